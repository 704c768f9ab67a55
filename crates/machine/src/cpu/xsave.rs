//! The extended state of a vCPU (`KVM_GET_XSAVE2`, `KVM_SET_XSAVE`). Its size depends on the CPU's
//! features.
//!
//! Unsafe code is here because the kernel, not the caller, decides how many bytes it reads and
//! writes: the buffer must have that size. Also, the system call of [`request_amx`] has no safe
//! form.

#![expect(
    unsafe_code,
    reason = "the kernel decides how many bytes it reads and writes; a system call without a safe form"
)]

use std::sync::Once;

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::kvm::{Ioctl, KvmError};

/// Size of `kvm_xsave`, which every KVM supports.
const LEGACY: usize = size_of::<kvm_xsave>();
/// The most bytes of extended state that are accepted. The largest today, with AMX, has 11 KiB.
const MAX: usize = 64 << 10;

/// Asks the kernel to permit AMX in guests of this process. Its state is so large that the kernel
/// does not permit it by default.
///
/// Only the first call asks, and it must come before the first vCPU: afterwards the kernel grants
/// no permission. `KVM_GET_SUPPORTED_CPUID` shows whether it is granted.
pub(crate) fn request_amx() {
    static REQUEST: Once = Once::new();
    REQUEST.call_once(|| {
        const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_int = 0x1025;
        const TILEDATA: libc::c_ulong = 18;
        // SAFETY: two numbers are passed, and no memory is accessed.
        let refused = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, TILEDATA) };
        if refused != 0 {
            // In most cases the CPU has no AMX, or the kernel is old.
            log::debug!("guests cannot use AMX: {}", std::io::Error::last_os_error());
        }
    });
}

/// The size of the extended state of a VM's vCPUs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct XsaveSize {
    bytes: usize,
    /// Whether the kernel has `KVM_GET_XSAVE2`.
    extended: bool,
}

impl XsaveSize {
    /// Asks KVM for the size.
    pub(crate) fn of(vm: &VmFd) -> Self {
        let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        XsaveSize { bytes: size.max(LEGACY), extended: size > 0 }
    }

    /// A zeroed buffer of this size.
    fn buffer(self) -> Xsave {
        let words = (self.bytes - LEGACY).div_ceil(size_of::<u32>());
        Xsave::new(words).expect("the size is less than 2^32 words")
    }

    /// Reads the extended state.
    pub(crate) fn get(self, vcpu: &VcpuFd) -> Result<Vec<u8>, KvmError> {
        let mut area = self.buffer();
        if self.extended {
            // SAFETY: the buffer has the size that the kernel reported for this VM. Features that
            // would make it larger (`request_amx`) are requested before the process has a VM, and
            // cannot be requested once it has a vCPU.
            unsafe { vcpu.get_xsave2(&mut area) }.ioctl("KVM_GET_XSAVE2")?;
        } else {
            // SAFETY: the assignment replaces the `kvm_xsave` at the start of the structure. The
            // length of the flexible array behind it is not changed: it is 0, because without the
            // extension the buffer has the size of a `kvm_xsave`.
            unsafe { area.as_mut_fam_struct() }.xsave = vcpu.get_xsave().ioctl("KVM_GET_XSAVE")?;
        }
        let mut bytes = Vec::with_capacity(self.bytes);
        let words = area.as_fam_struct_ref().xsave.region.iter().chain(area.as_slice());
        bytes.extend(words.flat_map(|word| word.to_le_bytes()));
        Ok(bytes)
    }

    /// Restores the extended state from `bytes`. If they are fewer than the size, zeros follow,
    /// which are the state of unused features. If they are more, all bytes beyond the size must be
    /// zeros.
    pub(crate) fn set(self, vcpu: &VcpuFd, bytes: &[u8]) -> Result<(), KvmError> {
        let too_large = || KvmError::XsaveSize { saved: bytes.len(), here: self.bytes };
        if bytes.len() > MAX || bytes.iter().skip(self.bytes).any(|byte| *byte != 0) {
            return Err(too_large());
        }
        let mut area = self.buffer();
        let mut words = bytes.chunks(size_of::<u32>()).map(|chunk| {
            let mut word = [0; size_of::<u32>()];
            word[..chunk.len()].copy_from_slice(chunk);
            u32::from_le_bytes(word)
        });
        // SAFETY: only words of the `kvm_xsave` are written, not the length of the flexible array.
        let legacy = &mut unsafe { area.as_mut_fam_struct() }.xsave.region;
        for (place, word) in legacy.iter_mut().zip(&mut words) {
            *place = word;
        }
        for (place, word) in area.as_mut_slice().iter_mut().zip(&mut words) {
            *place = word;
        }
        // SAFETY: the buffer has the size that the kernel reported for this VM (see `get`), or that
        // of a `kvm_xsave`, which is all that a kernel without the extension reads.
        unsafe { vcpu.set_xsave2(&area) }.ioctl("KVM_SET_XSAVE")
    }
}
