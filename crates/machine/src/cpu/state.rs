//! All state of a vCPU that KVM has, as plain data.
//!
//! The vCPU is paused: its thread has left `KVM_RUN`, and no access of the guest is half done
//! ([`crate::vcpu`]).
//!
//! # Order of a save
//!
//! The run state (`KVM_GET_MP_STATE`) is read first, because this call makes KVM apply pending
//! events. The events are read last. The deadline timer keeps running while the vCPU is paused, and
//! KVM may move its interrupt into the local APIC at any moment. So MSRs are read before the local
//! APIC ([`Timer`]).
//!
//! # Order of a restore
//!
//! 1. [`VcpuState::prepare`] sets CPUID, which decides which registers a vCPU has, and the
//!    frequency of the time stamp counter.
//! 2. The counters of all vCPUs are set together ([`super::tsc`]).
//! 3. [`VcpuState::restore`] sets the rest: the local APIC before the deadline timer, which depends
//!    on it and on the counter; the events last. Only in this step KVM accesses guest memory (clock
//!    pages, page tables in PAE mode, nested state). It may wait for a page server, so it runs on
//!    the vCPU's own thread.

use kvm_bindings::{
    CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, KVM_MAX_CPUID_ENTRIES, kvm_cpuid_entry2, kvm_debugregs,
    kvm_lapic_state, kvm_mp_state, kvm_regs, kvm_sregs, kvm_vcpu_events, kvm_xcrs,
};
use kvm_ioctls::{Cap, KvmNestedStateBuffer, VcpuFd};
use serde::{Deserialize, Serialize};

use super::msrs::{IA32_TSC, Msr, get_msrs, set_msrs, unlisted_msrs};
use super::tsc::{self, SavedCounter};
use super::xsave::XsaveSize;
use crate::kvm::{Ioctl, Kvm, KvmError, Vm};
use crate::raw;

/// Depends on the local APIC and on the time stamp counter, so it is restored after both.
const IA32_TSC_DEADLINE: u32 = 0x6e0;
/// Frequencies that differ by less count as the same. The guest's clock discipline corrects this
/// error of 1 in 4000.
const TSC_TOLERANCE_PPM: u64 = 250;

/// All state of a vCPU.
#[derive(Clone, Serialize, Deserialize)]
pub struct VcpuState {
    /// The leaves of CPUID.
    pub cpuid: Vec<CpuidLeaf>,
    /// Frequency of the time stamp counter in kHz; `None` if KVM does not report it.
    pub tsc_khz: Option<u32>,
    /// Offset of the time stamp counter from the host's; `None` if KVM does not report it.
    #[serde(default)]
    pub tsc_offset: Option<u64>,
    /// Whether the vCPU runs, waits for an interrupt, or waits to be started.
    #[serde(with = "raw")]
    mp_state: kvm_mp_state,
    /// General registers.
    #[serde(with = "raw")]
    regs: kvm_regs,
    /// Segments and control registers.
    #[serde(with = "raw")]
    sregs: kvm_sregs,
    /// The extended state: floating point and vector registers, and what else XSAVE covers.
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
    /// Pending exceptions and interrupts.
    #[serde(with = "raw")]
    events: kvm_vcpu_events,
    /// The state of nested virtualization.
    #[serde(default, with = "raw::optional")]
    nested: Option<Box<KvmNestedStateBuffer>>,
}

/// A leaf of CPUID.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct CpuidLeaf {
    /// The leaf's number.
    pub leaf: u32,
    /// The index (ecx), if the leaf has several.
    pub index: u32,
    /// KVM's flags.
    pub flags: u32,
    /// eax, ebx, ecx, edx.
    pub values: [u32; 4],
}

/// What this host's KVM can save of a vCPU.
#[derive(Debug, Clone)]
pub(crate) struct StateFormat {
    /// The MSRs that KVM can save.
    msrs: Vec<u32>,
    /// Size of the extended state.
    xsave: XsaveSize,
    /// Whether KVM can save the state of nested virtualization.
    nested: bool,
    /// Whether the CPU can scale a guest's time stamp counter to another frequency.
    scales_tsc: bool,
}

impl StateFormat {
    /// Asks KVM what it can save of the vCPUs of `vm`. `more` are MSRs that are saved even if KVM
    /// does not list them, where it can read them.
    pub(crate) fn of(kvm: &Kvm, vm: &Vm, more: &[u32]) -> Result<Self, KvmError> {
        let mut msrs = kvm.msr_indices()?;
        for index in unlisted_msrs().chain(more.iter().copied()) {
            if !msrs.contains(&index) {
                msrs.push(index);
            }
        }
        Ok(StateFormat {
            msrs,
            xsave: XsaveSize::of(&vm.shared_fd()),
            nested: kvm.saves_nested_state(),
            scales_tsc: vm.shared_fd().check_extension(Cap::TscControl),
        })
    }

    /// The MSRs that KVM can save.
    pub(crate) fn msrs(&self) -> &[u32] {
        &self.msrs
    }
}

impl VcpuState {
    /// Saves the state of `vcpu`.
    pub(crate) fn save(vcpu: &VcpuFd, format: &StateFormat) -> Result<Self, KvmError> {
        let mp_state = vcpu.get_mp_state().ioctl("KVM_GET_MP_STATE")?;
        let cpuid = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).ioctl("KVM_GET_CPUID2")?;
        let nested = if format.nested { nested_state(vcpu)? } else { None };
        let (msrs, lapic) = save_timer(vcpu, &format.msrs)?;
        Ok(VcpuState {
            cpuid: cpuid.as_slice().iter().map(CpuidLeaf::from).collect(),
            tsc_khz: vcpu.get_tsc_khz().ok().filter(|khz| *khz != 0),
            tsc_offset: tsc::offset(vcpu),
            mp_state,
            regs: vcpu.get_regs().ioctl("KVM_GET_REGS")?,
            sregs: vcpu.get_sregs().ioctl("KVM_GET_SREGS")?,
            xsave: format.xsave.get(vcpu)?,
            xcrs: vcpu.get_xcrs().ioctl("KVM_GET_XCRS")?,
            debug: vcpu.get_debug_regs().ioctl("KVM_GET_DEBUGREGS")?,
            lapic,
            msrs,
            nested,
            events: vcpu.get_vcpu_events().ioctl("KVM_GET_VCPU_EVENTS")?,
        })
    }

    /// The saved time stamp counter.
    pub(crate) fn counter(&self) -> SavedCounter {
        let counter = self.msrs.iter().find(|msr| msr.index == IA32_TSC).map(|msr| msr.value);
        SavedCounter { counter, offset: self.tsc_offset, khz: self.tsc_khz }
    }

    /// The numbers of the saved MSRs.
    pub(crate) fn msr_indices(&self) -> Vec<u32> {
        self.msrs.iter().map(|msr| msr.index).collect()
    }

    /// Restores CPUID and the counter's frequency of a new `vcpu`. KVM accesses no guest memory.
    pub(crate) fn prepare(&self, vcpu: &VcpuFd, format: &StateFormat) -> Result<(), KvmError> {
        let leaves: Vec<_> = self.cpuid.iter().map(kvm_cpuid_entry2::from).collect();
        let cpuid = CpuId::from_entries(&leaves).map_err(|_| KvmError::StateTooLarge("leaves of CPUID"))?;
        vcpu.set_cpuid2(&cpuid).ioctl("KVM_SET_CPUID2")?;
        self.restore_tsc_frequency(vcpu, format)
    }

    /// Restores the rest of a `vcpu` that is prepared and whose time stamp counter is set. KVM may
    /// access guest memory.
    pub(crate) fn restore(&self, vcpu: &VcpuFd, format: &StateFormat) -> Result<(), KvmError> {
        vcpu.set_mp_state(self.mp_state).ioctl("KVM_SET_MP_STATE")?;
        vcpu.set_regs(&self.regs).ioctl("KVM_SET_REGS")?;
        vcpu.set_sregs(&self.sregs).ioctl("KVM_SET_SREGS")?;
        // Before the extended state: these registers say what it may contain.
        vcpu.set_xcrs(&self.xcrs).ioctl("KVM_SET_XCRS")?;
        format.xsave.set(vcpu, &self.xsave)?;
        vcpu.set_debug_regs(&self.debug).ioctl("KVM_SET_DEBUGREGS")?;
        restore_timer(vcpu, &self.msrs, &self.lapic)?;
        if let Some(nested) = &self.nested {
            if nested.size as usize > size_of::<KvmNestedStateBuffer>() {
                return Err(KvmError::StateTooLarge("bytes of nested state"));
            }
            vcpu.set_nested_state(nested).ioctl("KVM_SET_NESTED_STATE")?;
        }
        vcpu.set_vcpu_events(&self.events).ioctl("KVM_SET_VCPU_EVENTS")
    }

    /// Restores the counter's frequency, which the guest knows. If the host's differs, the CPU must
    /// be able to scale it. (Without scaling, KVM would emulate a higher frequency by jumps, at
    /// different moments on each vCPU.)
    fn restore_tsc_frequency(&self, vcpu: &VcpuFd, format: &StateFormat) -> Result<(), KvmError> {
        let (Some(saved), Ok(here)) = (self.tsc_khz, vcpu.get_tsc_khz()) else { return Ok(()) };
        let difference = u64::from(saved.abs_diff(here));
        if difference * 1_000_000 <= u64::from(saved) * TSC_TOLERANCE_PPM {
            return Ok(());
        }
        let unsupported = kvm_ioctls::Error::new(libc::EOPNOTSUPP);
        let scaled = if format.scales_tsc { vcpu.set_tsc_khz(saved) } else { Err(unsupported) };
        scaled.map_err(|source| KvmError::TscFrequency { saved, here, source })
    }
}

/// The deadline timer of a vCPU. Its deadline is in an MSR, its interrupt in the local APIC.
///
/// When the deadline has passed, KVM sets the MSR to 0 and raises the interrupt in the local APIC.
/// It may do so at any moment, also on a paused vCPU (`apic_timer_expired` with APICv). Setting the
/// local APIC disarms the timer.
trait Timer {
    /// Reads MSRs.
    fn msrs(&self, indices: &[u32]) -> Result<Vec<Msr>, KvmError>;
    /// Writes MSRs.
    fn set_msrs(&self, msrs: &[Msr]) -> Result<(), KvmError>;
    /// Reads the local APIC.
    fn lapic(&self) -> Result<kvm_lapic_state, KvmError>;
    /// Sets the local APIC.
    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), KvmError>;
}

impl Timer for VcpuFd {
    fn msrs(&self, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
        get_msrs(self, indices)
    }

    fn set_msrs(&self, msrs: &[Msr]) -> Result<(), KvmError> {
        set_msrs(self, msrs)
    }

    fn lapic(&self) -> Result<kvm_lapic_state, KvmError> {
        self.get_lapic().ioctl("KVM_GET_LAPIC")
    }

    fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), KvmError> {
        VcpuFd::set_lapic(self, lapic).ioctl("KVM_SET_LAPIC")
    }
}

/// Reads the MSRs, then the local APIC. A deadline that passes in between is in both: the guest
/// gets one interrupt too many, which it treats as a late one. In the other order it could be in
/// neither, and a tickless guest would stop.
fn save_timer(vcpu: &impl Timer, indices: &[u32]) -> Result<(Vec<Msr>, kvm_lapic_state), KvmError> {
    let msrs = vcpu.msrs(indices)?;
    Ok((msrs, vcpu.lapic()?))
}

/// Sets the local APIC, then the MSRs, the deadline last. Leaves out the time stamp counter, which
/// is set already.
fn restore_timer(vcpu: &impl Timer, msrs: &[Msr], lapic: &kvm_lapic_state) -> Result<(), KvmError> {
    vcpu.set_lapic(lapic)?;
    let set = msrs.iter().copied().filter(|msr| msr.index != IA32_TSC);
    let (deadline, others): (Vec<_>, Vec<_>) = set.partition(|msr| msr.index == IA32_TSC_DEADLINE);
    vcpu.set_msrs(&others)?;
    vcpu.set_msrs(&deadline)
}

fn nested_state(vcpu: &VcpuFd) -> Result<Option<Box<KvmNestedStateBuffer>>, KvmError> {
    let mut buffer = Box::new(KvmNestedStateBuffer::empty());
    let length = vcpu.nested_state(&mut buffer).ioctl("KVM_GET_NESTED_STATE")?;
    Ok(length.map(|_| buffer))
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
    use std::cell::RefCell;

    /// A deadline timer whose deadline passes as soon as one of its two halves was read, which KVM
    /// allows.
    #[derive(Default)]
    struct FakeTimer(RefCell<Halves>);

    #[derive(Default)]
    struct Halves {
        deadline: u64,
        interrupt: bool,
        reads: u32,
    }

    impl FakeTimer {
        fn armed() -> Self {
            FakeTimer(RefCell::new(Halves { deadline: 1000, ..Halves::default() }))
        }

        fn read<T>(&self, half: impl FnOnce(&Halves) -> T) -> T {
            let mut timer = self.0.borrow_mut();
            let value = half(&timer);
            timer.reads += 1;
            if timer.deadline != 0 {
                (timer.deadline, timer.interrupt) = (0, true);
            }
            value
        }
    }

    impl Timer for FakeTimer {
        fn msrs(&self, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
            let value = self.read(|timer| timer.deadline);
            Ok(indices.iter().map(|index| Msr { index: *index, value }).collect())
        }

        fn set_msrs(&self, msrs: &[Msr]) -> Result<(), KvmError> {
            for msr in msrs {
                assert_ne!(msr.index, IA32_TSC, "the counters of all vCPUs are set together");
                if msr.index == IA32_TSC_DEADLINE {
                    self.0.borrow_mut().deadline = msr.value;
                }
            }
            Ok(())
        }

        fn lapic(&self) -> Result<kvm_lapic_state, KvmError> {
            let mut lapic = kvm_lapic_state::default();
            lapic.regs[0x200] = self.read(|timer| timer.interrupt).into();
            Ok(lapic)
        }

        fn set_lapic(&self, lapic: &kvm_lapic_state) -> Result<(), KvmError> {
            *self.0.borrow_mut() = Halves { interrupt: lapic.regs[0x200] != 0, ..Halves::default() };
            Ok(())
        }
    }

    #[test]
    fn deadline_that_passes_during_a_save_is_in_the_state() {
        let timer = FakeTimer::armed();
        let (msrs, lapic) = save_timer(&timer, &[IA32_TSC_DEADLINE]).unwrap();
        assert_eq!(timer.0.borrow().reads, 2);
        assert!(msrs[0].value != 0 || lapic.regs[0x200] != 0, "no tick is left");
    }

    #[test]
    fn restored_deadline_stays_armed() {
        let timer = FakeTimer::default();
        let msr = |index, value| Msr { index, value };
        let msrs = [msr(IA32_TSC_DEADLINE, 7), msr(IA32_TSC, 5), msr(0x174, 1)];
        restore_timer(&timer, &msrs, &kvm_lapic_state::default()).unwrap();
        assert_eq!(timer.0.borrow().deadline, 7);
    }
}
