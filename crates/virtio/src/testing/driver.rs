//! The driver's side of a split queue, as 2.7 tells a driver to behave, with access to the raw
//! rings for those that do not.

use std::collections::BTreeMap;
use std::sync::atomic::{Ordering, fence};

use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::device::feature;
use crate::queue::QueueState;

/// The chain continues at `next`.
pub const NEXT: u16 = 1;
/// The device may write the buffer.
pub const WRITE: u16 = 2;
/// The buffer is a table of descriptors.
pub const INDIRECT: u16 = 4;

/// A chain that came back from the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Used {
    /// What [`DriverQueue::add`] returned for it.
    pub head: u16,
    /// Bytes that the device says it wrote.
    pub written: u32,
}

/// A driver's queue in guest memory.
#[derive(Debug)]
pub struct DriverQueue {
    ram: GuestRam,
    size: u16,
    event_idx: bool,
    desc: u64,
    avail: u64,
    used: u64,
    free: Vec<u16>,
    /// Descriptors of each chain that is out.
    out: BTreeMap<u16, Vec<u16>>,
    start: u16,
    avail_idx: u16,
    /// The available index at the last decision to kick.
    kicked_idx: u16,
    used_idx: u16,
}

impl DriverQueue {
    /// Lays out a queue of `size` at `base` (a multiple of 16) and clears its rings.
    pub fn new(ram: &GuestRam, base: u64, size: u16, features: u64) -> Self {
        Self::starting_at(ram, base, size, features, 0)
    }

    /// As [`DriverQueue::new`], of a queue where both indices have come to `start` already.
    pub fn starting_at(ram: &GuestRam, base: u64, size: u16, features: u64, start: u16) -> Self {
        let n = u64::from(size);
        let desc = base;
        let avail = desc + 16 * n;
        let used = (avail + 6 + 2 * n).next_multiple_of(4);
        let zeros = vec![0; Self::bytes(size) as usize];
        ram.memory().write_slice(&zeros, GuestAddress(base)).expect("the queue is in RAM");
        let driver = DriverQueue {
            ram: ram.clone(),
            size,
            event_idx: features & feature::RING_EVENT_IDX != 0,
            desc,
            avail,
            used,
            free: (0..size).rev().collect(),
            out: BTreeMap::new(),
            start,
            avail_idx: start,
            kicked_idx: start,
            used_idx: start,
        };
        driver.set_avail_idx(start);
        driver.store(used + 2, start);
        driver
    }

    /// Bytes that a queue of `size` takes, a multiple of 16.
    pub fn bytes(size: u16) -> u64 {
        let n = u64::from(size);
        (16 * n + (6 + 2 * n).next_multiple_of(4) + 6 + 8 * n).next_multiple_of(16)
    }

    /// The state that the driver sets up: an enabled queue at its beginning.
    pub fn state(&self) -> QueueState {
        QueueState {
            size: self.size,
            ready: true,
            desc_table: self.desc,
            avail_ring: self.avail,
            used_ring: self.used,
            next_avail: self.start,
            next_used: self.start,
        }
    }

    /// Descriptors that are free.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Chains that the device has.
    pub fn out(&self) -> usize {
        self.out.len()
    }

    /// Makes a chain of `(address, length)` buffers available: `readable` ones, then `writable`
    /// ones. Not seen by the device before [`DriverQueue::publish`]. None if there are too few free
    /// descriptors.
    pub fn add(&mut self, readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Option<u16> {
        let buffers = Self::descriptors(readable, writable);
        if buffers.is_empty() || buffers.len() > self.free.len() {
            return None;
        }
        let indices: Vec<u16> = self.free.split_off(self.free.len() - buffers.len());
        for (i, &(addr, len, flags)) in buffers.iter().enumerate() {
            let (flags, next) = indices.get(i + 1).map_or((flags, 0), |&next| (flags | NEXT, next));
            self.set_descriptor(indices[i], addr, len, flags, next);
        }
        let head = indices[0];
        self.out.insert(head, indices);
        self.make_available(head);
        Some(head)
    }

    /// As [`DriverQueue::add`], with the descriptors in an indirect table that is written to
    /// `table`.
    pub fn add_indirect(
        &mut self,
        table: u64,
        readable: &[(u64, u32)],
        writable: &[(u64, u32)],
    ) -> Option<u16> {
        let buffers = Self::descriptors(readable, writable);
        let head = self.free.pop()?;
        let last = buffers.len() - 1;
        for (i, &(addr, len, flags)) in buffers.iter().enumerate() {
            let (flags, next) = if i < last { (flags | NEXT, i as u16 + 1) } else { (flags, 0) };
            write_descriptor(&self.ram, table + 16 * i as u64, addr, len, flags, next);
        }
        self.set_descriptor(head, table, 16 * buffers.len() as u32, INDIRECT, 0);
        self.out.insert(head, vec![head]);
        self.make_available(head);
        Some(head)
    }

    fn descriptors(readable: &[(u64, u32)], writable: &[(u64, u32)]) -> Vec<(u64, u32, u16)> {
        let readable = readable.iter().map(|&(addr, len)| (addr, len, 0));
        readable.chain(writable.iter().map(|&(addr, len)| (addr, len, WRITE))).collect()
    }

    fn make_available(&mut self, head: u16) {
        self.set_avail_entry(self.avail_idx % self.size, head);
        self.avail_idx = self.avail_idx.wrapping_add(1);
    }

    /// Shows the device all that was added. True if it wants a kick for it.
    pub fn publish(&mut self) -> bool {
        let (old, new) = (self.kicked_idx, self.avail_idx);
        self.set_avail_idx(new);
        fence(Ordering::SeqCst);
        self.kicked_idx = new;
        if self.event_idx {
            let event = self.avail_event();
            new.wrapping_sub(event).wrapping_sub(1) < new.wrapping_sub(old)
        } else {
            old != new && self.load(self.used) & 1 == 0
        }
    }

    /// Takes the next chain that the device has used.
    pub fn take_used(&mut self) -> Option<Used> {
        if self.used_idx() == self.used_idx {
            return None;
        }
        let entry = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        let words: u64 = self.ram.memory().read_obj(GuestAddress(entry)).expect("the used ring is in RAM");
        let used = Used { head: words as u16, written: (words >> 32) as u32 };
        assert!(words & 0xffff_ffff < u64::from(self.size), "a used entry names a descriptor");
        let indices = self.out.remove(&used.head);
        self.free.extend(indices.expect("the device uses only what it has").into_iter().rev());
        self.used_idx = self.used_idx.wrapping_add(1);
        Some(used)
    }

    /// As [`DriverQueue::take_used`], where something else may have written to the ring: None, too,
    /// if the next entry makes no sense.
    pub fn take_used_if_sane(&mut self) -> Option<Used> {
        let entry = self.used + 4 + 8 * u64::from(self.used_idx % self.size);
        let words: u64 = self.ram.memory().read_obj(GuestAddress(entry)).expect("the used ring is in RAM");
        let is_ours = u16::try_from(words & 0xffff_ffff).is_ok_and(|head| self.out.contains_key(&head));
        is_ours.then(|| self.take_used()).flatten()
    }

    /// Asks for an interrupt at the next used chain. True if there is one already.
    pub fn enable_interrupts(&mut self) -> bool {
        if self.event_idx {
            self.set_used_event(self.used_idx);
        } else {
            self.store(self.avail, 0);
        }
        fence(Ordering::SeqCst);
        self.used_idx() != self.used_idx
    }

    /// Asks for no interrupts.
    pub fn disable_interrupts(&mut self) {
        if self.event_idx {
            // As far away as can be.
            self.set_used_event(self.used_idx.wrapping_sub(1));
        } else {
            self.store(self.avail, 1);
        }
    }

    /// The used index in memory.
    pub fn used_idx(&self) -> u16 {
        self.load(self.used + 2)
    }

    /// The `avail_event` in memory.
    pub fn avail_event(&self) -> u16 {
        self.load(self.used + 4 + 8 * u64::from(self.size))
    }

    /// The flags of the used ring in memory.
    pub fn used_flags(&self) -> u16 {
        self.load(self.used)
    }

    /// Writes the `used_event` in memory.
    pub fn set_used_event(&self, idx: u16) {
        self.store(self.avail + 4 + 2 * u64::from(self.size), idx);
    }

    /// Writes the available index in memory, whatever it was.
    pub fn set_avail_idx(&self, idx: u16) {
        self.store(self.avail + 2, idx);
    }

    /// Writes an entry of the available ring.
    pub fn set_avail_entry(&self, slot: u16, head: u16) {
        self.store(self.avail + 4 + 2 * u64::from(slot), head);
    }

    /// Writes a descriptor of the queue's table.
    pub fn set_descriptor(&self, index: u16, addr: u64, len: u32, flags: u16, next: u16) {
        write_descriptor(&self.ram, self.desc + 16 * u64::from(index), addr, len, flags, next);
    }

    fn load(&self, addr: u64) -> u16 {
        self.ram.memory().load(GuestAddress(addr), Ordering::Acquire).expect("the rings are in RAM")
    }

    fn store(&self, addr: u64, value: u16) {
        self.ram.memory().store(value, GuestAddress(addr), Ordering::Release).expect("the rings are in RAM");
    }
}

/// Writes a descriptor anywhere.
pub fn write_descriptor(ram: &GuestRam, at: u64, addr: u64, len: u32, flags: u16, next: u16) {
    let rest = u64::from(len) | u64::from(flags) << 32 | u64::from(next) << 48;
    for (offset, word) in [(0, addr), (8, rest)] {
        ram.memory().write_obj(word.to_le(), GuestAddress(at + offset)).expect("the table is in RAM");
    }
}
