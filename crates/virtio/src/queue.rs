//! Split virtqueues (2.7), the device's side.
//!
//! # How a device uses a queue
//!
//! ```text
//!  loop {
//!      queue.disable_notifications()
//!      while queue.pop(&mut chain) { handle it; queue.add_used(head, written) }      // now or when it completes
//!      if queue.publish() { interrupt.queue(index) }
//!      if !queue.enable_notifications() { break }                                     // more came meanwhile: again
//!  }
//! ```
//!
//! The caller owns the [`Chain`]s and reuses them: nothing is allocated per request. Used buffers
//! become visible to the driver with [`Queue::publish`], once per batch.
//!
//! # Hostile drivers
//!
//! A popped chain is sound, whatever the rings contain:
//!
//! - Each buffer is RAM and lies in one region.
//! - There are at most [`MAX_CHAIN_LEN`] buffers, with less than 2^32 bytes in all. Readable
//!   buffers come before writable ones.
//! - No more chains are in flight than the queue has descriptors.
//!
//! Everything else is a [`QueueError`], and the queue is dead from then on: every call returns the
//! same error, the rings are neither read nor written, and the device must call
//! [`Interrupt::needs_reset`](crate::device::Interrupt).
//!
//! Each descriptor is read once. A driver that changes a chain in flight changes the data in its
//! own buffers, but not which buffers the device uses.
//!
//! # How it is built
//!
//! `ring` is the protocol of indices and notifications alone: it runs over guest memory here, and
//! over a model checker's memory in its tests. `ring_area` is the guest memory of the rings.
//! `chain` holds a chain of descriptors. The descriptor formats come from rust-vmm's
//! `virtio-queue`, which is also the oracle of the property tests.

mod chain;
mod error;
mod limits;
pub(crate) mod ring;
mod ring_area;
#[cfg(test)]
mod tests;

use std::sync::Arc;
use std::sync::atomic::{AtomicU32, Ordering};

use memory::{GuestRam, GuestRegion};
use serde::{Deserialize, Serialize};
use virtio_queue::desc::split::Descriptor;

use crate::feature;
use ring::Ring;
use ring_area::{RingArea, Rings};

pub use chain::{Buffers, Chain, GuestBuffer, GuestSlice};
pub use error::QueueError;
pub use limits::{MAX_CHAIN_LEN, MAX_QUEUE_SIZE};

/// The set-up of one queue by its driver and the device's progress in it, as plain data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct QueueState {
    /// Descriptors in the queue.
    pub size: u16,
    /// The driver enabled it.
    pub ready: bool,
    /// Guest-physical address of the descriptor table.
    pub desc_table: u64,
    /// Guest-physical address of the available ring (driver area).
    pub avail_ring: u64,
    /// Guest-physical address of the used ring (device area).
    pub used_ring: u64,
    /// The next entry of the available ring that the device takes.
    pub next_avail: u16,
    /// The next entry of the used ring that the device fills.
    pub next_used: u16,
}

/// How far the device got in a queue. The transport reads it to save a quiesced queue.
#[derive(Debug, Default)]
pub struct QueueProgress(AtomicU32);

impl QueueProgress {
    /// `(next_avail, next_used)`.
    pub fn get(&self) -> (u16, u16) {
        let both = self.0.load(Ordering::Acquire);
        ((both >> 16) as u16, both as u16)
    }

    fn set(&self, next_avail: u16, next_used: u16) {
        self.0.store(u32::from(next_avail) << 16 | u32::from(next_used), Ordering::Release);
    }
}

/// Chains in flight, one bit for each head.
#[derive(Debug, Default)]
struct InFlight {
    heads: [u64; MAX_QUEUE_SIZE as usize / 64],
    count: u16,
}

impl InFlight {
    /// Adds `head`, which is less than [`MAX_QUEUE_SIZE`]. False if it was there.
    fn insert(&mut self, head: u16) -> bool {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        // Not `count += u16::from(new)`: rustc 1.95 loses that (rust-lang/rust#158206).
        if self.heads[word] & bit != 0 {
            return false;
        }
        self.heads[word] |= bit;
        self.count += 1;
        true
    }

    /// Takes `head` out. False if it was not there.
    fn remove(&mut self, head: u16) -> bool {
        let (word, bit) = (usize::from(head / 64), 1 << (head % 64));
        let there = self.heads.get(word).is_some_and(|heads| heads & bit != 0);
        if there {
            self.heads[word] &= !bit;
            self.count -= 1;
        }
        there
    }
}

/// A queue that the driver set up, on the device's side.
#[derive(Debug)]
pub struct Queue {
    index: u16,
    /// The driver's set-up.
    state: QueueState,
    indirect: bool,
    ram: GuestRam,
    table: RingArea,
    rings: Rings,
    ring: Ring,
    in_flight: InFlight,
    progress: Arc<QueueProgress>,
    dead: Option<QueueError>,
}

impl Queue {
    /// Creates the queue `index` from its driver's set-up.
    ///
    /// `max_size` is the size that the device offers. `features` are those that the driver
    /// accepted. `progress` follows the queue.
    pub fn new(
        index: u16,
        max_size: u16,
        state: &QueueState,
        features: u64,
        ram: &GuestRam,
        progress: Arc<QueueProgress>,
    ) -> Result<Self, QueueError> {
        let size = state.size;
        if !size.is_power_of_two() || size > max_size.min(MAX_QUEUE_SIZE) {
            return Err(QueueError::Size { size, max: max_size });
        }
        let table = RingArea::new(ram, "descriptor table", state.desc_table, 16 * u64::from(size), 16)?;
        let rings = Rings::new(ram, size, state.avail_ring, state.used_ring)?;
        let event_idx = features & feature::RING_EVENT_IDX != 0;
        progress.set(state.next_avail, state.next_used);
        Ok(Queue {
            index,
            state: *state,
            indirect: features & feature::RING_INDIRECT_DESC != 0,
            ram: ram.clone(),
            table,
            rings,
            ring: Ring::new(size, event_idx, state.next_avail, state.next_used),
            in_flight: InFlight::default(),
            progress,
            dead: None,
        })
    }

    /// The queue's index.
    pub fn index(&self) -> u16 {
        self.index
    }

    /// The number of descriptors.
    pub fn size(&self) -> u16 {
        self.ring.size()
    }

    /// The driver's set-up and the device's progress.
    pub fn state(&self) -> QueueState {
        let (next_avail, next_used) = self.ring.progress();
        QueueState { next_avail, next_used, ..self.state }
    }

    /// The used index in the ring, for a queue that the kernel serves (vhost).
    pub fn used_idx(&self) -> Result<u16, QueueError> {
        self.rings.used_idx()
    }

    /// Sets the progress of a queue that the kernel has served (vhost). Nothing is in flight.
    pub fn set_position(&mut self, next_avail: u16, next_used: u16) {
        self.ring = Ring::new(self.ring.size(), self.ring.event_idx(), next_avail, next_used);
        self.show_position();
    }

    /// The memory of the queue's buffers.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The number of chains that were popped and not used yet.
    pub fn in_flight(&self) -> u16 {
        self.in_flight.count
    }

    /// Takes the next available chain. Returns false if there is none; `chain` is then unspecified.
    #[inline]
    pub fn pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let popped = self.alive().and_then(|()| self.try_pop(chain));
        self.keep(popped)
    }

    /// Undoes the last [`Queue::pop`], for a request that may not start yet. The next `pop` returns
    /// the chain again.
    pub fn rewind(&mut self, chain: &Chain) -> Result<(), QueueError> {
        self.unpop(chain.head())
    }

    /// As [`Queue::rewind`], for a caller that has popped several chains: last popped, first
    /// rewound.
    pub fn unpop(&mut self, head: u16) -> Result<(), QueueError> {
        let done = self.alive().and_then(|()| {
            if !self.in_flight.remove(head) {
                return Err(QueueError::NotInFlight(head));
            }
            self.ring.rewind();
            self.show_position();
            Ok(())
        });
        self.keep(done)
    }

    /// Adds the chain `head` to the used ring. The device wrote the first `written` bytes of its
    /// writable buffers. The driver sees it after [`Queue::publish`].
    #[inline]
    pub fn add_used(&mut self, head: u16, written: u32) -> Result<(), QueueError> {
        let added = self.alive().and_then(|()| {
            if !self.in_flight.remove(head) {
                return Err(QueueError::NotInFlight(head));
            }
            self.ring.add_used(&self.rings, head, written)
        });
        self.keep(added)
    }

    /// Makes the added entries visible to the driver. Returns whether it wants an interrupt for
    /// them.
    #[inline]
    #[must_use = "the driver may be waiting for the interrupt"]
    pub fn publish(&mut self) -> Result<bool, QueueError> {
        let published = self.alive().and_then(|()| self.ring.publish(&self.rings));
        self.show_position();
        self.keep(published)
    }

    /// Asks the driver not to kick. For the time in which the device polls the queue.
    pub fn disable_notifications(&mut self) -> Result<(), QueueError> {
        let done = self.alive().and_then(|()| self.ring.disable_notifications(&self.rings));
        self.keep(done)
    }

    /// Asks the driver to kick when it adds a chain. Returns true if a chain was added meanwhile,
    /// for which no kick may come: the device must continue polling.
    pub fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        let more =
            self.alive().and_then(|()| self.ring.enable_notifications(&self.rings, self.in_flight.count));
        self.keep(more)
    }

    /// Whether there is a chain to pop, without taking it.
    #[inline]
    pub fn has_available(&mut self) -> Result<bool, QueueError> {
        let more = self.alive().and_then(|()| self.ring.has_available(&self.rings, self.in_flight.count));
        self.keep(more)
    }

    /// As [`Queue::enable_notifications`], for a device that leaves available chains in the ring:
    /// the driver must kick when it adds another one.
    pub fn enable_notifications_of_more(&mut self) -> Result<bool, QueueError> {
        let in_flight = self.in_flight.count;
        let more = self.alive().and_then(|()| self.ring.enable_notifications_of_more(&self.rings, in_flight));
        self.keep(more)
    }

    /// The number of chains to pop.
    pub fn available(&mut self) -> Result<u16, QueueError> {
        let count = self.alive().and_then(|()| self.ring.available(&self.rings, self.in_flight.count));
        self.keep(count)
    }

    #[inline]
    fn try_pop(&mut self, chain: &mut Chain) -> Result<bool, QueueError> {
        let Some(head) = self.ring.pop(&self.rings, self.in_flight.count)? else {
            return Ok(false);
        };
        self.show_position();
        if head >= self.size() {
            return Err(QueueError::DescriptorIndex { index: head.into(), len: self.size().into() });
        }
        if !self.in_flight.insert(head) {
            return Err(QueueError::InFlight(head));
        }
        chain.begin(head);
        self.walk(chain, head)?;
        Ok(true)
    }

    /// Follows the chain from `head` on, through at most one indirect table.
    #[inline]
    fn walk(&self, chain: &mut Chain, head: u16) -> Result<(), QueueError> {
        let mut indirect: Option<RingArea<&GuestRegion>> = None;
        let mut table_len = u32::from(self.size());
        let mut index = u32::from(head);
        // The descriptor of the indirect table itself does not count.
        let mut in_table = 0;
        for _ in 0..=MAX_CHAIN_LEN {
            if index >= table_len {
                return Err(QueueError::DescriptorIndex { index, len: table_len });
            }
            // A chain in the queue's own table that is longer than the table has a loop.
            in_table += 1;
            if in_table > table_len {
                return Err(QueueError::ChainTooLong);
            }
            let at = u64::from(index) * 16;
            let descriptor: Descriptor = match &indirect {
                Some(table) => table.read(at)?,
                None => self.table.read(at)?,
            };
            if descriptor.refers_to_indirect_table() {
                if indirect.is_some() {
                    return Err(QueueError::Indirect("inside another one"));
                }
                let area = self.indirect_table(descriptor)?;
                (table_len, index, in_table) = (descriptor.len() / 16, 0, 0);
                indirect = Some(area);
                continue;
            }
            if chain.descriptors() == MAX_CHAIN_LEN {
                return Err(QueueError::ChainTooLong);
            }
            chain.push(&self.ram, descriptor)?;
            if !descriptor.has_next() {
                return Ok(());
            }
            index = descriptor.next().into();
        }
        Err(QueueError::ChainTooLong)
    }

    /// Checks an indirect table (2.7.5.3).
    fn indirect_table(&self, descriptor: Descriptor) -> Result<RingArea<&GuestRegion>, QueueError> {
        if !self.indirect {
            return Err(QueueError::Indirect("not negotiated"));
        }
        if descriptor.has_next() {
            return Err(QueueError::Indirect("not the last descriptor of its chain"));
        }
        if descriptor.len() == 0 || !descriptor.len().is_multiple_of(16) {
            return Err(QueueError::Indirect("invalid size"));
        }
        RingArea::borrowed(&self.ram, "indirect table", descriptor.addr().0, descriptor.len().into(), 1)
            .map_err(|_| QueueError::Indirect("not in guest memory"))
    }

    fn show_position(&self) {
        let (next_avail, next_used) = self.ring.progress();
        self.progress.set(next_avail, next_used);
    }

    #[inline]
    fn alive(&self) -> Result<(), QueueError> {
        self.dead.map_or(Ok(()), Err)
    }

    /// Fails if an earlier call found the queue broken.
    #[inline]
    fn keep<T>(&mut self, result: Result<T, QueueError>) -> Result<T, QueueError> {
        if let Err(error) = result {
            self.dead = Some(error);
        }
        result
    }
}
