//! Software breakpoints: `int3` instructions in the guest's memory, and the bytes that they hide.
//!
//! # Invariants
//!
//! - A debugger sees the guest's own bytes: [`Patches::hide`] puts them into what it reads, and
//!   what it writes there becomes the hidden byte ([`Patches::write`]).
//! - A byte is put back only where the `int3` still is. If the guest has changed its code since,
//!   its new byte stays.
//! - Several addresses may lead to one byte. The byte is patched once, until the last of them is
//!   removed.

use std::collections::BTreeMap;

use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

/// The instruction.
pub(super) const INT3: u8 = 0xcc;

/// Most breakpoints at a time: what a debugger can make this process allocate.
pub(super) const MAX_PATCHES: usize = 4096;

/// The software breakpoints of a guest.
#[derive(Debug)]
pub(super) struct Patches {
    ram: GuestRam,
    /// The physical address of each breakpoint, by linear address.
    places: BTreeMap<u64, u64>,
    /// The hidden byte of each patched physical address.
    hidden: BTreeMap<u64, u8>,
}

impl Patches {
    /// No breakpoints.
    pub(super) fn new(ram: GuestRam) -> Self {
        Patches { ram, places: BTreeMap::new(), hidden: BTreeMap::new() }
    }

    /// Whether there are none.
    pub(super) fn is_empty(&self) -> bool {
        self.hidden.is_empty()
    }

    /// Whether there is a breakpoint at a linear address.
    pub(super) fn contains(&self, linear: u64) -> bool {
        self.places.contains_key(&linear)
    }

    /// Whether a byte of physical memory is patched.
    pub(super) fn is_patched(&self, physical: u64) -> bool {
        self.hidden.contains_key(&physical)
    }

    /// Adds a breakpoint. False if the byte cannot be written, or there are [`MAX_PATCHES`].
    pub(super) fn add(&mut self, linear: u64, physical: u64) -> bool {
        if self.places.len() >= MAX_PATCHES {
            return false;
        }
        // The guest may have mapped the address elsewhere since.
        self.remove(linear);
        if !self.is_patched(physical) {
            let Some(byte) = self.read(physical) else { return false };
            if !self.write_byte(physical, INT3) {
                return false;
            }
            self.hidden.insert(physical, byte);
        }
        self.places.insert(linear, physical);
        true
    }

    /// Removes a breakpoint. Returns whether there was one.
    pub(super) fn remove(&mut self, linear: u64) -> bool {
        let Some(physical) = self.places.remove(&linear) else { return false };
        if !self.places.values().any(|other| *other == physical)
            && let Some(byte) = self.hidden.remove(&physical)
        {
            self.restore(physical, byte);
        }
        true
    }

    /// Removes all breakpoints.
    pub(super) fn clear(&mut self) {
        self.places.clear();
        for (physical, byte) in std::mem::take(&mut self.hidden) {
            self.restore(physical, byte);
        }
    }

    /// Puts the byte of a patched address back for one step. [`Self::patch_again`] ends that.
    pub(super) fn lift(&self, physical: u64) {
        if let Some(byte) = self.hidden.get(&physical) {
            self.restore(physical, *byte);
        }
    }

    /// Patches a lifted address again, if it still has a breakpoint. What the guest wrote there in
    /// the meantime becomes the hidden byte.
    pub(super) fn patch_again(&mut self, physical: u64) {
        if self.is_patched(physical)
            && let Some(byte) = self.read(physical)
            && self.write_byte(physical, INT3)
        {
            self.hidden.insert(physical, byte);
        }
    }

    /// Puts the hidden bytes into `data`, which was read at `physical`.
    pub(super) fn hide(&self, physical: u64, data: &mut [u8]) {
        for (offset, byte) in self.within(physical, data.len()) {
            // The guest may have changed its code.
            if data[offset] == INT3 {
                data[offset] = byte;
            }
        }
    }

    /// Writes `data` to physical memory below the breakpoints. False if it is not RAM.
    pub(super) fn write(&mut self, physical: u64, data: &[u8]) -> bool {
        let mut patched = data.to_vec();
        let places: Vec<usize> = self.within(physical, data.len()).map(|(offset, _)| offset).collect();
        for offset in &places {
            patched[*offset] = INT3;
        }
        if self.ram.populate(physical, data.len() as u64).is_err()
            || self.ram.memory().write_slice(&patched, GuestAddress(physical)).is_err()
        {
            return false;
        }
        for offset in places {
            self.hidden.insert(physical + offset as u64, data[offset]);
        }
        true
    }

    /// The hidden bytes of a range, by their offsets in it.
    fn within(&self, physical: u64, len: usize) -> impl Iterator<Item = (usize, u8)> {
        let end = physical.saturating_add(len as u64);
        self.hidden.range(physical..end).map(move |(at, byte)| ((at - physical) as usize, *byte))
    }

    fn restore(&self, physical: u64, byte: u8) {
        if self.read(physical) == Some(INT3) {
            let written = self.write_byte(physical, byte);
            debug_assert!(written, "RAM stays RAM");
        }
    }

    fn read(&self, physical: u64) -> Option<u8> {
        self.ram.populate(physical, 1).ok()?;
        self.ram.memory().read_obj(GuestAddress(physical)).ok()
    }

    fn write_byte(&self, physical: u64, byte: u8) -> bool {
        self.ram.memory().write_obj(byte, GuestAddress(physical)).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use config::HugePages;

    use super::*;

    fn patches() -> Patches {
        let ram = GuestRam::map(2, HugePages::None, false).unwrap();
        ram.memory().write_slice(&[1, 2, 3, 4], GuestAddress(0x1000)).unwrap();
        Patches::new(ram)
    }

    fn bytes(patches: &Patches) -> [u8; 4] {
        patches.ram.memory().read_obj(GuestAddress(0x1000)).unwrap()
    }

    #[test]
    fn breakpoints_replace_one_byte_until_they_are_removed() {
        let mut patches = patches();
        assert!(patches.add(0xffff_8000_0000_1001, 0x1001) && patches.contains(0xffff_8000_0000_1001));
        assert_eq!(bytes(&patches), [1, INT3, 3, 4]);
        assert!(patches.remove(0xffff_8000_0000_1001) && !patches.remove(0xffff_8000_0000_1001));
        assert!(patches.is_empty());
        assert_eq!(bytes(&patches), [1, 2, 3, 4]);
    }

    #[test]
    fn two_addresses_of_one_byte_share_a_patch() {
        let mut patches = patches();
        assert!(patches.add(0xa001, 0x1001) && patches.add(0xb001, 0x1001));
        patches.remove(0xa001);
        assert_eq!(bytes(&patches), [1, INT3, 3, 4]);
        patches.remove(0xb001);
        assert_eq!(bytes(&patches), [1, 2, 3, 4]);
    }

    #[test]
    fn debugger_reads_and_writes_the_guests_own_bytes() {
        let mut patches = patches();
        patches.add(0x1001, 0x1001);
        patches.add(0x1003, 0x1003);
        let mut seen = bytes(&patches);
        patches.hide(0x1000, &mut seen);
        assert_eq!(seen, [1, 2, 3, 4]);
        assert!(patches.write(0x1000, &[5, 6, 7]));
        assert_eq!(bytes(&patches), [5, INT3, 7, INT3]);
        patches.clear();
        assert_eq!(bytes(&patches), [5, 6, 7, 4]);
    }

    #[test]
    fn code_that_the_guest_changed_stays_changed() {
        let mut patches = patches();
        patches.add(0x1001, 0x1001);
        patches.ram.memory().write_obj(9_u8, GuestAddress(0x1001)).unwrap();
        let mut seen = bytes(&patches);
        patches.hide(0x1000, &mut seen);
        assert_eq!(seen, [1, 9, 3, 4]);
        patches.clear();
        assert_eq!(bytes(&patches), [1, 9, 3, 4]);
    }

    #[test]
    fn lifted_patch_comes_back_with_what_the_guest_wrote() {
        let mut patches = patches();
        patches.add(0x1001, 0x1001);
        patches.lift(0x1001);
        assert_eq!(bytes(&patches), [1, 2, 3, 4]);
        patches.ram.memory().write_obj(9_u8, GuestAddress(0x1001)).unwrap();
        patches.patch_again(0x1001);
        assert_eq!(bytes(&patches), [1, INT3, 3, 4]);
        patches.clear();
        assert_eq!(bytes(&patches), [1, 9, 3, 4]);
    }

    #[test]
    fn addresses_outside_ram_and_too_many_are_refused() {
        let mut patches = patches();
        assert!(!patches.add(0x1000, 1 << 40) && !patches.write(u64::MAX, &[1, 2]));
        assert!(patches.is_empty());
        for linear in 0..MAX_PATCHES as u64 {
            assert!(patches.add(linear, 0x1000));
        }
        assert!(!patches.add(1 << 20, 0x1000));
    }
}
