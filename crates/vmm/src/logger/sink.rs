//! [`Sink`]: the destination of the log, which never makes a writer wait.

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};

use machine::legacy::Output;

/// The destination.
#[derive(Debug)]
pub(super) struct Sink {
    /// `None` if standard output is closed.
    output: Option<Output>,
    /// Whether it is standard output.
    is_standard: bool,
    /// Whether the last line was cut off, as on a full disk.
    torn: bool,
    /// Lines that were lost since the last line that says how many.
    unreported: u64,
}

impl Sink {
    pub(super) fn standard() -> Self {
        Sink { output: Output::stdout().ok(), is_standard: true, torn: false, unreported: 0 }
    }

    /// Continues at another destination.
    pub(super) fn redirect(&mut self, output: Output) {
        self.output = Some(output);
        self.is_standard = false;
        self.torn = false;
    }

    pub(super) fn is_standard(&self) -> bool {
        self.is_standard
    }

    pub(super) fn descriptor(&self) -> Option<RawFd> {
        self.output.as_ref().map(|output| output.as_fd().as_raw_fd())
    }

    /// Writes a whole line, or loses it. Returns whether it is written.
    pub(super) fn write(&mut self, line: &[u8]) -> bool {
        let Some(output) = &self.output else { return true };
        if self.torn {
            // The rest of the torn line is lost, and this one starts on a line of its own.
            match put(output, b"\n") {
                Ok(1..) => self.torn = false,
                _ => return self.lose(),
            }
        }
        match put(output, line) {
            Ok(written) if written == line.len() => true,
            Ok(written) => {
                self.torn = written > 0;
                self.lose()
            }
            Err(_) => self.lose(),
        }
    }

    fn lose(&mut self) -> bool {
        self.unreported += 1;
        false
    }

    /// Writes bytes unchanged. Returns whether they are written. A signal handler may call it.
    pub(super) fn write_now(&self, bytes: &[u8]) -> bool {
        self.output
            .as_ref()
            .is_none_or(|output| put(output, bytes).is_ok_and(|written| written == bytes.len()))
    }

    /// How many lines were lost and not reported.
    pub(super) fn unreported(&self) -> u64 {
        self.unreported
    }

    /// Says that the lost lines are reported.
    pub(super) fn reported(&mut self) {
        self.unreported = 0;
    }
}

/// Writes what fits now.
fn put(output: &Output, bytes: &[u8]) -> io::Result<usize> {
    loop {
        match output.write(bytes) {
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            done => return done,
        }
    }
}
