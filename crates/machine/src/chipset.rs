//! What KVM emulates for the machine as a whole: interrupt controllers, timer chip, paravirtual clock. Saved and restored.

use std::time::{Duration, SystemTime, UNIX_EPOCH};

use kvm_bindings::{
    KVM_IRQCHIP_IOAPIC, KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE, kvm_clock_data, kvm_irqchip,
    kvm_pit_state2,
};
use kvm_ioctls::VmFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{KvmError, Named};
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
        let irqchip = |chip_id| {
            let mut chip = kvm_irqchip { chip_id, ..Default::default() };
            vm.get_irqchip(&mut chip).named("KVM_GET_IRQCHIP")?;
            Ok(chip)
        };
        // The timer keeps running: an interrupt that it raises during the save is in the
        // controllers' state.
        let pit = vm.get_pit2().named("KVM_GET_PIT2")?;
        Ok(ChipsetState {
            irqchips: CHIPS.map(irqchip).into_iter().collect::<Result<_, KvmError>>()?,
            pit,
            clock: with_real_time(vm.get_clock().named("KVM_GET_CLOCK")?, SystemTime::now()),
        })
    }

    /// Gives the chips of `vm` their state. Its vCPUs are there, and have not run.
    pub(crate) fn restore(&self, vm: &VmFd) -> Result<(), KvmError> {
        self.check_chips()?;
        for chip in &self.irqchips {
            vm.set_irqchip(chip).named("KVM_SET_IRQCHIP")?;
        }
        vm.set_pit2(&self.pit).named("KVM_SET_PIT2")
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

#[cfg(test)]
mod tests {
    use super::*;

    fn saved_at(realtime: u64, flags: u32) -> ChipsetState {
        let clock = kvm_clock_data { realtime, flags, ..Default::default() };
        ChipsetState { irqchips: Vec::new(), pit: kvm_pit_state2::default(), clock }
    }

    #[test]
    fn a_state_without_all_interrupt_controllers_is_refused() {
        let chips = |ids: &[u32]| ChipsetState {
            irqchips: ids.iter().map(|id| kvm_irqchip { chip_id: *id, ..Default::default() }).collect(),
            ..saved_at(0, 0)
        };
        assert!(chips(&CHIPS).check_chips().is_ok());
        for ids in [&[0, 1][..], &[0, 1, 2, 2], &[0, 1, 3], &[]] {
            let error = chips(ids).check_chips().unwrap_err().to_string();
            assert!(error.contains(&format!("{ids:?}")), "{error}");
        }
    }

    #[test]
    fn the_hosts_time_is_saved_also_where_kvm_does_not_add_it() {
        let now = UNIX_EPOCH + Duration::from_secs(100);
        let saved = |flags, realtime| {
            let clock =
                with_real_time(kvm_clock_data { flags, realtime, clock: 7, ..Default::default() }, now);
            (clock.flags, clock.realtime, clock.clock)
        };
        assert_eq!(saved(KVM_CLOCK_REALTIME, 5), (KVM_CLOCK_REALTIME, 5, 7));
        assert_eq!(saved(2, 0), (2 | KVM_CLOCK_REALTIME, 100_000_000_000, 7));
    }

    #[test]
    fn counters_move_on_by_the_time_that_passed_only_if_the_clock_is_to_catch_up_and_never_back() {
        let now = UNIX_EPOCH + Duration::from_secs(100);
        let passed = |at: u64, flags, after| saved_at(at * 1_000_000_000, flags).time_passed(after, now);
        assert_eq!(passed(40, KVM_CLOCK_REALTIME, ClockAfter::CatchesUp), Duration::from_mins(1));
        assert_eq!(passed(40, KVM_CLOCK_REALTIME, ClockAfter::Continues), Duration::ZERO);
        assert_eq!(passed(140, KVM_CLOCK_REALTIME, ClockAfter::CatchesUp), Duration::ZERO);
        assert_eq!(passed(40, 0, ClockAfter::CatchesUp), Duration::ZERO);
    }
}
