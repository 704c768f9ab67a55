//! Finding which pages of a span are mapped, without touching them.
//!
//! `PAGEMAP_SCAN` (Linux 6.7) walks only the page tables that exist. On older kernels
//! `/proc/self/pagemap` has an entry for each page. Without `/proc` (a jail) there is `mincore`.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::AsRawFd;
use std::os::unix::fs::FileExt;

use crate::pages::PAGE;
use crate::sys::span::Span;

/// `_IOWR('f', 16, struct pm_scan_arg)`.
const PAGEMAP_SCAN: libc::Ioctl = rustix::ioctl::opcode::read_write::<ScanArg>(b'f', 16) as libc::Ioctl;
const PAGE_IS_FILE: u64 = 1 << 2;
const PAGE_IS_PRESENT: u64 = 1 << 3;
const PAGE_IS_SWAPPED: u64 = 1 << 4;
const PAGE_IS_PFNZERO: u64 = 1 << 5;

/// Bits of an entry of `/proc/self/pagemap`.
const ENTRY_PRESENT: u64 = 1 << 63;
const ENTRY_SWAPPED: u64 = 1 << 62;
const ENTRY_FILE: u64 = 1 << 61;

/// `struct pm_scan_arg` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Default)]
struct ScanArg {
    size: u64,
    flags: u64,
    start: u64,
    end: u64,
    walk_end: u64,
    vec: u64,
    vec_len: u64,
    max_pages: u64,
    category_inverted: u64,
    category_mask: u64,
    category_anyof_mask: u64,
    return_mask: u64,
}

/// `struct page_region` of `linux/fs.h`.
#[repr(C)]
#[derive(Debug, Clone, Copy, Default)]
struct PageRegion {
    start: u64,
    end: u64,
    categories: u64,
}

/// Which pages a scan reports.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum PageFilter {
    /// Pages that are mapped or swapped out, except the shared zero page.
    Mapped,
    /// Of these, the private ones: not pages of a file in the page cache.
    Private,
    /// Private pages and mappings of the shared zero page. When the kernel splits a huge page, it
    /// maps the zero page in place of written zeros.
    PrivateOrZeros,
}

/// The page tables of this process. After a fork the child must open its own.
#[derive(Debug)]
pub(crate) struct Pagemap {
    file: File,
    scan: bool,
}

impl Pagemap {
    /// Opens `/proc/self/pagemap`.
    pub(crate) fn open() -> io::Result<Self> {
        Ok(Pagemap { file: File::open("/proc/self/pagemap")?, scan: true })
    }

    /// Disables `PAGEMAP_SCAN`, as on an older kernel.
    #[cfg(test)]
    pub(crate) fn without_scan(mut self) -> Self {
        self.scan = false;
        self
    }

    /// Calls `found` with the runs of pages of `span` that pass `filter`, in order, relative to its
    /// start.
    pub(crate) fn walk(
        &mut self,
        span: Span,
        filter: PageFilter,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        if self.scan {
            match self.walk_by_scan(span, filter, found) {
                // Kernels before 6.7 refuse the first call, before anything was found.
                Err(e) if matches!(e.raw_os_error(), Some(libc::ENOTTY | libc::EINVAL)) => self.scan = false,
                done => return done,
            }
        }
        self.walk_entries(span, filter, found)
    }

    fn walk_by_scan(
        &self,
        span: Span,
        filter: PageFilter,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut regions = vec![PageRegion::default(); 1024];
        let not = match filter {
            PageFilter::Mapped => PAGE_IS_PFNZERO,
            PageFilter::Private => PAGE_IS_PFNZERO | PAGE_IS_FILE,
            PageFilter::PrivateOrZeros => PAGE_IS_FILE,
        };
        let end = span.addr() + span.len();
        let mut start = span.addr();
        while start < end {
            let mut arg = ScanArg {
                size: size_of::<ScanArg>() as u64,
                start,
                end,
                vec: regions.as_mut_ptr() as u64,
                vec_len: regions.len() as u64,
                category_inverted: not,
                category_mask: not,
                category_anyof_mask: PAGE_IS_PRESENT | PAGE_IS_SWAPPED,
                ..ScanArg::default()
            };
            // SAFETY: `arg` is the structure that the call takes, and its `vec` holds `vec_len`
            // regions.
            let n = unsafe { libc::ioctl(self.file.as_raw_fd(), PAGEMAP_SCAN, &raw mut arg) };
            let n = usize::try_from(n).map_err(|_| io::Error::last_os_error())?;
            for region in &regions[..n] {
                found((region.start - span.addr()) / PAGE..(region.end - span.addr()) / PAGE);
            }
            debug_assert!(arg.walk_end > start, "the walk advances");
            start = arg.walk_end;
        }
        Ok(())
    }

    fn walk_entries(
        &self,
        span: Span,
        filter: PageFilter,
        found: &mut dyn FnMut(Range<u64>),
    ) -> io::Result<()> {
        let mut buffer = vec![0u8; 64 << 10];
        let pages = span.len() / PAGE;
        let mut run = 0..0;
        let mut page = 0;
        while page < pages {
            let len = buffer.len().min((pages - page) as usize * 8);
            self.file.read_exact_at(&mut buffer[..len], (span.addr() / PAGE + page) * 8)?;
            for entry in buffer[..len].chunks_exact(8) {
                let entry = u64::from_ne_bytes(entry.try_into().expect("8 bytes"));
                let there = entry & (ENTRY_PRESENT | ENTRY_SWAPPED) != 0;
                if there && (filter == PageFilter::Mapped || entry & ENTRY_FILE == 0) {
                    extend(&mut run, page, found);
                }
                page += 1;
            }
        }
        if !run.is_empty() {
            found(run);
        }
        Ok(())
    }
}

/// Calls `found` with the runs of pages of `span` that are in memory, by `mincore`. For a private
/// mapping of a file this includes pages that are only in the page cache. Swapped-out pages are
/// missing, which the caller must handle.
pub(crate) fn walk_mincore(span: Span, found: &mut dyn FnMut(Range<u64>)) -> io::Result<()> {
    let pages = span.len() / PAGE;
    let mut vector = vec![0u8; 64 << 10];
    let mut run = 0..0;
    let mut page = 0;
    while page < pages {
        let count = (vector.len() as u64).min(pages - page);
        let part = span.subspan(page * PAGE..(page + count) * PAGE);
        // SAFETY: `part` is mapped, and `vector` has a byte for each of its pages.
        let asked = unsafe { libc::mincore(part.as_ptr().cast(), part.len() as usize, vector.as_mut_ptr()) };
        if asked != 0 {
            return Err(io::Error::last_os_error());
        }
        for resident in &vector[..count as usize] {
            if resident & 1 == 1 {
                extend(&mut run, page, found);
            }
            page += 1;
        }
    }
    if !run.is_empty() {
        found(run);
    }
    Ok(())
}

/// Adds `page` to `run`. Calls `found` with the previous run if `page` does not continue it.
fn extend(run: &mut Range<u64>, page: u64, found: &mut dyn FnMut(Range<u64>)) {
    if run.end != page {
        if !run.is_empty() {
            found(run.clone());
        }
        *run = page..page;
    }
    run.end = page + 1;
}
