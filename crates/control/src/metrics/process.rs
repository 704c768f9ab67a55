//! [`ProcessCounts`]: what the process around the controller counts.

use super::report::{Group, Value};

/// Counters of the process. Its signal handlers and its log count them.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ProcessCounts {
    /// Lines that the log's destination did not take.
    pub missed_log_lines: u64,
    /// Lines of the log that were suppressed because there were too many of them.
    pub suppressed_log_lines: u64,
    /// Panics, each of which ends the process.
    pub panics: u64,
    /// System calls that were forbidden (SIGSYS), the first of which ends the process.
    pub seccomp_faults: u64,
    /// Signals that arrived.
    pub signals: SignalCounts,
}

/// Signals that arrived. All but `sigpipe` end the process.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(missing_docs, reason = "the names of the signals")]
pub struct SignalCounts {
    pub sigbus: u64,
    pub sigsegv: u64,
    pub sigxfsz: u64,
    pub sigxcpu: u64,
    pub sigpipe: u64,
    pub sighup: u64,
    pub sigill: u64,
}

impl ProcessCounts {
    /// The groups `seccomp`, `vmm` and `signals`.
    pub(super) fn groups(&self) -> [Group; 3] {
        let SignalCounts { sigbus, sigsegv, sigxfsz, sigxcpu, sigpipe, sighup, sigill } = self.signals;
        [
            Group::new("seccomp", vec![("num_faults", Value::Store(self.seccomp_faults))]),
            Group::new("vmm", vec![("panic_count", Value::Store(self.panics))]),
            Group::new(
                "signals",
                vec![
                    ("sigbus", Value::Store(sigbus)),
                    ("sigsegv", Value::Store(sigsegv)),
                    ("sigxfsz", Value::Store(sigxfsz)),
                    ("sigxcpu", Value::Store(sigxcpu)),
                    ("sigpipe", Value::Count(sigpipe)),
                    ("sighup", Value::Store(sighup)),
                    ("sigill", Value::Store(sigill)),
                ],
            ),
        ]
    }
}
