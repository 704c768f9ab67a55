//! Speed of a disk: of the bare file, of a [`DiskQueue`], and of the whole device from the driver's
//! kick to its interrupt, through a worker.
//!
//! `cargo bench -p vesta-block --features testing --bench disk -- [FILE]`. Without FILE it uses a
//! temporary file of 1 GiB. It does random reads and writes of 4 KiB, one at a time and 32 at a
//! time, and prints operations per second, microseconds of time each, and microseconds of CPU time
//! each. The driver's own CPU time is not counted; that of the kernel's threads for this process
//! is. The numbers are meaningful only on an idle machine.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use config::{CacheType, HugePages, IoEngine, Overlay};
use memory::GuestRam;
use memory::iovec::Access;
use rustix::event::{PollFd, PollFlags};
use sync::EventFd;
use vesta_block::disk::queue::DiskQueue;
use vesta_block::disk::{Disk, DiskOptions};
use vesta_block::engine::Blocking;
use vesta_block::io_request::Request;
use vesta_block::{Block, BlockConfig};
use virtio::device::{Activation, ActiveQueue, Device, Interrupt, feature};
use virtio::queue::Queue;
use virtio::rate_limiter::RateLimiterConfig;
use virtio::testing::{DriverQueue, guest_ram};
use virtio::worker::Workers;
use vm_memory::{Bytes, GuestAddress};

const BLOCK: u64 = 4096;
const TIME: Duration = Duration::from_secs(2);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let argument = std::env::args_os().skip(1).find(|argument| argument != "--bench");
    let path = argument.map_or_else(|| dir.path().join("disk"), PathBuf::from);
    if !path.exists() {
        let mut file = File::create(&path)?;
        for _ in 0..1024 {
            file.write_all(&vec![0x5a; 1 << 20])?;
        }
        file.sync_all()?;
    }
    println!("{:<26} {:>5} {:>4} {:>10} {:>9} {:>9}", "", "", "QD", "IOPS", "us", "cpu us");
    for write in [false, true] {
        bare(&path, write)?;
        for (engine, blocking, overlaid) in [
            (IoEngine::Async, Blocking::Never, false),
            (IoEngine::Async, Blocking::Never, true),
            (IoEngine::Async, Blocking::Allowed, false),
            (IoEngine::Async, Blocking::Allowed, true),
            (IoEngine::Sync, Blocking::Allowed, false),
            (IoEngine::Sync, Blocking::Allowed, true),
        ] {
            for overlay in [overlaid.then(|| dir.path().join("overlay"))] {
                let overlay = overlay.map(|path| Overlay { path, layers: vec![], size_mib: None });
                if let Some(overlay) = &overlay
                    && overlay.path.exists()
                {
                    std::fs::remove_file(&overlay.path)?;
                }
                let own = if blocking == Blocking::Allowed { " own" } else { "" };
                let name = format!("{engine:?}{own}{}", if overlaid { " overlay" } else { "" });
                let disk = Disk::open(&DiskOptions {
                    path: path.clone(),
                    read_only: false,
                    cache_type: CacheType::Unsafe,
                    engine: Some(engine),
                    overlay,
                    io_threads: 1,
                    lock: true,
                    name_is_durable: true,
                })?;
                for depth in [1, 32] {
                    device(&name, &disk, blocking, write, depth)?;
                }
                for depth in [1, 32] {
                    let mut queue = disk.queue(blocking)?;
                    let mut run = Run::begin(&name, write, depth);
                    serve(&mut queue, &disk, write, depth, &mut run);
                    run.end();
                }
            }
        }
    }
    Ok(())
}

/// Reads or writes with one system call each, on this thread.
fn bare(path: &Path, write: bool) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let blocks = file.metadata()?.len() / BLOCK;
    let mut buffer = vec![1; BLOCK as usize];
    let mut run = Run::begin("bare file", write, 1);
    while run.is_running() {
        let offset = run.random() % blocks * BLOCK;
        if write {
            file.write_all_at(&buffer, offset)?;
        } else {
            file.read_exact_at(&mut buffer, offset)?;
        }
        run.count += 1;
    }
    run.end();
    Ok(())
}

/// Keeps `depth` requests in flight, as a worker would.
fn serve(queue: &mut DiskQueue, disk: &Disk, write: bool, depth: u32, run: &mut Run) {
    let ram = GuestRam::map(4, HugePages::None, false).expect("memory for buffers");
    let blocks = disk.size() / BLOCK;
    let start = |queue: &mut DiskQueue, run: &mut Run, token: u32| {
        let mut buffers = queue.buffers();
        let access = if write { Access::Read } else { Access::Write };
        buffers.push_merged(&ram, u64::from(token) * BLOCK, BLOCK as usize, access).expect("in memory");
        let offset = run.random() % blocks * BLOCK;
        let request = if write { Request::Write(buffers) } else { Request::Read(buffers) };
        queue.enqueue(token, offset, request);
    };
    (0..depth).for_each(|token| start(queue, run, token));
    loop {
        queue.submit_and_reap();
        let mut any = false;
        let is_running = run.is_running();
        while let Some((token, result)) = queue.pop_completion() {
            result.expect("the disk works");
            run.count += 1;
            any = true;
            if is_running {
                start(queue, run, token);
            }
        }
        if queue.in_flight() == 0 {
            break;
        }
        if any || queue.has_more() {
            continue;
        }
        if let Some(event) = queue.event() {
            let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
            rustix::event::poll(&mut fds, None).expect("poll");
        }
    }
    queue.drain();
}

/// The whole device, with a driver that keeps `depth` requests in flight and sleeps until its
/// interrupt.
fn device(
    name: &str,
    disk: &Disk,
    blocking: Blocking,
    write: bool,
    depth: u32,
) -> Result<(), Box<dyn std::error::Error>> {
    const SIZE: u16 = 256;
    const DATA: u64 = 1 << 20;
    let workers = Workers::start(1)?;
    let own = match blocking {
        Blocking::Never => vec![],
        Blocking::Allowed => vec![workers.dedicated()?],
    };
    let config = BlockConfig { id: "bench".into(), num_queues: 1, queue_size: SIZE, io_threads: 1 };
    let (mut block, _control) = Block::new(config, disk.clone(), RateLimiterConfig::default(), own, 0)?;
    let ram = guest_ram(4);
    let mut driver = DriverQueue::new(&ram, 0x1000, SIZE, FEATURES);
    let queue = Queue::new(0, SIZE, &driver.state(), FEATURES, &ram, Arc::default())?;
    let kick = Arc::new(EventFd::new()?);
    let irq = Arc::new(Irq(EventFd::new()?));
    let activation = Activation {
        memory: ram.clone(),
        queues: vec![ActiveQueue { queue, kick: Arc::clone(&kick) }],
        interrupt: Arc::clone(&irq) as Arc<dyn Interrupt>,
        features: FEATURES,
        restored: false,
    };
    for task in block.activate(activation)? {
        workers.add(task, Arc::clone(&irq) as Arc<dyn Interrupt>);
    }
    let blocks = disk.size() / BLOCK;
    let mut run = Run::begin(&format!("{name} device"), write, depth);
    let mut slots: Vec<u64> = (0..u64::from(depth)).collect();
    let mut slot_of = vec![0; usize::from(SIZE)];
    loop {
        while run.is_running()
            && let Some(slot) = slots.pop()
        {
            let place = DATA + slot * 0x2000;
            let sector = run.random() % blocks * (BLOCK / 512);
            let header = [&u32::from(write).to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
            ram.memory().write_slice(&header, GuestAddress(place))?;
            let (header, data, status) = ((place, 16), (place + 0x1000, BLOCK as u32), (place + 64, 1));
            let head = if write {
                driver.add_indirect(place + 128, &[header, data], &[status])
            } else {
                driver.add_indirect(place + 128, &[header], &[data, status])
            };
            slot_of[usize::from(head.ok_or("the queue is full")?)] = slot;
        }
        if driver.out() == 0 {
            break;
        }
        if driver.publish() {
            kick.signal();
        }
        while !driver.enable_interrupts() {
            rustix::event::poll(&mut [PollFd::new(&irq.0, PollFlags::IN)], None)?;
            irq.0.take();
        }
        while let Some(used) = driver.take_used() {
            let slot = slot_of[usize::from(used.head)];
            let status: u8 = ram.memory().read_obj(GuestAddress(DATA + slot * 0x2000 + 64))?;
            assert_eq!(status, 0, "the disk works");
            slots.push(slot);
            run.count += 1;
        }
    }
    run.end();
    workers.stop();
    Ok(())
}

const FEATURES: u64 = feature::VERSION_1 | feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;

struct Irq(EventFd);

impl Interrupt for Irq {
    fn queue(&self, _: u16) {
        self.0.signal();
    }
    fn config(&self) {}
    fn needs_reset(&self, why: &dyn std::fmt::Display) {
        panic!("{why}");
    }
}

/// One measurement.
struct Run {
    what: String,
    count: u64,
    begin: Instant,
    driver: bool,
    cpu: Duration,
    state: u64,
}

impl Run {
    fn begin(name: &str, write: bool, depth: u32) -> Run {
        let driver = name.ends_with("device");
        let what = format!("{name:<26} {:>5} {depth:>4}", if write { "write" } else { "read" });
        Run { what, count: 0, begin: Instant::now(), driver, cpu: cpu_time(driver), state: 88172645463325252 }
    }

    fn is_running(&self) -> bool {
        !self.count.is_multiple_of(64) || self.begin.elapsed() < TIME
    }

    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state >> 8
    }

    fn end(self) {
        let (wall, cpu) = (self.begin.elapsed(), cpu_time(self.driver).saturating_sub(self.cpu));
        #[expect(clippy::cast_precision_loss, reason = "it is printed with few digits")]
        let count = self.count as f64;
        println!(
            "{} {:>10.0} {:>9.2} {:>9.2}",
            self.what,
            count / wall.as_secs_f64(),
            wall.as_secs_f64() * 1e6 / count,
            cpu.as_secs_f64() * 1e6 / count,
        );
    }
}

/// CPU time of this process, which includes the worker threads of `io_uring`; without that of the
/// driver's thread if there is one.
fn cpu_time(driver: bool) -> Duration {
    let process = clock(rustix::time::ClockId::ProcessCPUTime);
    let own = clock(rustix::time::ClockId::ThreadCPUTime);
    if driver { process.saturating_sub(own) } else { process }
}

fn clock(id: rustix::time::ClockId) -> Duration {
    let now = rustix::time::clock_gettime(id);
    Duration::new(now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned() as u32)
}
