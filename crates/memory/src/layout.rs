//! Where RAM is in the guest's physical address space.
//!
//! RAM fills the address space from 0 upwards except for two holes: 3 GiB to 4 GiB for devices with
//! 32-bit addresses, and 256 GiB to 512 GiB for 64-bit BARs of PCI devices. The addresses are
//! Firecracker's, so that guest images see the same layout.

use serde::{Deserialize, Serialize};

use crate::pages::PAGE;

/// One mebibyte.
pub const MIB: u64 = 1 << 20;
/// One gibibyte.
pub const GIB: u64 = 1 << 30;

/// Start of the hole for 32-bit devices: RAM below it ends here.
pub const MMIO32_START: u64 = 3 * GIB;
/// End of the hole for 32-bit devices (exclusive): RAM continues here.
pub const MMIO32_END: u64 = 4 * GIB;
/// Start of the hole for 64-bit BARs.
pub const MMIO64_START: u64 = 256 * GIB;
/// End of the hole for 64-bit BARs (exclusive): RAM continues here.
pub const MMIO64_END: u64 = 512 * GIB;

/// The address ranges for RAM, in order, as `(start, end)` with the end exclusive.
const RAM_SPANS: [(u64, u64); 3] = [
    (0, MMIO32_START),
    (MMIO32_END, MMIO64_START),
    (MMIO64_END, MMIO64_END + config::MAX_MEM_SIZE_MIB as u64 * MIB),
];

/// A range of guest-physical addresses that is RAM.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct RamSpan {
    /// First guest-physical address.
    pub start: u64,
    /// Length in bytes; never 0.
    pub size: u64,
}

impl RamSpan {
    /// One past the last guest-physical address.
    pub fn end(&self) -> u64 {
        self.start + self.size
    }
}

/// Splits `mem_size_mib` mebibytes of RAM over the ranges between the holes, lowest addresses
/// first.
///
/// `mem_size_mib` must be at most [`config::MAX_MEM_SIZE_MIB`], which the configuration checks.
pub fn ram_spans(mem_size_mib: u32) -> Vec<RamSpan> {
    let mut left = u64::from(mem_size_mib) * MIB;
    let mut spans = Vec::new();
    for (start, end) in RAM_SPANS {
        let size = left.min(end - start);
        if size > 0 {
            spans.push(RamSpan { start, size });
        }
        left -= size;
    }
    spans
}

/// Where each region of RAM is in a memory image. Part of the state file.
///
/// A value of this type is always valid, even if it comes from a file. It has 1 to 64 regions of
/// whole pages outside the holes, sorted and disjoint by guest address and by offset. Together they
/// are at most as large as the largest guest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Vec<ImageRegion>", into = "Vec<ImageRegion>")]
pub struct MemoryLayout(Vec<ImageRegion>);

/// One region of RAM in a memory image.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageRegion {
    /// First guest-physical address.
    pub guest_addr: u64,
    /// Length in bytes.
    pub size: u64,
    /// Offset of its first byte in the image.
    pub offset: u64,
}

/// Why a list of regions is not a valid layout.
#[derive(Debug, thiserror::Error, PartialEq, Eq)]
#[error(
    "memory region {index}: {reason}: guest address {guest_addr:#x}, {size:#x} bytes, offset {offset:#x}"
)]
pub struct LayoutError {
    /// The index of the region.
    pub index: usize,
    /// Its guest address.
    pub guest_addr: u64,
    /// Its length in bytes.
    pub size: u64,
    /// Its offset in the image.
    pub offset: u64,
    /// What is wrong with it.
    pub reason: &'static str,
}

/// The most regions of a layout.
const MAX_REGIONS: usize = 64;

impl MemoryLayout {
    /// The layout of a guest with `mem_size_mib` mebibytes: its ranges of RAM, one after the other.
    pub fn of_size(mem_size_mib: u32) -> Self {
        let mut offset = 0;
        let region = |RamSpan { start: guest_addr, size }| {
            let region = ImageRegion { guest_addr, size, offset };
            offset += size;
            region
        };
        MemoryLayout(ram_spans(mem_size_mib).into_iter().map(region).collect())
    }

    /// The regions in order.
    pub fn regions(&self) -> &[ImageRegion] {
        &self.0
    }

    /// Length of the image in bytes.
    pub fn file_size(&self) -> u64 {
        self.0.last().map_or(0, |r| r.offset + r.size)
    }

    /// Total size of the regions in bytes.
    pub fn ram_size(&self) -> u64 {
        self.0.iter().map(|r| r.size).sum()
    }
}

impl TryFrom<Vec<ImageRegion>> for MemoryLayout {
    type Error = LayoutError;

    fn try_from(regions: Vec<ImageRegion>) -> Result<Self, LayoutError> {
        const MAX_RAM: u64 = config::MAX_MEM_SIZE_MIB as u64 * MIB;
        let (mut guest_end, mut file_end, mut total) = (0, 0, 0u64);
        for (index, region) in regions.iter().enumerate() {
            let ImageRegion { guest_addr, size, offset } = *region;
            let refused = |reason| Err(LayoutError { index, guest_addr, size, offset, reason });
            if index == MAX_REGIONS {
                return refused("there are at most 64 regions");
            }
            if [guest_addr, size, offset].iter().any(|n| n % PAGE != 0) || size == 0 {
                return refused("it is not whole pages of 4096 bytes");
            }
            let (Some(end), Some(offset_end)) = (guest_addr.checked_add(size), offset.checked_add(size))
            else {
                return refused("it ends beyond 2^64");
            };
            if guest_addr < guest_end || offset < file_end {
                return refused("it overlaps the previous one, or is out of order");
            }
            if !RAM_SPANS.iter().any(|(start, limit)| *start <= guest_addr && end <= *limit) {
                return refused("it is outside the address ranges for RAM");
            }
            total += size;
            if total > MAX_RAM || offset_end > 2 * MAX_RAM {
                return refused("the image is larger than a guest can be");
            }
            (guest_end, file_end) = (end, offset_end);
        }
        if regions.is_empty() {
            return Err(LayoutError {
                index: 0,
                guest_addr: 0,
                size: 0,
                offset: 0,
                reason: "there are no regions",
            });
        }
        Ok(MemoryLayout(regions))
    }
}

impl From<MemoryLayout> for Vec<ImageRegion> {
    fn from(layout: MemoryLayout) -> Self {
        layout.0
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn small_guest_is_one_span_from_zero() {
        assert_eq!(ram_spans(128), [RamSpan { start: 0, size: 128 * MIB }]);
    }

    #[test]
    fn ram_steps_over_the_32_bit_hole() {
        assert_eq!(
            ram_spans(5 * 1024),
            [RamSpan { start: 0, size: 3 * GIB }, RamSpan { start: 4 * GIB, size: 2 * GIB }]
        );
    }

    #[test]
    fn three_gib_fit_below_the_32_bit_hole() {
        assert_eq!(ram_spans(3 * 1024), [RamSpan { start: 0, size: 3 * GIB }]);
    }

    #[test]
    fn image_regions_are_consecutive() {
        let layout = MemoryLayout::of_size(5 * 1024);
        let second = ImageRegion { guest_addr: 4 * GIB, size: 2 * GIB, offset: 3 * GIB };
        assert_eq!(layout.regions()[1], second);
        assert_eq!(layout.file_size(), 5 * GIB);
    }

    #[test]
    fn invalid_layout_error_has_region_and_reason() {
        let region = |guest_addr, size, offset| ImageRegion { guest_addr, size, offset };
        let good = region(0, MIB, 0);
        for (regions, reason) in [
            (vec![], "no regions"),
            (vec![region(0, 0, 0)], "whole pages"),
            (vec![region(1, MIB, 0)], "whole pages"),
            (vec![region(0, MIB, 512)], "whole pages"),
            (vec![good, region(0, MIB, MIB)], "overlaps"),
            (vec![good, region(MIB, MIB, 0)], "overlaps"),
            (vec![region(MIB, MIB, 0), region(0, MIB, MIB)], "overlaps"),
            (vec![region(2 * GIB, 2 * GIB, 0)], "outside the address ranges"),
            (vec![region(MMIO32_START, MIB, 0)], "outside the address ranges"),
            (vec![region(u64::MAX - 4095, 8192, 0)], "beyond 2^64"),
            (vec![region(0, MIB, u64::MAX - 4095)], "beyond 2^64"),
            (vec![region(0, MIB, 1 << 60)], "larger than a guest"),
            ((0..65).map(|n| region(n * MIB, MIB, n * MIB)).collect(), "at most 64"),
        ] {
            let error = MemoryLayout::try_from(regions).unwrap_err();
            assert!(error.reason.contains(reason), "{error} is not about {reason}");
        }
    }

    proptest! {
        #[test]
        fn layout_of_any_size_is_valid(mib in 1..=config::MAX_MEM_SIZE_MIB) {
            let layout = MemoryLayout::of_size(mib);
            prop_assert_eq!(layout.ram_size(), u64::from(mib) * MIB);
            prop_assert_eq!(MemoryLayout::try_from(Vec::from(layout.clone())), Ok(layout));
        }

        #[test]
        fn spans_cover_all_ram_in_order_outside_the_holes(mib in 1..=config::MAX_MEM_SIZE_MIB) {
            let spans = ram_spans(mib);
            prop_assert_eq!(spans.iter().map(|s| s.size).sum::<u64>(), u64::from(mib) * MIB);
            for s in &spans {
                prop_assert!(s.end() <= MMIO32_START || s.start >= MMIO32_END);
                prop_assert!(s.end() <= MMIO64_START || s.start >= MMIO64_END);
                prop_assert_eq!(s.start % (2 * MIB), 0);
            }
            prop_assert!(spans.windows(2).all(|w| w[0].end() <= w[1].start));
        }
    }
}
