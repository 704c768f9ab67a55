//! The host for guests: this machine if its KVM runs ordinary guests, else an emulated machine.

pub(crate) mod emulated;
pub(crate) mod init;
mod job;
mod local_kvm;

use std::fmt;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail};
use lexopt::prelude::*;

use crate::process::{die_with_us, say};
use emulated::Emulated;
pub(crate) use job::{Job, Outcome};

/// The kind of host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// This machine.
    Native,
    /// A machine that QEMU emulates, with AMD-V.
    Emulated,
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Kind::Native => "this machine",
            Kind::Emulated => "an emulated host (QEMU's software CPU with AMD-V; Debian's 6.12 kernel; 10 to 20 times slower)",
        })
    }
}

/// Chooses the host. Returns also the reason, in one line.
pub(crate) fn choose() -> Result<(Kind, String)> {
    match std::env::var("VESTA_HOST").as_deref() {
        Ok("native") => return Ok((Kind::Native, "VESTA_HOST is native".to_owned())),
        Ok("emulated") => return Ok((Kind::Emulated, "VESTA_HOST is emulated".to_owned())),
        Ok(other) => bail!("VESTA_HOST is {other}; native or emulated"),
        Err(_) => {}
    }
    let local = local_kvm::local_kvm();
    let kind = if local.runs_guests { Kind::Native } else { Kind::Emulated };
    Ok((kind, local.in_words))
}

/// Runs a job on a host of that kind.
pub(crate) fn run(kind: Kind, job: &Job, emulated: &Emulated) -> Result<Outcome> {
    match kind {
        Kind::Native => run_native(job, emulated.timeout),
        Kind::Emulated => emulated.run(job),
    }
}

fn run_native(job: &Job, timeout: Duration) -> Result<Outcome> {
    let (program, args) = job.argv.split_first().context("no command is given")?;
    let mut command = Command::new(program);
    command.args(args).env_clear().envs(job.env.iter().cloned()).current_dir(&job.cwd);
    let mut child = die_with_us(&mut command)
        .spawn()
        .with_context(|| format!("cannot run {}", program.to_string_lossy()))?;
    let pid = rustix::process::Pid::from_child(&child);
    let (ended, end) = std::sync::mpsc::channel();
    std::thread::spawn(move || ended.send(child.wait()));
    let Ok(status) = end.recv_timeout(timeout) else {
        rustix::process::kill_process_group(pid, rustix::process::Signal::KILL)?;
        return Ok(Outcome::TimedOut);
    };
    let status = status?;
    Ok(match (status.code(), status.signal()) {
        (Some(code), _) => Outcome::Exited(u8::try_from(code).unwrap_or(u8::MAX)),
        (None, signal) => Outcome::Signaled(signal.unwrap_or_default()),
    })
}

/// `cargo xtask host`.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let mut emulated = Emulated { pin: default_pin()?, ..Emulated::default() };
    let mut argv = Vec::new();
    while let Some(arg) = parser.next()? {
        match arg {
            Long("cpus") => emulated.cpus = parser.value()?.parse()?,
            Long("mem") => emulated.mem_mib = parser.value()?.parse()?,
            Long("timeout") => emulated.timeout = Duration::from_secs(parser.value()?.parse()?),
            Long("pin") => emulated.pin = parse_pin(&parser.value()?.string()?)?,
            Long("modules") => {
                emulated.modules.extend(parser.value()?.string()?.split(',').map(str::to_owned));
            }
            Long("kernel-log") => emulated.kernel_log = Some(parser.value()?.into()),
            Value(program) => {
                argv.push(program);
                argv.extend(parser.raw_args()?);
            }
            _ => return Err(arg.unexpected().into()),
        }
    }
    if argv.is_empty() {
        bail!("no command is given: cargo xtask host -- CMD...");
    }
    let (kind, why) = choose()?;
    say!("running on {kind}: {why}");
    Ok(run(kind, &Job::here(argv)?, &emulated)?.report())
}

/// The emulated processor that jobs are pinned to by default.
pub(crate) fn default_pin() -> Result<Option<usize>> {
    match std::env::var("VESTA_HOST_PIN") {
        Ok(pin) => parse_pin(&pin),
        Err(_) => Ok(Emulated::default().pin),
    }
}

fn parse_pin(text: &str) -> Result<Option<usize>> {
    match text {
        "" | "none" => Ok(None),
        cpu => {
            Ok(Some(cpu.parse().with_context(|| format!("processor to pin to is {cpu}; a number or none"))?))
        }
    }
}
