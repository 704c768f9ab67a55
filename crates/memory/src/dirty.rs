//! Dirty pages: those that were written since the last snapshot.
//!
//! They are tracked in two places. KVM's dirty log has what the guest wrote. The bitmaps in
//! [`GuestMemory`](crate::GuestMemory) have what the monitor wrote: device output and discarded
//! pages. A Diff snapshot needs both:
//!
//! ```text
//! let dirty = ram.take_dirty_pages(|region| KVM_GET_DIRTY_LOG of the region's slot)?;
//! write_diff(&ram, &dirty, ..) -> on an error: ram.mark_dirty_again(&dirty)
//! ```
//!
//! Reading either of them clears it. So after a failed snapshot [`GuestRam::mark_dirty_again`]
//! marks all of its pages as written by the monitor, and the next Diff has them.
//! [`GuestRam::take_dirty_pages`] does the same if it fails itself.

use vm_memory::bitmap::{AtomicBitmap, Bitmap};
use vm_memory::mmap::MmapRegion;
use vm_memory::{GuestMemoryBackend, GuestMemoryRegion};

use crate::pages::{PAGE, PageSet, PageSetError};
use crate::ram::{GuestRam, GuestRegion};

/// Why [`GuestRam::take_dirty_pages`] failed. No dirty page is lost.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
pub enum TakeDirtyError<E> {
    /// The dirty log of a region cannot be read.
    #[error(transparent)]
    Log(E),
    /// The dirty log has the wrong length for its region.
    #[error(transparent)]
    Length(#[from] PageSetError),
}

impl GuestRam {
    /// Whether the monitor's writes are tracked, as chosen when the memory was mapped.
    pub fn tracks_dirty_pages(&self) -> bool {
        self.memory().iter().any(|r| tracked(r).is_some())
    }

    /// Returns the pages that the monitor wrote and clears their dirty bits. `None` if they are not
    /// tracked.
    pub fn take_monitor_dirty_pages(&self) -> Option<PageSet> {
        let mut taken = self.empty_page_set();
        for (index, region) in self.memory().iter().enumerate() {
            let words = tracked(region)?.get_and_reset();
            taken.insert_words(index, &words).expect("a bitmap has a bit for each page");
        }
        Some(taken)
    }

    /// Returns the pages that the guest or the monitor wrote and clears their dirty bits. `None` if
    /// the monitor's writes are not tracked.
    ///
    /// `guest_log` reads and clears the dirty log of one region. If it fails, all pages that were
    /// taken so far are marked dirty again. So are all pages of the region that failed, because its
    /// log may have been cleared before the failure.
    pub fn take_dirty_pages<E>(
        &self,
        mut guest_log: impl FnMut(usize) -> Result<Vec<u64>, E>,
    ) -> Result<Option<PageSet>, TakeDirtyError<E>> {
        let Some(mut taken) = self.take_monitor_dirty_pages() else { return Ok(None) };
        for region in 0..taken.regions() {
            let log = guest_log(region).map_err(TakeDirtyError::Log);
            let added = log.and_then(|words| Ok(taken.insert_words(region, &words)?));
            if let Err(error) = added {
                taken.insert(region, 0..taken.pages(region));
                self.mark_dirty_again(&taken);
                return Err(error);
            }
        }
        Ok(Some(taken))
    }

    /// Clears the dirty bits of the monitor's writes.
    pub fn reset_monitor_dirty_pages(&self) {
        for region in self.memory().iter() {
            if let Some(bitmap) = tracked(region) {
                bitmap.reset();
            }
        }
    }

    /// Marks `pages` as written by the monitor, so that the next Diff has them after one that
    /// failed.
    pub fn mark_dirty_again(&self, pages: &PageSet) {
        for index in 0..pages.regions() {
            for run in pages.runs(index) {
                self.mark_written(index, run.start * PAGE, (run.end - run.start) * PAGE);
            }
        }
    }

    /// Marks a part of a region as written by the monitor.
    pub(crate) fn mark_written(&self, region: usize, start: u64, len: u64) {
        let region = self.memory().iter().nth(region).expect("one memory region for each");
        region.bitmap().mark_dirty(start as usize, len as usize);
    }
}

/// A region's bitmap. (The `GuestMemoryRegion` trait gives only a slice of it.)
fn tracked(region: &GuestRegion) -> Option<&AtomicBitmap> {
    let mapping: &MmapRegion<Option<AtomicBitmap>> = region;
    mapping.bitmap().as_ref()
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    fn written(ram: &GuestRam) -> Vec<u64> {
        ram.take_monitor_dirty_pages().unwrap().runs(0).flatten().collect()
    }

    #[test]
    fn monitor_writes_are_taken_once() {
        let ram = GuestRam::map(16, HugePages::None, true).unwrap();
        ram.memory().write_slice(&[1; 5000], GuestAddress(3 * PAGE)).unwrap();
        assert_eq!(written(&ram), [3, 4]);
        assert_eq!(written(&ram), [] as [u64; 0]);
    }

    #[test]
    fn pages_marked_dirty_again_are_in_the_next_diff() {
        let ram = GuestRam::map(16, HugePages::None, true).unwrap();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        let mut dirty = ram.take_monitor_dirty_pages().unwrap();
        let mut log = vec![0; 16 * 256 / 64];
        log[1] = 2;
        dirty.insert_words(0, &log).unwrap();
        ram.mark_dirty_again(&dirty);
        assert_eq!(written(&ram), [0, 65]);
    }

    /// Memory of two regions. The monitor wrote the first page of each.
    fn two_regions() -> GuestRam {
        let ram = GuestRam::map(3 * 1024 + 1, HugePages::None, true).unwrap();
        for region in ram.regions() {
            ram.memory().write_obj(1u8, GuestAddress(region.guest_addr)).unwrap();
        }
        ram
    }

    fn empty_log(ram: &GuestRam, region: usize) -> Vec<u64> {
        vec![0; ram.empty_page_set().pages(region).div_ceil(64) as usize]
    }

    fn log_with_page(ram: &GuestRam, region: usize, page: u64) -> Vec<u64> {
        let mut log = empty_log(ram, region);
        log[(page / 64) as usize] |= 1 << (page % 64);
        log
    }

    #[test]
    fn take_dirty_pages_joins_guest_and_monitor_writes() {
        let ram = two_regions();
        let taken =
            ram.take_dirty_pages(|region| Ok::<_, ()>(log_with_page(&ram, region, 9))).unwrap().unwrap();
        let pages = |region| taken.runs(region).flatten().collect::<Vec<_>>();
        assert_eq!([pages(0), pages(1)], [[0, 9], [0, 9]]);
        let again = ram.take_dirty_pages(|region| Ok::<_, ()>(empty_log(&ram, region))).unwrap().unwrap();
        assert!(again.is_empty());
    }

    #[test]
    fn take_dirty_pages_loses_no_page_if_one_log_fails() {
        type Read = fn(&GuestRam) -> Result<Vec<u64>, &'static str>;
        let failures: [(Read, TakeDirtyError<&'static str>); 2] = [
            (|_| Err("ENOMEM"), TakeDirtyError::Log("ENOMEM")),
            (|_| Ok(vec![0; 1]), PageSetError { region: 1, needed: 4, found: 1 }.into()),
        ];
        for (fail, error) in failures {
            let ram = two_regions();
            let read = |region| if region == 1 { fail(&ram) } else { Ok(log_with_page(&ram, 0, 9)) };
            assert_eq!(ram.take_dirty_pages(read), Err(error));
            let next = ram.take_dirty_pages(|region| Ok::<_, ()>(empty_log(&ram, region))).unwrap().unwrap();
            assert_eq!(next.runs(0).flatten().collect::<Vec<_>>(), [0, 9]);
            // The failed log may have been cleared.
            assert_eq!(next.runs(1).flatten().count(), 256);
        }
    }

    #[test]
    fn reset_monitor_dirty_pages_clears_the_bitmap() {
        let ram = GuestRam::map(16, HugePages::None, true).unwrap();
        ram.memory().write_obj(1u8, GuestAddress(0)).unwrap();
        ram.reset_monitor_dirty_pages();
        assert!(written(&ram).is_empty());
    }

    #[test]
    fn untracked_memory_has_no_dirty_set() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        assert!(!ram.tracks_dirty_pages());
        assert_eq!(ram.take_monitor_dirty_pages(), None);
        ram.mark_dirty_again(&ram.all_pages());
    }
}
