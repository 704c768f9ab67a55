//! A command for a host, and how it ended.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};

use crate::process::say;

/// The status of `host` where CMD took longer than its time limit.
const STATUS_TIMED_OUT: u8 = 124;
/// The status of `host` where the emulated host died before CMD ended.
const STATUS_HOST_DIED: u8 = 125;

/// A command to run on a host.
#[derive(Debug, Clone)]
pub(crate) struct Job {
    /// The program and its arguments.
    pub(crate) argv: Vec<OsString>,
    /// Its complete environment.
    pub(crate) env: Vec<(OsString, OsString)>,
    /// Its working directory.
    pub(crate) cwd: PathBuf,
}

impl Job {
    /// A job with this process's environment and directory.
    pub(crate) fn here(argv: Vec<OsString>) -> Result<Job> {
        let cwd = std::env::current_dir().context("the current directory")?;
        Ok(Job { argv, env: std::env::vars_os().collect(), cwd })
    }
}

/// How a job ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Outcome {
    /// It exited with this status.
    Exited(u8),
    /// A signal ended it.
    Signaled(i32),
    /// It took longer than its time limit and was killed.
    TimedOut,
    /// The emulated host died. `log` is a file with the logs, `tail` their relevant lines.
    HostDied { log: PathBuf, tail: String },
}

impl Outcome {
    /// The status that a shell would return. Prints what a status cannot express.
    pub(crate) fn report(&self) -> ExitCode {
        match self {
            Outcome::Exited(status) => ExitCode::from(*status),
            Outcome::Signaled(signal) => ExitCode::from(u8::try_from(128 + signal).unwrap_or(u8::MAX)),
            Outcome::TimedOut => {
                say!("the command took longer than its time limit and was ended");
                ExitCode::from(STATUS_TIMED_OUT)
            }
            Outcome::HostDied { log, tail } => {
                say!(
                    "the emulated host died before the command ended; its kernel log is {}; its end:",
                    log.display()
                );
                eprintln!("{tail}");
                ExitCode::from(STATUS_HOST_DIED)
            }
        }
    }
}
