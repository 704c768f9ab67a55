//! Frames that a receive limit would deliver too late.
//!
//! A limit holds frames back in the network's own queue: a thousand of them on most taps, which a
//! limit of 50 a second would deliver 20 seconds late. Whatever waits behind them (a ping, an
//! answer) would be as late, and worth nothing. So a queue that has held frames for [`LATE`]
//! without a break is drained as if it passed [`DRAIN`] frames a second: what the limit does not
//! let pass of these is dropped. A frame then waits about a second at most, in a queue of up to
//! [`DRAIN`] frames.
//!
//! Nothing is dropped where the queue was empty within the last second, or where the limit lets
//! [`DRAIN`] frames a second pass. The first frame that a limit holds is never dropped, however
//! slow the limit. Nor is anything dropped where frames wait for the guest's receive buffers: that
//! is no limit's doing. The cost is bounded, too: [`DRAIN`] short reads a second.

use virtio::worker::Nanos;

const SECOND: Nanos = 1_000_000_000;
/// How long the queue may hold frames before they are late.
pub(super) const LATE: Nanos = SECOND;
/// Frames in a second that leave a queue which is late: as many as most taps hold (`txqueuelen`).
pub(super) const DRAIN: u64 = 1000;

/// How long the network's queue has held frames because of a limit.
#[derive(Debug, Default)]
pub(super) struct Lateness {
    /// Since when the queue has held frames; None if it was seen empty after the limit held
    /// something back last.
    since: Option<Nanos>,
    /// A frame has passed since then: the next ones are not the first that the limit holds.
    has_passed: bool,
    /// Until when frames that left were counted.
    counted: Nanos,
}

impl Lateness {
    /// The limit holds something back.
    pub(super) fn held(&mut self, now: Nanos) {
        if self.since.is_none() {
            (self.since, self.has_passed, self.counted) = (Some(now), false, now);
        }
    }

    /// The queue is empty, or nothing is held back by a limit.
    pub(super) fn clear(&mut self) {
        self.since = None;
    }

    /// A frame passed.
    pub(super) fn passed(&mut self) {
        self.has_passed = true;
        self.counted = self.counted.saturating_add(SECOND / DRAIN);
    }

    /// Number of frames that are to be dropped now, before the next one passes.
    pub(super) fn take_late(&mut self, now: Nanos) -> u64 {
        let is_late = |since: &Nanos| self.has_passed && now.saturating_sub(*since) > LATE;
        let Some(since) = self.since.filter(is_late) else { return 0 };
        // What left before it was late is not made up for by more than a queue's length.
        self.counted = self.counted.max(now.saturating_sub(SECOND)).max(since);
        let count = now.saturating_sub(self.counted) / (SECOND / DRAIN);
        self.counted = self.counted.saturating_add(count * (SECOND / DRAIN));
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_queue_that_was_empty_within_a_second_loses_nothing() {
        let mut lateness = Lateness::default();
        lateness.held(5);
        assert_eq!(lateness.take_late(5 + LATE), 0);
        lateness.clear();
        lateness.held(6 + LATE);
        lateness.passed();
        assert_eq!(lateness.take_late(5 + 2 * LATE), 0);
        assert!(lateness.take_late(7 + 2 * LATE) > 0);
    }

    #[test]
    fn the_first_frame_that_is_held_passes() {
        let mut lateness = Lateness::default();
        lateness.held(0);
        assert_eq!(lateness.take_late(10 * LATE), 0);
    }

    #[test]
    fn a_late_queue_is_drained_at_its_rate() {
        let mut lateness = Lateness::default();
        lateness.held(0);
        lateness.passed();
        let (mut left, mut passed) = (0, 0);
        // 50 frames pass in each of ten seconds after the first.
        for tick in 1..=500 {
            left += lateness.take_late(LATE + tick * SECOND / 50);
            lateness.passed();
            passed += 1;
        }
        assert!((left + passed).abs_diff(10 * DRAIN + DRAIN) <= 50, "{left} dropped, {passed} passed");
    }

    #[test]
    fn a_fast_limit_drops_nothing() {
        let mut lateness = Lateness::default();
        lateness.held(0);
        let mut dropped = 0;
        for tick in 1..=20_000 {
            lateness.passed();
            dropped += lateness.take_late(tick * SECOND / 2000);
        }
        assert_eq!(dropped, 0);
    }
}
