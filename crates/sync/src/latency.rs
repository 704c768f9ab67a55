//! Aggregated durations for statistics.

use std::sync::atomic::{AtomicU64, Ordering};

/// The shortest, the longest and the sum of durations. Threads add to it without ordering against
/// other memory.
#[derive(Debug)]
pub struct Latency {
    /// `u64::MAX` before the first duration.
    min_ns: AtomicU64,
    max_ns: AtomicU64,
    sum_ns: AtomicU64,
}

/// The values of a [`Latency`], in nanoseconds. All are 0 before the first duration.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct LatencyTotals {
    /// The shortest duration.
    pub min_ns: u64,
    /// The longest duration.
    pub max_ns: u64,
    /// The sum of all durations.
    pub sum_ns: u64,
}

impl Default for Latency {
    fn default() -> Self {
        Latency { min_ns: AtomicU64::new(u64::MAX), max_ns: AtomicU64::new(0), sum_ns: AtomicU64::new(0) }
    }
}

impl Latency {
    /// Adds a duration in nanoseconds.
    pub fn record(&self, ns: u64) {
        self.record_many(ns, 1);
    }

    /// Adds `count` durations that took `total_ns` together. Their average counts as the shortest
    /// and the longest one.
    pub fn record_many(&self, total_ns: u64, count: u64) {
        let Some(average) = total_ns.checked_div(count) else { return };
        self.sum_ns.fetch_add(total_ns, Ordering::Relaxed);
        // A plain load first: a new extreme is rare.
        if average < self.min_ns.load(Ordering::Relaxed) {
            self.min_ns.fetch_min(average, Ordering::Relaxed);
        }
        if average > self.max_ns.load(Ordering::Relaxed) {
            self.max_ns.fetch_max(average, Ordering::Relaxed);
        }
    }

    /// The values.
    pub fn get(&self) -> LatencyTotals {
        let min = self.min_ns.load(Ordering::Relaxed);
        LatencyTotals {
            min_ns: if min == u64::MAX { 0 } else { min },
            max_ns: self.max_ns.load(Ordering::Relaxed),
            sum_ns: self.sum_ns.load(Ordering::Relaxed),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn latency_keeps_its_extremes_and_its_sum() {
        let latency = Latency::default();
        assert_eq!(latency.get(), LatencyTotals::default());
        for ns in [700, 300, 500] {
            latency.record(ns);
        }
        assert_eq!(latency.get(), LatencyTotals { min_ns: 300, max_ns: 700, sum_ns: 1500 });
    }

    #[test]
    fn a_batch_counts_by_its_average() {
        let latency = Latency::default();
        latency.record_many(0, 0);
        assert_eq!(latency.get(), LatencyTotals::default());
        latency.record_many(1000, 4);
        assert_eq!(latency.get(), LatencyTotals { min_ns: 250, max_ns: 250, sum_ns: 1000 });
    }
}
