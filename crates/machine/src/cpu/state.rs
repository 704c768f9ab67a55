//! All state of a vCPU that KVM has, as plain data.
//!
//! # Order
//!
//! Saving: the processor's state of running (`KVM_GET_MP_STATE`) first, because KVM then takes in what is pending, and the pending events
//! last. Restoring: CPUID first, because it decides which registers there are; the local APIC before the deadline timer, which
//! is armed in its terms; the events last.
//!
//! The vCPU is still: its thread has left `KVM_RUN` with everything that it had begun done ([`crate::vcpu`]).

use std::time::Duration;

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, Msrs, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_msr_entry, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{KvmNestedStateBuffer, VcpuFd};
use serde::{Deserialize, Serialize};

use super::xsave::XsaveSize;
use crate::kvm::{KvmError, Named};
use crate::raw;

/// Counts on while a guest is away, if it is to.
const IA32_TSC: u32 = 0x10;
/// Armed in terms of the local APIC and the time stamp counter, so restored after both.
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// The most registers that KVM takes at once.
const MSRS_AT_ONCE: usize = 256;
/// Two clocks that differ by less are the same: a part in 4000, which a guest's own clock discipline makes good.
const TSC_TOLERANCE_PPM: u64 = 250;

/// What a vCPU is at one moment.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// What CPUID shows.
    pub cpuid: Vec<CpuidLeaf>,
    /// Frequency of the time stamp counter; `None` where KVM did not say.
    pub tsc_khz: Option<u32>,
    /// Whether it runs, waits for an interrupt, or for its start.
    #[serde(with = "raw")]
    mp_state: kvm_mp_state,
    /// General registers.
    #[serde(with = "raw")]
    regs: kvm_regs,
    /// Segments and control registers.
    #[serde(with = "raw")]
    sregs: kvm_sregs,
    /// Floating point and everything after it.
    #[serde(with = "serde_bytes")]
    xsave: Vec<u8>,
    /// Extended control registers.
    #[serde(with = "raw")]
    xcrs: kvm_xcrs,
    /// Debug registers.
    #[serde(with = "raw")]
    debug: kvm_debugregs,
    /// The local APIC.
    #[serde(with = "raw")]
    lapic: kvm_lapic_state,
    /// Model-specific registers.
    pub msrs: Vec<Msr>,
    /// Exceptions and interrupts on their way.
    #[serde(with = "raw")]
    events: kvm_vcpu_events,
    /// The state of a guest of the guest.
    #[serde(default, with = "raw::optional")]
    nested: Option<Box<KvmNestedStateBuffer>>,
}

/// A leaf of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// Its number.
    pub leaf: u32,
    /// Its index, where it has several.
    pub index: u32,
    /// KVM's flags.
    pub flags: u32,
    /// eax, ebx, ecx, edx.
    pub values: [u32; 4],
}

/// A model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// Its number.
    pub index: u32,
    /// What is in it.
    pub value: u64,
}

/// What saving and restoring need to know of the host.
#[derive(Debug, Clone)]
pub(crate) struct StateFormat {
    /// The registers that KVM can save.
    pub(crate) msrs: Vec<u32>,
    /// Size of the extended state.
    pub(crate) xsave: XsaveSize,
    /// KVM can save the state of a nested guest.
    pub(crate) nested: bool,
}

impl VcpuState {
    /// The state of `vcpu`.
    pub(crate) fn save(vcpu: &VcpuFd, format: &StateFormat) -> Result<Self, KvmError> {
        let mp_state = vcpu.get_mp_state().named("KVM_GET_MP_STATE")?;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).named("KVM_GET_CPUID2")?;
        let nested = if format.nested { nested_state(vcpu)? } else { None };
        Ok(VcpuState {
            cpuid: cpuid.as_slice().iter().map(CpuidLeaf::from).collect(),
            tsc_khz: vcpu.get_tsc_khz().ok().filter(|khz| *khz != 0),
            mp_state,
            regs: vcpu.get_regs().named("KVM_GET_REGS")?,
            sregs: vcpu.get_sregs().named("KVM_GET_SREGS")?,
            xsave: format.xsave.get(vcpu)?,
            xcrs: vcpu.get_xcrs().named("KVM_GET_XCRS")?,
            debug: vcpu.get_debug_regs().named("KVM_GET_DEBUGREGS")?,
            lapic: vcpu.get_lapic().named("KVM_GET_LAPIC")?,
            msrs: get_msrs(vcpu, &format.msrs)?,
            nested,
            events: vcpu.get_vcpu_events().named("KVM_GET_VCPU_EVENTS")?,
        })
    }

    /// Makes a fresh `vcpu` what this says, its time stamp counter moved on by the time that has `passed`.
    pub(crate) fn restore(
        &self,
        vcpu: &VcpuFd,
        format: &StateFormat,
        passed: Duration,
    ) -> Result<(), KvmError> {
        let leaves: Vec<_> = self.cpuid.iter().map(kvm_cpuid_entry2::from).collect();
        let cpuid = CpuId::from_entries(&leaves).map_err(|_| KvmError::StateTooLarge("leaves of CPUID"))?;
        vcpu.set_cpuid2(&cpuid).named("KVM_SET_CPUID2")?;
        self.restore_tsc_frequency(vcpu)?;
        vcpu.set_mp_state(self.mp_state).named("KVM_SET_MP_STATE")?;
        vcpu.set_regs(&self.regs).named("KVM_SET_REGS")?;
        vcpu.set_sregs(&self.sregs).named("KVM_SET_SREGS")?;
        // The control registers say what the extended state may hold.
        vcpu.set_xcrs(&self.xcrs).named("KVM_SET_XCRS")?;
        format.xsave.set(vcpu, &self.xsave)?;
        vcpu.set_debug_regs(&self.debug).named("KVM_SET_DEBUGREGS")?;
        vcpu.set_lapic(&self.lapic).named("KVM_SET_LAPIC")?;
        let (deadline, others): (Vec<_>, Vec<_>) =
            self.msrs_after(passed).partition(|msr| msr.index == IA32_TSC_DEADLINE);
        set_msrs(vcpu, &others)?;
        set_msrs(vcpu, &deadline)?;
        if let Some(nested) = &self.nested {
            vcpu.set_nested_state(nested).named("KVM_SET_NESTED_STATE")?;
        }
        vcpu.set_vcpu_events(&self.events).named("KVM_SET_VCPU_EVENTS")
    }

    /// The registers once `passed` is over, at the frequency that the guest knows. (A deadline stays where it is on the counter: it may have
    /// passed by then. So does `IA32_TSC_ADJUST`, which is the guest's own and which KVM does not count as time.)
    fn msrs_after(&self, passed: Duration) -> impl Iterator<Item = Msr> {
        let ticks = passed.as_nanos() * u128::from(self.tsc_khz.unwrap_or(0)) / 1_000_000;
        self.msrs.iter().map(move |msr| match msr.index {
            // Modulo 2^64, as the counter.
            IA32_TSC => Msr { value: msr.value.wrapping_add(ticks as u64), ..*msr },
            _ => *msr,
        })
    }

    /// A guest goes on at the frequency that it knows. Where the host's is another one, the hardware has to scale.
    fn restore_tsc_frequency(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        let (Some(saved), Ok(here)) = (self.tsc_khz, vcpu.get_tsc_khz()) else { return Ok(()) };
        let difference = u64::from(saved.abs_diff(here));
        if difference * 1_000_000 <= u64::from(saved) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        vcpu.set_tsc_khz(saved).map_err(|source| KvmError::TscFrequency { saved, here, source })
    }
}

fn nested_state(vcpu: &VcpuFd) -> Result<Option<Box<KvmNestedStateBuffer>>, KvmError> {
    let mut buffer = Box::new(KvmNestedStateBuffer::empty());
    let length = vcpu.nested_state(&mut buffer).named("KVM_GET_NESTED_STATE")?;
    Ok(length.map(|_| buffer))
}

/// The registers as they are. One that KVM lists and this vCPU does not have is left out.
fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let mut got = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let batch = &left[..left.len().min(MSRS_AT_ONCE)];
        let mut msrs = to_kvm(batch.iter().map(|index| Msr { index: *index, value: 0 }));
        let count = vcpu.get_msrs(&mut msrs).named("KVM_GET_MSRS")?;
        got.extend(msrs.as_slice()[..count].iter().map(|msr| Msr { index: msr.index, value: msr.data }));
        // KVM stops at the first that there is not.
        let refused = usize::from(count < batch.len());
        left = &left[count + refused..];
    }
    Ok(got)
}

/// Sets the registers. One that KVM refuses must have its value already.
fn set_msrs(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), KvmError> {
    let mut left = msrs;
    while !left.is_empty() {
        let batch = &left[..left.len().min(MSRS_AT_ONCE)];
        let count = vcpu.set_msrs(&to_kvm(batch.iter().copied())).named("KVM_SET_MSRS")?;
        left = &left[count..];
        if count < batch.len() {
            let refused = left[0];
            if get_msrs(vcpu, &[refused.index])? != [refused] {
                return Err(KvmError::Msr { index: refused.index, value: refused.value });
            }
            left = &left[1..];
        }
    }
    Ok(())
}

fn to_kvm(msrs: impl Iterator<Item = Msr>) -> Msrs {
    let entries: Vec<_> =
        msrs.map(|msr| kvm_msr_entry { index: msr.index, data: msr.value, ..Default::default() }).collect();
    Msrs::from_entries(&entries).expect("a batch is as many as KVM takes")
}

impl std::fmt::Debug for VcpuState {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The rest is thousands of numbers.
        f.debug_struct("VcpuState").field("regs", &self.regs).finish_non_exhaustive()
    }
}

impl From<&kvm_cpuid_entry2> for CpuidLeaf {
    fn from(entry: &kvm_cpuid_entry2) -> Self {
        CpuidLeaf {
            leaf: entry.function,
            index: entry.index,
            flags: entry.flags,
            values: [entry.eax, entry.ebx, entry.ecx, entry.edx],
        }
    }
}

impl From<&CpuidLeaf> for kvm_cpuid_entry2 {
    fn from(leaf: &CpuidLeaf) -> Self {
        let [eax, ebx, ecx, edx] = leaf.values;
        kvm_cpuid_entry2 {
            function: leaf.leaf,
            index: leaf.index,
            flags: leaf.flags & KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
            eax,
            ebx,
            ecx,
            edx,
            ..Default::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_time_that_passed_moves_the_counter_on_at_the_guests_frequency_and_nothing_else() {
        let msr = |index, value| Msr { index, value };
        let state = VcpuState {
            cpuid: Vec::new(),
            tsc_khz: Some(2_500_000),
            mp_state: kvm_mp_state::default(),
            regs: kvm_regs::default(),
            sregs: kvm_sregs::default(),
            xsave: Vec::new(),
            xcrs: kvm_xcrs::default(),
            debug: kvm_debugregs::default(),
            lapic: kvm_lapic_state::default(),
            msrs: vec![msr(IA32_TSC, u64::MAX), msr(IA32_TSC_DEADLINE, 7)],
            events: kvm_vcpu_events::default(),
            nested: None,
        };
        let after = |seconds| state.msrs_after(Duration::from_secs(seconds)).collect::<Vec<_>>();
        assert_eq!(after(0), state.msrs);
        assert_eq!(after(2), [msr(IA32_TSC, 5_000_000_000 - 1), msr(IA32_TSC_DEADLINE, 7)]);
    }
}
