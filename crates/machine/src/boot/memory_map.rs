//! The memory map for the guest: which ranges are RAM, and which are reserved.

use memory::GuestRam;

use crate::layout;

/// The type of RAM. Types are those of the ACPI specification, which e820 and PVH use too.
pub(super) const RAM: u32 = 1;
/// The type of ranges that the guest must not use.
pub(super) const RESERVED: u32 = 2;

/// One entry of the map.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Range {
    pub(super) start: u64,
    pub(super) size: u64,
    pub(super) kind: u32,
}

/// The ranges by address: low RAM, firmware tables, the rest of RAM, and PCI configuration space.
pub(super) fn ranges(ram: &GuestRam) -> Vec<Range> {
    let low_end = layout::LOW_RAM_END;
    let mut ranges = vec![
        Range { start: 0, size: low_end, kind: RAM },
        Range { start: low_end, size: layout::HIGH_RAM - low_end, kind: RESERVED },
        Range { start: layout::ECAM, size: layout::ECAM_SIZE, kind: RESERVED },
    ];
    for region in ram.regions() {
        let start = region.guest_addr.max(layout::HIGH_RAM);
        let size = region.guest_addr + region.size - start;
        ranges.push(Range { start, size, kind: RAM });
    }
    ranges.sort_by_key(|r| r.start);
    ranges
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use memory::layout::GIB;

    #[test]
    fn map_covers_all_ram_without_overlaps() {
        let ram = GuestRam::map(5 * 1024, HugePages::None, false).unwrap();
        let ranges = ranges(&ram);
        assert!(ranges.windows(2).all(|w| w[0].start + w[0].size <= w[1].start), "{ranges:x?}");
        let usable: u64 = ranges.iter().filter(|r| r.kind == RAM).map(|r| r.size).sum();
        assert_eq!(usable, 5 * GIB - (layout::HIGH_RAM - layout::LOW_RAM_END));
    }
}
