//! PageFilter pages of a guest hold something, found without touching any.

use std::io;

use crate::pages::PageSet;
use crate::ram::GuestRam;
use crate::sys::pagemap::{self, PageFilter, Pagemap};

/// Why nobody knows which pages are there.
#[derive(Debug, thiserror::Error)]
#[error("cannot find out which pages of the guest's memory are in use: {0}")]
pub struct ResidentError(
    /// The kernel's reason.
    #[from]
    pub io::Error,
);

impl GuestRam {
    /// The pages that this guest has for itself: touched, and not (any more) those of a snapshot's file. All others are what they
    /// were at the start: zero, or as in the file, or with the page server.
    ///
    /// Relative to what the guest was restored from this is what has changed, with or without dirty tracking: swapped-out
    /// pages and pages that were given back are in it, and pages of zeros that the kernel has taken back by itself. The set may be too large
    /// (without `/proc`, and by pages that were only read), never too small.
    pub fn changed_pages(&self) -> Result<PageSet, ResidentError> {
        let mut own = self.private_by(PageFilter::PrivateOrZeros)?;
        own.insert_all(&self.discarded());
        Ok(own)
    }

    /// [`Self::changed_pages`] without those that are zero, and known to be without looking.
    pub(crate) fn private_pages(&self) -> Result<PageSet, ResidentError> {
        self.private_by(PageFilter::Private)
    }

    fn private_by(&self, which: PageFilter) -> Result<PageSet, ResidentError> {
        Ok(match Pagemap::open() {
            Ok(pagemap) => self.mapped_pages(pagemap, which)?,
            Err(_) => self.pages_by_mincore()?,
        })
    }

    pub(crate) fn mapped_pages(&self, mut pagemap: Pagemap, which: PageFilter) -> io::Result<PageSet> {
        let mut mapped = self.empty_page_set();
        for (index, span) in self.spans().iter().enumerate() {
            pagemap.walk(*span, which, &mut |run| mapped.insert(index, run))?;
        }
        Ok(mapped)
    }

    /// A number that changes when pages come, to see whether any did. Not how many there are: swapped-out pages may be missing.
    pub(crate) fn page_progress(&self) -> u64 {
        let pages = match Pagemap::open() {
            Ok(pagemap) => self.mapped_pages(pagemap, PageFilter::Private),
            Err(_) => self.mincore_pages(),
        };
        pages.map_or(0, |pages| pages.count())
    }

    /// [`Self::changed_pages`] for a process without `/proc`, from `mincore`. It does not see what was swapped out: with swap, all pages count.
    fn pages_by_mincore(&self) -> io::Result<PageSet> {
        if rustix::system::sysinfo().totalswap != 0 {
            return Ok(self.all_pages());
        }
        self.mincore_pages()
    }

    /// The pages that `mincore` sees.
    fn mincore_pages(&self) -> io::Result<PageSet> {
        let mut resident = self.empty_page_set();
        for (index, span) in self.spans().iter().enumerate() {
            pagemap::walk_mincore(*span, &mut |run| resident.insert(index, run))?;
        }
        Ok(resident)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    use crate::pages::PAGE;
    use crate::sys::span::SpanAdvice;

    /// Memory of small pages, also on a host that uses huge ones for everyone.
    fn small_pages(mib: u32) -> GuestRam {
        let ram = GuestRam::map(mib, HugePages::None, false).unwrap();
        for span in ram.spans() {
            span.advise(SpanAdvice::SmallPages).unwrap();
        }
        ram
    }

    /// Pages 0, 5 and 511 written, page 7 only read.
    fn touched() -> (GuestRam, Vec<u64>) {
        let ram = small_pages(2);
        for page in [0, 5, 511] {
            ram.memory().write_obj(1u8, GuestAddress(page * PAGE)).unwrap();
        }
        ram.memory().read_obj::<u8>(GuestAddress(7 * PAGE)).unwrap();
        (ram, vec![0, 5, 511])
    }

    fn list(set: &PageSet) -> Vec<u64> {
        set.runs(0).flatten().collect()
    }

    #[test]
    fn scan_finds_written_pages_and_touches_none() {
        let (ram, written) = touched();
        assert_eq!(list(&ram.private_pages().unwrap()), written);
        assert_eq!(list(&ram.private_pages().unwrap()), written, "looking changed what is there");
    }

    /// The kernel maps the page of zeros in place of a page that was written when it splits a huge page that has zeros.
    #[test]
    fn zero_pages_count_as_changed() {
        let (ram, written) = touched();
        assert_eq!(list(&ram.changed_pages().unwrap()), [&written[..2], &[7], &written[2..]].concat());
    }

    #[test]
    fn pagemap_entries_find_the_same_pages_and_the_zero_page() {
        let (ram, written) = touched();
        let own = ram.mapped_pages(Pagemap::open().unwrap().without_scan(), PageFilter::Private).unwrap();
        assert_eq!(list(&own), [&written[..2], &[7], &written[2..]].concat());
    }

    #[test]
    fn mincore_finds_written_pages_without_proc() {
        let (ram, written) = touched();
        let own = ram.pages_by_mincore().unwrap();
        assert!(written.iter().all(|p| own.contains(0, *p)));
    }

    #[test]
    fn page_progress_changes_when_a_page_arrives() {
        let (ram, _) = touched();
        let before = (ram.page_progress(), ram.mincore_pages().unwrap().count());
        ram.memory().write_obj(1u8, GuestAddress(100 * PAGE)).unwrap();
        assert_eq!((ram.page_progress(), ram.mincore_pages().unwrap().count()), (before.0 + 1, before.1 + 1));
    }

    #[test]
    fn scanning_a_sparse_tebibyte_is_fast() {
        let ram = small_pages(config::MAX_MEM_SIZE_MIB);
        ram.memory().write_obj(1u8, GuestAddress(900 << 30)).unwrap();
        assert_eq!(ram.changed_pages().unwrap().count(), 1);
    }
}
