//! The areas of a queue in guest memory. They are looked up once, when the queue is created.

use std::ops::Deref;
use std::sync::Arc;
use std::sync::atomic::{Ordering, fence};

use memory::{GuestRam, GuestRegion};
use vm_memory::{
    ByteValued, Bytes, GuestAddress, GuestMemoryBackend, GuestMemoryRegion, MemoryRegionAddress,
};

use super::chain::GuestSlice;
use super::error::QueueError;
use super::ring::{RingMemory, order};

/// A range of guest memory in one region. The region is kept (`Arc`, for the life of the queue) or
/// borrowed (for one access).
#[derive(Debug)]
pub(super) struct RingArea<R = Arc<GuestRegion>> {
    name: &'static str,
    region: R,
    /// Guest-physical address.
    addr: u64,
    /// Offset in the region.
    offset: u64,
    len: u64,
}

impl RingArea {
    /// Looks up the `len` bytes (not 0) at `addr`, a multiple of `align`, and keeps their region.
    pub(super) fn new(
        ram: &GuestRam,
        name: &'static str,
        addr: u64,
        len: u64,
        align: u64,
    ) -> Result<Self, QueueError> {
        let area = RingArea::borrowed(ram, name, addr, len, align)?;
        let (start, size) = (area.region.start_addr(), area.region.len());
        // `vm-memory` gives out the `Arc` of a region only by removing it from (a copy of) the
        // list.
        let (_, region) = ram.memory().remove_region(start, size).map_err(|_| area.outside())?;
        Ok(RingArea { name, region, addr, offset: area.offset, len })
    }
}

impl<'a> RingArea<&'a GuestRegion> {
    /// Looks up the `len` bytes (not 0) at `addr`, a multiple of `align`.
    pub(super) fn borrowed(
        ram: &'a GuestRam,
        name: &'static str,
        addr: u64,
        len: u64,
        align: u64,
    ) -> Result<Self, QueueError> {
        if !addr.is_multiple_of(align) {
            return Err(QueueError::Unaligned { area: name, addr, align });
        }
        let outside = QueueError::RingOutsideRam { area: name, addr, len };
        if !ram.contains(addr, len) {
            return Err(outside);
        }
        let region = ram.memory().find_region(GuestAddress(addr)).ok_or(outside)?;
        Ok(RingArea { name, region, addr, offset: addr - region.start_addr().0, len })
    }
}

impl<R: Deref<Target = GuestRegion>> RingArea<R> {
    /// The error of an access outside the area, which `new` ruled out.
    fn outside(&self) -> QueueError {
        QueueError::RingOutsideRam { area: self.name, addr: self.addr, len: self.len }
    }

    #[inline]
    fn slice(&self, at: u64, len: usize) -> Result<GuestSlice<'_>, QueueError> {
        debug_assert!(at + len as u64 <= self.len, "{} is {} bytes, not {at} + {len}", self.name, self.len);
        self.region.get_slice(MemoryRegionAddress(self.offset + at), len).map_err(|_| self.outside())
    }

    /// Reads a value that the driver must not change now. Not atomic.
    #[inline]
    pub(super) fn read<T: ByteValued>(&self, at: u64) -> Result<T, QueueError> {
        self.slice(at, size_of::<T>())?.read_obj(0).map_err(|_| self.outside())
    }

    #[inline]
    fn write<T: ByteValued>(&self, at: u64, value: T) -> Result<(), QueueError> {
        self.slice(at, size_of::<T>())?.write_obj(value, 0).map_err(|_| self.outside())
    }

    #[inline]
    fn load(&self, at: u64, order: Ordering) -> Result<u16, QueueError> {
        self.slice(at, 2)?.load(0, order).map(u16::from_le).map_err(|_| self.outside())
    }

    #[inline]
    fn store(&self, at: u64, value: u16, order: Ordering) -> Result<(), QueueError> {
        self.slice(at, 2)?.store(value.to_le(), 0, order).map_err(|_| self.outside())
    }
}

/// Both rings in guest memory (2.7.6, 2.7.8).
#[derive(Debug)]
pub(super) struct Rings {
    avail: RingArea,
    used: RingArea,
    size: u16,
}

impl Rings {
    pub(super) fn new(ram: &GuestRam, size: u16, avail: u64, used: u64) -> Result<Self, QueueError> {
        let n = u64::from(size);
        Ok(Rings {
            avail: RingArea::new(ram, "available ring", avail, 6 + 2 * n, 2)?,
            used: RingArea::new(ram, "used ring", used, 6 + 8 * n, 4)?,
            size,
        })
    }

    /// The used index in the ring.
    pub(super) fn used_idx(&self) -> Result<u16, QueueError> {
        self.used.load(2, Ordering::Acquire)
    }
}

impl RingMemory for Rings {
    #[inline]
    fn avail_flags(&self) -> Result<u16, QueueError> {
        self.avail.load(0, Ordering::Relaxed)
    }

    #[inline]
    fn avail_idx(&self) -> Result<u16, QueueError> {
        self.avail.load(2, order::LOAD_AVAIL_IDX)
    }

    #[inline]
    fn avail_entry(&self, slot: u16) -> Result<u16, QueueError> {
        self.avail.load(4 + 2 * u64::from(slot), Ordering::Relaxed)
    }

    #[inline]
    fn used_event(&self) -> Result<u16, QueueError> {
        self.avail.load(4 + 2 * u64::from(self.size), Ordering::Relaxed)
    }

    #[inline]
    fn set_used_flags(&self, flags: u16) -> Result<(), QueueError> {
        self.used.store(0, flags, Ordering::Relaxed)
    }

    #[inline]
    fn set_used_idx(&self, idx: u16) -> Result<(), QueueError> {
        self.used.store(2, idx, order::STORE_USED_IDX)
    }

    #[inline]
    fn set_used_entry(&self, slot: u16, head: u16, written: u32) -> Result<(), QueueError> {
        // Two little-endian words: the head, then the length.
        self.used.write(4 + 8 * u64::from(slot), (u64::from(written) << 32 | u64::from(head)).to_le())
    }

    #[inline]
    fn set_avail_event(&self, idx: u16) -> Result<(), QueueError> {
        self.used.store(4 + 8 * u64::from(self.size), idx, Ordering::Relaxed)
    }

    #[inline]
    fn full_fence(&self) {
        fence(Ordering::SeqCst);
    }
}
