//! How long a worker spins before it sleeps.
//!
//! Spinning pays when the next event comes soon: the driver then needs no kick and the worker no wake-up. So the time is
//! adapted: a sleep that was shorter than the longest spin allowed would have been worth spinning, and doubles it; a
//! longer one was not, and halves it down to nothing. Off unless asked for.

use super::Nanos;

/// Where spinning begins when it pays.
const FIRST: Nanos = 4_000;

/// The adapted time.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Spin {
    max: Nanos,
    budget: Nanos,
}

impl Spin {
    /// At most `max` nanoseconds; 0 is off.
    pub(super) fn up_to(max: Nanos) -> Self {
        Spin { max, budget: 0 }
    }

    /// Whether it may spin at all.
    pub(super) fn adapts(&self) -> bool {
        self.max > 0
    }

    /// Whether it spins now.
    pub(super) fn is_on(&self) -> bool {
        self.budget > 0
    }

    /// How long to spin without anything happening.
    pub(super) fn budget(&self) -> Nanos {
        self.budget
    }

    /// The worker slept for `time`.
    pub(super) fn slept(&mut self, time: Nanos) {
        if time <= self.max {
            self.budget = (self.budget * 2).clamp(FIRST.min(self.max), self.max);
        } else {
            self.budget = if self.budget <= FIRST { 0 } else { self.budget / 2 };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_grows_while_sleeps_are_short_and_goes_off_when_they_are_long() {
        let mut spin = Spin::up_to(50_000);
        assert!(!spin.is_on());
        for _ in 0..10 {
            spin.slept(10_000);
        }
        assert_eq!(spin.budget(), 50_000);
        for _ in 0..10 {
            spin.slept(1_000_000);
        }
        assert!(!spin.is_on());
    }

    #[test]
    fn it_stays_off_when_not_asked_for() {
        let mut spin = Spin::up_to(0);
        spin.slept(0);
        assert!(!spin.is_on() && !spin.adapts());
    }
}
