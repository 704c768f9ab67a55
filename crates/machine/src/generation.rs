//! Telling a guest that it is not the only one with its past: after a restore and in a fork.
//!
//! Two devices of ACPI, each a page of memory that the guest knows:
//!
//! - the **VM generation id**: 16 random bytes, other ones in each life; a Linux guest reseeds its random generator when they change;
//! - the **VMClock** (UAPI.13): a counter of disruptions and one of generations. It says nothing about what time it is.
//!
//! Both announce a change by the interrupt of a generic event device ([`crate::acpi`]). The pages are written while the guest stands
//! still, so it never sees half a change.

use memory::GuestRam;
use sync::EventFd;
use vm_memory::{Bytes, GuestAddress};

use crate::layout;

/// Size of the VMClock's page.
pub(crate) const VMCLOCK_SIZE: u32 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VERSION: u16 = 1;
/// No counter is described.
const COUNTER_INVALID: u8 = 0xff;
const FLAG_VM_GEN_COUNTER_PRESENT: u64 = 1 << 8;
const FLAG_NOTIFICATION_PRESENT: u64 = 1 << 9;

/// Where the VMClock's fields are.
mod field {
    pub(super) const MAGIC: u64 = 0x00;
    pub(super) const SIZE: u64 = 0x04;
    pub(super) const VERSION: u64 = 0x08;
    pub(super) const COUNTER_ID: u64 = 0x0a;
    pub(super) const SEQ_COUNT: u64 = 0x0c;
    pub(super) const DISRUPTION_MARKER: u64 = 0x10;
    pub(super) const FLAGS: u64 = 0x18;
    pub(super) const VM_GENERATION_COUNTER: u64 = 0x68;
}

/// The two devices.
#[derive(Debug)]
pub(crate) struct Generation {
    ram: GuestRam,
    /// Raises the generic event device's interrupt.
    interrupt: EventFd,
}

impl Generation {
    /// The devices of a guest in `ram`, whose pages are as they are.
    pub(crate) fn new(ram: GuestRam, interrupt: EventFd) -> Self {
        Generation { ram, interrupt }
    }

    /// Fills the pages for a guest that has never run.
    pub(crate) fn begin(&self) -> std::io::Result<()> {
        self.new_id()?;
        let clock = |offset| GuestAddress(layout::VMCLOCK + offset);
        let memory = self.ram.memory();
        let done = memory
            .write_obj(MAGIC, clock(field::MAGIC))
            .and_then(|()| memory.write_obj(VMCLOCK_SIZE, clock(field::SIZE)))
            .and_then(|()| memory.write_obj(VERSION, clock(field::VERSION)))
            .and_then(|()| memory.write_obj(COUNTER_INVALID, clock(field::COUNTER_ID)))
            .and_then(|()| {
                memory.write_obj(FLAG_VM_GEN_COUNTER_PRESENT | FLAG_NOTIFICATION_PRESENT, clock(field::FLAGS))
            });
        done.expect("the first MiB is RAM");
        Ok(())
    }

    /// Begins another life of a guest that has run, and that stands still: new identities, and an interrupt once it runs.
    pub(crate) fn advance(&self) -> std::io::Result<()> {
        self.new_id()?;
        self.bump(field::DISRUPTION_MARKER);
        self.bump(field::VM_GENERATION_COUNTER);
        // Even, as between two changes.
        let seq = self.read::<u32>(field::SEQ_COUNT);
        self.write(field::SEQ_COUNT, (seq | 1).wrapping_add(1));
        self.interrupt.signal();
        Ok(())
    }

    fn new_id(&self) -> std::io::Result<()> {
        let mut id = [0; 16];
        // Sixteen bytes come whole.
        rustix::rand::getrandom(&mut id, rustix::rand::GetRandomFlags::empty())?;
        self.ram
            .memory()
            .write_slice(&id, GuestAddress(layout::VM_GENERATION_ID))
            .expect("the first MiB is RAM");
        Ok(())
    }

    fn bump(&self, field: u64) {
        self.write(field, self.read::<u64>(field).wrapping_add(1));
    }

    fn read<T: vm_memory::ByteValued>(&self, field: u64) -> T {
        let addr = GuestAddress(layout::VMCLOCK + field);
        self.ram.memory().read_obj(addr).expect("the first MiB is RAM")
    }

    fn write<T: vm_memory::ByteValued>(&self, field: u64, value: T) {
        let addr = GuestAddress(layout::VMCLOCK + field);
        self.ram.memory().write_obj(value, addr).expect("the first MiB is RAM");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;

    fn page(generation: &Generation, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        generation.ram.memory().read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn begun() -> Generation {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        let generation = Generation::new(ram, EventFd::new().unwrap());
        generation.begin().unwrap();
        generation
    }

    #[test]
    fn each_life_has_another_id() {
        let generation = begun();
        let mut ids = vec![page(&generation, layout::VM_GENERATION_ID, 16)];
        for _ in 0..3 {
            generation.advance().unwrap();
            ids.push(page(&generation, layout::VM_GENERATION_ID, 16));
        }
        ids.push(vec![0; 16]);
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 5);
    }

    #[test]
    fn a_new_life_counts_on_keeps_the_sequence_even_and_interrupts_once() {
        let generation = begun();
        assert_eq!(generation.interrupt.take(), 0, "a new guest needs no interrupt");
        generation.advance().unwrap();
        generation.advance().unwrap();
        assert_eq!(generation.read::<u64>(field::VM_GENERATION_COUNTER), 2);
        assert_eq!(generation.read::<u64>(field::DISRUPTION_MARKER), 2);
        assert_eq!(generation.read::<u32>(field::SEQ_COUNT), 4);
        assert_eq!(generation.interrupt.take(), 2);
        assert_eq!(page(&generation, layout::VMCLOCK, 4), b"VCLK");
    }
}
