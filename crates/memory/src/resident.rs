//! Finding the pages of a guest that are in use, without touching any.

use std::io;

use crate::pages::PageSet;
use crate::ram::GuestRam;
use crate::sys::pagemap::{self, PageFilter, Pagemap};

/// Why the pages in use cannot be found.
#[derive(Debug, thiserror::Error)]
#[error("guest memory: cannot find the pages in use: {0}")]
pub struct ResidentError(
    /// The kernel's reason.
    #[from]
    pub io::Error,
);

impl GuestRam {
    /// The pages that changed since the guest was started or restored, with or without dirty
    /// tracking. All others are as at the start: zero, as in the image, or not sent by the page
    /// server.
    ///
    /// The set includes swapped-out pages, discarded pages, and written pages that the kernel
    /// replaced by the zero page. It may be too large (without `/proc`, or by pages that were only
    /// read), but never too small.
    pub fn changed_pages(&self) -> Result<PageSet, ResidentError> {
        let mut own = self.scan_private(PageFilter::PrivateOrZeros)?;
        own.insert_all(&self.discarded());
        Ok(own)
    }

    /// [`Self::changed_pages`] without discarded pages and pages mapped to the zero page.
    pub(crate) fn private_pages(&self) -> Result<PageSet, ResidentError> {
        self.scan_private(PageFilter::Private)
    }

    fn scan_private(&self, filter: PageFilter) -> Result<PageSet, ResidentError> {
        Ok(match Pagemap::open() {
            Ok(pagemap) => self.mapped_pages(pagemap, filter)?,
            Err(_) => self.pages_by_mincore()?,
        })
    }

    /// The pages in the page tables that pass `filter`.
    pub(crate) fn mapped_pages(&self, mut pagemap: Pagemap, filter: PageFilter) -> io::Result<PageSet> {
        let mut mapped = self.empty_page_set();
        for (index, span) in self.spans().iter().enumerate() {
            pagemap.walk(*span, filter, &mut |run| mapped.insert(index, run))?;
        }
        Ok(mapped)
    }

    /// A number that changes when pages arrive. It is not the number of pages: swapped-out pages
    /// may be missing.
    pub(crate) fn page_progress(&self) -> u64 {
        let pages = match Pagemap::open() {
            Ok(pagemap) => self.mapped_pages(pagemap, PageFilter::Private),
            Err(_) => self.mincore_pages(),
        };
        pages.map_or(0, |pages| pages.count())
    }

    /// [`Self::private_pages`] for a process without `/proc`, by `mincore`, which does not see
    /// swapped-out pages. On a host with swap it returns all pages.
    fn pages_by_mincore(&self) -> io::Result<PageSet> {
        if rustix::system::sysinfo().totalswap != 0 {
            return Ok(self.all_pages());
        }
        self.mincore_pages()
    }

    /// The pages that `mincore` reports.
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

    /// Memory of small pages, even on a host whose default is huge pages.
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
        assert_eq!(list(&ram.private_pages().unwrap()), written, "the scan touched a page");
    }

    /// When the kernel splits a huge page, it maps the zero page in place of parts that are zero.
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
