//! What KVM emulates for the machine as a whole: interrupt controllers, timer chip, paravirtual clock. Saved and restored.
//!
//! # PICs that no guest has programmed
//!
//! KVM creates its two PICs with every line enabled and vectors from 0 on, where exceptions have
//! theirs, and the first vCPU's LINT0 takes what they deliver. A restored machine raises interrupts
//! before its guest may have programmed the PICs: that of the generic event device always. So a PIC
//! has all lines masked until the guest initialises it, as firmware leaves one, in a saved state
//! from before too.
//!
//! # Order of a restore
//!
//! Interrupt controllers, then vCPUs with their local APICs, then the timer chip: it counts as soon
//! as it has its state, and a local APIC that does not have its own yet would lose the interrupt.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{Ioctl, KvmError, get_irqchip, mask_unprogrammed_pic};
use crate::raw;

/// `kvm_clock_data::flags`: `realtime` is valid, or is to be gone by.
const KVM_CLOCK_REALTIME: u32 = 1 << 2;

/// The interrupt controllers, in the order in which they are saved.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// Their state.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChipsetState {
    /// PIC 1, PIC 2, I/O APIC.
    #[serde(with = "raw::list")]
    irqchips: Vec<kvm_irqchip>,
    #[serde(with = "raw")]
    pit: kvm_pit_state2,
    /// The guest's clock, and the host's when it was read.
    #[serde(with = "raw")]
    clock: kvm_clock_data,
}

/// The clock with the host's time, which KVM adds only where all of its clocks go by a stable
/// counter. `now` is when it was read.
fn with_real_time(clock: kvm_clock_data, now: SystemTime) -> kvm_clock_data {
    if clock.flags & KVM_CLOCK_REALTIME != 0 {
        return clock;
    }
    let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    // It fits until the year 2554.
    let realtime = u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX);
    kvm_clock_data { realtime, flags: clock.flags | KVM_CLOCK_REALTIME, ..clock }
}

/// What a guest's clock shows after it was saved and restored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClockAfter {
    /// It goes on from where it stood.
    #[default]
    Continues,
    /// It has moved on by the real time that passed in between: the paravirtual clock, and the time stamp counter, which Linux goes by
    /// where it is shown that the counter never stops.
    CatchesUp,
}

impl ChipsetState {
    /// The state of `vm`, whose vCPUs are still.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, KvmError> {
        // The timer keeps running: an interrupt that it raises during the save is in the
        // controllers' state.
        let pit = vm.get_pit2().ioctl("KVM_GET_PIT2")?;
        Ok(ChipsetState {
            irqchips: CHIPS.map(|id| get_irqchip(vm, id)).into_iter().collect::<Result<_, KvmError>>()?,
            pit,
            clock: with_real_time(vm.get_clock().ioctl("KVM_GET_CLOCK")?, SystemTime::now()),
        })
    }

    /// Restores the interrupt controllers of `vm`. Its vCPUs exist, have no state yet and have not
    /// run.
    pub(crate) fn restore_irqchips(&self, vm: &VmFd) -> Result<(), KvmError> {
        self.check_chips()?;
        for chip in &self.irqchips {
            let mut chip = *chip;
            mask_unprogrammed_pic(&mut chip);
            vm.set_irqchip(&chip).ioctl("KVM_SET_IRQCHIP")?;
        }
        Ok(())
    }

    /// Restores and starts the timer chip. The vCPUs have their state.
    pub(crate) fn restore_pit(&self, vm: &VmFd) -> Result<(), KvmError> {
        vm.set_pit2(&self.pit).ioctl("KVM_SET_PIT2")
    }

    /// A chip that is missing would start as after a reset.
    fn check_chips(&self) -> Result<(), KvmError> {
        let ids: Vec<_> = self.irqchips.iter().map(|chip| chip.chip_id).collect();
        if ids == CHIPS { Ok(()) } else { Err(KvmError::Irqchips { ids }) }
    }

    /// How far the guest's time stamp counters have to move on at `now`. As KVM does with its clock: never back.
    pub(crate) fn time_passed(&self, after: ClockAfter, now: SystemTime) -> Duration {
        if after == ClockAfter::Continues || self.clock.flags & KVM_CLOCK_REALTIME == 0 {
            return Duration::ZERO;
        }
        now.duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .saturating_sub(Duration::from_nanos(self.clock.realtime))
    }

    /// Sets the guest's clock. The time stamp counters are set, and the vCPUs have no other state yet.
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
        vm.set_clock(&clock).ioctl("KVM_SET_CLOCK")
    }
}

#[cfg(test)]
mod tests;
