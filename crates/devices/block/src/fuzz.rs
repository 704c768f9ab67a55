//! Fuzz targets: a hostile guest on a disk, and overlay files with random changes.

use crate::{Block, BlockConfig, BlockState};
use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::time::Duration;
use virtio::fuzz::{BASE, DATA, Input, MAX_ACTS, NO_LIMIT, SIZE, common_act, limits, new_guest, still_whole};
use virtio::rate_limiter::RateLimiterUpdate;
use virtio::testing::{DriverQueue, Guest, Kind, TestWorker, worker};
use vm_memory::{Bytes, GuestAddress};

use config::{CacheType, IoEngine, Overlay};
use memory::iovec::Access;
use rustix::fs::MemfdFlags;

use super::disk::{Disk, DiskOptions};
use super::engine::Blocking;
use super::io_request::Request;
use virtio::testing::reused_ram;

/// An overlay file with random changes, and with or without valid checksums. It is refused or works
/// as a disk.
pub fn overlay(data: &[u8]) {
    const SIZE: u64 = 40 << 20;
    let mut input = Input(data);
    let (base, top) = (in_memory(SIZE), in_memory(0));
    let options = DiskOptions {
        path: path_of(&base),
        read_only: false,
        cache_type: if input.u8() & 1 == 0 { CacheType::Writeback } else { CacheType::Unsafe },
        engine: Some(IoEngine::Sync),
        overlay: Some(Overlay { path: path_of(&top), layers: vec![], size_mib: None }),
        io_threads: 1,
        lock: false,
        name_is_durable: true,
    };
    let ram = reused_ram(1);
    let some_requests = |input: &mut Input<'_>, disk: &Disk| {
        let mut queue = disk.queue(Blocking::Allowed).expect("a disk can be served");
        for token in 0..u32::from(input.u8() % 16) {
            let (offset, len) =
                (u64::from(input.u32()) % (48 << 20) & !511, 512 * (1 + u32::from(input.u8())));
            let mut buffers = queue.buffers();
            let request = match input.u8() % 4 {
                0 => Request::Discard { len: u64::from(len) << 8 },
                1 => Request::Flush,
                act => {
                    let access = if act == 2 { Access::Write } else { Access::Read };
                    buffers.push_merged(&ram, 0, len as usize, access).expect("it is in RAM");
                    if act == 2 { Request::Read(buffers) } else { Request::Write(buffers) }
                }
            };
            queue.enqueue(token, offset, request);
        }
        queue.drain();
        while queue.pop_completion().is_some() {}
        assert_eq!(queue.in_flight(), 0);
    };
    some_requests(&mut input, &Disk::open(&options).expect("an overlay can be made"));
    for _ in 0..usize::from(input.u8() % 16) {
        // Header, session and maps; only the last few bytes of the file matter elsewhere.
        let (at, byte) = (u64::from(input.u16()) % 32768, [input.u8()]);
        let at = if input.u8() < 128 { at % 80 + (at & 4096) } else { at };
        top.write_all_at(&byte, at).expect("a file in memory can be written");
    }
    if input.u8() < 200 {
        for (start, len) in [(0, 80), (4096, 40)] {
            let mut bytes = vec![0; len];
            top.read_exact_at(&mut bytes, start).expect("it is there");
            let crc = crc32fast::hash(&bytes[..len - 4]).to_le_bytes();
            top.write_all_at(&crc, start + len as u64 - 4).expect("a file in memory can be written");
        }
    }
    if input.u8() < 40 {
        top.set_len(u64::from(input.u32() % (64 << 20))).expect("a file in memory has any size");
    }
    for read_only in [true, false, false] {
        if let Ok(disk) = Disk::open(&DiskOptions { read_only, ..options.clone() }) {
            some_requests(&mut input, &disk);
        }
    }
}

fn in_memory(len: u64) -> File {
    let fd = rustix::fs::memfd_create("disk", MemfdFlags::CLOEXEC).expect("a file in memory can be made");
    let file = File::from(fd);
    file.set_len(len).expect("a file in memory has any size");
    file
}

fn path_of(file: &File) -> PathBuf {
    format!("/proc/self/fd/{}", file.as_raw_fd()).into()
}

/// A disk in memory.
pub(crate) struct FuzzedDisk {
    pub(crate) read_only: bool,
    pub(crate) cache_type: CacheType,
    pub(crate) overlaid: bool,
    /// Larger than a page of an overlay's map, and than a part of a request.
    pub(crate) large: bool,
    /// With Async, every transfer goes through the ring.
    pub(crate) engine: IoEngine,
}

impl FuzzedDisk {
    /// Opens the disk: the same files each time on this thread, with a new overlay.
    pub(crate) fn open(&self) -> Disk {
        thread_local! {
            static FILES: [File; 2] = [in_memory(100 * 512), in_memory(20 << 20)];
        }
        let path = FILES.with(|files| path_of(&files[usize::from(self.large)]));
        let overlay = self.overlaid.then(|| in_memory(0));
        let overlay_at =
            overlay.as_ref().map(|file| Overlay { path: path_of(file), layers: vec![], size_mib: None });
        let options = DiskOptions {
            path,
            read_only: self.read_only,
            cache_type: self.cache_type,
            engine: Some(self.engine),
            overlay: overlay_at,
            io_threads: 1,
            lock: false,
            name_is_durable: true,
        };
        let mut disk = Disk::open(&options).expect("a file in memory can be opened");
        disk.draining = true;
        disk
    }
}

/// A hostile guest on a disk. The first byte of `data` selects the transport and the kind of disk.
///
/// All requests are complete when the worker has run: the disk is synchronous, or the worker waits
/// for its `io_uring`. So a run is deterministic, except for the order of requests that are in a
/// ring at the same time.
pub fn device(data: &[u8]) {
    let mut input = Input(data);
    let how = input.u8();
    let kind = if how & 1 == 0 { Kind::Mmio } else { Kind::Pci };
    let disk = FuzzedDisk {
        read_only: how & 2 != 0,
        cache_type: if how & 4 != 0 { CacheType::Writeback } else { CacheType::Unsafe },
        // A read-only overlay would have to exist already.
        overlaid: how & 0xa == 8,
        large: how & 16 != 0,
        // A ring is slow to set up, so only one run in four has one.
        engine: if how & 0xc0 == 0x40 { IoEngine::Async } else { IoEngine::Sync },
    };
    let num_queues = if how & 32 != 0 { 2 } else { 1 };
    let config = BlockConfig { id: "fuzzed".into(), num_queues, queue_size: SIZE, io_threads: 1 };
    let workers = vec![worker(0)];
    let (device, mut control) = Block::new(config, disk.open(), limits(&mut input), workers.clone(), 1)
        .expect("a device can be made");
    let mut guest = new_guest(kind, Box::new(device));
    let mut driver = Some(guest.start(BASE, SIZE, true));
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 18 {
            0 => guest.worker.advance(u64::from(input.u32())),
            1 => control.update_limits(limits(&mut input), guest.worker.now()),
            2 => {
                let mut state = guest.save();
                let own: BlockState = state.common().device.decode().expect("the state is this device's");
                let worker = TestWorker::new();
                let device;
                (device, control) = Block::restore(&own, disk.open(), workers.clone(), worker.now())
                    .expect("what was saved can be restored");
                let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), worker);
                copy.restore(&state).expect("what was saved can be restored");
                guest = copy;
            }
            3 => {
                let mut replaced = control.replace(disk.open()).expect("the same disk can be opened again");
                guest.worker.run();
                replaced.wait(Duration::ZERO).expect("nothing is in flight");
            }
            4 | 16 | 17 => good_request(&mut input, &mut guest, &mut driver),
            act => common_act(act, &mut input, &mut guest, &mut driver),
        }
        guest.worker.run();
    }
    control.update_limits(
        RateLimiterUpdate { bandwidth: Some(NO_LIMIT), ops: Some(NO_LIMIT) },
        guest.worker.now(),
    );
    still_whole(&mut guest);
}

/// A request that is mostly well-formed: a header, some data, a status byte.
fn good_request(input: &mut Input<'_>, guest: &mut Guest, driver: &mut Option<DriverQueue>) {
    let Some(driver) = driver else { return };
    let kind = [0u32, 1, 4, 8, 11, 13, 0, 1, 11, 13, 2, 0xffff][usize::from(input.u8() % 12)];
    let sector = if input.u8() < 240 { u64::from(input.u8()) } else { input.u64() };
    let len = if input.u8() < 200 { u32::from(input.u8() % 9) * 512 } else { u32::from(input.u16()) };
    let header = [&kind.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
    let range = [
        &sector.to_le_bytes()[..],
        &u32::from(input.u8()).to_le_bytes(),
        &u32::from(input.u8() % 3).to_le_bytes(),
    ]
    .concat();
    let memory = guest.ram.memory();
    memory.write_slice(&[header, range].concat(), GuestAddress(DATA)).expect("it is in RAM");
    let data = (DATA + 0x1000 + u64::from(input.u8()) * 16, len);
    let head = (DATA, 16);
    let status = (DATA + 0x800, 1);
    let added = match kind {
        0 | 8 => driver.add(&[head], &[data, status]),
        1 => driver.add(&[head, data], &[status]),
        _ => driver.add(&[(DATA, 16 + 16 * u32::from(input.u8() % 3))], &[status]),
    };
    if added.is_some() {
        driver.publish();
        guest.kick(0);
        guest.worker.run();
    }
    // A correct driver takes its completions. Other acts test drivers that do not.
    if driver.out() > usize::from(SIZE) / 2 {
        *driver = guest.start(BASE, SIZE, true);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio::fuzz::seeded;

    #[test]
    fn random_guests_do_not_break_block() {
        seeded(device, 2_000);
    }

    #[test]
    fn random_overlay_files_are_refused_or_work() {
        seeded(overlay, 1_000);
    }
}
