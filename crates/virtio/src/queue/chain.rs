//! Chains of descriptors, and the buffers in guest memory that they describe.

use memory::GuestRam;
use virtio_queue::desc::split::Descriptor;
use vm_memory::bitmap::{AtomicBitmap, BS};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend, VolatileSlice};

use super::error::QueueError;

/// A chain that was longer than this frees its memory before it is reused.
const KEPT_CAPACITY: usize = 160;

/// The bytes of a buffer, for volatile access. Writes through it mark the pages dirty.
pub type GuestSlice<'a> = VolatileSlice<'a, BS<'a, Option<AtomicBitmap>>>;

/// A buffer in guest memory. It is not empty and lies in one region:
/// [`Queue::pop`](super::Queue::pop) checked it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GuestBuffer {
    /// Guest-physical address.
    pub addr: u64,
    /// Length in bytes.
    pub len: u32,
}

impl GuestBuffer {
    /// The bytes in `ram`, which must be the memory of the queue (other memory may give an error).
    ///
    /// For system calls that read or write the buffer in place, see [`memory::iovec`].
    pub fn slice<'a>(&self, ram: &'a GuestRam) -> Result<GuestSlice<'a>, QueueError> {
        ram.memory()
            .get_slice(GuestAddress(self.addr), self.len as usize)
            .map_err(|_| QueueError::BufferOutsideRam { addr: self.addr, len: self.len })
    }
}

/// A chain of descriptors that the driver made available: first the buffers to read, then the
/// buffers to write.
///
/// The device allocates it once; [`Queue::pop`](super::Queue::pop) fills it again and again.
#[derive(Debug, Default)]
pub struct Chain {
    head: u16,
    buffers: Vec<GuestBuffer>,
    /// The number of readable buffers; they come first.
    readable: usize,
    readable_len: u32,
    writable_len: u32,
    /// The number of descriptors, empty ones included.
    descriptors: usize,
    /// A writable descriptor was added.
    writing: bool,
}

impl Chain {
    /// An empty chain.
    pub fn new() -> Self {
        Self::default()
    }

    /// The index of its first descriptor, for [`Queue::add_used`](super::Queue::add_used).
    pub fn head(&self) -> u16 {
        self.head
    }

    /// The buffers that the device reads.
    pub fn readable(&self) -> Buffers<'_> {
        Buffers { list: &self.buffers[..self.readable], skip: 0, len: self.readable_len }
    }

    /// The buffers that the device may write.
    pub fn writable(&self) -> Buffers<'_> {
        Buffers { list: &self.buffers[self.readable..], skip: 0, len: self.writable_len }
    }

    /// Empties the chain and sets its head.
    pub(super) fn begin(&mut self, head: u16) {
        self.head = head;
        self.buffers.clear();
        if self.buffers.capacity() > KEPT_CAPACITY {
            self.buffers.shrink_to(KEPT_CAPACITY);
        }
        (self.readable, self.readable_len, self.writable_len) = (0, 0, 0);
        (self.descriptors, self.writing) = (0, false);
    }

    /// The number of descriptors.
    pub(super) fn descriptors(&self) -> usize {
        self.descriptors
    }

    /// Adds the buffer of one descriptor.
    pub(super) fn push(&mut self, ram: &GuestRam, descriptor: Descriptor) -> Result<(), QueueError> {
        let (addr, len) = (descriptor.addr().0, descriptor.len());
        let sum = self.readable_len.checked_add(self.writable_len).and_then(|sum| sum.checked_add(len));
        if sum.is_none() {
            return Err(QueueError::ChainTooLarge);
        }
        self.descriptors += 1;
        if descriptor.is_write_only() {
            self.writing = true;
            self.writable_len += len;
        } else if self.writing {
            return Err(QueueError::ReadableAfterWritable);
        } else {
            self.readable_len += len;
        }
        // The address of an empty buffer means nothing.
        if len > 0 {
            if !ram.contains(addr, len.into()) {
                return Err(QueueError::BufferOutsideRam { addr, len });
            }
            self.buffers.push(GuestBuffer { addr, len });
            if !descriptor.is_write_only() {
                self.readable = self.buffers.len();
            }
        }
        Ok(())
    }
}

/// A range of bytes in a list of buffers in guest memory.
#[derive(Debug, Clone, Copy)]
pub struct Buffers<'a> {
    list: &'a [GuestBuffer],
    /// Bytes of the first buffer before the range.
    skip: u32,
    /// Length of the range in bytes.
    len: u32,
}

impl<'a> Buffers<'a> {
    /// Length of the range in bytes.
    pub fn len(&self) -> u32 {
        self.len
    }

    /// Whether the range is empty.
    pub fn is_empty(&self) -> bool {
        self.len == 0
    }

    /// The buffers of the range; the first and the last are cut to it.
    pub fn iter(&self) -> impl Iterator<Item = GuestBuffer> + use<'a> {
        let (mut skip, mut left) = (self.skip, self.len);
        self.list.iter().map_while(move |buffer| {
            let len = (buffer.len - skip).min(left);
            let area = GuestBuffer { addr: buffer.addr + u64::from(skip), len };
            left -= len;
            skip = 0;
            (len > 0).then_some(area)
        })
    }

    /// Splits the range after `at` bytes. `None` if it is shorter.
    pub fn split_at(&self, at: u32) -> Option<(Buffers<'a>, Buffers<'a>)> {
        let rest = self.len.checked_sub(at)?;
        let first = Buffers { len: at, ..*self };
        let mut list = self.list;
        let mut skip = u64::from(self.skip) + u64::from(at);
        while let Some((buffer, others)) = list.split_first() {
            if skip < u64::from(buffer.len) {
                break;
            }
            skip -= u64::from(buffer.len);
            list = others;
        }
        Some((first, Buffers { list, skip: skip as u32, len: rest }))
    }

    /// Copies from the start of the range to `data`. Returns the number of bytes: the shorter
    /// length.
    pub fn read(&self, ram: &GuestRam, data: &mut [u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        for buffer in self.iter() {
            let left = &mut data[done..];
            if left.is_empty() {
                break;
            }
            done += buffer.slice(ram)?.copy_to(left);
        }
        Ok(done)
    }

    /// Copies `data` to the start of the range. Returns the number of bytes: the shorter length.
    pub fn write(&self, ram: &GuestRam, data: &[u8]) -> Result<usize, QueueError> {
        let mut done = 0;
        for buffer in self.iter() {
            let left = &data[done..];
            if left.is_empty() {
                break;
            }
            let slice = buffer.slice(ram)?;
            done += slice
                .write(left, 0)
                .map_err(|_| QueueError::BufferOutsideRam { addr: buffer.addr, len: buffer.len })?;
        }
        Ok(done)
    }
}
