//! Stretches of this process's address space that hold guest RAM.
//!
//! A [`Span`] is the proof that a range is guest memory: only this module makes new ones, out of fresh mappings, and they
//! are never unmapped. Nobody holds a Rust reference into one, so mapping something else over a part, or dropping
//! its pages, takes nothing from anybody but the guest.

use std::fs::File;
use std::ops::Range;

use rustix::io::Errno;
use rustix::mm::{Advice, MapFlags, ProtFlags};

/// Host addresses of regions are multiples of this, the size of a huge page.
const ALIGNMENT: usize = 2 << 20;

/// A mapped stretch of guest RAM. Plain numbers: copies are the same memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Span {
    start: usize,
    len: usize,
}

/// What backs a new span.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SpanKind<'a> {
    /// Ordinary pages, all zero.
    Anonymous,
    /// 2 MiB pages from the pool, all zero.
    Hugetlb,
    /// A private view of a file from this offset.
    File(&'a File, u64),
}

impl Span {
    /// Maps `len` bytes at an address aligned to 2 MiB. Nothing is touched; only [`SpanKind::Hugetlb`] reserves its pages.
    pub(crate) fn map(len: usize, kind: SpanKind<'_>) -> rustix::io::Result<Span> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let (flags, slack) = match kind {
            SpanKind::Anonymous | SpanKind::File(..) => (MapFlags::PRIVATE | MapFlags::NORESERVE, ALIGNMENT),
            // The pool's pages are aligned as they are.
            SpanKind::Hugetlb => (MapFlags::PRIVATE | MapFlags::HUGETLB | MapFlags::HUGE_2MB, 0),
        };
        // Mappings may lie anywhere: ask for more and give the ends back.
        let total = len.checked_add(slack).ok_or(Errno::NOMEM)?;
        // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
        let start = unsafe { rustix::mm::mmap_anonymous(std::ptr::null_mut(), total, protection, flags) }?;
        let head = start.cast::<u8>().align_offset(ALIGNMENT).min(slack);
        let host = start.cast::<u8>().wrapping_add(head);
        let span = Span { start: host as usize, len };
        unmap(start as usize, head);
        unmap(span.start + len, slack - head);
        if let SpanKind::File(file, offset) = kind {
            // SAFETY: the range is the mapping just made, which nobody knows yet.
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

    pub(crate) fn as_ptr(self) -> *mut u8 {
        self.start as *mut u8
    }

    /// A part of the span, in bytes from its start. Panics if the range is not in it.
    pub(crate) fn subspan(self, range: Range<u64>) -> Span {
        assert!(range.start <= range.end && range.end <= self.len(), "{range:?} of {self:?}");
        Span { start: self.start + range.start as usize, len: (range.end - range.start) as usize }
    }

    /// Gives advice that keeps contents, or fills in pages before they are asked for.
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

    /// Gives the pages back to the kernel. Anonymous pages are zero afterwards, those of a file as in the file.
    pub(crate) fn drop_pages(self) -> rustix::io::Result<()> {
        // SAFETY: the span is guest memory (type invariant), into which nobody holds a Rust reference.
        unsafe { rustix::mm::madvise(self.as_ptr().cast(), self.len, Advice::LinuxDontNeed) }
    }

    /// Replaces what is mapped there by ordinary pages that are zero.
    pub(crate) fn remap_anonymous(self) -> rustix::io::Result<()> {
        let protection = ProtFlags::READ | ProtFlags::WRITE;
        let flags = MapFlags::PRIVATE | MapFlags::NORESERVE | MapFlags::FIXED;
        // SAFETY: the span is guest memory (type invariant), into which nobody holds a Rust reference; it stays mapped.
        unsafe { rustix::mm::mmap_anonymous(self.as_ptr().cast(), self.len, protection, flags) }?;
        self.advise(SpanAdvice::DontDump)
    }
}

/// Advice that changes no contents.
#[derive(Debug, Clone, Copy)]
pub(crate) enum SpanAdvice {
    /// Leave it out of crash dumps.
    DontDump,
    /// Use transparent huge pages.
    HugePages,
    /// Map nothing by huge pages.
    SmallPages,
    /// Map the pages as if read.
    PopulateRead,
    /// Map the pages as if written: private copies.
    PopulateWrite,
}

/// Gives back a part of a fresh mapping.
fn unmap(start: usize, len: usize) {
    if len > 0 {
        // SAFETY: the range is an unused part of a mapping that `Span::map` just made and nobody else knows.
        let unmapped = unsafe { rustix::mm::munmap(start as *mut _, len) };
        debug_assert!(unmapped.is_ok(), "a part of a fresh mapping can be unmapped: {unmapped:?}");
    }
}
