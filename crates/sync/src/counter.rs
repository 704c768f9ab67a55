//! Counters for statistics.

use std::sync::atomic::{AtomicU64, Ordering};

/// A counter that only grows. Threads add to it without ordering against other memory.
#[derive(Debug, Default)]
pub struct Counter(AtomicU64);

impl Counter {
    /// A counter at zero.
    pub const fn new() -> Self {
        Counter(AtomicU64::new(0))
    }

    /// The value.
    pub fn get(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Adds `count`.
    pub fn add(&self, count: u64) {
        self.0.fetch_add(count, Ordering::Relaxed);
    }

    /// Adds one. Returns the new value.
    pub fn increment(&self) -> u64 {
        self.0.fetch_add(1, Ordering::Relaxed) + 1
    }

    /// Adds one. Returns the new value if it is a power of two, else `None`.
    ///
    /// For log lines about events that a guest can cause at will: line `n` follows after `2^n`
    /// events.
    pub fn rarely(&self) -> Option<u64> {
        Some(self.increment()).filter(|times| times.is_power_of_two())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn counts_at_powers_of_two_are_reported() {
        let counter = Counter::default();
        let said: Vec<_> = (0..1000).filter_map(|_| counter.rarely()).collect();
        assert_eq!(said, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512]);
        assert_eq!(counter.get(), 1000);
    }
}
