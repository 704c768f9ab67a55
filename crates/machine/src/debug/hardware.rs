//! The four debug registers, which hold breakpoints and watch points.
//!
//! All vCPUs have the same contents. While a debugger uses them, the guest's own use of its debug
//! registers has no effect.
//!
//! Intel SDM volume 3, 17.2 (Debug Registers).

/// Registers for addresses: DR0 to DR3.
const COUNT: usize = 4;

/// DR7: exact data breakpoints, and the bit that is always 1.
const DR7_BASE: u64 = 1 << 9 | 1 << 10;

/// What an access is compared with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Watch {
    /// Execution of the instruction.
    Execute,
    /// Writes.
    Write,
    /// Reads and writes. The CPU has no reads alone.
    Access,
}

impl Watch {
    /// R/W in DR7.
    fn bits(self) -> u64 {
        match self {
            Watch::Execute => 0b00,
            Watch::Write => 0b01,
            Watch::Access => 0b11,
        }
    }
}

/// A register in use.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Slot {
    /// The linear address.
    pub(super) address: u64,
    /// 1, 2, 4 or 8 bytes, aligned.
    len: u64,
    /// What it stops.
    pub(super) watch: Watch,
    /// The address and the length of the whole watch point, of which this may be a part.
    whole: (u64, u64),
}

/// The debug registers.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct DebugRegisters {
    slots: [Option<Slot>; COUNT],
}

impl DebugRegisters {
    /// Whether none is in use.
    pub(super) fn is_empty(&self) -> bool {
        self.slots.iter().all(Option::is_none)
    }

    /// Watches `len` bytes at `address`, as several registers if they are not aligned. False if too
    /// few are free: then nothing has changed.
    pub(super) fn add(&mut self, address: u64, len: u64, watch: Watch) -> bool {
        let mut slots = self.slots;
        let Some(end) = address.checked_add(len).filter(|_| (1..=8 * COUNT as u64).contains(&len)) else {
            return false;
        };
        let mut next = address;
        while next < end {
            let len = largest_aligned(next, end - next);
            let Some(free) = slots.iter_mut().find(|slot| slot.is_none()) else { return false };
            *free = Some(Slot { address: next, len, watch, whole: (address, end - address) });
            next += len;
        }
        self.slots = slots;
        true
    }

    /// Ends such a watch. Returns whether there was one.
    pub(super) fn remove(&mut self, address: u64, len: u64, watch: Watch) -> bool {
        let matches = |slot: &Slot| slot.whole == (address, len) && slot.watch == watch;
        let mut found = false;
        for slot in self.slots.iter_mut().filter(|slot| slot.is_some_and(|slot| matches(&slot))) {
            *slot = None;
            found = true;
        }
        found
    }

    /// Whether accesses of `address` are watched.
    pub(super) fn watches(&self, address: u64) -> bool {
        let mut used = self.slots.iter().flatten();
        used.any(|slot| slot.watch != Watch::Execute && slot.address == address)
    }

    /// The register that caused a #DB with this DR6.
    pub(super) fn hit(&self, dr6: u64) -> Option<Slot> {
        self.slots.iter().enumerate().find_map(|(index, slot)| slot.filter(|_| dr6 & 1 << index != 0))
    }

    /// DR0 to DR7, as KVM takes them.
    pub(super) fn values(&self) -> [u64; 8] {
        let mut values = [0; 8];
        values[7] = DR7_BASE;
        for (index, slot) in self.slots.iter().enumerate() {
            let Some(slot) = slot else { continue };
            let len = match slot.len {
                8 => 0b10,
                len => len - 1,
            };
            values[index] = slot.address;
            // Enabled for all tasks.
            values[7] |= 0b10 << (2 * index) | (len << 2 | slot.watch.bits()) << (16 + 4 * index);
        }
        values
    }
}

/// The largest length that the CPU can watch at `address`, of at most `len` bytes.
fn largest_aligned(address: u64, len: u64) -> u64 {
    [8, 4, 2].into_iter().find(|size| *size <= len && address.is_multiple_of(*size)).unwrap_or(1)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn control_register_has_kind_and_length_of_each() {
        let mut registers = DebugRegisters::default();
        assert!(registers.is_empty());
        assert!(registers.add(0x1001, 1, Watch::Execute));
        assert!(registers.add(0x2000, 8, Watch::Write));
        assert!(registers.add(0x3004, 4, Watch::Access));
        let values = registers.values();
        assert_eq!(values[..4], [0x1001, 0x2000, 0x3004, 0]);
        assert_eq!(values[7], 0x600 | 0b10_1010 | 0b1001 << 20 | 0b1111 << 24);
    }

    #[test]
    fn unaligned_watch_takes_several_registers_or_none() {
        let mut registers = DebugRegisters::default();
        assert!(registers.add(0x1001, 4, Watch::Write));
        assert_eq!(registers.values()[..4], [0x1001, 0x1002, 0x1004, 0]);
        let before = registers.clone();
        assert!(!registers.add(0x2002, 4, Watch::Write));
        assert!(!registers.add(0x2000, 33, Watch::Write) && !registers.add(u64::MAX, 2, Watch::Write));
        assert!(!registers.add(0x2000, 0, Watch::Write));
        assert_eq!(registers, before);
        assert!(registers.remove(0x1001, 4, Watch::Write) && registers.is_empty());
    }

    #[test]
    fn only_the_same_watch_is_removed() {
        let mut registers = DebugRegisters::default();
        registers.add(0x1000, 1, Watch::Execute);
        assert!(!registers.remove(0x1000, 1, Watch::Write) && !registers.remove(0x1000, 2, Watch::Execute));
        assert!(!registers.is_empty() && !registers.watches(0x1000));
        assert!(registers.remove(0x1000, 1, Watch::Execute));
    }

    #[test]
    fn hit_is_found_by_its_bit() {
        let mut registers = DebugRegisters::default();
        registers.add(0x1000, 1, Watch::Execute);
        registers.add(0x2000, 4, Watch::Write);
        assert_eq!(registers.hit(0xffff_0ff2).map(|slot| slot.address), Some(0x2000));
        // A single step, and a register that is not in use.
        assert_eq!(registers.hit(0xffff_4ff0), None);
        assert_eq!(registers.hit(0xffff_0ff8), None);
    }
}
