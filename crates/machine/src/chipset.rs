//! The state that KVM keeps for the machine as a whole: interrupt controllers, timer chip and
//! paravirtual clock. Saved and restored.
//!
//! # Order of a restore
//!
//! 1. The interrupt controllers ([`ChipsetState::restore_irqchips`]).
//! 2. The clock ([`ChipsetState::restore_clock`]), after the time stamp counters of the vCPUs.
//! 3. The other state of the vCPUs, with their local APICs ([`crate::cpu`]).
//! 4. The timer chip ([`ChipsetState::restore_pit`]). It counts as soon as it has its state, and a
//!    local APIC that gets its own state afterwards would lose the timer's interrupt.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{Ioctl, KvmError, get_irqchip, mask_unprogrammed_pic};
use crate::raw;

/// `kvm_clock_data::flags`: `realtime` is valid (save), or is to be used (restore).
const KVM_CLOCK_REALTIME: u32 = 1 << 2;

/// The IDs of the interrupt controllers, in the order in which they are saved.
const CHIPS: [u32; 3] = [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, KVM_IRQCHIP_IOAPIC];

/// The state of the chipset.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ChipsetState {
    /// PIC 1, PIC 2, I/O APIC.
    #[serde(with = "raw::list")]
    irqchips: Vec<kvm_irqchip>,
    #[serde(with = "raw")]
    pit: kvm_pit_state2,
    /// The guest's clock, and the host's time at which it was read.
    #[serde(with = "raw")]
    clock: kvm_clock_data,
}

/// Adds the host's time `now` to a clock that was just read, if KVM did not. KVM does so only if
/// its master clock runs on a stable time stamp counter.
fn with_real_time(clock: kvm_clock_data, now: SystemTime) -> kvm_clock_data {
    if clock.flags & KVM_CLOCK_REALTIME != 0 {
        return clock;
    }
    let since_epoch = now.duration_since(UNIX_EPOCH).unwrap_or_default();
    // It fits until the year 2554.
    let realtime = u64::try_from(since_epoch.as_nanos()).unwrap_or(u64::MAX);
    kvm_clock_data { realtime, flags: clock.flags | KVM_CLOCK_REALTIME, ..clock }
}

/// What a guest's clock shows after a restore.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum ClockAfter {
    /// It continues from the time at which it was saved.
    #[default]
    Continues,
    /// It has moved on by the real time that passed since the save. This applies to the paravirtual
    /// clock, and to the time stamp counter, which Linux uses where CPUID says that it never stops.
    CatchesUp,
}

impl ChipsetState {
    /// Saves the state of `vm`, whose vCPUs are paused.
    pub(crate) fn save(vm: &VmFd) -> Result<Self, KvmError> {
        // The timer first, because it keeps running: an interrupt that it raises from here on is in
        // the state of the controllers.
        let pit = vm.get_pit2().ioctl("KVM_GET_PIT2")?;
        Ok(ChipsetState {
            irqchips: CHIPS.map(|id| get_irqchip(vm, id)).into_iter().collect::<Result<_, KvmError>>()?,
            pit,
            clock: with_real_time(vm.get_clock().ioctl("KVM_GET_CLOCK")?, SystemTime::now()),
        })
    }

    /// Restores the interrupt controllers of `vm`. Its vCPUs exist, but have no state yet and have
    /// not run.
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

    /// Checks that all controllers are there. A missing one would start as after a reset.
    fn check_chips(&self) -> Result<(), KvmError> {
        let ids: Vec<_> = self.irqchips.iter().map(|chip| chip.chip_id).collect();
        if ids == CHIPS { Ok(()) } else { Err(KvmError::Irqchips { ids }) }
    }

    /// The time by which the guest's time stamp counters move on at `now`. Like KVM's clock, they
    /// never go back.
    pub(crate) fn time_passed(&self, after: ClockAfter, now: SystemTime) -> Duration {
        if after == ClockAfter::Continues || self.clock.flags & KVM_CLOCK_REALTIME == 0 {
            return Duration::ZERO;
        }
        now.duration_since(UNIX_EPOCH)
            .unwrap_or_default()
            .saturating_sub(Duration::from_nanos(self.clock.realtime))
    }

    /// Restores the guest's clock. The time stamp counters are set; the vCPUs have no other state
    /// yet.
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
