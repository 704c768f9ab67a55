//! The exit codes of this process, and [`exit`]. The codes are Firecracker's, which its clients
//! read, and 128 plus a signal's number where a shell would report that.

use crate::personality::Personality;
use crate::{logger, terminal};

/// An exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ExitCode {
    /// The guest ended, or the command line only asked for information.
    Ok = 0,
    /// An error that has no code of its own.
    Generic = 1,
    /// SIGSYS that a process sent, under Firecracker's name. Its tools for snapshots and CPU
    /// templates end so if their command line is invalid.
    Unexpected = 2,
    /// SIGINT, where it cannot take its default action: in process 1 of a PID namespace.
    Interrupted = 128 + libc::SIGINT as isize,
    /// SIGQUIT, likewise.
    Quit = 128 + libc::SIGQUIT as isize,
    /// SIGABRT, likewise.
    Aborted = 128 + libc::SIGABRT as isize,
    /// SIGTERM, likewise.
    Terminated = 128 + libc::SIGTERM as isize,
    /// A system call that is not allowed (SIGSYS).
    BadSyscall = 148,
    /// SIGBUS.
    BusError = 149,
    /// SIGSEGV.
    SegmentationFault = 150,
    /// SIGXFSZ.
    FileSize = 151,
    /// The configuration file is invalid, or a microVM cannot be started from it.
    BadConfiguration = 152,
    /// The command line is invalid.
    ArgParsing = 153,
    /// SIGXCPU.
    CpuTime = 154,
    /// SIGHUP.
    HangUp = 156,
    /// SIGILL.
    IllegalInstruction = 157,
}

impl ExitCode {
    /// The code for a signal that asked this process to end.
    pub(crate) fn of_signal(signal: i32) -> ExitCode {
        match signal {
            libc::SIGHUP => ExitCode::HangUp,
            libc::SIGINT => ExitCode::Interrupted,
            libc::SIGQUIT => ExitCode::Quit,
            libc::SIGTERM => ExitCode::Terminated,
            _ => ExitCode::Generic,
        }
    }
}

/// Restores the terminal, logs the code, and ends the process.
pub(crate) fn exit(code: ExitCode) -> ! {
    terminal::restore();
    logger::finish();
    Personality::of_this_process().log_exit(code as i32);
    std::process::exit(code as i32)
}
