//! Guest RAM as the rest of the monitor has it.

use std::num::NonZeroUsize;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use config::HugePages;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::backing::Backing;
use crate::layout::{MIB, MemoryLayout};
use crate::pages::{PAGE, PageSet};
use crate::sys::span::{Span, SpanAdvice, SpanKind};
use crate::{GuestMemory, GuestRegion};

/// The size of the page that dirty pages are counted in.
const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(PAGE as usize).unwrap();

/// Why guest RAM could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The kernel refused the mapping: no address space, no huge pages in the pool, or a limit.
    #[error("cannot map {size_mib} MiB of guest memory ({pages}): {source}")]
    Map {
        /// What was asked for, in MiB.
        size_mib: u64,
        /// The kind of pages, in words.
        pages: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The kernel took the mapping but not the advice about it.
    #[error("cannot set up {size_mib} MiB of guest memory ({pages}): {source}")]
    Advise {
        /// What was asked for, in MiB.
        size_mib: u64,
        /// The kind of pages, in words.
        pages: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// Huge pages are reserved, and the kernel does not let this process use one.
    #[error(
        "huge_pages 2M: the host gives no page for the {len} bytes at guest address {addr:#x}{}; raise hugetlb.2MB.max of the \
         monitor's cgroup, or set huge_pages to None",
        suffix(source)
    )]
    Populate {
        /// First guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// A reason that says something. `EFAULT` only says that the first use of a page would have been a SIGBUS.
fn suffix(source: &std::io::Error) -> String {
    if source.raw_os_error() == Some(rustix::io::Errno::FAULT.raw_os_error()) {
        return String::new();
    }
    format!(": {source}")
}

/// Why pages could not be given back.
#[derive(Debug, thiserror::Error)]
pub enum DiscardError {
    /// Not whole pages of one region.
    #[error(
        "{len:#x} bytes from guest address {addr:#x} are not whole pages of RAM ({page_size} bytes each)"
    )]
    Range {
        /// First guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
        /// Size of a page in bytes.
        page_size: u64,
    },
    /// The kernel refused.
    #[error("cannot give back {len:#x} bytes from guest address {addr:#x}: {source}")]
    Kernel {
        /// First guest-physical address.
        addr: u64,
        /// Length in bytes.
        len: u64,
        /// The kernel's reason.
        source: std::io::Error,
    },
}

/// A stretch of guest RAM and where it is mapped in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest-physical address.
    pub guest_addr: u64,
    /// Where it is mapped here; a multiple of 2 MiB.
    pub host_addr: u64,
    /// Length in bytes.
    pub size: u64,
}

/// All RAM of one guest. Cheap to clone: clones are the same memory.
///
/// When the last clone goes, the pages are given back to the kernel; the addresses stay reserved, so that a
/// forgotten [`GuestMemory`] reads zeros and never somebody else's mapping. (A process runs one machine: what is
/// left behind is address space, not memory.)
#[derive(Debug, Clone)]
pub struct GuestRam {
    inner: Arc<Inner>,
}

#[derive(Debug)]
struct Inner {
    memory: GuestMemory,
    regions: Vec<RamRegion>,
    spans: Vec<Span>,
    layout: MemoryLayout,
    huge_pages: HugePages,
    backing: Backing,
    /// Pages that were given back. They were zero then, whatever they are at the source.
    discarded: Mutex<PageSet>,
    /// A fork of this process may have the same memory.
    shared: AtomicBool,
}

impl GuestRam {
    /// Maps private anonymous RAM of `mem_size_mib` mebibytes, untouched and unreserved.
    ///
    /// With [`HugePages::Hugetlbfs2M`] the pages are reserved from the kernel's pool at once, and too few of them is an
    /// error here rather than a signal later. The first of them is also used, because a cgroup's limit counts use and not
    /// reservations: see [`Self::populate`]. `track_dirty_pages` adds a bitmap of the pages that the monitor writes.
    pub fn map(mem_size_mib: u32, huge_pages: HugePages, track_dirty_pages: bool) -> Result<Self, MapError> {
        let layout = MemoryLayout::of_size(mem_size_mib);
        let ram = Self::build(layout, huge_pages, track_dirty_pages, Backing::Anonymous)?;
        // What the monitor writes itself before a guest runs lies in there, but for kernel and initrd.
        ram.populate(0, MIB)?;
        Ok(ram)
    }

    /// Maps RAM of this layout. Where `source` is a file, regions are private views of it.
    pub(crate) fn build(
        layout: MemoryLayout,
        huge_pages: HugePages,
        track_dirty_pages: bool,
        backing: Backing,
    ) -> Result<Self, MapError> {
        let (mut regions, mut guest_regions) = (Vec::new(), Vec::new());
        let mut spans = UnownedSpans(Vec::new());
        for region in layout.regions() {
            let kind = match (&backing, huge_pages) {
                (Backing::File(file), _) => SpanKind::File(file, region.offset),
                (_, HugePages::Hugetlbfs2M) => SpanKind::Hugetlb,
                _ => SpanKind::Anonymous,
            };
            let span = map_span(region.size, kind, huge_pages)?;
            spans.0.push(span);
            let bitmap = track_dirty_pages.then(|| AtomicBitmap::new(region.size as usize, PAGE_SIZE));
            // SAFETY: the span is a mapping of exactly this size that is never unmapped.
            let builder = unsafe {
                MmapRegionBuilder::new_with_bitmap(region.size as usize, bitmap)
                    .with_raw_mmap_pointer(span.as_ptr())
            };
            let mapping = builder.build().expect("the mapping is page-aligned");
            guest_regions.push(Arc::new(
                GuestRegion::new(mapping, GuestAddress(region.guest_addr)).expect("regions end below 2^64"),
            ));
            let (guest_addr, size) = (region.guest_addr, region.size);
            regions.push(RamRegion { guest_addr, host_addr: span.addr(), size });
        }
        let memory = GuestMemory::from_arc_regions(guest_regions).expect("regions are sorted and disjoint");
        let discarded = Mutex::new(PageSet::empty(layout.regions().iter().map(|r| r.size)));
        let spans = std::mem::take(&mut spans.0);
        let inner = Inner {
            memory,
            regions,
            spans,
            layout,
            huge_pages,
            backing,
            discarded,
            shared: AtomicBool::new(false),
        };
        Ok(GuestRam { inner: Arc::new(inner) })
    }

    /// The memory, for checked access.
    pub fn memory(&self) -> &GuestMemory {
        &self.inner.memory
    }

    /// The regions in order of guest address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.inner.regions
    }

    /// Where the regions are in this guest's memory images.
    pub fn layout(&self) -> &MemoryLayout {
        &self.inner.layout
    }

    /// The kind of pages that back the memory.
    pub fn huge_pages(&self) -> HugePages {
        self.inner.huge_pages
    }

    /// Size in bytes of the pages that back the memory.
    pub fn page_size(&self) -> u64 {
        if self.inner.huge_pages == HugePages::Hugetlbfs2M { 2 * MIB } else { PAGE }
    }

    /// Size of all regions together, in bytes.
    pub fn size(&self) -> u64 {
        self.inner.regions.iter().map(|r| r.size).sum()
    }

    /// Whether the `len` bytes from `addr` are all RAM, in one region.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        self.memory()
            .find_region(GuestAddress(addr))
            .is_some_and(|r| len <= r.len() - (addr - r.start_addr().0))
    }

    /// Makes sure that the pages of a range can be written, where the first use of one may be refused: huge pages that were
    /// reserved may still be over the limit of the process's cgroup, and a write would be a SIGBUS. Nothing happens to other
    /// pages, to those of a page server, and beyond the end of a region. Kernels before 5.14 cannot tell.
    pub fn populate(&self, addr: u64, len: u64) -> Result<(), MapError> {
        if self.inner.huge_pages != HugePages::Hugetlbfs2M
            || !matches!(self.inner.backing, Backing::Anonymous)
        {
            return Ok(());
        }
        let page = self.page_size();
        for (region, span) in self.inner.regions.iter().zip(&self.inner.spans) {
            let start = addr.max(region.guest_addr);
            let end = addr.saturating_add(len).min(region.guest_addr + region.size);
            if start >= end {
                continue;
            }
            let first = (start - region.guest_addr) / page * page;
            let last = (end - region.guest_addr).next_multiple_of(page).min(region.size);
            let part = span.subspan(first..last);
            let populated = loop {
                match part.advise(SpanAdvice::PopulateWrite) {
                    Err(rustix::io::Errno::INTR) => {}
                    done => break done,
                }
            };
            match populated {
                Ok(()) | Err(rustix::io::Errno::INVAL) => {}
                Err(source) => return Err(MapError::Populate { addr, len, source: source.into() }),
            }
        }
        Ok(())
    }

    /// What a fork must keep open to save this memory: the file that it came from.
    pub fn descriptors(&self) -> Vec<RawFd> {
        match &self.inner.backing {
            Backing::File(file) => vec![file.as_raw_fd()],
            Backing::Anonymous | Backing::PageServer(_) => Vec::new(),
        }
    }

    /// See [`Self::note_fork`].
    pub(crate) fn set_shared(&self) {
        self.inner.shared.store(true, Ordering::Relaxed);
    }

    /// Whether a fork of this process may have the same memory.
    pub(crate) fn is_shared(&self) -> bool {
        self.inner.shared.load(Ordering::Relaxed)
    }

    /// The empty set of this guest's pages.
    pub fn empty_page_set(&self) -> PageSet {
        PageSet::empty(self.inner.regions.iter().map(|r| r.size))
    }

    /// The set of all of this guest's pages.
    pub fn all_pages(&self) -> PageSet {
        PageSet::full(self.inner.regions.iter().map(|r| r.size))
    }

    /// Gives the pages of a range back to the kernel, as a balloon does: they take no memory and read as zero, also where
    /// they came from a snapshot's file. A page server is told (and waited for: the call ends when it has read the event).
    /// The range is whole pages ([`Self::page_size`]) of one region. The pages count as written by the monitor.
    pub fn discard(&self, addr: u64, len: u64) -> Result<(), DiscardError> {
        let page_size = self.page_size();
        let index =
            self.inner.regions.iter().position(|r| r.guest_addr <= addr && addr - r.guest_addr < r.size);
        let bad_range = || DiscardError::Range { addr, len, page_size };
        let index = index.filter(|_| self.contains(addr, len)).ok_or_else(bad_range)?;
        if !addr.is_multiple_of(page_size) || !len.is_multiple_of(page_size) {
            return Err(bad_range());
        }
        if len == 0 {
            return Ok(());
        }
        let start = addr - self.inner.regions[index].guest_addr;
        let part = self.inner.spans[index].subspan(start..start + len);
        // Marked first: a page that is marked and kept its contents is written once too often, not lost.
        self.mark_written(index, start, len);
        self.inner.discarded().insert(index, start / PAGE..(start + len) / PAGE);
        let done = match self.inner.backing {
            // Without its mapping a page of a file would come back as it was in the file.
            Backing::File(_) => part.remap_anonymous(),
            Backing::Anonymous | Backing::PageServer(_) => part.drop_pages(),
        };
        done.map_err(|e| DiscardError::Kernel { addr, len, source: e.into() })
    }

    /// Where the regions are mapped, in order.
    pub(crate) fn spans(&self) -> &[Span] {
        &self.inner.spans
    }

    pub(crate) fn backing(&self) -> &Backing {
        &self.inner.backing
    }

    /// Pages that were given back, written again since or not.
    pub(crate) fn discarded(&self) -> PageSet {
        self.inner.discarded().clone()
    }
}

impl Inner {
    fn discarded(&self) -> MutexGuard<'_, PageSet> {
        // A set of bits is as good after a panic as before.
        self.discarded.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Regions that belong to nobody yet. What is not taken out is given back: pages of the pool are reserved by the mapping itself.
struct UnownedSpans(Vec<Span>);

impl Drop for UnownedSpans {
    fn drop(&mut self) {
        for span in &self.0 {
            let replaced = span.remap_anonymous();
            debug_assert!(replaced.is_ok(), "private memory can be given back: {replaced:?}");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for span in &self.spans {
            if let Backing::PageServer(connection) = &self.backing {
                // First out of the page server's hands: nobody may be there any more to hear of the removal.
                connection.release(*span);
            }
            let dropped = match &self.backing {
                Backing::Anonymous | Backing::PageServer(_) if self.huge_pages != HugePages::Hugetlbfs2M => {
                    span.drop_pages()
                }
                // Not the pages alone: the mapping keeps the file, or what it has reserved of the pool.
                _ => span.remap_anonymous(),
            };
            debug_assert!(dropped.is_ok(), "private memory can be given back: {dropped:?}");
        }
    }
}

/// Maps one region at a host address aligned to 2 MiB.
fn map_span(size: u64, kind: SpanKind<'_>, huge_pages: HugePages) -> Result<Span, MapError> {
    let size_mib = size / MIB;
    let pages = match huge_pages {
        HugePages::None => "4 KiB pages",
        HugePages::Transparent => "transparent huge pages",
        HugePages::Hugetlbfs2M => "2 MiB pages from the huge page pool",
    };
    let span = Span::map(size as usize, kind).map_err(|source| MapError::Map {
        size_mib,
        pages,
        source: source.into(),
    })?;
    let advised = |source: rustix::io::Errno| MapError::Advise { size_mib, pages, source: source.into() };
    // A crash dump of the monitor must not carry a tenant's memory.
    span.advise(SpanAdvice::DontDump).map_err(advised)?;
    if huge_pages == HugePages::Transparent {
        span.advise(SpanAdvice::HugePages).map_err(advised)?;
    }
    Ok(span)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::GIB;
    use vm_memory::Bytes;

    #[test]
    fn ram_is_aligned_and_readable_to_its_last_byte() {
        let ram = GuestRam::map(3 * 1024 + 5, HugePages::None, false).unwrap();
        assert_eq!(ram.regions().len(), 2);
        assert!(ram.regions().iter().all(|r| r.host_addr % (2 * MIB) == 0));
        let last = GuestAddress(4 * GIB + 5 * MIB - 1);
        ram.memory().write_obj(0x5au8, last).unwrap();
        assert_eq!(ram.memory().read_obj::<u8>(last).unwrap(), 0x5a);
        assert!(ram.memory().write_obj(0u8, GuestAddress(4 * GIB + 5 * MIB)).is_err());
        assert!(ram.memory().write_obj(0u8, GuestAddress(3 * GIB)).is_err());
    }

    #[test]
    fn a_tebibyte_costs_nothing_until_touched() {
        let ram = GuestRam::map(config::MAX_MEM_SIZE_MIB, HugePages::Transparent, false).unwrap();
        assert_eq!(ram.size(), 1 << 40);
        ram.memory().write_obj(1u8, GuestAddress(800 * GIB)).unwrap();
    }

    #[test]
    fn refused_huge_page_is_named_with_the_cgroup_limit() {
        let refused = |errno: rustix::io::Errno| {
            MapError::Populate { addr: 2 << 20, len: 4096, source: errno.into() }.to_string()
        };
        let text = refused(rustix::io::Errno::FAULT);
        assert!(
            text.starts_with("huge_pages 2M: ") && text.contains("0x200000; raise hugetlb.2MB.max"),
            "{text}"
        );
        assert!(refused(rustix::io::Errno::NOMEM).contains("0x200000: Cannot allocate memory"));
    }

    #[test]
    fn only_huge_pages_are_populated() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        ram.populate(0, u64::MAX).unwrap();
        assert!(ram.changed_pages().unwrap().is_empty());
    }

    #[test]
    fn contains_knows_the_ends_of_regions() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        assert!(ram.contains(0, 16 * MIB));
        assert!(!ram.contains(0, 16 * MIB + 1));
        assert!(!ram.contains(16 * MIB, 1));
        assert!(!ram.contains(u64::MAX, 2));
        assert!(!ram.contains(1, u64::MAX));
    }

    #[test]
    fn writes_of_the_monitor_are_tracked_when_asked_for() {
        use vm_memory::bitmap::Bitmap;
        let ram = GuestRam::map(16, HugePages::None, true).unwrap();
        ram.memory().write_obj(1u8, GuestAddress(5 * 4096)).unwrap();
        let region = ram.memory().iter().next().unwrap();
        let bitmap = region.bitmap();
        assert!(bitmap.dirty_at(5 * 4096));
        assert!(!bitmap.dirty_at(6 * 4096));
    }

    #[test]
    fn a_forgotten_view_reads_zeros_after_the_ram_is_gone() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        let view = ram.memory().clone();
        view.write_obj(7u8, GuestAddress(0)).unwrap();
        drop(ram);
        assert_eq!(view.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }
}
