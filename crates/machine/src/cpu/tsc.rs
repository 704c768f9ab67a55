//! Restoring the time stamp counters of all vCPUs together.
//!
//! A guest relies on two rules:
//!
//! - The counters of its vCPUs agree. A thread that moves from one vCPU to another must not see
//!   time run backwards, and KVM publishes a stable clock ("master clock") only for vCPUs with one
//!   offset.
//! - No counter is ever below a value that the guest has read, however often it is saved and
//!   restored.
//!
//! A saved state has each vCPU's counter, read at slightly different times, and each vCPU's offset
//! from the host's counter (`KVM_VCPU_TSC_OFFSET`, Linux 5.16). The differences between the offsets
//! are exact; those between the counters are noise up to [`SAME_COUNTER`]. So one counter is
//! restored, to the latest value that was read of any. The others get the same offset plus their
//! lead.
//!
//! The offset to set follows from the offset and the counter of a new vCPU: `offset + (wanted -
//! counter)`. This is right with any scaling ratio ([`super::state`] sets the frequency before). It
//! also avoids writes to `IA32_TSC`, which KVM treats as attempts to synchronize vCPUs: it may
//! replace a value by another that is within a second. The register is written only if KVM lacks
//! the attribute, on all vCPUs in a row with one value; KVM then synchronizes them by that rule.
//!
//! Unsafe code is here because `kvm-ioctls` has no device attributes of vCPUs on x86.

#![expect(unsafe_code, reason = "kvm-ioctls has no device attributes of vCPUs on x86")]

use std::time::Duration;

use kvm_bindings::{KVM_VCPU_TSC_CTRL, KVM_VCPU_TSC_OFFSET, KVMIO, kvm_device_attr};
use kvm_ioctls::VcpuFd;
use vmm_sys_util::ioctl::ioctl_with_ref;
use vmm_sys_util::ioctl_iow_nr;

use super::msrs::{IA32_TSC, Msr, get_msrs, set_msrs};
use crate::kvm::{Ioctl, KvmError};

/// Counters that differ by less are one counter that was read at different times. KVM uses the same
/// bound.
const SAME_COUNTER: Duration = Duration::from_secs(1);

ioctl_iow_nr!(KVM_SET_DEVICE_ATTR, KVMIO, 0xe1, kvm_device_attr);
ioctl_iow_nr!(KVM_GET_DEVICE_ATTR, KVMIO, 0xe2, kvm_device_attr);

/// The counter of one vCPU, as KVM gives access to it.
trait Counter {
    /// The offset from the host's (scaled) counter; `None` if KVM lacks the attribute.
    fn offset(&self) -> Option<u64>;
    /// Sets the offset.
    fn set_offset(&self, offset: u64) -> Result<(), KvmError>;
    /// The counter now; `None` if the vCPU has no such register.
    fn read(&self) -> Result<Option<u64>, KvmError>;
    /// Writes the counter's register.
    fn write(&self, value: u64) -> Result<(), KvmError>;
}

impl Counter for VcpuFd {
    fn offset(&self) -> Option<u64> {
        offset(self)
    }

    fn set_offset(&self, offset: u64) -> Result<(), KvmError> {
        let attribute = tsc_offset_attribute((&raw const offset) as u64);
        // SAFETY: the kernel reads the attribute and the eight bytes that it points to, which live
        // until the call returns.
        let result = unsafe { ioctl_with_ref(self, KVM_SET_DEVICE_ATTR(), &attribute) };
        if result == 0 { Ok(()) } else { Err(kvm_ioctls::Error::last()).ioctl("KVM_SET_DEVICE_ATTR") }
    }

    fn read(&self) -> Result<Option<u64>, KvmError> {
        Ok(get_msrs(self, &[IA32_TSC])?.first().map(|msr| msr.value))
    }

    fn write(&self, value: u64) -> Result<(), KvmError> {
        set_msrs(self, &[Msr { index: IA32_TSC, value }])
    }
}

/// The offset of a vCPU's counter from the host's (scaled) counter; `None` if KVM lacks the
/// attribute.
pub(super) fn offset(vcpu: &VcpuFd) -> Option<u64> {
    let mut offset = 0u64;
    let attribute = tsc_offset_attribute((&raw mut offset) as u64);
    // SAFETY: the kernel reads the attribute and writes the eight bytes that it points to, which
    // live until the call returns.
    let result = unsafe { ioctl_with_ref(vcpu, KVM_GET_DEVICE_ATTR(), &attribute) };
    (result == 0).then_some(offset)
}

fn tsc_offset_attribute(addr: u64) -> kvm_device_attr {
    kvm_device_attr { flags: 0, group: KVM_VCPU_TSC_CTRL, attr: KVM_VCPU_TSC_OFFSET.into(), addr }
}

/// Restores the counters of new `vcpus`, moved on by the time that `passed`. The frequencies of the
/// vCPUs are set already.
pub(crate) fn restore_counters(
    vcpus: &[VcpuFd],
    saved: &[SavedCounter],
    passed: Duration,
) -> Result<(), KvmError> {
    match Plan::of(saved, passed) {
        Some(plan) => plan.apply(vcpus),
        None => Ok(()),
    }
}

/// What was saved of one vCPU's counter.
#[derive(Debug, Clone, Copy)]
pub(crate) struct SavedCounter {
    /// The counter's value.
    pub(super) counter: Option<u64>,
    /// The offset from the host's counter.
    pub(super) offset: Option<u64>,
    /// The frequency in kHz.
    pub(super) khz: Option<u32>,
}

impl SavedCounter {
    /// The counter's ticks in `time`, modulo 2^64.
    fn ticks(self, time: Duration) -> u64 {
        (time.as_nanos() * u128::from(self.khz.unwrap_or(0)) / 1_000_000) as u64
    }

    /// How far this counter is ahead of that of `first` at the same moment.
    fn lead(self, first: SavedCounter) -> u64 {
        if let (Some(own), Some(other)) = (self.offset, first.offset) {
            return own.wrapping_sub(other);
        }
        let (Some(own), Some(other)) = (self.counter, first.counter) else { return 0 };
        let lead = own.wrapping_sub(other);
        if lead.cast_signed().unsigned_abs() < self.ticks(SAME_COUNTER) { 0 } else { lead }
    }
}

/// The counters to set.
#[derive(Debug, PartialEq, Eq)]
struct Plan {
    /// The first vCPU's counter.
    counter: u64,
    /// How far each vCPU's counter is ahead of the first's.
    leads: Vec<u64>,
}

impl Plan {
    /// The plan for saved counters, `passed` later; `None` if no counter was saved.
    fn of(saved: &[SavedCounter], passed: Duration) -> Option<Self> {
        let first = *saved.first()?;
        let leads: Vec<_> = saved.iter().map(|vcpu| vcpu.lead(first)).collect();
        let start = first.counter?;
        // The latest value that was read of any, so that none goes back.
        let later = saved.iter().zip(&leads).filter_map(|(vcpu, lead)| {
            let after_first = vcpu.counter?.wrapping_sub(*lead).wrapping_sub(start);
            u64::try_from(after_first.cast_signed()).ok()
        });
        let counter = start.wrapping_add(later.max().unwrap_or(0)).wrapping_add(first.ticks(passed));
        Some(Plan { counter, leads })
    }

    fn apply(&self, vcpus: &[impl Counter]) -> Result<(), KvmError> {
        let Some(first) = vcpus.first() else { return Ok(()) };
        let mut each = vcpus.iter().zip(&self.leads);
        match first.offset().zip(first.read()?) {
            Some((offset, counter)) => {
                let offset = offset.wrapping_add(self.counter.wrapping_sub(counter));
                each.try_for_each(|(vcpu, lead)| vcpu.set_offset(offset.wrapping_add(*lead)))
            }
            None => each.try_for_each(|(vcpu, lead)| vcpu.write(self.counter.wrapping_add(*lead))),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::cell::Cell;

    const KHZ: u32 = 2_000_000;
    const SECOND: u64 = 2_000_000_000;
    const NOW: Duration = Duration::ZERO;

    fn saved(counter: u64, offset: Option<u64>) -> SavedCounter {
        SavedCounter { counter: Some(counter), offset, khz: Some(KHZ) }
    }

    fn plan(saved: &[SavedCounter], passed: Duration) -> Plan {
        Plan::of(saved, passed).unwrap()
    }

    #[test]
    fn counters_with_one_offset_are_restored_to_the_latest_read() {
        let vcpus = [100, 90, 170, 160].map(|counter| saved(counter, Some(7)));
        assert_eq!(plan(&vcpus, NOW), Plan { counter: 170, leads: vec![0; 4] });
    }

    #[test]
    fn differences_that_the_guest_set_are_kept() {
        let vcpus = [saved(100, Some(0)), saved(95, Some(u64::MAX - 9)), saved(600, Some(480))];
        assert_eq!(plan(&vcpus, NOW), Plan { counter: 120, leads: vec![0, u64::MAX - 9, 480] });
    }

    #[test]
    fn counters_without_offsets_are_one_if_within_a_second() {
        let vcpus = [saved(50, None), saved(50 + SECOND / 2, None), saved(60 + 3 * SECOND, None)];
        let leads = vec![0, 0, 10 + 3 * SECOND];
        assert_eq!(plan(&vcpus, NOW), Plan { counter: 50 + SECOND / 2, leads });
    }

    #[test]
    fn passed_time_moves_counters_on_at_the_guests_frequency() {
        let after = |seconds| plan(&[saved(u64::MAX, Some(1))], Duration::from_secs(seconds)).counter;
        assert_eq!((after(0), after(2)), (u64::MAX, 2 * SECOND - 1));
    }

    #[test]
    fn state_without_counters_restores_none() {
        assert_eq!(Plan::of(&[], NOW), None);
        assert_eq!(Plan::of(&[SavedCounter { counter: None, offset: None, khz: None }], NOW), None);
    }

    /// A host whose counter advances with every call, at a frequency that is scaled for the guest.
    struct Host {
        counter: Cell<u64>,
        scale: u64,
        has_attribute: bool,
    }

    struct Vcpu<'a> {
        host: &'a Host,
        offset: Cell<u64>,
    }

    impl Host {
        fn new(scale: u64, has_attribute: bool) -> Self {
            Host { counter: Cell::new(1 << 40), scale, has_attribute }
        }

        fn vcpus(&self) -> [Vcpu<'_>; 4] {
            [11, 12, 13, 14].map(|offset| Vcpu { host: self, offset: Cell::new(offset) })
        }

        fn scaled(&self) -> u64 {
            self.counter.set(self.counter.get() + 1000);
            self.counter.get() * self.scale
        }
    }

    impl Counter for Vcpu<'_> {
        fn offset(&self) -> Option<u64> {
            self.host.has_attribute.then(|| self.offset.get())
        }

        fn set_offset(&self, offset: u64) -> Result<(), KvmError> {
            assert!(self.host.has_attribute);
            self.offset.set(offset);
            Ok(())
        }

        fn read(&self) -> Result<Option<u64>, KvmError> {
            Ok(Some(self.host.scaled().wrapping_add(self.offset.get())))
        }

        fn write(&self, value: u64) -> Result<(), KvmError> {
            self.offset.set(value.wrapping_sub(self.host.scaled()));
            Ok(())
        }
    }

    #[test]
    fn all_vcpus_get_one_offset_and_never_go_back_over_many_hops() {
        let mut last = 5;
        let mut states = [last; 4].map(|counter| saved(counter, None));
        for hop in 0..20 {
            // Hosts of other frequencies and, now and then, one without the attribute.
            let host = Host::new(1 + hop % 3, hop % 5 != 4);
            let vcpus = host.vcpus();
            plan(&states, NOW).apply(&vcpus).unwrap();
            // As a thread reads them that moves from one vCPU to the next.
            for vcpu in vcpus.iter().chain(vcpus.iter().rev()) {
                let counter = vcpu.read().unwrap().unwrap();
                assert!(!host.has_attribute || counter > last, "hop {hop}: {counter} after {last}");
                last = last.max(counter);
            }
            let offsets = vcpus.each_ref().map(|vcpu| vcpu.offset.get());
            assert!(!host.has_attribute || offsets == [offsets[0]; 4], "hop {hop}: {offsets:?}");
            states = vcpus.each_ref().map(|vcpu| saved(vcpu.read().unwrap().unwrap(), vcpu.offset()));
        }
    }
}
