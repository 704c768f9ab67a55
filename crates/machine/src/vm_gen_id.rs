//! Tells a guest that it was restored or forked, so that it is not the only one with its past.
//!
//! Two ACPI devices, each with a page of guest memory:
//!
//! - the **VM generation ID**: 16 random bytes, which change at each restore and fork. A Linux
//!   guest then reseeds its random number generator;
//! - the **VMClock** (UAPI.13): a counter of disruptions and one of VM generations. It does not
//!   tell the time.
//!
//! The interrupt of a generic event device announces a change of both ([`crate::acpi`]). The pages
//! are written while the vCPUs are paused, so the guest never sees half a change.

use memory::GuestRam;
use sync::EventFd;
use vm_memory::{Bytes, GuestAddress};

use crate::layout;

/// Size of the VMClock's page.
pub(crate) const VMCLOCK_SIZE: u32 = 0x1000;

const MAGIC: u32 = u32::from_le_bytes(*b"VCLK");
const VERSION: u16 = 1;
/// The page describes no counter.
const COUNTER_INVALID: u8 = 0xff;
const FLAG_VM_GEN_COUNTER_PRESENT: u64 = 1 << 8;
const FLAG_NOTIFICATION_PRESENT: u64 = 1 << 9;

/// Offsets of the VMClock's fields.
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

/// Both devices.
#[derive(Debug)]
pub(crate) struct VmGenId {
    ram: GuestRam,
    /// Raises the generic event device's interrupt.
    interrupt: EventFd,
}

impl VmGenId {
    /// The devices of the guest whose memory is `ram`. Does not write their pages.
    pub(crate) fn new(ram: GuestRam, interrupt: EventFd) -> Self {
        VmGenId { ram, interrupt }
    }

    /// Fills the pages for a guest that has never run.
    pub(crate) fn init(&self) -> std::io::Result<()> {
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

    /// Changes the ID and the counters of a saved guest, and raises the interrupt. The vCPUs are
    /// paused.
    pub(crate) fn change(&self) -> std::io::Result<()> {
        self.new_id()?;
        self.bump(field::DISRUPTION_MARKER);
        self.bump(field::VM_GENERATION_COUNTER);
        // Even: no change is under way.
        let seq = self.read::<u32>(field::SEQ_COUNT);
        self.write(field::SEQ_COUNT, (seq | 1).wrapping_add(1));
        self.interrupt.signal();
        Ok(())
    }

    fn new_id(&self) -> std::io::Result<()> {
        let mut id = [0; 16];
        // The kernel returns up to 256 bytes whole.
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

    fn page(device: &VmGenId, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        device.ram.memory().read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn initialised() -> VmGenId {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        let device = VmGenId::new(ram, EventFd::new().unwrap());
        device.init().unwrap();
        device
    }

    #[test]
    fn id_differs_after_each_change() {
        let device = initialised();
        let mut ids = vec![page(&device, layout::VM_GENERATION_ID, 16)];
        for _ in 0..3 {
            device.change().unwrap();
            ids.push(page(&device, layout::VM_GENERATION_ID, 16));
        }
        ids.push(vec![0; 16]);
        ids.sort();
        ids.dedup();
        assert_eq!(ids.len(), 5);
    }

    #[test]
    fn each_change_counts_up_and_raises_one_interrupt() {
        let device = initialised();
        assert_eq!(device.interrupt.take(), 0, "a new guest needs no interrupt");
        device.change().unwrap();
        device.change().unwrap();
        assert_eq!(device.read::<u64>(field::VM_GENERATION_COUNTER), 2);
        assert_eq!(device.read::<u64>(field::DISRUPTION_MARKER), 2);
        assert_eq!(device.read::<u32>(field::SEQ_COUNT), 4);
        assert_eq!(device.interrupt.take(), 2);
        assert_eq!(page(&device, layout::VMCLOCK, 4), b"VCLK");
    }
}
