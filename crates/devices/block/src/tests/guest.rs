//! A guest with one block device: a driver that adds requests to queues, on a worker that the test
//! steps.

use std::sync::Arc;
use std::sync::mpsc::Receiver;

use config::IoEngine;
use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use super::rig::*;
use crate::engine::Blocking;
use crate::{Block, BlockConfig, BlockControl};
use sync::EventFd;
use virtio::device::{Activation, ActiveQueue, Device};
use virtio::queue::{Queue, QueueProgress};
use virtio::rate_limiter::RateLimiterConfig;
use virtio::testing::{CountingInterrupt, DriverQueue, TestWorker, Used, tracked_guest_ram};
use virtio::worker::Task;

pub(crate) const IN: u32 = 0;
pub(crate) const OUT: u32 = 1;
pub(crate) const FLUSH: u32 = 4;
pub(crate) const GET_ID: u32 = 8;
pub(crate) const DISCARD: u32 = 11;
pub(crate) const WRITE_ZEROES: u32 = 13;

/// Address of the queues.
const QUEUES: u64 = 0x1000;
/// Address of the first request.
pub(crate) const ARENA: u64 = 1 << 20;
/// Size of guest memory in MiB.
const RAM_MIB: u32 = 32;

/// A request that was added to a queue.
pub(crate) struct Submitted {
    pub(crate) head: u16,
    /// Its writable buffers: data, then status.
    writable: Vec<(u64, u32)>,
}

/// A completed request.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Response {
    pub(crate) status: u8,
    pub(crate) data: Vec<u8>,
    pub(crate) written: u32,
}

pub(crate) struct Guest {
    pub(crate) ram: GuestRam,
    pub(crate) worker: TestWorker,
    pub(crate) interrupt: Arc<CountingInterrupt>,
    pub(crate) block: Block,
    pub(crate) control: BlockControl,
    pub(crate) drivers: Vec<DriverQueue>,
    /// Progress of the device in each queue.
    pub(crate) positions: Vec<Arc<QueueProgress>>,
    kicks: Vec<Arc<EventFd>>,
    tasks: Vec<u64>,
    next_addr: u64,
    features: u64,
}

pub(crate) fn config(num_queues: u16, io_threads: u16) -> BlockConfig {
    BlockConfig { id: "disk_1".into(), num_queues, queue_size: 64, io_threads }
}

impl Guest {
    pub(crate) fn new(options: &DiskOptions) -> Guest {
        Self::with(options, config(1, 1), RateLimiterConfig::default(), Blocking::Never, u64::MAX)
    }

    /// A guest whose driver accepts the offered features that are in `accepts`.
    pub(crate) fn with(
        options: &DiskOptions,
        config: BlockConfig,
        limits: RateLimiterConfig,
        blocking: Blocking,
        accepts: u64,
    ) -> Guest {
        let worker = TestWorker::new();
        let threads = config.io_threads;
        let blocking = if options.engine == Some(IoEngine::Sync) { Blocking::Allowed } else { blocking };
        let workers = match blocking {
            Blocking::Never => vec![],
            Blocking::Allowed => (0..threads).map(|index| virtio::testing::worker(index.into())).collect(),
        };
        let disk = Disk::open(options).unwrap();
        let (block, control) = Block::new(config, disk, limits, workers, worker.now()).unwrap();
        Self::around(block, control, worker, accepts)
    }

    /// A guest with this device.
    pub(crate) fn around(block: Block, control: BlockControl, worker: TestWorker, accepts: u64) -> Guest {
        let ring = virtio::device::feature::RING_EVENT_IDX | virtio::device::feature::RING_INDIRECT_DESC;
        let features = (block.features() | ring) & accepts;
        let mut guest = Guest {
            ram: tracked_guest_ram(RAM_MIB),
            worker,
            interrupt: CountingInterrupt::new(),
            block,
            control,
            drivers: vec![],
            positions: vec![],
            kicks: vec![],
            tasks: vec![],
            next_addr: ARENA,
            features,
        };
        guest.activate();
        guest
    }

    /// The driver starts: fresh queues, `DRIVER_OK`.
    pub(crate) fn activate(&mut self) {
        let sizes = self.block.queue_sizes().to_vec();
        let mut base = QUEUES;
        self.drivers.clear();
        self.kicks.clear();
        self.positions.clear();
        let mut queues = Vec::new();
        for (index, size) in sizes.into_iter().enumerate() {
            let driver = DriverQueue::new(&self.ram, base, size, self.features);
            base += DriverQueue::bytes(size).next_multiple_of(4096);
            let position = Arc::new(QueueProgress::default());
            let queue = Queue::new(
                index as u16,
                size,
                &driver.state(),
                self.features,
                &self.ram,
                Arc::clone(&position),
            )
            .unwrap();
            self.positions.push(position);
            let kick = Arc::new(EventFd::new().unwrap());
            queues.push(ActiveQueue { queue, kick: Arc::clone(&kick) });
            self.drivers.push(driver);
            self.kicks.push(kick);
        }
        let activation = Activation {
            memory: self.ram.clone(),
            queues,
            interrupt: Arc::clone(&self.interrupt) as _,
            features: self.features,
            restored: false,
        };
        let tasks = self.block.activate(activation).unwrap();
        self.tasks = tasks.into_iter().map(|task| self.worker.add(task, self.interrupt.clone())).collect();
        self.worker.run();
    }

    /// Removes the tasks from the worker, as a reset does first.
    pub(crate) fn begin_reset(&mut self) -> Vec<Receiver<Box<dyn Task>>> {
        let tasks = std::mem::take(&mut self.tasks);
        tasks.into_iter().map(|task| self.worker.remove(task)).collect()
    }

    /// Waits for the tasks, and resets the device.
    pub(crate) fn end_reset(&mut self, tasks: Vec<Receiver<Box<dyn Task>>>) {
        for task in tasks {
            let mut back = None;
            self.worker.run_until(|| {
                back = back.take().or_else(|| task.try_recv().ok());
                back.is_some()
            });
            back.unwrap().detach();
        }
        self.block.reset();
        self.next_addr = ARENA;
    }

    /// Address of unused guest memory of `len` bytes.
    fn alloc(&mut self, len: u32) -> u64 {
        let addr = self.next_addr;
        self.next_addr += u64::from(len) + 8;
        assert!(self.next_addr < u64::from(RAM_MIB) << 20, "too much at once for the guest's memory");
        addr
    }

    /// Bytes of guest memory that requests in flight use.
    pub(crate) fn arena_used(&self) -> u64 {
        self.next_addr - ARENA
    }

    /// Cuts `len` bytes into at most 100 buffers, whose lengths repeat `cuts`.
    fn cut(&mut self, len: u32, cuts: &[u32]) -> Vec<(u64, u32)> {
        let shortest = len.div_ceil(100).max(1);
        let mut buffers = Vec::new();
        let mut left = len;
        for &cut in cuts.iter().cycle() {
            if left == 0 {
                break;
            }
            let take = cut.max(shortest).min(left);
            buffers.push((self.alloc(take), take));
            left -= take;
        }
        buffers
    }

    fn put(&self, buffers: &[(u64, u32)], bytes: &[u8]) {
        let mut at = 0;
        for &(addr, len) in buffers {
            self.ram.memory().write_slice(&bytes[at..at + len as usize], GuestAddress(addr)).unwrap();
            at += len as usize;
        }
    }

    fn get(&self, buffers: &[(u64, u32)]) -> Vec<u8> {
        let mut bytes = Vec::new();
        for &(addr, len) in buffers {
            let mut part = vec![0; len as usize];
            self.ram.memory().read_slice(&mut part, GuestAddress(addr)).unwrap();
            bytes.extend(part);
        }
        bytes
    }

    /// Adds a request to queue `queue`, in buffers of lengths `cuts`. `None` if the queue has too
    /// few free descriptors. Does not kick.
    pub(crate) fn submit_cut(
        &mut self,
        queue: usize,
        (kind, sector): (u32, u64),
        data: &[u8],
        read_len: u32,
        cuts: &[u32],
        indirect: bool,
    ) -> Option<Submitted> {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes(), data].concat();
        let readable = self.cut(header.len() as u32, cuts);
        self.put(&readable, &header);
        let writable = self.cut(read_len + 1, cuts);
        self.put(&writable, &vec![0xee; read_len as usize + 1]);
        let head = if indirect {
            let table = self.alloc(16 * (readable.len() + writable.len()) as u32);
            self.drivers[queue].add_indirect(table, &readable, &writable)
        } else {
            self.drivers[queue].add(&readable, &writable)
        }?;
        Some(Submitted { head, writable })
    }

    /// Adds a request to queue `queue` in the usual three buffers. Does not kick.
    pub(crate) fn submit(
        &mut self,
        queue: usize,
        kind: u32,
        sector: u64,
        data: &[u8],
        read_len: u32,
    ) -> Submitted {
        let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        let mut readable = vec![(self.alloc(16), 16)];
        self.put(&readable, &header);
        if !data.is_empty() {
            let buffer = [(self.alloc(data.len() as u32), data.len() as u32)];
            self.put(&buffer, data);
            readable.extend(buffer);
        }
        let mut writable = Vec::new();
        if read_len > 0 {
            writable.push((self.alloc(read_len), read_len));
        }
        writable.push((self.alloc(1), 1));
        self.put(&writable[writable.len() - 1..], &[0xee]);
        let head = self.drivers[queue].add(&readable, &writable).expect("the queue has free descriptors");
        Submitted { head, writable }
    }

    /// Publishes what was added, and kicks if the device wants that.
    pub(crate) fn kick(&mut self, queue: usize) {
        self.drivers[queue].enable_interrupts();
        if self.drivers[queue].publish() {
            self.kicks[queue].signal();
        }
    }

    /// Kicks without a new request.
    pub(crate) fn kick_for_nothing(&self, queue: usize) {
        self.kicks[queue].signal();
    }

    /// The result of `submitted`.
    pub(crate) fn response(&self, submitted: &Submitted, used: Used) -> Response {
        assert_eq!(used.head, submitted.head);
        let mut data = self.get(&submitted.writable);
        let status = data.pop().unwrap();
        Response { status, data, written: used.written }
    }

    /// Runs the worker until queue `queue` has `count` completions, and takes them.
    pub(crate) fn wait(&mut self, queue: usize, count: usize) -> Vec<Used> {
        let driver = &mut self.drivers[queue];
        let mut got = Vec::new();
        self.worker.run_until(|| {
            while got.len() < count
                && let Some(used) = driver.take_used()
            {
                got.push(used);
            }
            got.len() == count
        });
        got
    }

    /// Like [`Guest::wait`], with a clock that runs: for devices with rate limits.
    pub(crate) fn wait_in_time(&mut self, queue: usize, count: usize) -> Vec<Used> {
        let mut got = Vec::new();
        loop {
            self.worker.run();
            assert_eq!(self.interrupt.broken(), Vec::<String>::new());
            got.extend(std::iter::from_fn(|| self.drivers[queue].take_used()));
            if got.len() >= count {
                assert_eq!(got.len(), count);
                return got;
            }
            match self.worker.next_timer() {
                Some(at) => self.worker.advance(at.saturating_sub(self.worker.now())),
                None => got.extend(self.wait(queue, 1)),
            }
        }
    }

    /// Like [`Guest::read`], with a clock that runs.
    pub(crate) fn read_in_time(&mut self, sector: u64, count: u32) -> (u8, Vec<u8>) {
        let submitted = self.submit(0, IN, sector, &[], count * 512);
        self.kick(0);
        let used = self.wait_in_time(0, 1)[0];
        let response = self.response(&submitted, used);
        self.forget();
        (response.status, response.data)
    }

    /// One request, from start to end.
    pub(crate) fn one(&mut self, kind: u32, sector: u64, data: &[u8], read_len: u32) -> Response {
        let submitted = self.submit(0, kind, sector, data, read_len);
        self.kick(0);
        let used = self.wait(0, 1)[0];
        let response = self.response(&submitted, used);
        self.next_addr = ARENA;
        response
    }

    pub(crate) fn read(&mut self, sector: u64, count: u32) -> (u8, Vec<u8>) {
        let response = self.one(IN, sector, &[], count * 512);
        assert_eq!(response.written, if response.status == 0 { count * 512 + 1 } else { 0 });
        (response.status, response.data)
    }

    pub(crate) fn write(&mut self, sector: u64, data: &[u8]) -> u8 {
        let response = self.one(OUT, sector, data, 0);
        assert_eq!(response.written, 1);
        response.status
    }

    /// Frees the memory of requests, none of which may be in flight.
    pub(crate) fn forget(&mut self) {
        assert!(self.drivers.iter().all(|driver| driver.out() == 0));
        self.next_addr = ARENA;
    }
}

/// The payload of a discard or write-zeroes.
pub(crate) fn ranges(ranges: &[(u64, u32, u32)]) -> Vec<u8> {
    let one = |&(sector, count, flags): &(u64, u32, u32)| {
        [&sector.to_le_bytes()[..], &count.to_le_bytes(), &flags.to_le_bytes()].concat()
    };
    ranges.iter().flat_map(one).collect()
}

/// A file of `sectors` sectors with a pattern, and the options to open it.
pub(crate) fn disk(dir: &Path, sectors: u64, engine: IoEngine) -> (DiskOptions, Vec<u8>) {
    let content = pattern(0x77, 0, sectors * SECTOR);
    let path = dir.join("disk");
    std::fs::write(&path, &content).unwrap();
    (DiskOptions { lock: false, ..raw(&path, engine) }, content)
}
