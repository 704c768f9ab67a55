//! How long a receive limit has kept frames in the network's queue, and which of them are too late.
//!
//! Frames that a rate limit delays wait in the network's own queue. That of most taps holds a
//! thousand frames, which a limit of 50 a second would deliver 20 seconds late. Every frame behind
//! them, such as a ping or a reply, would be as late and useless. So a queue that has held frames
//! for [`MAX_AGE`] without a break is drained at [`DRAIN_RATE`] frames a second: those of them that
//! the limit does not let pass are dropped. A frame then waits about a second at most, in a queue
//! of up to [`DRAIN_RATE`] frames.
//!
//! Nothing is dropped if the queue was empty within the last second, or if the limit lets
//! [`DRAIN_RATE`] frames a second pass. The first frame that a limit delays is never dropped,
//! however low the limit. No frame is dropped here because the guest lacks receive buffers, which
//! no limit has caused. The cost is bounded: [`DRAIN_RATE`] short reads a second.

use virtio::worker::Nanos;

const SECOND: Nanos = 1_000_000_000;
/// How long the queue may hold frames before they are too late.
const MAX_AGE: Nanos = SECOND;
/// Frames a second that leave a queue whose frames are too late: the length of most taps' queues
/// (`txqueuelen`).
const DRAIN_RATE: u64 = 1000;

/// How long a rate limit has kept frames in the network's queue.
#[derive(Debug, Default)]
pub(super) struct QueueAge {
    /// The time since which the queue has held frames. None: it was empty after the limit last
    /// delayed a frame.
    since: Option<Nanos>,
    /// A frame has passed since then, so the next one is not the first that the limit delays.
    has_passed: bool,
    /// Up to this time the frames are counted that must leave at [`DRAIN_RATE`].
    counted: Nanos,
}

impl QueueAge {
    /// The limit delays a frame.
    pub(super) fn held(&mut self, now: Nanos) {
        if self.since.is_none() {
            (self.since, self.has_passed, self.counted) = (Some(now), false, now);
        }
    }

    /// The queue is empty, or the limit does not delay its frames.
    pub(super) fn clear(&mut self) {
        self.since = None;
    }

    /// The limit let a frame pass.
    pub(super) fn passed(&mut self) {
        self.has_passed = true;
        self.counted = self.counted.saturating_add(SECOND / DRAIN_RATE);
    }

    /// Number of frames to drop now, before the next one passes.
    pub(super) fn take_late(&mut self, now: Nanos) -> u64 {
        let is_late = |since: &Nanos| self.has_passed && now.saturating_sub(*since) > MAX_AGE;
        let Some(since) = self.since.filter(is_late) else { return 0 };
        // Time before the frames were late makes up for one queue's length at most.
        self.counted = self.counted.max(now.saturating_sub(SECOND)).max(since);
        let count = now.saturating_sub(self.counted) / (SECOND / DRAIN_RATE);
        self.counted = self.counted.saturating_add(count * (SECOND / DRAIN_RATE));
        count
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn queue_that_was_empty_within_a_second_loses_nothing() {
        let mut age = QueueAge::default();
        age.held(5);
        assert_eq!(age.take_late(5 + MAX_AGE), 0);
        age.clear();
        age.held(6 + MAX_AGE);
        age.passed();
        assert_eq!(age.take_late(5 + 2 * MAX_AGE), 0);
        assert!(age.take_late(7 + 2 * MAX_AGE) > 0);
    }

    #[test]
    fn first_delayed_frame_passes() {
        let mut age = QueueAge::default();
        age.held(0);
        assert_eq!(age.take_late(10 * MAX_AGE), 0);
    }

    #[test]
    fn late_queue_is_drained_at_the_drain_rate() {
        let mut age = QueueAge::default();
        age.held(0);
        age.passed();
        let (mut dropped, mut passed) = (0, 0);
        // 50 frames pass in each of ten seconds after the first.
        for tick in 1..=500 {
            dropped += age.take_late(MAX_AGE + tick * SECOND / 50);
            age.passed();
            passed += 1;
        }
        assert!(
            (dropped + passed).abs_diff(10 * DRAIN_RATE + DRAIN_RATE) <= 50,
            "{dropped} dropped, {passed} passed"
        );
    }

    #[test]
    fn fast_limit_drops_nothing() {
        let mut age = QueueAge::default();
        age.held(0);
        let mut dropped = 0;
        for tick in 1..=20_000 {
            age.passed();
            dropped += age.take_late(tick * SECOND / 2000);
        }
        assert_eq!(dropped, 0);
    }
}
