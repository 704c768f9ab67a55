//! Guest RAM as the other crates use it.

use std::num::NonZeroUsize;
use std::ops::Range;
use std::os::fd::{AsRawFd, RawFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard};

use config::HugePages;
use sync::locked;
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::backing::Backing;
use crate::layout::{MIB, MemoryLayout};
use crate::pages::{PAGE, PageSet};
use crate::sys::span::{Span, SpanAdvice, SpanKind};

/// The guest's memory as `vm-memory` sees it: regions that do not change while the machine lives.
/// Each may have a bitmap of the pages that the *monitor* wrote; KVM logs what the guest wrote.
pub type GuestMemory = vm_memory::GuestMemoryMmap<Option<AtomicBitmap>>;

/// One region of [`GuestMemory`].
pub type GuestRegion = vm_memory::GuestRegionMmap<Option<AtomicBitmap>>;

/// The page size of the dirty bitmaps.
const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(PAGE as usize).unwrap();

/// Why guest RAM could not be mapped.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// The kernel refused the mapping: no address space, no huge pages in the pool, or a limit.
    #[error("guest memory: cannot map {size_mib} MiB ({pages}): {source}")]
    Map {
        /// The size in MiB.
        size_mib: u64,
        /// The kind of pages, in words.
        pages: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The kernel mapped the memory but refused `madvise`.
    #[error("guest memory: cannot set up {size_mib} MiB ({pages}): {source}")]
    Advise {
        /// The size in MiB.
        size_mib: u64,
        /// The kind of pages, in words.
        pages: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// Huge pages are reserved, but the kernel does not let this process use one.
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

/// The kernel's reason as the end of a message. Empty for `EFAULT`, which only says that a use of
/// the page would have raised SIGBUS.
fn suffix(source: &std::io::Error) -> String {
    if source.raw_os_error() == Some(rustix::io::Errno::FAULT.raw_os_error()) {
        return String::new();
    }
    format!(": {source}")
}

/// A region of guest RAM and its mapping in this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamRegion {
    /// First guest-physical address.
    pub guest_addr: u64,
    /// Host address of the mapping; a multiple of 2 MiB.
    pub host_addr: u64,
    /// Length in bytes.
    pub size: u64,
}

/// All RAM of one guest. Cheap to clone: clones are the same memory.
///
/// When the last clone is dropped, the pages are returned to the kernel. The addresses stay mapped,
/// so a remaining [`GuestMemory`] reads zeros and never another mapping. A process runs one
/// machine, so what is left is address space, not memory.
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
    /// Pages that were ever discarded. They were zero then, whatever their backing holds.
    discarded: Mutex<PageSet>,
    /// A fork of this process may have the same memory.
    shared: AtomicBool,
}

impl GuestRam {
    /// Maps private anonymous RAM of `mem_size_mib` mebibytes, untouched and, except for huge pages
    /// of the pool, unreserved.
    ///
    /// With [`HugePages::Hugetlbfs2M`] the pages are reserved from the kernel's pool at once, so
    /// that too few of them are an error here rather than a signal later. The first page is also
    /// used, because a cgroup's limit counts use and not reservations: see [`Self::populate`].
    /// `track_dirty_pages` adds a bitmap of the pages that the monitor writes.
    pub fn map(mem_size_mib: u32, huge_pages: HugePages, track_dirty_pages: bool) -> Result<Self, MapError> {
        let layout = MemoryLayout::of_size(mem_size_mib);
        let ram = Self::build(layout, huge_pages, track_dirty_pages, Backing::Anonymous)?;
        // What the monitor itself writes before the guest runs is there, except kernel and initrd.
        ram.populate(0, MIB)?;
        Ok(ram)
    }

    /// Maps RAM of this layout. With a file as `backing`, regions are private mappings of it.
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
            let mapping = span.into_region(bitmap);
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

    /// The memory, for checked access by guest address.
    pub fn memory(&self) -> &GuestMemory {
        &self.inner.memory
    }

    /// The regions in order of guest address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.inner.regions
    }

    /// The layout of the regions in this guest's memory images.
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

    /// Total size of all regions in bytes.
    pub fn size(&self) -> u64 {
        self.inner.regions.iter().map(|r| r.size).sum()
    }

    /// Whether the `len` bytes at `addr` are RAM of one region.
    pub fn contains(&self, addr: u64, len: u64) -> bool {
        self.memory()
            .find_region(GuestAddress(addr))
            .is_some_and(|r| len <= r.len() - (addr - r.start_addr().0))
    }

    /// Makes sure that the pages of a range can be written. Reserved huge pages may still be over
    /// the limit of the process's cgroup, and a write would then raise SIGBUS. Does nothing for
    /// other kinds of pages, for a page server's memory, and beyond the end of a region. Kernels
    /// before 5.14 cannot check it.
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

    /// The descriptors that a fork must keep open to save this memory: the image that it maps.
    pub fn descriptors(&self) -> Vec<RawFd> {
        match &self.inner.backing {
            Backing::File(file) => vec![file.as_raw_fd()],
            Backing::Anonymous | Backing::PageServer(_) => Vec::new(),
        }
    }

    /// Sets [`Self::is_shared`]. Called by [`Self::note_fork`].
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

    /// Adds to [`Self::discarded`].
    pub(crate) fn add_discarded(&self, region: usize, pages: Range<u64>) {
        self.inner.discarded().insert(region, pages);
    }

    /// The mappings of the regions, in order.
    pub(crate) fn spans(&self) -> &[Span] {
        &self.inner.spans
    }

    /// The backing of pages that were not touched yet.
    pub(crate) fn backing(&self) -> &Backing {
        &self.inner.backing
    }

    /// Pages that were ever discarded, even if they were written again since.
    pub(crate) fn discarded(&self) -> PageSet {
        self.inner.discarded().clone()
    }
}

impl Inner {
    fn discarded(&self) -> MutexGuard<'_, PageSet> {
        // A panic leaves the set consistent.
        locked(&self.discarded)
    }
}

/// New mappings that no [`GuestRam`] owns yet. Dropping it returns their memory: the mapping itself
/// reserves pages of the pool.
struct UnownedSpans(Vec<Span>);

impl Drop for UnownedSpans {
    fn drop(&mut self) {
        for span in &self.0 {
            let replaced = span.remap_anonymous();
            debug_assert!(replaced.is_ok(), "private memory can be replaced: {replaced:?}");
        }
    }
}

impl Drop for Inner {
    fn drop(&mut self) {
        for span in &self.spans {
            if let Backing::PageServer(connection) = &self.backing {
                // Unregister first: the removal would wait for a server that may have exited.
                connection.release(*span);
            }
            let dropped = match &self.backing {
                Backing::Anonymous | Backing::PageServer(_) if self.huge_pages != HugePages::Hugetlbfs2M => {
                    span.drop_pages()
                }
                // Replace the mapping, which holds the file or its reservation of the pool.
                _ => span.remap_anonymous(),
            };
            debug_assert!(dropped.is_ok(), "private memory can be dropped: {dropped:?}");
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
    // A crash dump of the monitor must not contain a tenant's memory.
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
    fn tebibyte_costs_nothing_until_touched() {
        let ram = GuestRam::map(config::MAX_MEM_SIZE_MIB, HugePages::Transparent, false).unwrap();
        assert_eq!(ram.size(), 1 << 40);
        ram.memory().write_obj(1u8, GuestAddress(800 * GIB)).unwrap();
    }

    #[test]
    fn refused_huge_page_error_names_the_cgroup_limit() {
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
    fn contains_stops_at_region_ends() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        assert!(ram.contains(0, 16 * MIB));
        assert!(!ram.contains(0, 16 * MIB + 1));
        assert!(!ram.contains(16 * MIB, 1));
        assert!(!ram.contains(u64::MAX, 2));
        assert!(!ram.contains(1, u64::MAX));
    }

    #[test]
    fn monitor_writes_are_tracked_if_enabled() {
        use vm_memory::bitmap::Bitmap;
        let ram = GuestRam::map(16, HugePages::None, true).unwrap();
        ram.memory().write_obj(1u8, GuestAddress(5 * 4096)).unwrap();
        let region = ram.memory().iter().next().unwrap();
        let bitmap = region.bitmap();
        assert!(bitmap.dirty_at(5 * 4096));
        assert!(!bitmap.dirty_at(6 * 4096));
    }

    #[test]
    fn remaining_view_reads_zeros_after_ram_is_dropped() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        let view = ram.memory().clone();
        view.write_obj(7u8, GuestAddress(0)).unwrap();
        drop(ram);
        assert_eq!(view.read_obj::<u8>(GuestAddress(0)).unwrap(), 0);
    }
}
