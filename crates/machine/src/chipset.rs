//! What KVM emulates for the machine as a whole: interrupt controllers, timer chip, paravirtual clock. Saved and restored.

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{KvmError, Named};

/// `kvm_clock_data::flags`: `realtime` is valid, or is to be gone by.
const KVM_CLOCK_REALTIME: u32 = 1 << 2;

/// Their state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChipsetState {
    /// PIC 1, PIC 2, I/O APIC.
    irqchips: Vec<kvm_irqchip>,
    pit: kvm_pit_state2,
    /// The guest's clock, and the host's when it was read.
    clock: kvm_clock_data,
}

/// What a guest's clock shows after it was saved and restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClockAfter {
    /// It goes on from where it stood.
    #[default]
    Continues,
    /// It has moved on by the real time that passed in between.
    CatchesUp,
}

impl ChipsetState {
    /// The state of `vm`, whose vCPUs are still.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, KvmError> {
        let irqchip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).named("KVM_GET_IRQCHIP")?;
            Ok(chip)
        };
        Ok(ChipsetState {
            irqchips: [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC]
                .map(irqchip)
                .into_iter()
                .collect::<Result<_, KvmError>>()?,
            pit: vm.get_pit2().named("KVM_GET_PIT2")?,
            clock: vm.get_clock().named("KVM_GET_CLOCK")?,
        })
    }

    /// Gives the chips of `vm` their state. Its vCPUs are there, and have not run.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        for chip in &self.irqchips {
            vm.set_irqchip(chip).named("KVM_SET_IRQCHIP")?;
        }
        vm.set_pit2(&self.pit).named("KVM_SET_PIT2")
    }

    /// Sets the guest's clock. The vCPUs have their state.
    pub(crate) fn restore_clock(&self, vm: &VmFd, after: ClockAfter) -> Result<(), KvmError> {
        let flags = match after {
            ClockAfter::Continues => 0,
            ClockAfter::CatchesUp if self.clock.flags & KVM_CLOCK_REALTIME == 0 => {
                return Err(KvmError::NoRealTime);
            }
            ClockAfter::CatchesUp => KVM_CLOCK_REALTIME,
        };
        let clock = kvm_clock_data {
            clock: self.clock.clock,
            realtime: self.clock.realtime,
            flags,
            ..Default::default()
        };
        vm.set_clock(&clock).named("KVM_SET_CLOCK")
    }
}
