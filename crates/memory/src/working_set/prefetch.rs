//! Filling in a working set ahead of the guest.

use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;

use rustix::fs::Advice;
use rustix::io::Errno;

use super::set::{PageRun, WorkingSet, WorkingSetError};
use crate::backing::Backing;
use crate::pages::PAGE;
use crate::ram::GuestRam;
use crate::sys::span::SpanAdvice;
use crate::sys::span_io;

/// Pages that are filled in per step. The thread can be stopped between two steps.
const STEP_PAGES: u64 = 512;
/// How many pages the disk reads ahead of the pages that are filled in.
const READ_AHEAD_PAGES: u64 = 4096;
/// The niceness of the thread, so that the guest's threads have priority.
const NICENESS: i32 = 10;

/// Options of a prefetch.
#[derive(Debug, Clone, Copy)]
pub struct PrefetchOptions {
    /// Copy the pages that the recorded guest wrote. It saves the guest the faults. But each clone
    /// then has private copies of these pages, even if it never writes them.
    pub copy_written: bool,
}

impl Default for PrefetchOptions {
    fn default() -> Self {
        PrefetchOptions { copy_written: true }
    }
}

/// The result of a prefetch.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prefetched {
    /// Pages that were filled in, or were present already.
    pub pages: u64,
    /// Why it ended early: usually not enough memory. The guest faults in the rest itself.
    pub error: Option<Errno>,
}

/// A low-priority thread that fills in a working set. Dropping it stops the thread.
#[derive(Debug)]
pub struct Prefetch {
    stop: Arc<AtomicBool>,
    pages: Arc<AtomicU64>,
    thread: Option<JoinHandle<Option<Errno>>>,
}

impl Prefetch {
    /// Starts filling in `set`, which was loaded for the image that `ram` comes from.
    pub fn start(ram: &GuestRam, set: WorkingSet, options: PrefetchOptions) -> Result<Self, WorkingSetError> {
        let stop = Arc::new(AtomicBool::new(false));
        let pages = Arc::new(AtomicU64::new(0));
        let filler =
            Filler { ram: ram.clone(), set, options, stop: Arc::clone(&stop), pages: Arc::clone(&pages) };
        let thread = sync::thread::spawn("prefetch", None, move || filler.run());
        Ok(Prefetch { stop, pages, thread: Some(thread.map_err(WorkingSetError::Thread)?) })
    }

    /// The number of pages that are filled in so far.
    pub fn pages(&self) -> u64 {
        self.pages.load(Ordering::Relaxed)
    }

    /// Whether the thread has ended.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Waits until the thread has ended.
    pub fn finish(mut self) -> Prefetched {
        self.join()
    }

    /// Stops the thread after at most 2 MiB more, and waits for it. If a page server does not
    /// answer, it waits for the server, or for
    /// [`PageServer::release`](crate::page_server::PageServer::release).
    pub fn stop(mut self) -> Prefetched {
        self.stop.store(true, Ordering::Relaxed);
        self.join()
    }

    fn join(&mut self) -> Prefetched {
        let error = match self.thread.take() {
            Some(thread) => thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)),
            None => None,
        };
        Prefetched { pages: self.pages(), error }
    }
}

impl Drop for Prefetch {
    /// Stops the thread as [`stop`](Self::stop) does, but does not wait for it: the disk of the
    /// memory file may hang. The thread holds a clone of the RAM until it ends.
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

/// The state of the thread.
struct Filler {
    ram: GuestRam,
    set: WorkingSet,
    options: PrefetchOptions,
    stop: Arc<AtomicBool>,
    pages: Arc<AtomicU64>,
}

impl Filler {
    fn run(self) -> Option<Errno> {
        // On Linux this affects only this thread. If it fails, the priority stays as it is.
        let _ = rustix::process::nice(NICENESS);
        let steps: Vec<_> = self.set.runs().iter().flat_map(|run| steps(*run)).collect();
        let (mut advised, mut ahead) = (0, 0);
        for (number, step) in steps.iter().enumerate() {
            while advised < steps.len() && (advised <= number || ahead < READ_AHEAD_PAGES) {
                self.read_ahead(&steps[advised]);
                ahead += steps[advised].count;
                advised += 1;
            }
            if self.stop.load(Ordering::Relaxed) {
                return None;
            }
            if let Err(e) = self.populate(step) {
                return Some(e);
            }
            ahead -= step.count;
            self.pages.fetch_add(step.count, Ordering::Relaxed);
        }
        None
    }

    /// Makes the disk read pages that will be filled in soon.
    fn read_ahead(&self, run: &PageRun) {
        if let Backing::File(file) = self.ram.backing() {
            let region = self.ram.layout().regions()[run.region as usize];
            let len = std::num::NonZeroU64::new(run.count * PAGE);
            // If it fails, the pages are read when they are filled in.
            let _ = rustix::fs::fadvise(file, region.offset + run.first * PAGE, len, Advice::WillNeed);
        }
    }

    fn populate(&self, run: &PageRun) -> rustix::io::Result<()> {
        let bytes = bytes(run);
        let span = self.ram.spans()[run.region as usize].subspan(bytes);
        let copy = run.written && self.options.copy_written;
        match span.advise(if copy { SpanAdvice::PopulateWrite } else { SpanAdvice::PopulateRead }) {
            // Before Linux 5.14: touch each page instead.
            Err(Errno::INVAL) => {
                for page in 0..run.count {
                    span_io::touch(span.subspan(page * PAGE..(page + 1) * PAGE));
                }
                Ok(())
            }
            done => done,
        }
    }
}

/// The byte range of a run in its region.
fn bytes(run: &PageRun) -> Range<u64> {
    run.first * PAGE..(run.first + run.count) * PAGE
}

/// Splits a run into steps.
fn steps(run: PageRun) -> impl Iterator<Item = PageRun> {
    (0..run.count.div_ceil(STEP_PAGES)).map(move |n| PageRun {
        first: run.first + n * STEP_PAGES,
        count: STEP_PAGES.min(run.count - n * STEP_PAGES),
        ..run
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::sys::pagemap::{PageFilter, Pagemap};
    use config::HugePages;
    use snapshot::FileId;

    fn restored(dir: &tempfile::TempDir) -> GuestRam {
        let path = dir.path().join("mem");
        std::fs::write(&path, vec![7; 4 << 20]).unwrap();
        let layout = crate::MemoryLayout::of_size(4);
        GuestRam::from_file(&layout, &path, HugePages::None, false).unwrap()
    }

    fn set(runs: Vec<PageRun>) -> WorkingSet {
        WorkingSet { image: FileId::random().unwrap(), runs }
    }

    fn list(ram: &GuestRam, which: PageFilter) -> Vec<u64> {
        ram.mapped_pages(Pagemap::open().unwrap(), which).unwrap().runs(0).flatten().collect()
    }

    #[test]
    fn prefetch_maps_all_pages_and_copies_only_written_ones() {
        let dir = tempfile::tempdir().unwrap();
        let ram = restored(&dir);
        let set = set(vec![PageRun::new(0, 900..1000, true), PageRun::new(0, 0..600, false)]);
        let done = Prefetch::start(&ram, set, PrefetchOptions::default()).unwrap().finish();
        assert_eq!(done, Prefetched { pages: 700, error: None });
        assert_eq!(list(&ram, PageFilter::Private), (900..1000).collect::<Vec<_>>());
        let mapped = list(&ram, PageFilter::Mapped);
        assert!((0..600).all(|page| mapped.contains(&page)));
    }

    #[test]
    fn copying_written_pages_can_be_disabled() {
        let dir = tempfile::tempdir().unwrap();
        let ram = restored(&dir);
        let set = set(vec![PageRun::new(0, 0..10, true)]);
        Prefetch::start(&ram, set, PrefetchOptions { copy_written: false }).unwrap().finish();
        assert_eq!(list(&ram, PageFilter::Private), [] as [u64; 0]);
    }

    #[test]
    fn stopped_prefetch_ends() {
        let ram = GuestRam::map(64, HugePages::None, false).unwrap();
        let set = set(vec![PageRun::new(0, 0..16384, true)]);
        let prefetch = Prefetch::start(&ram, set, PrefetchOptions::default()).unwrap();
        let done = prefetch.stop();
        assert!(done.pages <= 16384 && done.error.is_none(), "{done:?}");
        assert_eq!(list(&ram, PageFilter::Private).len() as u64, done.pages);
    }

    #[test]
    fn long_runs_are_split_into_steps() {
        let cut: Vec<_> = steps(PageRun::new(0, 5..1034, true)).map(|r| (r.first, r.count)).collect();
        assert_eq!(cut, [(5, 512), (517, 512), (1029, 5)]);
    }
}
