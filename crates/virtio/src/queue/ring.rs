//! The protocol of the two rings: indices, memory order and notifications (2.7.6 to 2.7.14).
//!
//! This module knows neither descriptors nor guest memory ([`RingMemory`] is the access to it), so
//! that a model checker can run this code against a driver in every order of their accesses.
//!
//! # Why no kick and no interrupt is lost
//!
//! Both sides do the same: *store, full fence, load*. Before it sleeps, the device stores the index
//! at which it wants a kick and then loads the available index again. The driver stores that index
//! and then loads the index at which the device wants a kick. With a full fence between the two
//! steps on each side, at least one of them sees the other's store: either the driver kicks or the
//! device continues. For interrupts the sides are exchanged.

use super::error::QueueError;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver wants no interrupts (2.7.7).
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`: the device wants no kicks (2.7.10).
const NO_NOTIFY: u16 = 1;

/// The memory order of the accesses that need one. All others are relaxed.
pub(super) mod order {
    use std::sync::atomic::Ordering;

    /// Pairs with the driver's store: the entries before the index are visible.
    pub(in crate::queue) const LOAD_AVAIL_IDX: Ordering = Ordering::Acquire;
    /// Pairs with the driver's load: the entries before the index are visible.
    pub(in crate::queue) const STORE_USED_IDX: Ordering = Ordering::Release;
}

/// Access to the two rings in memory that the driver shares. `slot` is less than the queue size.
pub(crate) trait RingMemory {
    fn avail_flags(&self) -> Result<u16, QueueError>;
    /// With order [`order::LOAD_AVAIL_IDX`].
    fn avail_idx(&self) -> Result<u16, QueueError>;
    fn avail_entry(&self, slot: u16) -> Result<u16, QueueError>;
    fn used_event(&self) -> Result<u16, QueueError>;
    fn set_used_flags(&self, flags: u16) -> Result<(), QueueError>;
    /// With order [`order::STORE_USED_IDX`].
    fn set_used_idx(&self, idx: u16) -> Result<(), QueueError>;
    fn set_used_entry(&self, slot: u16, head: u16, written: u32) -> Result<(), QueueError>;
    fn set_avail_event(&self, idx: u16) -> Result<(), QueueError>;
    /// A sequentially consistent fence.
    fn full_fence(&self);
}

/// The device's side of the two rings.
#[derive(Debug)]
// A model checker compares its states.
#[cfg_attr(test, derive(Clone, PartialEq, Eq, Hash))]
pub(crate) struct Ring {
    /// A power of two.
    size: u16,
    event_idx: bool,
    /// The next entry of the available ring to take.
    next_avail: u16,
    /// The available index when it was last read.
    seen_avail: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// The used index in the ring.
    published: u16,
    /// Without `event_idx`: `VIRTQ_USED_F_NO_NOTIFY` is set.
    quiet: bool,
}

impl Ring {
    pub(crate) fn new(size: u16, event_idx: bool, next_avail: u16, next_used: u16) -> Self {
        Ring {
            size,
            event_idx,
            next_avail,
            seen_avail: next_avail,
            next_used,
            published: next_used,
            quiet: false,
        }
    }

    pub(crate) fn size(&self) -> u16 {
        self.size
    }

    pub(super) fn event_idx(&self) -> bool {
        self.event_idx
    }

    /// `(next_avail, next_used)`.
    pub(crate) fn progress(&self) -> (u16, u16) {
        (self.next_avail, self.next_used)
    }

    fn slot(&self, idx: u16) -> u16 {
        idx & (self.size - 1)
    }

    /// Reads the available index. With `in_flight` chains popped, the driver can have added at most
    /// the rest of the queue.
    #[inline]
    fn read_avail_idx(&mut self, memory: &impl RingMemory, in_flight: u16) -> Result<(), QueueError> {
        let idx = memory.avail_idx()?;
        let new = idx.wrapping_sub(self.next_avail);
        if new > self.size.saturating_sub(in_flight) {
            return Err(QueueError::AvailableIndex { from: self.next_avail, to: idx, size: self.size });
        }
        self.seen_avail = idx;
        Ok(())
    }

    /// Whether there is an entry to take.
    #[inline]
    pub(crate) fn has_available(
        &mut self,
        memory: &impl RingMemory,
        in_flight: u16,
    ) -> Result<bool, QueueError> {
        if self.seen_avail == self.next_avail {
            self.read_avail_idx(memory, in_flight)?;
        }
        Ok(self.seen_avail != self.next_avail)
    }

    /// The number of entries to take.
    pub(super) fn available(&mut self, memory: &impl RingMemory, in_flight: u16) -> Result<u16, QueueError> {
        self.read_avail_idx(memory, in_flight)?;
        Ok(self.seen_avail.wrapping_sub(self.next_avail))
    }

    /// Takes the next entry of the available ring.
    #[inline]
    pub(crate) fn pop(
        &mut self,
        memory: &impl RingMemory,
        in_flight: u16,
    ) -> Result<Option<u16>, QueueError> {
        if !self.has_available(memory, in_flight)? {
            return Ok(None);
        }
        let head = memory.avail_entry(self.slot(self.next_avail))?;
        self.next_avail = self.next_avail.wrapping_add(1);
        Ok(Some(head))
    }

    /// Undoes the last `pop`.
    pub(crate) fn rewind(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Writes the next entry of the used ring. The driver sees it after [`Ring::publish`].
    #[inline]
    pub(crate) fn add_used(
        &mut self,
        memory: &impl RingMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        memory.set_used_entry(self.slot(self.next_used), head, written)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Stores the used index after the added entries. Returns whether the driver wants an
    /// interrupt.
    #[inline]
    pub(crate) fn publish(&mut self, memory: &impl RingMemory) -> Result<bool, QueueError> {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return Ok(false);
        }
        memory.set_used_idx(new)?;
        self.published = new;
        memory.full_fence();
        if self.event_idx {
            // Is the entry at which the driver wants an interrupt among those from `old` to `new`?
            let event = memory.used_event()?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            Ok(memory.avail_flags()? & NO_INTERRUPT == 0)
        }
    }

    /// Asks for no kicks. With `event_idx` there is nothing to do: the last index that was asked
    /// for has passed.
    #[inline]
    pub(crate) fn disable_notifications(&mut self, memory: &impl RingMemory) -> Result<(), QueueError> {
        if !self.event_idx && !self.quiet {
            memory.set_used_flags(NO_NOTIFY)?;
            self.quiet = true;
        }
        Ok(())
    }

    /// Asks for a kick at the next entry. Returns whether the entry is there already.
    #[inline]
    pub(crate) fn enable_notifications(
        &mut self,
        memory: &impl RingMemory,
        in_flight: u16,
    ) -> Result<bool, QueueError> {
        if self.event_idx {
            memory.set_avail_event(self.next_avail)?;
        } else {
            memory.set_used_flags(0)?;
            self.quiet = false;
        }
        memory.full_fence();
        self.read_avail_idx(memory, in_flight)?;
        Ok(self.seen_avail != self.next_avail)
    }

    /// As [`Ring::enable_notifications`], for the entry after those that are there and not taken
    /// yet.
    pub(super) fn enable_notifications_of_more(
        &mut self,
        memory: &impl RingMemory,
        in_flight: u16,
    ) -> Result<bool, QueueError> {
        self.read_avail_idx(memory, in_flight)?;
        let seen = self.seen_avail;
        if self.event_idx {
            memory.set_avail_event(seen)?;
        } else {
            memory.set_used_flags(0)?;
            self.quiet = false;
        }
        memory.full_fence();
        self.read_avail_idx(memory, in_flight)?;
        Ok(self.seen_avail != seen)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::sync::atomic::Ordering;

    use loom::sync::atomic::{AtomicU16, fence};

    use super::*;

    const SIZE: u16 = 2;

    /// The rings in the model checker's memory.
    #[derive(Default)]
    struct Modelled {
        avail_flags: AtomicU16,
        avail_idx: AtomicU16,
        avail: [AtomicU16; SIZE as usize],
        used_event: AtomicU16,
        used_flags: AtomicU16,
        used_idx: AtomicU16,
        used: [AtomicU16; SIZE as usize],
        avail_event: AtomicU16,
    }

    impl RingMemory for Arc<Modelled> {
        fn avail_flags(&self) -> Result<u16, QueueError> {
            Ok(self.avail_flags.load(Ordering::Relaxed))
        }

        fn avail_idx(&self) -> Result<u16, QueueError> {
            Ok(self.avail_idx.load(order::LOAD_AVAIL_IDX))
        }

        fn avail_entry(&self, slot: u16) -> Result<u16, QueueError> {
            Ok(self.avail[usize::from(slot)].load(Ordering::Relaxed))
        }

        fn used_event(&self) -> Result<u16, QueueError> {
            Ok(self.used_event.load(Ordering::Relaxed))
        }

        fn set_used_flags(&self, flags: u16) -> Result<(), QueueError> {
            self.used_flags.store(flags, Ordering::Relaxed);
            Ok(())
        }

        fn set_used_idx(&self, idx: u16) -> Result<(), QueueError> {
            self.used_idx.store(idx, order::STORE_USED_IDX);
            Ok(())
        }

        fn set_used_entry(&self, slot: u16, head: u16, _written: u32) -> Result<(), QueueError> {
            self.used[usize::from(slot)].store(head, Ordering::Relaxed);
            Ok(())
        }

        fn set_avail_event(&self, idx: u16) -> Result<(), QueueError> {
            self.avail_event.store(idx, Ordering::Relaxed);
            Ok(())
        }

        fn full_fence(&self) {
            fence(Ordering::SeqCst);
        }
    }

    impl Modelled {
        /// The driver makes `head` available as entry `idx`. Returns whether the device wants a
        /// kick.
        fn add(&self, event_idx: bool, idx: u16, head: u16) -> bool {
            self.avail[usize::from(idx % SIZE)].store(head, Ordering::Relaxed);
            self.avail_idx.store(idx + 1, Ordering::Release);
            fence(Ordering::SeqCst);
            if event_idx {
                self.avail_event.load(Ordering::Relaxed) == idx
            } else {
                self.used_flags.load(Ordering::Relaxed) & NO_NOTIFY == 0
            }
        }

        /// The driver asks for an interrupt at used entry `idx`. Returns whether it is there
        /// already.
        fn wants_interrupt(&self, event_idx: bool, idx: u16) -> bool {
            if event_idx {
                self.used_event.store(idx, Ordering::Relaxed);
            } else {
                self.avail_flags.store(0, Ordering::Relaxed);
            }
            fence(Ordering::SeqCst);
            self.used_idx.load(Ordering::Acquire) == idx + 1
        }
    }

    /// The device takes all entries until it would sleep. Returns the heads.
    fn work(ring: &mut Ring, memory: &Arc<Modelled>) -> Vec<u16> {
        let mut heads = Vec::new();
        loop {
            ring.disable_notifications(memory).unwrap();
            while let Some(head) = ring.pop(memory, 0).unwrap() {
                heads.push(head);
            }
            if !ring.enable_notifications(memory, 0).unwrap() {
                return heads;
            }
        }
    }

    fn no_kick_is_lost(event_idx: bool) {
        loom::model(move || {
            let memory = Arc::new(Modelled::default());
            // The first entry is there and its kick has come.
            memory.add(event_idx, 0, 7);
            let driver = {
                let memory = Arc::clone(&memory);
                loom::thread::spawn(move || memory.add(event_idx, 1, 8))
            };
            let heads = work(&mut Ring::new(SIZE, event_idx, 0, 0), &memory);
            let kicked = driver.join().unwrap();
            match heads.as_slice() {
                [7, 8] => {}
                [7] => assert!(kicked, "the device sleeps and gets no kick"),
                heads => panic!("the device took {heads:?}"),
            }
        });
    }

    #[test]
    fn in_every_order_a_device_that_sleeps_is_kicked_with_event_idx() {
        no_kick_is_lost(true);
    }

    #[test]
    fn in_every_order_a_device_that_sleeps_is_kicked_with_flags() {
        no_kick_is_lost(false);
    }

    /// The use of vsock's event queue: an entry stays in the ring, and the device waits for
    /// another.
    fn no_kick_for_more_is_lost(event_idx: bool) {
        loom::model(move || {
            let memory = Arc::new(Modelled::default());
            memory.add(event_idx, 0, 7);
            let driver = {
                let memory = Arc::clone(&memory);
                loom::thread::spawn(move || memory.add(event_idx, 1, 8))
            };
            let mut ring = Ring::new(SIZE, event_idx, 0, 0);
            ring.disable_notifications(&memory).unwrap();
            let before = ring.available(&memory, 0).unwrap();
            let more = ring.enable_notifications_of_more(&memory, 0).unwrap();
            let noticed = ring.available(&memory, 0).unwrap() != before;
            let kicked = driver.join().unwrap();
            assert!(noticed || kicked || before == 2, "the device sleeps and gets no kick");
            assert!(noticed || !more, "more than there is");
        });
    }

    #[test]
    fn device_that_waits_for_another_entry_is_kicked_event_idx() {
        no_kick_for_more_is_lost(true);
    }

    #[test]
    fn device_that_waits_for_another_entry_is_kicked_flags() {
        no_kick_for_more_is_lost(false);
    }

    fn no_interrupt_is_lost(event_idx: bool) {
        loom::model(move || {
            let memory = Arc::new(Modelled::default());
            // The driver wanted no interrupt so far.
            memory.used_event.store(u16::MAX, Ordering::Relaxed);
            memory.avail_flags.store(NO_INTERRUPT, Ordering::Relaxed);
            let device = {
                let memory = Arc::clone(&memory);
                loom::thread::spawn(move || {
                    let mut ring = Ring::new(SIZE, event_idx, 0, 0);
                    ring.add_used(&memory, 9, 0).unwrap();
                    ring.publish(&memory).unwrap()
                })
            };
            let seen = memory.wants_interrupt(event_idx, 0);
            if seen {
                assert_eq!(memory.used[0].load(Ordering::Relaxed), 9);
            }
            let interrupted = device.join().unwrap();
            assert!(seen || interrupted, "the driver sleeps and gets no interrupt");
        });
    }

    #[test]
    fn sleeping_driver_is_interrupted_with_event_idx() {
        no_interrupt_is_lost(true);
    }

    #[test]
    fn sleeping_driver_is_interrupted_with_flags() {
        no_interrupt_is_lost(false);
    }
}
