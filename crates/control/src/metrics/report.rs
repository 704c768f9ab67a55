//! [`Report`]: the counters of a microVM at one moment, by group and name.
//!
//! The names are Firecracker's where a group is in the lines of metrics. A report is the same for
//! both outputs: a [line](super::line) has what changed since the line before, and
//! [Prometheus](super::prometheus) gets the totals.

use sync::LatencyTotals;

/// The counters of a microVM, in the order of a line.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Report {
    pub(crate) groups: Vec<Group>,
}

/// Counters that belong together.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Group {
    pub(crate) name: &'static str,
    pub(crate) of: Of,
    pub(crate) fields: Vec<(&'static str, Value)>,
}

/// What a group is about.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Of {
    /// The process, or the only device of a kind.
    Process,
    /// One of several devices of a kind. The label is what its id is called.
    Device { label: &'static str, id: String },
    /// All devices of a kind: the sum of the groups of that name before it, whose fields it has.
    AllDevices,
}

/// A counter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Value {
    /// A number that only grows. A line has the growth since the line before.
    Count(u64),
    /// A number that a line has as it is.
    Store(u64),
    /// A duration in microseconds that a line has as it is.
    Micros(u64),
    /// Durations. A line has the shortest and the longest of all, and the growth of the sum.
    Latency(LatencyTotals),
}

impl Group {
    /// A group of the process.
    pub(crate) fn new(name: &'static str, fields: Vec<(&'static str, Value)>) -> Self {
        Group { name, of: Of::Process, fields }
    }

    /// A group of counters of the process that only grow.
    pub(crate) fn counts(name: &'static str, fields: &[(&'static str, u64)]) -> Self {
        Group::new(name, fields.iter().map(|(field, count)| (*field, Value::Count(*count))).collect())
    }
}
