//! The page tables with which a 64-bit kernel is entered: an identity mapping in pages of 2 MiB.
//!
//! They map the first GiB, which holds boot data and nearly every kernel, and each GiB in which the
//! kernel or its initrd has a byte. So an ordinary guest has three pages of tables. A kernel that
//! accesses other memory maps it itself, as the boot protocol says.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;

use memory::GuestRam;

use super::error::BootError;
use super::io::write_boot_data;
use crate::layout;

const PRESENT_WRITABLE: u64 = 0b11;
const LARGE: u64 = 1 << 7;

/// Binary logarithm of what one level-2 table maps.
const GIB_SHIFT: u32 = 30;
/// Entries in a table.
const ENTRIES: u64 = 512;
const TABLE_SIZE: u64 = 0x1000;

/// Maps the first GiB and each GiB that `used` touches. Nothing is written on an error.
pub(crate) fn write_page_tables(
    ram: &GuestRam,
    used: impl Iterator<Item = Range<u64>>,
) -> Result<(), BootError> {
    let gibs: BTreeSet<u64> = std::iter::once(0..1)
        .chain(used)
        .filter(|range| !range.is_empty())
        .flat_map(|range| range.start >> GIB_SHIFT..=(range.end - 1) >> GIB_SHIFT)
        .collect();
    let groups: BTreeSet<u64> = gibs.iter().map(|gib| gib / ENTRIES).collect();
    let max_tables = ((layout::BOOT_TABLES_END - layout::BOOT_PML4) / TABLE_SIZE) as usize - 1;
    if gibs.len() + groups.len() > max_tables {
        let end = gibs.last().map_or(0, |gib| (gib + 1) << GIB_SHIFT);
        return Err(BootError::TooFarApart {
            gib: gibs.len(),
            end,
            max: max_tables - groups.len().min(max_tables),
        });
    }

    let mut free = (layout::BOOT_PML4 + TABLE_SIZE..).step_by(TABLE_SIZE as usize);
    let mut next_table = || free.next().expect("the range has no end");
    let mut level3 = BTreeMap::new();
    for group in groups {
        let table = next_table();
        write_entry(ram, layout::BOOT_PML4, group, table | PRESENT_WRITABLE);
        level3.insert(group, table);
    }
    for gib in gibs {
        let table = next_table();
        write_entry(ram, level3[&(gib / ENTRIES)], gib % ENTRIES, table | PRESENT_WRITABLE);
        let pages = (0..ENTRIES).map(|page| gib << GIB_SHIFT | page << 21 | PRESENT_WRITABLE | LARGE);
        write_boot_data(ram, table, &pages.flat_map(u64::to_le_bytes).collect::<Vec<u8>>());
    }
    Ok(())
}

fn write_entry(ram: &GuestRam, table: u64, index: u64, entry: u64) {
    write_boot_data(ram, table + 8 * index, &entry.to_le_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    const GIB: u64 = 1 << GIB_SHIFT;

    fn ram() -> GuestRam {
        GuestRam::map(2, HugePages::None, false).unwrap()
    }

    fn map(ram: &GuestRam, used: Range<u64>) -> Result<(), BootError> {
        write_page_tables(ram, std::iter::once(used))
    }

    /// The physical address that the tables give for a virtual one.
    fn translate(ram: &GuestRam, addr: u64) -> Option<u64> {
        let mut table = layout::BOOT_PML4;
        for shift in [39, 30, 21] {
            let index = addr >> shift & (ENTRIES - 1);
            let entry: u64 = ram.memory().read_obj(GuestAddress(table + 8 * index)).unwrap();
            if entry & PRESENT_WRITABLE != PRESENT_WRITABLE {
                return None;
            }
            table = entry & !0xfff;
        }
        Some(table + (addr & ((1 << 21) - 1)))
    }

    #[test]
    fn ordinary_kernel_has_the_first_gib_in_three_tables() {
        let ram = ram();
        map(&ram, 16 << 20..64 << 20).unwrap();
        for addr in [0, 0x7000, 123 << 20, GIB - 1] {
            assert_eq!(translate(&ram, addr), Some(addr));
        }
        assert_eq!(translate(&ram, GIB), None);
        let untouched: u64 = ram.memory().read_obj(GuestAddress(layout::BOOT_PML4 + 3 * TABLE_SIZE)).unwrap();
        assert_eq!(untouched, 0);
    }

    #[test]
    fn every_gib_with_kernel_or_initrd_is_mapped_wherever_it_is() {
        let ram = ram();
        let ranges = [GIB + 5..3 * GIB, 600 * GIB..600 * GIB + 1, 0..0];
        write_page_tables(&ram, ranges.into_iter()).unwrap();
        for addr in [0, GIB, 2 * GIB, 3 * GIB - 1, 600 * GIB, 601 * GIB - 1] {
            assert_eq!(translate(&ram, addr), Some(addr), "{addr:#x}");
        }
        for addr in [3 * GIB, 599 * GIB, 601 * GIB] {
            assert_eq!(translate(&ram, addr), None, "{addr:#x}");
        }
    }

    #[test]
    fn more_gibs_than_the_tables_map_are_refused() {
        let ram = ram();
        map(&ram, 20 * GIB..40 * GIB).unwrap();
        let error = map(&ram, 20 * GIB..41 * GIB).unwrap_err();
        assert!(matches!(error, BootError::TooFarApart { gib: 22, max: 21, .. }), "{error}");
        let error = map(&ram, 0..1 << 50).unwrap_err();
        assert!(matches!(error, BootError::TooFarApart { .. }), "{error}");
    }
}
