//! Mapping guest RAM.

use std::num::NonZeroUsize;
use std::ptr::NonNull;
use std::sync::Arc;

use config::HugePages;
use rustix::mm::{Advice, MapFlags, ProtFlags};
use vm_memory::bitmap::AtomicBitmap;
use vm_memory::mmap::MmapRegionBuilder;
use vm_memory::{GuestAddress, GuestMemoryBackend, GuestMemoryRegion};

use crate::layout::{MIB, RamSpan, ram_spans};
use crate::{GuestMemory, GuestRegion};

/// Host addresses of regions are multiples of this, the size of a huge page.
const ALIGNMENT: usize = 2 << 20;
/// The size of the page that dirty pages are counted in.
const PAGE_SIZE: NonZeroUsize = NonZeroUsize::new(4096).unwrap();

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
    page_size: u64,
}

impl GuestRam {
    /// Maps private anonymous RAM of `mem_size_mib` mebibytes, untouched and unreserved.
    ///
    /// With [`HugePages::Hugetlbfs2M`] the pages are reserved from the kernel's pool at once, and too few of them is an
    /// error here rather than a signal later. `track_dirty_pages` adds a bitmap of the pages that the monitor writes.
    pub fn map(mem_size_mib: u32, huge_pages: HugePages, track_dirty_pages: bool) -> Result<Self, MapError> {
        let mut regions = Vec::new();
        let mut guest_regions = Vec::new();
        for span in ram_spans(mem_size_mib) {
            let host = map_span(span, huge_pages)?;
            let bitmap = track_dirty_pages.then(|| AtomicBitmap::new(span.size as usize, PAGE_SIZE));
            // SAFETY: `host` is a mapping of exactly `span.size` bytes that is never unmapped (see `Drop`).
            let builder = unsafe {
                MmapRegionBuilder::new_with_bitmap(span.size as usize, bitmap)
                    .with_raw_mmap_pointer(host.as_ptr())
            };
            let mapping = builder.build().expect("the mapping is page-aligned");
            guest_regions.push(Arc::new(
                GuestRegion::new(mapping, GuestAddress(span.start)).expect("spans end below 2^64"),
            ));
            regions.push(RamRegion {
                guest_addr: span.start,
                host_addr: host.as_ptr() as u64,
                size: span.size,
            });
        }
        let memory = GuestMemory::from_arc_regions(guest_regions).expect("spans are sorted and disjoint");
        let page_size = if huge_pages == HugePages::Hugetlbfs2M { 2 * MIB } else { 4096 };
        Ok(GuestRam { inner: Arc::new(Inner { memory, regions, page_size }) })
    }

    /// The memory, for checked access.
    pub fn memory(&self) -> &GuestMemory {
        &self.inner.memory
    }

    /// The regions in order of guest address.
    pub fn regions(&self) -> &[RamRegion] {
        &self.inner.regions
    }

    /// Size in bytes of the pages that back the memory.
    pub fn page_size(&self) -> u64 {
        self.inner.page_size
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
}

impl Drop for Inner {
    fn drop(&mut self) {
        for region in &self.regions {
            // SAFETY: the range is ours, from `map_span`, and nobody holds a Rust reference into guest memory:
            // `vm-memory` hands out volatile accesses only. Private pages that are dropped read as zero afterwards.
            let dropped = unsafe {
                rustix::mm::madvise(region.host_addr as *mut _, region.size as usize, Advice::LinuxDontNeed)
            };
            debug_assert!(dropped.is_ok(), "private memory can be given back: {dropped:?}");
        }
    }
}

/// Maps one span at a host address aligned to 2 MiB.
fn map_span(span: RamSpan, huge_pages: HugePages) -> Result<NonNull<u8>, MapError> {
    let (extra_flags, pages) = match huge_pages {
        HugePages::None => (MapFlags::NORESERVE, "4 KiB pages"),
        HugePages::Transparent => (MapFlags::NORESERVE, "transparent huge pages"),
        HugePages::Hugetlbfs2M => {
            (MapFlags::HUGETLB | MapFlags::HUGE_2MB, "2 MiB pages from the huge page pool")
        }
    };
    let failed =
        |source: rustix::io::Errno| MapError::Map { size_mib: span.size / MIB, pages, source: source.into() };
    let size = span.size as usize;

    // Anonymous mappings may lie anywhere; ask for more and give the ends back. (The pool's pages are aligned as they are.)
    let slack = if huge_pages == HugePages::Hugetlbfs2M { 0 } else { ALIGNMENT };
    // SAFETY: a new mapping at an address of the kernel's choice touches nothing that exists.
    let start = unsafe {
        rustix::mm::mmap_anonymous(
            std::ptr::null_mut(),
            size + slack,
            ProtFlags::READ | ProtFlags::WRITE,
            MapFlags::PRIVATE | extra_flags,
        )
    }
    .map_err(failed)?
    .cast::<u8>();
    let head = start.align_offset(ALIGNMENT);
    let tail = slack.saturating_sub(head);
    let host = start.wrapping_add(head);
    unmap(start, head);
    unmap(host.wrapping_add(size), tail);

    let advised = |source: rustix::io::Errno| MapError::Advise {
        size_mib: span.size / MIB,
        pages,
        source: source.into(),
    };
    // A crash dump of the monitor must not carry a tenant's memory.
    advise(host, size, Advice::LinuxDontDump).map_err(advised)?;
    if huge_pages == HugePages::Transparent {
        advise(host, size, Advice::LinuxHugepage).map_err(advised)?;
    }
    Ok(NonNull::new(host).expect("the kernel does not map address 0"))
}

fn advise(host: *mut u8, size: usize, advice: Advice) -> rustix::io::Result<()> {
    // SAFETY: `host` and `size` are the mapping just made; the advice given here keeps its contents.
    unsafe { rustix::mm::madvise(host.cast(), size, advice) }
}

/// Gives back one end of a fresh mapping.
fn unmap(start: *mut u8, len: usize) {
    if len > 0 {
        // SAFETY: the range is the unused end of a mapping that `map_span` just made and nobody else knows.
        let unmapped = unsafe { rustix::mm::munmap(start.cast(), len) };
        debug_assert!(unmapped.is_ok(), "the end of a fresh mapping can be unmapped: {unmapped:?}");
    }
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
        assert!(ram.regions().iter().all(|r| r.host_addr % ALIGNMENT as u64 == 0));
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
