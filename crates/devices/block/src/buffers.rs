//! Ranges of guest memory that the kernel reads from or writes to.
//!
//! # Invariant
//!
//! Every segment of a [`GuestBuffers`] lies in guest RAM: it comes from the checked lookup of
//! `vm-memory`. Guest RAM is never unmapped while the process lives (see [`memory::GuestRam`]), so
//! a segment stays valid for as long as it exists. This module never dereferences the addresses.
//! They go to the kernel as they are, and the guest may change the memory at any time.

use memory::GuestRam;
use vm_memory::bitmap::Bitmap;

use virtio::queue::{GuestBuffer, QueueError};

/// A range of this process's memory, in the layout of `struct iovec`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(C)]
pub(crate) struct Segment {
    /// First host address.
    pub(crate) addr: usize,
    /// Length in bytes; never 0.
    pub(crate) len: usize,
}

/// Direction of a transfer between the disk and guest memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Direction {
    /// The device reads guest memory: a disk write.
    FromGuest,
    /// The device writes guest memory: a disk read.
    ToGuest,
}

/// The data of one request: ranges of guest memory, in order.
///
/// Reusable: [`clear`](Self::clear) keeps the allocation.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct GuestBuffers {
    segments: Vec<Segment>,
    len: u64,
}

impl GuestBuffers {
    /// No ranges.
    pub fn new() -> Self {
        GuestBuffers::default()
    }

    /// Adds `buffer`, which must be in `ram`.
    ///
    /// A range with [`Direction::ToGuest`] counts as written from now on: where dirty pages are
    /// tracked, its pages are marked here, because the kernel's writes are not seen.
    pub fn push(
        &mut self,
        ram: &GuestRam,
        buffer: GuestBuffer,
        direction: Direction,
    ) -> Result<(), QueueError> {
        let slice = buffer.slice(ram)?;
        if direction == Direction::ToGuest {
            slice.bitmap().mark_dirty(0, slice.len());
        }
        let addr = slice.ptr_guard_mut().as_ptr().expose_provenance();
        match self.segments.last_mut() {
            // Buffers in adjacent pages are often adjacent.
            Some(last) if last.addr + last.len == addr => last.len += slice.len(),
            _ => self.segments.push(Segment { addr, len: slice.len() }),
        }
        self.len += slice.len() as u64;
        Ok(())
    }

    /// Length of all ranges together, in bytes.
    pub fn len(&self) -> u64 {
        self.len
    }

    /// Whether the length is 0.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// Removes the ranges and keeps the allocation.
    pub fn clear(&mut self) {
        self.segments.clear();
        self.len = 0;
    }

    /// The ranges.
    pub(crate) fn segments(&self) -> &[Segment] {
        &self.segments
    }

    /// The ranges, for an engine to advance past what is done.
    pub(crate) fn segments_mut(&mut self) -> &mut [Segment] {
        &mut self.segments
    }

    /// Appends `len` bytes of `from`, starting `offset` bytes into it. `from` must hold that many.
    pub(crate) fn push_part(&mut self, from: &GuestBuffers, offset: u64, len: u64) {
        debug_assert!(offset + len <= from.len);
        let (mut skip, mut left) = (offset as usize, len as usize);
        for segment in &from.segments {
            if left == 0 {
                break;
            }
            if skip >= segment.len {
                skip -= segment.len;
                continue;
            }
            let take = left.min(segment.len - skip);
            self.segments.push(Segment { addr: segment.addr + skip, len: take });
            left -= take;
            skip = 0;
        }
        self.len += len;
    }
}

/// Spent buffers, kept for their allocations.
#[derive(Debug, Default)]
pub(crate) struct BufferPool(Vec<GuestBuffers>);

impl BufferPool {
    /// Most buffers that are kept.
    const MAX: usize = 64;

    /// Empty buffers: recycled ones, if there are any.
    pub(crate) fn take(&mut self) -> GuestBuffers {
        self.0.pop().unwrap_or_default()
    }

    /// Takes back buffers that are not needed any more.
    pub(crate) fn recycle(&mut self, mut buffers: GuestBuffers) {
        if self.0.len() < Self::MAX {
            buffers.clear();
            self.0.push(buffers);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use memory::layout::MIB;
    use virtio::testing::{guest_ram, tracked_guest_ram};
    use vm_memory::GuestMemoryBackend;

    fn at(addr: u64, len: u32) -> GuestBuffer {
        GuestBuffer { addr, len }
    }

    #[test]
    fn adjacent_buffers_become_one_segment() {
        let ram = guest_ram(1);
        let mut buffers = GuestBuffers::new();
        for buffer in [at(4096, 4096), at(8192, 512), at(4096, 512)] {
            buffers.push(&ram, buffer, Direction::FromGuest).unwrap();
        }
        let host = ram.regions()[0].host_addr as usize;
        assert_eq!(
            buffers.segments(),
            [Segment { addr: host + 4096, len: 4608 }, Segment { addr: host + 4096, len: 512 }]
        );
        assert_eq!(buffers.len(), 5120);
    }

    #[test]
    fn buffer_outside_ram_is_refused() {
        let ram = guest_ram(1);
        let mut buffers = GuestBuffers::new();
        for (addr, len) in [(MIB, 1), (MIB - 1, 2), (u64::MAX, 1), (u64::MAX - 1, u32::MAX), (0, u32::MAX)] {
            let refused = buffers.push(&ram, at(addr, len), Direction::FromGuest);
            assert_eq!(refused, Err(QueueError::BufferOutsideRam { addr, len }));
        }
        assert!(buffers.is_empty());
    }

    #[test]
    fn only_buffers_to_the_guest_are_marked_dirty() {
        let ram = tracked_guest_ram(1);
        let mut buffers = GuestBuffers::new();
        buffers.push(&ram, at(0, 4096), Direction::FromGuest).unwrap();
        buffers.push(&ram, at(8192 - 1, 2), Direction::ToGuest).unwrap();
        let region = ram.memory().iter().next().unwrap();
        let dirty = |page: usize| vm_memory::GuestMemoryRegion::bitmap(region).dirty_at(page * 4096);
        assert_eq!([dirty(0), dirty(1), dirty(2), dirty(3)], [false, true, true, false]);
    }

    #[test]
    fn push_part_cuts_segments() {
        let ram = guest_ram(1);
        let host = ram.regions()[0].host_addr as usize;
        let mut all = GuestBuffers::new();
        for addr in [0, 8192, 16384] {
            all.push(&ram, at(addr, 1000), Direction::FromGuest).unwrap();
        }
        let mut part = GuestBuffers::new();
        part.push_part(&all, 500, 2000);
        assert_eq!(
            part.segments(),
            [
                Segment { addr: host + 500, len: 500 },
                Segment { addr: host + 8192, len: 1000 },
                Segment { addr: host + 16384, len: 500 }
            ]
        );
        assert_eq!(part.len(), 2000);
    }
}
