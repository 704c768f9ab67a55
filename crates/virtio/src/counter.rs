//! Numbers that threads add to and others read: what devices count.

use std::sync::atomic::{AtomicU64, Ordering};

/// A number that threads add to.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// Its value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds; the value before.
    pub(crate) fn add(&self, count: u64) -> u64 {
        self.0.fetch_add(count, Ordering::Relaxed)
    }

    /// Counts one more of what a guest can bring about at will. The value where it is worth a line in the log: ever more rarely.
    pub fn rarely(&self) -> Option<u64> {
        Some(self.add(1) + 1).filter(|times| times.is_power_of_two())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happens_over_and_over_is_said_ever_more_rarely() {
        let counter = Counter::default();
        let said: Vec<_> = (0..1000).filter_map(|_| counter.rarely()).collect();
        assert_eq!(said, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
        assert_eq!(counter.get(), 1000);
    }
}
