//! Disks for fuzzing: those that a hostile guest is let loose on, and overlays that somebody has tampered with.

use std::fs::File;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;
use std::path::PathBuf;

use config::{CacheType, IoEngine, Overlay};
use rustix::fs::MemfdFlags;

use super::buffers::Direction;
use super::disk::{Disk, DiskOptions};
use super::engine::Patience;
use super::queue::Request;
use crate::fuzz::Input;
use crate::queue::GuestBuffer;
use crate::testing::reused_ram;

/// The file of an overlay in which somebody has changed what they liked, with checksums that fit or not. It is refused or it is a disk.
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
        let mut queue = disk.queue(Patience::MayWait).expect("a disk can be served");
        for token in 0..u32::from(input.u8() % 16) {
            let (offset, len) =
                (u64::from(input.u32()) % (48 << 20) & !511, 512 * (1 + u32::from(input.u8())));
            let mut buffers = queue.buffers();
            let request = match input.u8() % 4 {
                0 => Request::Discard { len: u64::from(len) << 8 },
                1 => Request::Flush,
                act => {
                    let direction = if act == 2 { Direction::ToGuest } else { Direction::FromGuest };
                    buffers.push(&ram, GuestBuffer { addr: 0, len }, direction).expect("it is in RAM");
                    if act == 2 { Request::Read(buffers) } else { Request::Write(buffers) }
                }
            };
            queue.start(token, offset, request);
        }
        queue.drain();
        while queue.finished().is_some() {}
        assert_eq!(queue.in_flight(), 0);
    };
    some_requests(&mut input, &Disk::open(&options).expect("an overlay can be made"));
    for _ in 0..usize::from(input.u8() % 16) {
        // Header, session and maps; all but the last few bytes are of no interest elsewhere.
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
    /// Larger than a page of an overlay's map, and than what is worked off at once.
    pub(crate) large: bool,
    /// With Async its ring is waited for.
    pub(crate) engine: IoEngine,
}

impl FuzzedDisk {
    /// The disk: the same files each time on this thread, with an overlay of its own.
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
        disk.settled = true;
        disk
    }
}
