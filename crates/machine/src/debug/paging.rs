//! The walk of a guest's page tables, from a linear to a physical address.
//!
//! Page tables are guest input. The walk reads at most five entries, each at an address that its
//! reader checks. It writes nothing, also no accessed bits.
//!
//! All paging modes of x86 are here, because a guest passes through several when it starts.
//! Neither reserved bits nor permissions are checked: a debugger reads and writes what is mapped.
//!
//! Intel SDM volume 3, chapter 4 (Paging).

use kvm_bindings::kvm_sregs;

const CR0_PAGING: u64 = 1 << 31;
const CR4_LARGE_PAGES: u64 = 1 << 4;
const CR4_PAE: u64 = 1 << 5;
const CR4_FIVE_LEVELS: u64 = 1 << 12;
const EFER_LONG_MODE_ACTIVE: u64 = 1 << 10;

const PRESENT: u64 = 1;
const LARGE_PAGE: u64 = 1 << 7;

/// The physical address in an entry of 8 bytes.
const ADDRESS_MASK: u64 = 0x000f_ffff_ffff_f000;

/// Bits of an offset in the smallest page.
const PAGE_BITS: u32 = 12;

/// The registers that say how a vCPU translates addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct AddressSpace {
    mode: Mode,
    /// The physical address of the first table.
    root: u64,
    large_pages: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mode {
    /// Paging is off.
    Physical,
    /// 32 bits, entries of 4 bytes.
    Legacy,
    /// 32 bits, entries of 8 bytes.
    Pae,
    /// 48 or 57 bits, four or five levels.
    Long { levels: u32 },
}

impl AddressSpace {
    /// The address space of a vCPU with these registers.
    pub(super) fn of(system: &kvm_sregs) -> Self {
        let mode = if system.cr0 & CR0_PAGING == 0 {
            Mode::Physical
        } else if system.efer & EFER_LONG_MODE_ACTIVE != 0 {
            Mode::Long { levels: if system.cr4 & CR4_FIVE_LEVELS == 0 { 4 } else { 5 } }
        } else if system.cr4 & CR4_PAE != 0 {
            Mode::Pae
        } else {
            Mode::Legacy
        };
        let root = match mode {
            Mode::Physical => 0,
            Mode::Legacy => system.cr3 & 0xffff_f000,
            Mode::Pae => system.cr3 & 0xffff_ffe0,
            Mode::Long { .. } => system.cr3 & ADDRESS_MASK,
        };
        AddressSpace { mode, root, large_pages: system.cr4 & CR4_LARGE_PAGES != 0 }
    }

    /// The physical address of `linear`; `None` if it is not mapped. `read` reads that many bytes
    /// of physical memory as a number, `None` if they are not RAM.
    pub(super) fn translate(&self, linear: u64, read: impl Fn(u64, usize) -> Option<u64>) -> Option<u64> {
        match self.mode {
            Mode::Physical => Some(linear),
            Mode::Legacy => self.walk_legacy(u32::try_from(linear).ok()?, read),
            Mode::Pae => self.walk(u32::try_from(linear).ok()?.into(), 3, read),
            Mode::Long { levels } => {
                let unused = 64 - (PAGE_BITS + 9 * levels);
                let canonical = (linear << unused).cast_signed() >> unused == linear.cast_signed();
                if canonical { self.walk(linear, levels, read) } else { None }
            }
        }
    }

    /// Entries of 8 bytes, 512 in a table. (The first table of PAE has four, and 32-bit addresses
    /// select none of the others.)
    fn walk(&self, linear: u64, levels: u32, read: impl Fn(u64, usize) -> Option<u64>) -> Option<u64> {
        let mut table = self.root;
        for level in (0..levels).rev() {
            let shift = PAGE_BITS + 9 * level;
            let entry = read(table.checked_add((linear >> shift & 0x1ff) * 8)?, 8)?;
            if entry & PRESENT == 0 {
                return None;
            }
            let offset = (1 << shift) - 1;
            // Pages of 4 KiB, 2 MiB and, in long mode, 1 GiB. The bit is reserved above.
            let largest = if levels > 3 { 2 } else { 1 };
            if level == 0 || (level <= largest && entry & LARGE_PAGE != 0) {
                return Some((entry & ADDRESS_MASK & !offset) | (linear & offset));
            }
            table = entry & ADDRESS_MASK;
        }
        None
    }

    /// Entries of 4 bytes, 1024 in a table.
    fn walk_legacy(&self, linear: u32, read: impl Fn(u64, usize) -> Option<u64>) -> Option<u64> {
        let linear = u64::from(linear);
        let directory = read(self.root + (linear >> 22) * 4, 4)?;
        if directory & PRESENT == 0 {
            return None;
        }
        if self.large_pages && directory & LARGE_PAGE != 0 {
            // Bits 13 to 20 are bits 32 to 39 of the address (PSE-36).
            let high = (directory >> 13 & 0xff) << 32;
            return Some(high | (directory & 0xffc0_0000) | (linear & 0x3f_ffff));
        }
        let entry = read((directory & 0xffff_f000) + (linear >> PAGE_BITS & 0x3ff) * 4, 4)?;
        (entry & PRESENT != 0).then_some((entry & 0xffff_f000) | (linear & 0xfff))
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashMap;

    use proptest::prelude::*;

    use super::*;

    /// CR0, CR4 and EFER.
    type Controls = (u64, u64, u64);

    const LONG: Controls = (CR0_PAGING, CR4_PAE, EFER_LONG_MODE_ACTIVE);

    fn space((cr0, cr4, efer): Controls, cr3: u64) -> AddressSpace {
        AddressSpace::of(&kvm_sregs { cr0, cr3, cr4, efer, ..Default::default() })
    }

    /// Memory with these entries, and nothing elsewhere.
    fn memory(entries: &[(u64, u64)]) -> impl Fn(u64, usize) -> Option<u64> + Copy {
        let entries: HashMap<u64, u64> = entries.iter().copied().collect();
        let entries: &'static HashMap<u64, u64> = Box::leak(Box::new(entries));
        move |address, _| entries.get(&address).copied()
    }

    #[test]
    fn without_paging_an_address_is_physical() {
        let read = memory(&[]);
        assert_eq!(space((0, 0, 0), 0x1000).translate(0x1234_5678, read), Some(0x1234_5678));
    }

    #[test]
    fn four_levels_lead_to_pages_of_each_size() {
        let read = memory(&[
            (0x1000 + 511 * 8, 0x2003),
            (0x2000 + 510 * 8, 0x3003),
            (0x3000 + 8, 0x4003),
            (0x4000 + 2 * 8, 0x8000_0000_0008_9003),
            (0x3000 + 2 * 8, 0x4020_0083),
            (0x2000 + 511 * 8, 0x8000_0083),
            (0x3000 + 3 * 8, 0x4002),
        ]);
        let long = space(LONG, 0x1018);
        let base = 0xffff_ffff_8000_0000;
        assert_eq!(long.translate(base + 0x20_2abc, read), Some(0x8_9abc));
        assert_eq!(long.translate(base + 0x41_2345, read), Some(0x4021_2345));
        assert_eq!(long.translate(base + 0x5234_5678, read), Some(0x9234_5678));
        // Not present, no such entry, and not canonical.
        assert_eq!(long.translate(base + 0x60_0000, read), None);
        assert_eq!(long.translate(0x1000, read), None);
        assert_eq!(long.translate(0x0000_ffff_8020_2abc, read), None);
    }

    #[test]
    fn fifth_level_is_used_if_the_guest_has_it() {
        let read = memory(&[(0x9000 + 8, 0x1003), (0x1000, 0x2003), (0x2000, 0x83)]);
        let space = space((CR0_PAGING, CR4_PAE | CR4_FIVE_LEVELS, EFER_LONG_MODE_ACTIVE), 0x9000);
        assert_eq!(space.translate((1 << 48) + 5, read), Some(5));
        assert_eq!(space.translate(5, read), None);
    }

    #[test]
    fn both_modes_of_32_bits_are_walked() {
        let pae = space((CR0_PAGING, CR4_PAE, 0), 0x1020);
        let read = memory(&[
            (0x1020 + 3 * 8, 0x2001),
            (0x2000, 0x3003),
            (0x3000 + 8, 0x1_2345_6003),
            (0x2008, 0x20_0083),
        ]);
        assert_eq!(pae.translate(0xc000_1abc, read), Some(0x1_2345_6abc));
        assert_eq!(pae.translate(0xc020_0007, read), Some(0x20_0007));
        assert_eq!(pae.translate(1 << 32 | 0xc020_0007, read), None);

        let read = memory(&[(0x1000 + 4, 0x2003), (0x2004, 0x5003), (0x1000 + 8, 0x0080_2083)]);
        let legacy = space((CR0_PAGING, CR4_LARGE_PAGES, 0), 0x1000);
        assert_eq!(legacy.translate(0x40_1123, read), Some(0x5123));
        assert_eq!(legacy.translate(0x80_1123, read), Some(0x1_0080_1123));
        // Without large pages the same entry names a table, which is not there.
        assert_eq!(space((CR0_PAGING, 0, 0), 0x1000).translate(0x80_1123, read), None);
    }

    #[test]
    fn tables_that_name_themselves_end_the_walk() {
        let long = space(LONG, 0x1000);
        assert_eq!(long.translate(0xfff, |_, _| Some(0x1003)), Some(0x1fff));
    }

    proptest! {
        #[test]
        fn any_tables_and_registers_end_in_an_address_or_none(
            cr0: u64, cr3: u64, cr4: u64, efer: u64, linear: u64, entry: u64,
        ) {
            let space = AddressSpace::of(&kvm_sregs { cr0, cr3, cr4, efer, ..Default::default() });
            let reads = std::cell::Cell::new(0);
            let read = |address: u64, _| {
                reads.set(reads.get() + 1);
                (address % 7 != 1).then_some(entry ^ address)
            };
            let _ = space.translate(linear, read);
            prop_assert!(reads.get() <= 5);
        }
    }
}
