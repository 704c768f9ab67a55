//! How fast a disk is through the device's own path, beside the bare file: `cargo run --release --example disk_bench -- FILE`.
//!
//! Without FILE it uses a temporary file of 1 GiB. For each engine and the bare file it prints random 4 KiB reads and writes, one at
//! a time and 32 at a time: operations per second, microseconds each, and microseconds of processor time each, those of the
//! kernel's own threads for this process included.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use config::{CacheType, HugePages, IoEngine, Overlay};
use memory::GuestRam;
use rustix::event::{PollFd, PollFlags};
use vesta_virtio::block::buffers::Direction;
use vesta_virtio::block::disk::{Disk, DiskOptions};
use vesta_virtio::block::engine::Patience;
use vesta_virtio::block::queue::{DiskQueue, Request};
use vesta_virtio::queue::GuestBuffer;

const BLOCK: u64 = 4096;
const TIME: Duration = Duration::from_secs(2);

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let dir = tempfile::tempdir()?;
    let path = std::env::args_os().nth(1).map_or_else(|| dir.path().join("disk"), PathBuf::from);
    if !path.exists() {
        let mut file = File::create(&path)?;
        for _ in 0..1024 {
            file.write_all(&vec![0x5a; 1 << 20])?;
        }
        file.sync_all()?;
    }
    println!("{:<18} {:>5} {:>4} {:>10} {:>9} {:>9}", "", "", "QD", "IOPS", "us", "cpu us");
    for write in [false, true] {
        bare(&path, write)?;
        for (engine, patience, overlaid) in [
            (IoEngine::Async, Patience::None, false),
            (IoEngine::Async, Patience::None, true),
            (IoEngine::Async, Patience::MayWait, false),
            (IoEngine::Async, Patience::MayWait, true),
            (IoEngine::Sync, Patience::None, false),
            (IoEngine::Sync, Patience::MayWait, false),
            (IoEngine::Sync, Patience::MayWait, true),
        ] {
            for overlay in [overlaid.then(|| dir.path().join("overlay"))] {
                let overlay = overlay.map(|path| Overlay { path, layers: vec![], size_mib: None });
                if let Some(overlay) = &overlay
                    && overlay.path.exists()
                {
                    std::fs::remove_file(&overlay.path)?;
                }
                let own = if patience == Patience::MayWait { " own" } else { "" };
                let name = format!("{engine:?}{own}{}", if overlaid { " overlay" } else { "" });
                let disk = Disk::open(&DiskOptions {
                    path: path.clone(),
                    read_only: false,
                    cache_type: CacheType::Unsafe,
                    engine: Some(engine),
                    overlay,
                })?;
                for depth in [1, 32] {
                    let mut queue = disk.queue(patience)?;
                    let mut run = Run::begin(&name, write, depth);
                    serve(&mut queue, &disk, write, depth, &mut run);
                    run.end();
                }
            }
        }
    }
    Ok(())
}

/// Reads or writes with one system call each, from this thread.
fn bare(path: &Path, write: bool) -> std::io::Result<()> {
    let file = File::options().read(true).write(true).open(path)?;
    let blocks = file.metadata()?.len() / BLOCK;
    let mut buffer = vec![1; BLOCK as usize];
    let mut run = Run::begin("bare file", write, 1);
    while run.goes_on() {
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
        let buffer = GuestBuffer { addr: u64::from(token) * BLOCK, len: BLOCK as u32 };
        let direction = if write { Direction::FromGuest } else { Direction::ToGuest };
        buffers.push(&ram, buffer, direction).expect("in memory");
        let offset = run.random() % blocks * BLOCK;
        let request = if write { Request::Write(buffers) } else { Request::Read(buffers) };
        queue.start(token, offset, request);
    };
    (0..depth).for_each(|token| start(queue, run, token));
    loop {
        queue.kick();
        let mut any = false;
        let goes_on = run.goes_on();
        while let Some((token, result)) = queue.finished() {
            result.expect("the disk works");
            run.count += 1;
            any = true;
            if goes_on {
                start(queue, run, token);
            }
        }
        if queue.in_flight() == 0 {
            break;
        }
        if any || queue.has_more() {
            continue;
        }
        queue.settle();
        if !queue.has_more()
            && let Some(event) = queue.event()
        {
            let mut fds = [PollFd::from_borrowed_fd(event, PollFlags::IN)];
            rustix::event::poll(&mut fds, None).expect("poll");
        }
    }
    queue.drain();
}

/// One measurement.
struct Run {
    what: String,
    count: u64,
    begin: Instant,
    cpu: Duration,
    state: u64,
}

impl Run {
    fn begin(name: &str, write: bool, depth: u32) -> Run {
        let what = format!("{name:<18} {:>5} {depth:>4}", if write { "write" } else { "read" });
        Run { what, count: 0, begin: Instant::now(), cpu: cpu_time(), state: 88172645463325252 }
    }

    fn goes_on(&self) -> bool {
        !self.count.is_multiple_of(64) || self.begin.elapsed() < TIME
    }

    fn random(&mut self) -> u64 {
        self.state ^= self.state << 13;
        self.state ^= self.state >> 7;
        self.state ^= self.state << 17;
        self.state >> 8
    }

    fn end(self) {
        let (wall, cpu) = (self.begin.elapsed(), cpu_time().saturating_sub(self.cpu));
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

/// Processor time of this process, whose threads `io_uring`'s workers are.
fn cpu_time() -> Duration {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::ProcessCPUTime);
    Duration::new(now.tv_sec.cast_unsigned(), now.tv_nsec.cast_unsigned() as u32)
}
