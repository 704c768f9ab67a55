//! Crash reports: what is written when the process ends by a panic or a fatal signal.
//!
//! Nothing here waits for long: neither for the log, which the crashing thread may have locked
//! itself, nor for a reader of standard error. So a process that crashes always ends.

use std::backtrace::{Backtrace, BacktraceStatus};
use std::panic::PanicHookInfo;

use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::{counts, last_line, logger, terminal};

/// A writable pipe or terminal takes this many bytes at once.
const CHUNK: usize = 4096;

/// How long a reader of standard error may take until more can be written.
const READER_TIMEOUT: Timespec = Timespec { tv_sec: 0, tv_nsec: 200_000_000 };

/// Writes a line to the log, if it is not locked, and to standard error. A signal handler may call
/// it.
pub(crate) fn write(line: &[u8]) {
    logger::write_if_free(line);
    to_stderr(line);
}

/// Writes to standard error. Bytes that the reader does not take in time are lost.
pub(crate) fn to_stderr(text: &[u8]) {
    let stderr = rustix::stdio::stderr();
    let mut rest = text;
    while !rest.is_empty() {
        let mut fds = [PollFd::new(&stderr, PollFlags::OUT)];
        if !poll(&mut fds, Some(&READER_TIMEOUT)).is_ok_and(|ready| ready > 0) {
            return;
        }
        match rustix::io::write(stderr, &rest[..rest.len().min(CHUNK)]) {
            Ok(written) if written > 0 => rest = &rest[written..],
            _ => return,
        }
    }
}

/// Installs the panic hook, which restores the terminal, writes the reason to the log and to
/// standard error, and writes the last line of metrics.
pub(crate) fn install_panic_hook() {
    std::panic::set_hook(Box::new(hook));
}

fn hook(info: &PanicHookInfo<'_>) {
    terminal::restore();
    counts::panicked();
    logger::error_without_waiting(&format!("bug in this monitor: {info}"));
    let thread = std::thread::current();
    let name = thread.name().unwrap_or("main");
    let backtrace = Backtrace::capture();
    let text = match backtrace.status() {
        BacktraceStatus::Captured => format!("thread '{name}' {info}\n{backtrace}\n"),
        _ => format!("thread '{name}' {info}\n"),
    };
    to_stderr(text.as_bytes());
    last_line::write();
}

#[cfg(test)]
mod tests {
    use std::fmt;

    use super::*;
    use crate::subprocess;

    #[test]
    fn panic_while_the_log_is_locked_is_reported() {
        if subprocess::is_one() {
            logger::install("a");
            install_panic_hook();
            let _held = logger::hold();
            panic!("with the log locked");
        }
        let ended = subprocess::again("crash_report::tests::panic_while_the_log_is_locked_is_reported");
        assert_eq!(ended.status.code(), Some(101), "{ended:?}");
        assert!(ended.stderr.contains("with the log locked"), "{ended:?}");
    }

    #[test]
    fn panic_in_an_argument_of_a_log_line_is_reported() {
        struct Bomb;
        impl fmt::Display for Bomb {
            fn fmt(&self, _: &mut fmt::Formatter<'_>) -> fmt::Result {
                panic!("in a line of the log")
            }
        }
        if subprocess::is_one() {
            logger::install("a");
            install_panic_hook();
            log::error!("{Bomb}");
            return;
        }
        let ended = subprocess::again("crash_report::tests::panic_in_an_argument_of_a_log_line_is_reported");
        assert_eq!(ended.status.code(), Some(101), "{ended:?}");
        assert!(ended.stdout.contains("bug in this monitor: panicked at"), "{ended:?}");
        assert!(ended.stderr.contains("in a line of the log"), "{ended:?}");
    }

    #[test]
    fn panic_does_not_wait_for_a_reader_of_standard_error() {
        if subprocess::is_one() {
            let (_reader, writer) = std::io::pipe().unwrap();
            rustix::io::ioctl_fionbio(&writer, true).unwrap();
            while rustix::io::write(&writer, &[0; CHUNK]).is_ok() {}
            rustix::io::ioctl_fionbio(&writer, false).unwrap();
            rustix::stdio::dup2_stderr(&writer).unwrap();
            install_panic_hook();
            let panicked = std::thread::spawn(|| panic!("unheard")).join();
            std::process::exit(if panicked.is_err() { 7 } else { 8 });
        }
        let ended =
            subprocess::again("crash_report::tests::panic_does_not_wait_for_a_reader_of_standard_error");
        assert_eq!(ended.status.code(), Some(7), "{ended:?}");
    }
}
