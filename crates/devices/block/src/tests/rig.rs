//! A disk under test, a queue that serves it, and guest memory for its requests; and the imports
//! that most tests need.

pub(crate) use std::path::{Path, PathBuf};

pub(crate) use config::{CacheType, IoEngine, Overlay};
pub(crate) use memory::GuestRam;
pub(crate) use memory::iovec::{Access, GuestIoVec};
pub(crate) use rustix::io::Errno;
pub(crate) use vm_memory::{Bytes, GuestAddress};

pub(crate) use crate::SECTOR;
pub(crate) use crate::disk::queue::DiskQueue;
pub(crate) use crate::disk::{Disk, DiskOptions};
pub(crate) use crate::engine::Blocking;
pub(crate) use crate::io_request::{Request, Token};
pub(crate) use virtio::testing::guest_ram;

/// A disk, a queue that serves it, and the guest memory of its requests.
pub(crate) struct Rig {
    pub(crate) disk: Disk,
    pub(crate) queue: DiskQueue,
    pub(crate) ram: GuestRam,
    /// Requests in flight use guest memory below this address.
    pub(crate) next_addr: u64,
    pub(crate) next_token: Token,
}

impl Rig {
    pub(crate) fn open(options: &DiskOptions) -> Rig {
        Self::open_with(options, Blocking::Never)
    }

    /// A disk with `io_engine` Sync always gets [`Blocking::Allowed`].
    pub(crate) fn open_with(options: &DiskOptions, blocking: Blocking) -> Rig {
        let blocking = if options.engine == Some(IoEngine::Sync) { Blocking::Allowed } else { blocking };
        let disk = Disk::open(options).unwrap();
        let queue = disk.queue(blocking).unwrap();
        Rig { disk, queue, ram: guest_ram(16), next_addr: 0, next_token: 0 }
    }

    /// Buffers for `len` bytes in pieces of `piece` bytes that are not adjacent, and their
    /// addresses.
    pub(crate) fn buffers(
        &mut self,
        len: u64,
        piece: u64,
        access: Access,
    ) -> (GuestIoVec, Vec<(u64, usize)>) {
        let mut buffers = self.queue.buffers();
        let mut places = Vec::new();
        let mut left = len;
        while left > 0 {
            let take = left.min(piece);
            buffers.push_merged(&self.ram, self.next_addr, take as usize, access).unwrap();
            places.push((self.next_addr, take as usize));
            self.next_addr += take + 16;
            left -= take;
        }
        (buffers, places)
    }

    pub(crate) fn start(&mut self, offset: u64, request: Request) -> Token {
        self.next_token += 1;
        self.queue.enqueue(self.next_token, offset, request);
        self.next_token
    }

    pub(crate) fn start_write(&mut self, offset: u64, bytes: &[u8], piece: u64) -> Token {
        let (buffers, places) = self.buffers(bytes.len() as u64, piece, Access::Read);
        let mut at = 0;
        for (addr, len) in places {
            self.ram.memory().write_slice(&bytes[at..at + len], GuestAddress(addr)).unwrap();
            at += len;
        }
        self.start(offset, Request::Write(buffers))
    }

    pub(crate) fn bytes_at(&self, places: &[(u64, usize)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(addr, len) in places {
            let mut part = vec![0; len];
            self.ram.memory().read_slice(&mut part, GuestAddress(addr)).unwrap();
            bytes.extend(part);
        }
        bytes
    }

    /// Waits for all requests, frees their memory, and returns the results.
    pub(crate) fn finish(&mut self) -> Vec<(Token, Result<(), Errno>)> {
        self.queue.drain();
        self.next_addr = 0;
        let results = std::iter::from_fn(|| self.queue.pop_completion()).collect();
        assert_eq!(self.queue.in_flight(), 0);
        results
    }

    pub(crate) fn one(&mut self) -> Result<(), Errno> {
        let results = self.finish();
        assert_eq!(results.len(), 1);
        assert_eq!(results[0].0, self.next_token);
        results[0].1
    }

    pub(crate) fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.start_write(offset, bytes, u64::MAX);
        self.one()
    }

    pub(crate) fn read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let (buffers, places) = self.buffers(len, u64::MAX, Access::Write);
        self.start(offset, Request::Read(buffers));
        self.one().map(|()| self.bytes_at(&places))
    }

    pub(crate) fn do_now(&mut self, offset: u64, request: Request) -> Result<(), Errno> {
        self.start(offset, request);
        self.one()
    }
}

pub(crate) fn raw(path: &Path, engine: IoEngine) -> DiskOptions {
    DiskOptions {
        path: path.into(),
        read_only: false,
        cache_type: CacheType::Writeback,
        engine: Some(engine),
        overlay: None,
        io_threads: 1,
        lock: true,
        name_is_durable: false,
    }
}

pub(crate) fn overlaid(path: &Path, overlay: PathBuf, layers: Vec<PathBuf>, engine: IoEngine) -> DiskOptions {
    DiskOptions { overlay: Some(Overlay { path: overlay, layers, size_mib: None }), ..raw(path, engine) }
}

/// The options of `base`, with an overlay at `top` or without.
pub(crate) fn raw_or_overlaid(base: &Path, top: &Path, with_overlay: bool, engine: IoEngine) -> DiskOptions {
    if with_overlay { overlaid(base, top.into(), vec![], engine) } else { raw(base, engine) }
}

pub(crate) const ENGINES: [IoEngine; 2] = [IoEngine::Async, IoEngine::Sync];

/// Bytes that depend on their offset and on `seed`.
pub(crate) fn pattern(seed: u8, offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(|at| (at / SECTOR) as u8 ^ (at as u8).wrapping_mul(31) ^ seed).collect()
}
