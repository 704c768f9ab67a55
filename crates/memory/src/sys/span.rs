//! Ranges of this process's address space that hold guest RAM.
//!
//! A [`Span`] proves that a range is guest memory. Only this module creates new ones, from new
//! mappings, and they are never unmapped. No Rust reference into a span exists, so mapping other
//! memory over a part of it, or dropping its pages, affects only the guest.

use std::fs::File;
use std::ops::Range;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::{MmapRegion, MmapRegionBuilder};

/// Host addresses of regions are multiples of this, the size of a huge page.
const ALIGNMENT: usize = 2 << 20;

/// A mapped range of guest RAM. Copies are the same memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    start: usize,
    len: usize,
}

/// The backing of a new span.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SpanKind<'a> {
    /// Pages of the default size, all zero.
    Anonymous,
    /// 2 MiB pages from the pool, all zero.
    Hugetlb,
    /// A private mapping of a file from this offset.
    File(&'a File, u64),
}

impl Span {
    /// Maps `len` bytes at an address aligned to 2 MiB. Nothing is touched; only
    /// [`SpanKind::Hugetlb`] reserves its pages.
    pub(crate) fn map(len: usize, kind: SpanKind<'_>) -> rustix::io::Result<Span> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let (flags, slack) = match kind {
            SpanKind::Anonymous | SpanKind::File(..) => (MapFlags::PRIVATE | MapFlags::NORESERVE, ALIGNMENT),
            // Huge pages are always aligned.
            SpanKind::Hugetlb => (MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB, 0),
        };
        // The kernel chooses any address: map more than needed and unmap the ends.
        let total = len.checked_add(slack).ok_or(Errno::NOMEM)?;
        // SAFETY: a new mapping at an address of the kernel's choice replaces no existing one.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), total, protection, flags) }?;
        let head = start.cast::<u8>().align_offset(ALIGNMENT).min(slack);
        let host = start.cast::<u8>().wrapping_add(head);
        let span = Span { start: host as usize, len };
        unmap(start as usize, head);
        unmap(span.start + len, slack - head);
        if let SpanKind::File(file, offset) = kind {
            // SAFETY: the range is the new mapping, which no other code uses yet.
            let mapped = unsafe {
                rustix::mm::mmap(host.cast(), len, protection, flags | MapFlags::FIXED, file, offset)
            };
            if let Err(e) = mapped {
                unmap(span.start, len);
                return Err(e);
            }
        }
        Ok(span)
    }

    /// Host address of the first byte.
    pub(crate) fn addr(self) -> u64 {
        self.start as u64
    }

    /// Length in bytes.
    pub(crate) fn len(self) -> u64 {
        self.len as u64
    }

    /// Pointer to the first byte.
    pub(crate) fn as_ptr(self) -> *mut u8 {
        self.start as *mut u8
    }

    /// The span as a region of `vm-memory` with this bitmap.
    pub(crate) fn into_region(self, bitmap: Option<AtomicBitmap>) -> MmapRegion<Option<AtomicBitmap>> {
        // SAFETY: the span is a mapping of this size (type invariant), which is never unmapped.
        let builder = unsafe {
            MmapRegionBuilder::new_with_bitmap(self.len, bitmap).with_raw_mmap_pointer(self.as_ptr())
        };
        builder.build().expect("the mapping is page-aligned")
    }

    /// The part of the span at these byte offsets. Panics if it is not within the span.
    pub(crate) fn subspan(self, range: Range<u64>) -> Span {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {self:?}");
        Span { start: self.start + range.start as usize, len: (range.end - range.start) as usize }
    }

    /// Calls `madvise` with advice that changes no contents.
    pub(crate) fn advise(self, advice: SpanAdvice) -> rustix::io::Result<()> {
        let advice = match advice {
            SpanAdvice::DontDump => Advice::LinuxDontDump,
            SpanAdvice::HugePages => Advice::LinuxHugepage,
            SpanAdvice::SmallPages => Advice::LinuxNoHugepage,
            SpanAdvice::PopulateRead => Advice::LinuxPopulateRead,
            SpanAdvice::PopulateWrite => Advice::LinuxPopulateWrite,
        };
        // SAFETY: the span is mapped (type invariant), and none of these changes what it contains.
        unsafe { rustix::mm::madvise(self.as_ptr().cast(), self.len, advice) }
    }

    /// Drops the pages (`MADV_DONTNEED`). Anonymous memory then reads as zero, a file's as in the
    /// file.
    pub(crate) fn drop_pages(self) -> rustix::io::Result<()> {
        // SAFETY: the span is guest memory (type invariant), into which no Rust reference exists.
        unsafe { rustix::mm::madvise(self.as_ptr().cast(), self.len, Advice::LinuxDontNeed) }
    }

    /// Maps anonymous zero pages in place of the span's memory.
    pub(crate) fn remap_anonymous(self) -> rustix::io::Result<()> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the span is guest memory (type invariant), into which no Rust reference exists,
        // and it stays mapped.
        unsafe { rustix::mm::mmap_anonymous(self.as_ptr().cast(), self.len, protection, flags) }?;
        self.advise(SpanAdvice::DontDump)
    }
}

/// Advice (`madvise`) that changes no contents.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SpanAdvice {
    /// Exclude it from core dumps.
    DontDump,
    /// Use transparent huge pages.
    HugePages,
    /// Do not use transparent huge pages.
    SmallPages,
    /// Fault the pages in as if read.
    PopulateRead,
    /// Fault the pages in as if written, as private copies.
    PopulateWrite,
}

/// Unmaps a part of a new mapping.
fn unmap(start: usize, len: usize) {
    if len > 0 {
        // SAFETY: the range is an unused part of a mapping that `Span::map` has just made, and that
        // no other code uses.
        let unmapped = unsafe { rustix::mm::munmap(start as *mut _, len) };
        debug_assert!(unmapped.is_ok(), "a part of a new mapping can be unmapped: {unmapped:?}");
    }
}
