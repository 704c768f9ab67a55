//! The time that reading ahead of a guest saves:
//! `cargo bench -p vesta-memory --bench working_set [-- DIRECTORY]`.
//!
//! A guest of 512 MiB has a working set of 64 MiB, in blocks of 16 pages all over its memory, half
//! of them written. The bench measures how long the guest takes to touch all of them, with a warm
//! and a cold page cache. With reading ahead, the guest starts at once, 2 ms later, or when all is
//! filled in.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use config::HugePages;
use vesta_memory::GuestRam;
use vesta_memory::image::{ImageInfo, write_full};
use vesta_memory::pages::PAGE;
use vesta_memory::working_set::{Prefetch, PrefetchOptions, RecordOptions, Recorder, WorkingSet};
use vm_memory::{Bytes, GuestAddress};

const MIB: u32 = 512;
/// Pages in a block.
const BLOCK: u64 = 16;
const ROUNDS: usize = 7;

/// The guest: reads all blocks and writes every other one, in an order that no readahead predicts.
fn touch(ram: &GuestRam) -> Duration {
    let blocks = u64::from(MIB) * 256 / BLOCK;
    let start = Instant::now();
    for n in 0..blocks / 8 {
        let block = n * 1663 % blocks;
        for page in block * BLOCK..(block + 1) * BLOCK {
            let address = GuestAddress(page * PAGE);
            let byte: u8 = ram.memory().read_obj(address).expect("RAM");
            if block.is_multiple_of(2) {
                ram.memory().write_obj(byte, address).expect("RAM");
            }
        }
    }
    start.elapsed()
}

fn measure(
    name: &str,
    path: &Path,
    info: &ImageInfo,
    cold: bool,
    ahead: Option<(&WorkingSet, Option<Duration>)>,
) {
    let mut times: Vec<_> = (0..ROUNDS)
        .map(|_| {
            if cold {
                let file = std::fs::File::open(path).expect("the image");
                rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed).expect("advice");
            }
            let ram =
                GuestRam::from_file(&info.layout, path, HugePages::None, false).expect("the image maps");
            let prefetch = ahead.map(|(set, lead)| {
                let prefetch =
                    Prefetch::start(&ram, set.clone(), PrefetchOptions::default()).expect("a thread");
                match lead {
                    Some(lead) => std::thread::sleep(lead),
                    None => {
                        while !prefetch.is_finished() {
                            std::thread::yield_now();
                        }
                    }
                }
                prefetch
            });
            let took = touch(&ram);
            drop(prefetch);
            took
        })
        .collect();
    times.sort();
    println!("| {} | {name} | {:.2?} |", if cold { "cold" } else { "warm" }, times[ROUNDS / 2]);
}

fn main() {
    let dir =
        std::env::args().skip(1).find(|a| !a.starts_with("--")).map_or(PathBuf::from("."), PathBuf::from);
    let path = dir.join(format!("bench-{}.mem", std::process::id()));
    let ram = GuestRam::map(MIB, HugePages::None, false).expect("memory can be mapped");
    ram.memory().write_slice(&vec![0x5a; (MIB as usize) << 20], GuestAddress(0)).expect("RAM");
    let image = write_full(&ram, &path, &()).expect("the disk has space");
    let info = image.info.clone();
    image.file.commit().expect("the file can be named");
    drop(ram);

    let ram = GuestRam::from_file(&info.layout, &path, HugePages::None, false).expect("the image maps");
    let recorder = Recorder::start(&ram, info.id, RecordOptions::default()).expect("page tables");
    let watched = touch(&ram);
    let set = recorder.finish().expect("page tables");
    println!("{} pages recorded in {} runs, in {watched:.2?} from the disk\n", set.pages(), set.runs().len());
    println!("| page cache | read ahead | touching all |\n|---|---|---|");
    for cold in [false, true] {
        measure("no", &path, &info, cold, None);
        measure("yes, at once", &path, &info, cold, Some((&set, Some(Duration::ZERO))));
        measure("yes, 2 ms before", &path, &info, cold, Some((&set, Some(Duration::from_millis(2)))));
        measure("yes, all of it", &path, &info, cold, Some((&set, None)));
    }
    std::fs::remove_file(&path).expect("the file exists");
}
