//! [`Host`]: what the process around a controller does for it.

use std::os::fd::{BorrowedFd, RawFd};

use config::Logger;
use machine::legacy::SerialSetup;

use crate::child::ForkPlan;
use crate::metrics::{LastLine, ProcessCounts};

/// The process around a controller.
pub trait Host {
    /// Configures the log as `logger` says. On an error the log is as it was.
    fn set_up_logger(&mut self, logger: &Logger) -> std::io::Result<()>;

    /// Keeps what writes the last line of metrics, for an end by a panic or a fatal signal.
    fn keep_last_line(&mut self, _last: LastLine) {}

    /// What reads the counters of this process.
    fn process_counts(&self) -> fn() -> ProcessCounts {
        ProcessCounts::default
    }

    /// Opens this process's standard input and output as the host end of a serial port.
    fn standard_io(&mut self) -> std::io::Result<SerialSetup>;

    /// Forks this process once for each child of `plan`.
    ///
    /// Returns in the parent only. Each child calls
    /// [`Controller::start_child`](crate::Controller::start_child) and ends with its guest.
    fn fork(&mut self, plan: ForkPlan) -> std::io::Result<()>
    where
        Self: Sized;

    /// Forks a process that does `work` and ends.
    ///
    /// Returns in the parent only. The child has the descriptors in `kept`, the log and no others.
    /// Its exit status says whether `work` returned true.
    fn fork_writer(&mut self, kept: Vec<RawFd>, work: Box<dyn FnOnce() -> bool>) -> std::io::Result<()>;

    /// A descriptor that is readable once a signal has asked this process to end.
    fn asked_to_end(&self) -> Option<BorrowedFd<'_>> {
        None
    }

    /// Called when a guest starts. It has standard input and output if `with_standard_io`.
    fn guest_starts(&mut self, with_standard_io: bool);
}
