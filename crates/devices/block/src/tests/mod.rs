//! Disks of every kind against a model: a vector of bytes.

mod answers;
mod backlog;
mod crash;
mod device;
mod device_model;
mod errors;
mod failed_sync;
mod full;
mod guest;
mod host_crash;
mod killed;
mod limits;
mod model;
pub(crate) mod recorder;

use std::path::{Path, PathBuf};

use config::{CacheType, IoEngine, Overlay};
use memory::GuestRam;
use rustix::io::Errno;
use vm_memory::{Bytes, GuestAddress};

use super::SECTOR;
use super::buffers::{Direction, GuestBuffers};
use super::disk::queue::DiskQueue;
use super::disk::{Disk, DiskOptions};
use super::engine::Blocking;
use super::io_request::{Request, Token};
use virtio::queue::GuestBuffer;
use virtio::testing::guest_ram;

/// A disk, something that serves it, and the guest memory that its requests lie in.
struct Rig {
    disk: Disk,
    queue: DiskQueue,
    ram: GuestRam,
    /// Guest memory below this address is used by requests in flight.
    next_addr: u64,
    next_token: Token,
}

impl Rig {
    fn open(options: &DiskOptions) -> Rig {
        Self::open_with(options, Blocking::Never)
    }

    /// A synchronous disk is served by a worker that may block, whatever is asked for.
    fn open_with(options: &DiskOptions, blocking: Blocking) -> Rig {
        let blocking = if options.engine == Some(IoEngine::Sync) { Blocking::Allowed } else { blocking };
        let disk = Disk::open(options).unwrap();
        let queue = disk.queue(blocking).unwrap();
        Rig { disk, queue, ram: guest_ram(16), next_addr: 0, next_token: 0 }
    }

    /// Buffers for `len` bytes in pieces of `piece` bytes that do not touch, and their addresses.
    fn buffers(&mut self, len: u64, piece: u64, direction: Direction) -> (GuestBuffers, Vec<(u64, usize)>) {
        let mut buffers = self.queue.buffers();
        let mut places = Vec::new();
        let mut left = len;
        while left > 0 {
            let take = left.min(piece);
            buffers
                .push(&self.ram, GuestBuffer { addr: self.next_addr, len: take as u32 }, direction)
                .unwrap();
            places.push((self.next_addr, take as usize));
            self.next_addr += take + 16;
            left -= take;
        }
        (buffers, places)
    }

    fn start(&mut self, offset: u64, request: Request) -> Token {
        self.next_token += 1;
        self.queue.enqueue(self.next_token, offset, request);
        self.next_token
    }

    fn start_write(&mut self, offset: u64, bytes: &[u8], piece: u64) -> Token {
        let (buffers, places) = self.buffers(bytes.len() as u64, piece, Direction::FromGuest);
        let mut at = 0;
        for (addr, len) in places {
            self.ram.memory().write_slice(&bytes[at..at + len], GuestAddress(addr)).unwrap();
            at += len;
        }
        self.start(offset, Request::Write(buffers))
    }

    fn bytes_at(&self, places: &[(u64, usize)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(addr, len) in places {
            let mut part = vec![0; len];
            self.ram.memory().read_slice(&mut part, GuestAddress(addr)).unwrap();
            bytes.extend(part);
        }
        bytes
    }

    /// Waits for all requests and forgets their memory; how they went.
    fn finish(&mut self) -> Vec<(Token, Result<(), Errno>)> {
        self.queue.drain();
        self.next_addr = 0;
        let results = std::iter::from_fn(|| self.queue.pop_completion()).collect();
        assert_eq!(self.queue.in_flight(), 0);
        results
    }

    fn one(&mut self) -> Result<(), Errno> {
        let results = self.finish();
        assert_eq!(results.len(), 1);
        assert_eq!(results[0].0, self.next_token);
        results[0].1
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), Errno> {
        self.start_write(offset, bytes, u64::MAX);
        self.one()
    }

    fn read(&mut self, offset: u64, len: u64) -> Result<Vec<u8>, Errno> {
        let (buffers, places) = self.buffers(len, u64::MAX, Direction::ToGuest);
        self.start(offset, Request::Read(buffers));
        self.one().map(|()| self.bytes_at(&places))
    }

    fn do_now(&mut self, offset: u64, request: Request) -> Result<(), Errno> {
        self.start(offset, request);
        self.one()
    }
}

fn raw(path: &Path, engine: IoEngine) -> DiskOptions {
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

fn overlaid(path: &Path, overlay: PathBuf, layers: Vec<PathBuf>, engine: IoEngine) -> DiskOptions {
    DiskOptions { overlay: Some(Overlay { path: overlay, layers, size_mib: None }), ..raw(path, engine) }
}

const ENGINES: [IoEngine; 2] = [IoEngine::Async, IoEngine::Sync];

/// Bytes that tell where they stand and who wrote them.
fn pattern(seed: u8, offset: u64, len: u64) -> Vec<u8> {
    (offset..offset + len).map(|at| (at / SECTOR) as u8 ^ (at as u8).wrapping_mul(31) ^ seed).collect()
}
