//! The time of writing and restoring images:
//! `cargo bench -p vesta-memory --bench snapshot [-- DIRECTORY]`.
//!
//! Medians of eleven rounds, in DIRECTORY (default: the current one), with and without the time of
//! the sync.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use config::HugePages;
use vesta_memory::GuestRam;
use vesta_memory::image::write_full;
use vesta_memory::pages::PAGE;
use vm_memory::{Bytes, GuestAddress};

const ROUNDS: usize = 11;

fn median(mut times: Vec<Duration>) -> Duration {
    times.sort();
    times[times.len() / 2]
}

/// A guest of which every `stride`th block of 16 pages is used.
fn guest(mib: u32, stride: u64, huge_pages: HugePages) -> GuestRam {
    let ram = GuestRam::map(mib, huge_pages, false).expect("memory can be mapped");
    let block = vec![0x5a; 16 * PAGE as usize];
    for start in (0..ram.size()).step_by((stride * 16 * PAGE) as usize) {
        ram.memory().write_slice(&block, GuestAddress(start)).expect("RAM");
    }
    ram
}

fn measure(name: &str, dir: &Path, ram: &GuestRam) {
    let path = dir.join(format!("bench-{}.mem", std::process::id()));
    let (mut scan, mut write, mut sync, mut restore, mut bytes) = (vec![], vec![], vec![], vec![], 0);
    for _ in 0..ROUNDS {
        let start = Instant::now();
        ram.changed_pages().expect("the page tables can be read");
        scan.push(start.elapsed());
        let start = Instant::now();
        let image = write_full(ram, &path, &()).expect("the disk has space");
        bytes = image.data_bytes;
        let info = image.info.clone();
        write.push(start.elapsed());
        let start = Instant::now();
        image.file.commit().expect("the file can be named");
        sync.push(start.elapsed());
        let start = Instant::now();
        let clone = GuestRam::from_file(&info.layout, &path, HugePages::None, false).expect("the image maps");
        clone.memory().read_obj::<u8>(GuestAddress(0)).expect("RAM");
        restore.push(start.elapsed());
        drop(clone);
        std::fs::remove_file(&path).expect("the file exists");
    }
    let mib = bytes >> 20;
    let [scan, write, sync, restore] = [scan, write, sync, restore].map(median);
    println!("| {name} | {mib} MiB | {scan:.2?} | {write:.2?} | {sync:.2?} | {restore:.2?} |");
}

fn main() {
    let dir =
        std::env::args().skip(1).find(|a| !a.starts_with("--")).map_or(PathBuf::from("."), PathBuf::from);
    println!("| guest | data | which pages | full image | synced and named | restored, first page read |");
    println!("|---|---|---|---|---|---|");
    measure("128 MiB, 1 MiB used", &dir, &guest(128, 128, HugePages::None));
    measure("128 MiB, all used", &dir, &guest(128, 1, HugePages::None));
    measure("2 GiB, 10% used", &dir, &guest(2048, 10, HugePages::None));
    measure("2 GiB, 10% used, huge pages", &dir, &guest(2048, 10, HugePages::Transparent));
}
