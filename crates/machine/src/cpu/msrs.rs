//! Model-specific registers (MSRs): read and written in batches; those at boot; those that are
//! saved although KVM does not list them.

use kvm_bindings::{Msrs, kvm_msr_entry};
use kvm_ioctls::VcpuFd;
use serde::{Deserialize, Serialize};

use crate::kvm::{Ioctl, KvmError};

/// The time stamp counter.
pub(super) const IA32_TSC: u32 = 0x10;
const IA32_SYSENTER_CS: u32 = 0x174;
const IA32_SYSENTER_ESP: u32 = 0x175;
const IA32_SYSENTER_EIP: u32 = 0x176;
const IA32_MISC_ENABLE: u32 = 0x1a0;
const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
const STAR: u32 = 0xc000_0081;
const LSTAR: u32 = 0xc000_0082;
const CSTAR: u32 = 0xc000_0083;
const SYSCALL_MASK: u32 = 0xc000_0084;
const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// The most MSRs in one call.
const MSRS_AT_ONCE: usize = 256;

/// `IA32_MISC_ENABLE`: fast `REP MOVS` is enabled.
const FAST_STRINGS: u64 = 1;
/// MTRRs are enabled, and the default memory type is write-back.
const MTRR_ENABLED_WRITE_BACK: u64 = 1 << 11 | 6;

/// Variable MTRRs: a base and a mask for each of KVM's eight.
const MTRR_VARIABLE: std::ops::Range<u32> = 0x200..0x210;
/// Fixed MTRRs: ranges of 64, 16 and 4 KiB.
const MTRR_FIXED: [u32; 11] = [0x250, 0x258, 0x259, 0x268, 0x269, 0x26a, 0x26b, 0x26c, 0x26d, 0x26e, 0x26f];
/// Machine check banks: four MSRs for each of KVM's 32.
const MACHINE_CHECK_BANKS: std::ops::Range<u32> = 0x400..0x480;

/// A model-specific register.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Msr {
    /// The register's number.
    pub index: u32,
    /// The register's value.
    pub value: u64,
}

/// MSRs that `KVM_GET_MSRS` returns although `KVM_GET_MSR_INDEX_LIST` leaves them out.
pub(crate) fn unlisted_msrs() -> impl Iterator<Item = u32> {
    std::iter::once(IA32_MTRR_DEF_TYPE).chain(MTRR_FIXED).chain(MTRR_VARIABLE).chain(MACHINE_CHECK_BANKS)
}

/// The MSRs of a vCPU at boot.
const BOOT_MSRS: [(u32, u64); 11] = [
    (IA32_SYSENTER_CS, 0),
    (IA32_SYSENTER_ESP, 0),
    (IA32_SYSENTER_EIP, 0),
    (STAR, 0),
    (CSTAR, 0),
    (KERNEL_GS_BASE, 0),
    (SYSCALL_MASK, 0),
    (LSTAR, 0),
    (IA32_TSC, 0),
    (IA32_MISC_ENABLE, FAST_STRINGS),
    (IA32_MTRR_DEF_TYPE, MTRR_ENABLED_WRITE_BACK),
];

/// Sets [`BOOT_MSRS`]. CPUID must be set before: a vCPU has only the MSRs that CPUID shows.
pub(crate) fn set_boot_msrs(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let entries = BOOT_MSRS.map(|(index, data)| kvm_msr_entry { index, data, ..Default::default() });
    let msrs = Msrs::from_entries(&entries).expect("eleven registers are few enough");
    let set = vcpu.set_msrs(&msrs).ioctl("KVM_SET_MSRS")?;
    if set == entries.len() {
        return Ok(());
    }
    // KVM stops at the first MSR that it refuses.
    log::error!("KVM refused to set the register (MSR) {:#x} of a vCPU", entries[set].index);
    Err(kvm_ioctls::Error::new(libc::EINVAL)).ioctl("KVM_SET_MSRS")
}

/// Reads MSRs. Leaves out those that this vCPU does not have.
pub(crate) fn get_msrs(vcpu: &VcpuFd, indices: &[u32]) -> Result<Vec<Msr>, KvmError> {
    let mut got = Vec::with_capacity(indices.len());
    let mut left = indices;
    while !left.is_empty() {
        let batch = &left[..left.len().min(MSRS_AT_ONCE)];
        let mut msrs = to_kvm(batch.iter().map(|index| Msr { index: *index, value: 0 }));
        let count = vcpu.get_msrs(&mut msrs).ioctl("KVM_GET_MSRS")?;
        got.extend(msrs.as_slice()[..count].iter().map(|msr| Msr { index: msr.index, value: msr.data }));
        // KVM stops at the first MSR that the vCPU does not have.
        let refused = usize::from(count < batch.len());
        left = &left[count + refused..];
    }
    Ok(got)
}

/// Writes MSRs. It is an error if KVM refuses one that does not have the value already.
pub(super) fn set_msrs(vcpu: &VcpuFd, msrs: &[Msr]) -> Result<(), KvmError> {
    let mut left = msrs;
    while !left.is_empty() {
        let batch = &left[..left.len().min(MSRS_AT_ONCE)];
        let count = vcpu.set_msrs(&to_kvm(batch.iter().copied())).ioctl("KVM_SET_MSRS")?;
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
    Msrs::from_entries(&entries).expect("a batch is within KVM's bound")
}
