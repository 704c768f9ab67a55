//! The protocol of the two rings: indices, the order of accesses, and who notifies whom (2.7.6 to 2.7.14).
//!
//! Nothing here knows what a descriptor is or how memory is reached ([`RingMemory`] does), so that a model checker can run this
//! very code against a driver in every order of their accesses.
//!
//! # Why no kick and no interrupt is lost
//!
//! Both sides play the same game: *publish, full fence, look*. The device, before it sleeps, says "kick me at this index"
//! and then looks at the available index again; the driver moves that index and then looks at what the device said. With a
//! full fence between the two steps on each side, at least one of them sees the other: either the driver kicks or the device goes on.
//! Interrupts are the same with the sides exchanged.

use super::QueueError;

/// `VIRTQ_AVAIL_F_NO_INTERRUPT`: the driver wants no interrupts (2.7.7).
const NO_INTERRUPT: u16 = 1;
/// `VIRTQ_USED_F_NO_NOTIFY`: the device wants no kicks (2.7.10).
const NO_NOTIFY: u16 = 1;

/// The two rings as memory that is shared with the driver. `slot` is less than the size of the queue.
pub(super) trait RingMemory {
    fn avail_flags(&self) -> Result<u16, QueueError>;
    /// With acquire order: entries before it are visible.
    fn avail_idx(&self) -> Result<u16, QueueError>;
    fn avail_entry(&self, slot: u16) -> Result<u16, QueueError>;
    fn used_event(&self) -> Result<u16, QueueError>;
    fn set_used_flags(&self, flags: u16) -> Result<(), QueueError>;
    /// With release order: entries before it are visible.
    fn set_used_idx(&self, idx: u16) -> Result<(), QueueError>;
    fn set_used_entry(&self, slot: u16, head: u16, written: u32) -> Result<(), QueueError>;
    fn set_avail_event(&self, idx: u16) -> Result<(), QueueError>;
    /// Orders all accesses before it before all accesses after it.
    fn full_fence(&self);
}

/// The device's side of the two rings.
#[derive(Debug)]
pub(super) struct Ring {
    /// A power of two.
    size: u16,
    event_idx: bool,
    /// The next entry of the available ring to take.
    next_avail: u16,
    /// The available index when it was last looked at.
    seen_avail: u16,
    /// The next entry of the used ring to fill.
    next_used: u16,
    /// The used index that the driver sees.
    published: u16,
    /// Without `event_idx`: the driver was asked not to kick.
    quiet: bool,
}

impl Ring {
    pub(super) fn new(size: u16, event_idx: bool, next_avail: u16, next_used: u16) -> Self {
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

    pub(super) fn size(&self) -> u16 {
        self.size
    }

    /// `(next_avail, next_used)`.
    pub(super) fn position(&self) -> (u16, u16) {
        (self.next_avail, self.next_used)
    }

    fn slot(&self, idx: u16) -> u16 {
        idx & (self.size - 1)
    }

    /// Looks how far the driver got. `in_flight` chains are out, so there cannot be more new ones than the rest of the queue.
    #[inline]
    fn look(&mut self, memory: &impl RingMemory, in_flight: u16) -> Result<(), QueueError> {
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
    pub(super) fn has_available(
        &mut self,
        memory: &impl RingMemory,
        in_flight: u16,
    ) -> Result<bool, QueueError> {
        if self.seen_avail == self.next_avail {
            self.look(memory, in_flight)?;
        }
        Ok(self.seen_avail != self.next_avail)
    }

    /// Takes the next entry of the available ring.
    #[inline]
    pub(super) fn pop(
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
    pub(super) fn rewind(&mut self) {
        self.next_avail = self.next_avail.wrapping_sub(1);
    }

    /// Fills the next entry of the used ring, which the driver does not look at yet.
    #[inline]
    pub(super) fn add_used(
        &mut self,
        memory: &impl RingMemory,
        head: u16,
        written: u32,
    ) -> Result<(), QueueError> {
        memory.set_used_entry(self.slot(self.next_used), head, written)?;
        self.next_used = self.next_used.wrapping_add(1);
        Ok(())
    }

    /// Moves the used index over all that was added. True if the driver wants an interrupt for any of it.
    #[inline]
    pub(super) fn publish(&mut self, memory: &impl RingMemory) -> Result<bool, QueueError> {
        let (old, new) = (self.published, self.next_used);
        if old == new {
            return Ok(false);
        }
        memory.set_used_idx(new)?;
        self.published = new;
        memory.full_fence();
        if self.event_idx {
            // Was the entry that the driver waits for among those from `old` to `new`?
            let event = memory.used_event()?;
            Ok(new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old))
        } else {
            Ok(memory.avail_flags()? & NO_INTERRUPT == 0)
        }
    }

    /// Asks for no kicks. With `event_idx` the last index asked for lies behind anyway, and nothing needs to be said.
    #[inline]
    pub(super) fn disable_notifications(&mut self, memory: &impl RingMemory) -> Result<(), QueueError> {
        if !self.event_idx && !self.quiet {
            memory.set_used_flags(NO_NOTIFY)?;
            self.quiet = true;
        }
        Ok(())
    }

    /// Asks for a kick at the next entry. True if it is there already.
    #[inline]
    pub(super) fn enable_notifications(
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
        self.look(memory, in_flight)?;
        Ok(self.seen_avail != self.next_avail)
    }
}
