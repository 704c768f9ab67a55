//! The extended state of a vCPU (`KVM_GET_XSAVE2`, `KVM_SET_XSAVE`): as large as its processor's features make it.
//!
//! Unsafe code is here because the kernel reads and writes as many bytes as *it* finds right: the
//! buffer must be that large. And because what a process may use of it ([`request_amx`]) is asked
//! for by a system call that has no safe form.

use std::sync::Once;

use kvm_bindings::{Xsave, kvm_xsave};
use kvm_ioctls::{Cap, VcpuFd, VmFd};

use crate::kvm::{Ioctl, KvmError};

/// Size of the area that every KVM knows.
const LEGACY: usize = size_of::<kvm_xsave>();
/// Most that an area can be; today's largest, with AMX, is 11 KiB.
const MAX: usize = 64 << 10;

/// Asks the kernel to let guests of this process have AMX, whose state is too large for every
/// process to have it. It is asked once, before the first vCPU: afterwards the kernel grants no
/// more. Whether it is granted, `KVM_GET_SUPPORTED_CPUID` shows.
pub(crate) fn request_amx() {
    static REQUEST: Once = Once::new();
    REQUEST.call_once(|| {
        const ARCH_REQ_XCOMP_GUEST_PERM: libc::c_int = 0x1025;
        const TILEDATA: libc::c_ulong = 18;
        // SAFETY: two numbers are passed, and no memory is accessed.
        let refused = unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_GUEST_PERM, TILEDATA) };
        if refused != 0 {
            // No such unit (or an old kernel), in most cases.
            log::debug!("guests cannot use AMX: {}", std::io::Error::last_os_error());
        }
    });
}

/// How large the area of this machine's vCPUs is, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct XsaveSize {
    bytes: usize,
    /// The kernel has `KVM_GET_XSAVE2`.
    extended: bool,
}

impl XsaveSize {
    /// Asks the kernel.
    pub(crate) fn of(vm: &VmFd) -> Self {
        let size = usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0);
        XsaveSize { bytes: size.max(LEGACY), extended: size > 0 }
    }

    /// A buffer for it, all zeros.
    fn buffer(self) -> Xsave {
        let words = (self.bytes - LEGACY).div_ceil(size_of::<u32>());
        Xsave::new(words).expect("an area has less than 2^32 words")
    }

    /// The area as it is.
    pub(crate) fn get(self, vcpu: &VcpuFd) -> Result<Vec<u8>, KvmError> {
        let mut area = self.buffer();
        if self.extended {
            // SAFETY: the buffer has the size that the kernel gave for this VM. Features that would
            // make it larger (`request_amx`) are asked for before the process has a VM, and cannot
            // be once it has a vCPU.
            unsafe { vcpu.get_xsave2(&mut area) }.ioctl("KVM_GET_XSAVE2")?;
        } else {
            // SAFETY: `get_xsave` returns a `kvm_xsave`, which is what the structure begins with; its length stays 0.
            unsafe { area.as_mut_fam_struct() }.xsave = vcpu.get_xsave().ioctl("KVM_GET_XSAVE")?;
        }
        let mut bytes = Vec::with_capacity(self.bytes);
        let words = area.as_fam_struct_ref().xsave.region.iter().chain(area.as_slice());
        bytes.extend(words.flat_map(|word| word.to_le_bytes()));
        Ok(bytes)
    }

    /// Makes the area `bytes`. A shorter one is followed by zeros, which are the state of a unit that was never used; of a longer one
    /// all that is cut off must be zeros.
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
        // SAFETY: only the area's words are written, never its length.
        let legacy = &mut unsafe { area.as_mut_fam_struct() }.xsave.region;
        for (place, word) in legacy.iter_mut().zip(&mut words) {
            *place = word;
        }
        for (place, word) in area.as_mut_slice().iter_mut().zip(&mut words) {
            *place = word;
        }
        // SAFETY: the buffer has the size that the kernel gave for this VM (see `get`), or that of a `kvm_xsave`, which is
        // all that a kernel without the extension reads.
        unsafe { vcpu.set_xsave2(&area) }.ioctl("KVM_SET_XSAVE")
    }
}
