//! Recording which pages a guest touches.
//!
//! A thread scans the page tables every few milliseconds. Pages that are new since the last scan
//! were touched in between. This is coarse, but it does not slow the guest down, and the order
//! within a few milliseconds does not matter for reading ahead. A scan costs time in proportion to
//! the mapped pages; after a long scan the next one comes later.
//!
//! The kernel maps more of a file than the guest touches: up to 16 pages around a page, and all of
//! a huge page in the page cache. The first is harmless, because neighbours are usually needed
//! together. The second would make all of memory a working set, because a new image is in the page
//! cache as huge pages. So the image of a recorded guest is dropped from the page cache and mapped
//! by small pages: the recorded restore reads from the disk, as most first restores do. If other
//! guests have the image mapped, it stays in the page cache, and the set may be coarse.

use std::sync::mpsc::{RecvTimeoutError, SyncSender, sync_channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::fs::Advice;
use snapshot::FileId;

use super::set::{PageRun, WorkingSet, WorkingSetError};
use crate::backing::Backing;
use crate::pages::PageSet;
use crate::ram::GuestRam;
use crate::resident::ResidentError;
use crate::sys::pagemap::{PageFilter, Pagemap};
use crate::sys::span::SpanAdvice;

/// Options of a recording.
#[derive(Debug, Clone, Copy)]
pub struct RecordOptions {
    /// The time between two scans.
    pub interval: Duration,
    /// The duration of the recording. Pages that are touched later need no reading ahead.
    pub duration: Duration,
}

impl Default for RecordOptions {
    fn default() -> Self {
        RecordOptions { interval: Duration::from_millis(5), duration: Duration::from_secs(1) }
    }
}

/// A recording in progress. Dropping it ends the recording.
#[derive(Debug)]
pub struct Recorder {
    stop: Option<SyncSender<()>>,
    thread: Option<JoinHandle<Result<WorkingSet, WorkingSetError>>>,
}

impl Recorder {
    /// Starts a recording. To be called before the guest runs: pages that are mapped already are
    /// not recorded.
    pub fn start(ram: &GuestRam, image: FileId, options: RecordOptions) -> Result<Self, WorkingSetError> {
        if let Backing::File(file) = ram.backing() {
            // A file system in memory ignores it, and the set is coarser.
            let _ = rustix::fs::fadvise(file, 0, None, Advice::DontNeed);
            for span in ram.spans() {
                // It fails on a kernel without huge pages, which needs no such advice.
                let _ = span.advise(SpanAdvice::SmallPages);
            }
        }
        let mut log = TouchLog::start(ram)?;
        let (stop, stopped) = sync_channel::<()>(1);
        let thread = sync::thread::spawn("working_set", None, move || {
            let start = Instant::now();
            let mut pause = options.interval;
            while start.elapsed() < options.duration
                && matches!(stopped.recv_timeout(pause), Err(RecvTimeoutError::Timeout))
            {
                let began = Instant::now();
                log.scan()?;
                // Use at most a fifth of one CPU.
                pause = options.interval.max(began.elapsed() * 4);
            }
            log.finish(image)
        });
        Ok(Recorder { stop: Some(stop), thread: Some(thread.map_err(WorkingSetError::Thread)?) })
    }

    /// Whether the recording has ended by itself: [`Self::finish`] then neither waits nor cuts it
    /// short.
    pub fn is_finished(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Ends the recording with a last scan.
    pub fn finish(mut self) -> Result<WorkingSet, WorkingSetError> {
        self.stop = None;
        let thread = self.thread.take().expect("the thread is there until it is joined");
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

impl Drop for Recorder {
    fn drop(&mut self) {
        self.stop = None;
        if let Some(thread) = self.thread.take() {
            // The result is not needed.
            let _ = thread.join();
        }
    }
}

/// The pages that were found so far.
struct TouchLog {
    ram: GuestRam,
    /// All pages that were mapped at the last scan.
    seen: PageSet,
    /// Region and pages of each new run, in the order of the scans.
    order: Vec<(usize, std::ops::Range<u64>)>,
}

impl TouchLog {
    fn start(ram: &GuestRam) -> Result<Self, WorkingSetError> {
        Ok(TouchLog { ram: ram.clone(), seen: mapped(ram, PageFilter::Mapped)?, order: Vec::new() })
    }

    fn scan(&mut self) -> Result<(), WorkingSetError> {
        let mut new = mapped(&self.ram, PageFilter::Mapped)?;
        new.remove_all(&self.seen);
        for region in 0..new.regions() {
            self.order.extend(new.runs(region).map(|run| (region, run)));
        }
        self.seen.insert_all(&new);
        Ok(())
    }

    fn finish(mut self, image: FileId) -> Result<WorkingSet, WorkingSetError> {
        self.scan()?;
        let written = mapped(&self.ram, PageFilter::Private)?;
        let mut runs: Vec<PageRun> = Vec::new();
        for (region, pages) in self.order {
            let mut start = pages.start;
            while start < pages.end {
                let kind = written.contains(region, start);
                let end = (start..pages.end).find(|page| written.contains(region, *page) != kind);
                let end = end.unwrap_or(pages.end);
                runs.push(PageRun::new(region, start..end, kind));
                start = end;
            }
        }
        Ok(WorkingSet { image, runs })
    }
}

fn mapped(ram: &GuestRam, which: PageFilter) -> Result<PageSet, ResidentError> {
    Ok(ram.mapped_pages(Pagemap::open()?, which)?)
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    use crate::pages::PAGE;

    fn write(ram: &GuestRam, page: u64) {
        ram.memory().write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
    }

    #[test]
    fn pages_are_ordered_by_the_scan_that_found_them() {
        let ram = GuestRam::map(1, HugePages::None, false).unwrap();
        write(&ram, 1);
        let mut log = TouchLog::start(&ram).unwrap();
        write(&ram, 200);
        log.scan().unwrap();
        write(&ram, 3);
        write(&ram, 4);
        write(&ram, 200);
        let set = log.finish(FileId::random().unwrap()).unwrap();
        assert_eq!(set.runs(), [PageRun::new(0, 200..201, true), PageRun::new(0, 3..5, true)]);
    }

    #[test]
    fn read_and_written_pages_are_distinguished() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("mem");
        std::fs::write(&path, vec![7; 1 << 20]).unwrap();
        let layout = crate::MemoryLayout::of_size(1);
        let ram = GuestRam::from_file(&layout, &path, HugePages::None, false).unwrap();
        let log = TouchLog::start(&ram).unwrap();
        ram.memory().read_obj::<u8>(GuestAddress(0)).unwrap();
        write(&ram, 100);
        let set = log.finish(FileId::random().unwrap()).unwrap();
        let written: Vec<_> = set.runs().iter().filter(|r| r.written).copied().collect();
        assert_eq!(written, [PageRun::new(0, 100..101, true)]);
        // The kernel also maps the neighbours of a page that is read.
        assert!(set.runs().iter().any(|r| !r.written && r.first == 0), "{:?}", set.runs());
    }

    #[test]
    fn page_cache_of_a_new_image_is_not_recorded() {
        // On a disk: /dev/shm has no cache to drop.
        let dir = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let path = dir.path().join("mem");
        std::fs::write(&path, vec![7; 16 << 20]).unwrap();
        std::fs::File::open(&path).unwrap().sync_all().unwrap();
        let layout = crate::MemoryLayout::of_size(16);
        let ram = GuestRam::from_file(&layout, &path, HugePages::None, false).unwrap();
        let recorder = Recorder::start(&ram, FileId::random().unwrap(), RecordOptions::default()).unwrap();
        ram.memory().read_obj::<u8>(GuestAddress(1000 * PAGE)).unwrap();
        let set = recorder.finish().unwrap();
        assert!((1..=64).contains(&set.pages()), "one page was read, {} are recorded", set.pages());
    }

    #[test]
    fn recorder_finished_early_has_the_touched_pages() {
        let ram = GuestRam::map(1, HugePages::None, false).unwrap();
        let options = RecordOptions { duration: Duration::from_hours(1), ..RecordOptions::default() };
        let recorder = Recorder::start(&ram, FileId::random().unwrap(), options).unwrap();
        write(&ram, 9);
        assert!(!recorder.is_finished());
        assert_eq!(recorder.finish().unwrap().runs(), [PageRun::new(0, 9..10, true)]);
    }
}
