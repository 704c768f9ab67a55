//! The time of fork(2) with a guest's memory, all of it touched:
//! `cargo bench -p vesta-memory --bench fork`.
//!
//! Medians of eleven rounds. The child exits at once.

use std::time::{Duration, Instant};

use config::HugePages;
use vesta_memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

const ROUNDS: usize = 11;

/// Forks once. Returns the time that the parent spends in fork(2).
fn fork_once() -> Duration {
    let start = Instant::now();
    // SAFETY: the child calls nothing but `_exit`.
    let child = unsafe { libc::fork() };
    if child == 0 {
        // SAFETY: exits the child without running the parent's exit handlers.
        unsafe { libc::_exit(0) };
    }
    let took = start.elapsed();
    assert!(child > 0, "fork: {}", std::io::Error::last_os_error());
    let mut status = 0;
    // SAFETY: waits for a child of this process.
    let waited = unsafe { libc::waitpid(child, &raw mut status, 0) };
    assert_eq!((waited, status), (child, 0));
    took
}

fn measure(mib: u32, huge_pages: HugePages, image: bool) {
    let mut ram = GuestRam::map(mib, huge_pages, false).expect("memory can be mapped");
    let file = tempfile::NamedTempFile::new().expect("a temporary file");
    if image {
        file.as_file().set_len(ram.size()).expect("a sparse file");
        ram = GuestRam::from_file(&ram.layout().clone(), file.path(), huge_pages, false).expect("it maps");
    }
    let mebibyte = vec![1; 1 << 20];
    for at in 0..u64::from(mib) {
        ram.memory().write_slice(&mebibyte, GuestAddress(at << 20)).expect("RAM");
    }
    ram.fork_check().expect("private memory");
    let mut times: Vec<_> = (0..ROUNDS).map(|_| fork_once()).collect();
    times.sort();
    let kind = if image { "private mapping of an image" } else { "new memory" };
    println!("| {mib} MiB | {kind} | {huge_pages:?} | {:.2?} |", times[ROUNDS / 2]);
}

fn main() {
    println!("| memory | from | huge pages | fork |\n|---|---|---|---|");
    for mib in [128, 1024, 2048] {
        measure(mib, HugePages::None, false);
        measure(mib, HugePages::Transparent, false);
        measure(mib, HugePages::None, true);
        measure(mib, HugePages::Transparent, true);
    }
}
