//! KVM, with the order of its calls in the types.
//!
//! Since Linux 6.18, adding a memory slot after an interrupt chip, a PIT or an ioeventfd waits for
//! a grace period of the kernel: 6 to 25 ms instead of microseconds. So a VM is created in one
//! order, and each step returns the type that has the next step:
//!
//! ```text
//! Kvm::create_vm -> VmWithoutMemory --map_ram--> VmWithMemory --create_irqchip--> VmWithIrqchip
//!                                                                     |
//!                                                                create_vcpus --> Vm, VcpuFds
//! ```
//!
//! [`Vm`] takes ioeventfds and irqfds. It has no call that adds a memory slot.
//!
//! | module | what it is about |
//! |---|---|
//! | `capability` | what the host's KVM must have |
//! | `error` | [`KvmError`], and the names of ioctls in it |
//! | `memory_slot` | guest RAM as KVM knows it |
//! | `eventfd` | eventfds as `kvm-ioctls` takes them |
//! | `pic` | the PICs, before a guest programs them |

mod capability;
mod error;
mod eventfd;
mod memory_slot;
mod pic;

use std::os::fd::AsRawFd;
use std::sync::Arc;

use config::KvmCapability;
use kvm_bindings::{
    CpuId, KVM_CAP_SET_GUEST_DEBUG2, KVM_GUESTDBG_BLOCKIRQ, KVM_MAX_CPUID_ENTRIES, KVM_PIT_SPEAKER_DUMMY,
    kvm_pit_config,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use memory::GuestRam;
use sync::EventFd;

use crate::layout;

use error::API_VERSION;
pub(crate) use error::Ioctl;
pub use error::KvmError;
pub(crate) use eventfd::lend;
#[cfg(test)]
pub(crate) use pic::pic_state;
pub(crate) use pic::{get_irqchip, mask_unprogrammed_pic};

/// `/dev/kvm`, checked for its version and the required capabilities.
#[derive(Debug)]
pub struct Kvm(kvm_ioctls::Kvm);

impl Kvm {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self, KvmError> {
        Self::open_with(&[])
    }

    /// Opens `/dev/kvm` for a CPU template, which adds capabilities to the required ones and
    /// removes some.
    pub fn open_with(changes: &[KvmCapability]) -> Result<Self, KvmError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(KvmError::Open)?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::ApiVersion(version));
        }
        capability::check(changes, |number| kvm.check_extension_raw(number.into()) > 0)?;
        Ok(Kvm(kvm))
    }

    /// The CPUID leaves that KVM supports on this host.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.0.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).ioctl("KVM_GET_SUPPORTED_CPUID")
    }

    /// The model-specific registers that KVM lists as part of a vCPU's state.
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        Ok(self.0.get_msr_index_list().ioctl("KVM_GET_MSR_INDEX_LIST")?.as_slice().to_vec())
    }

    /// Whether KVM can save the state of nested virtualization.
    pub fn saves_nested_state(&self) -> bool {
        self.0.check_extension(Cap::NestedState)
    }

    /// Whether a vCPU that a debugger steps can be kept from taking interrupts.
    pub(crate) fn steps_without_interrupts(&self) -> bool {
        // KVM_CAP_SET_GUEST_DEBUG2 is the mask of supported flags.
        let flags = self.0.check_extension_raw(KVM_CAP_SET_GUEST_DEBUG2.into());
        u32::try_from(flags).is_ok_and(|flags| flags & KVM_GUESTDBG_BLOCKIRQ != 0)
    }

    /// The most vCPUs that one VM can have.
    pub fn max_vcpus(&self) -> usize {
        self.0.get_max_vcpus()
    }

    /// Creates an empty VM. A signal can interrupt the call, which is then repeated.
    pub fn create_vm(&self) -> Result<VmWithoutMemory, KvmError> {
        loop {
            match self.0.create_vm() {
                Ok(fd) => return Ok(VmWithoutMemory { fd }),
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(e).ioctl("KVM_CREATE_VM"),
            }
        }
    }
}

/// Step 1: an empty VM.
#[derive(Debug)]
pub struct VmWithoutMemory {
    fd: VmFd,
}

impl VmWithoutMemory {
    /// Adds guest RAM, one memory slot per region. With `log_dirty`, KVM logs the pages that the
    /// guest writes.
    pub fn map_ram(self, ram: GuestRam, log_dirty: bool) -> Result<VmWithMemory, KvmError> {
        // KVM on Intel keeps three pages of its own in the guest's address space, in another slot.
        self.fd.set_tss_address(layout::KVM_TSS).ioctl("KVM_SET_TSS_ADDR")?;
        memory_slot::add_all(&self.fd, &ram, log_dirty)?;
        Ok(VmWithMemory { fd: self.fd, ram })
    }
}

/// Step 2: a VM with RAM.
#[derive(Debug)]
pub struct VmWithMemory {
    fd: VmFd,
    ram: GuestRam,
}

impl VmWithMemory {
    /// Adds the interrupt controllers: two PICs with all lines masked, an I/O APIC, and a local
    /// APIC for each vCPU that is created later.
    pub fn create_irqchip(self) -> Result<VmWithIrqchip, KvmError> {
        self.fd.create_irq_chip().ioctl("KVM_CREATE_IRQCHIP")?;
        pic::mask_new_pics(&self.fd)?;
        Ok(VmWithIrqchip { fd: self.fd, ram: self.ram })
    }

    /// Creates one vCPU without interrupt controllers, for guests of a few instructions.
    pub(crate) fn create_lone_vcpu(self) -> Result<(Vm, VcpuFd), KvmError> {
        let vcpu = self.fd.create_vcpu(0).ioctl("KVM_CREATE_VCPU")?;
        Ok((Vm { fd: Arc::new(self.fd), ram: self.ram }, vcpu))
    }
}

/// Step 3: a VM with RAM and interrupt controllers.
#[derive(Debug)]
pub struct VmWithIrqchip {
    fd: VmFd,
    ram: GuestRam,
}

impl VmWithIrqchip {
    /// Adds `count` vCPUs with APIC IDs from 0 on, then the timer chip (PIT).
    pub fn create_vcpus(self, count: u8) -> Result<(Vm, Vec<VcpuFd>), KvmError> {
        let vcpus = (0..count)
            .map(|id| self.fd.create_vcpu(id.into()).ioctl("KVM_CREATE_VCPU"))
            .collect::<Result<Vec<_>, _>>()?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).ioctl("KVM_CREATE_PIT2")?;
        Ok((Vm { fd: Arc::new(self.fd), ram: self.ram }, vcpus))
    }
}

/// A VM with RAM, interrupt controllers and vCPUs.
#[derive(Debug)]
pub struct Vm {
    fd: Arc<VmFd>,
    ram: GuestRam,
}

impl Vm {
    /// The guest's RAM.
    pub fn ram(&self) -> &GuestRam {
        &self.ram
    }

    /// The VM's descriptor.
    pub(crate) fn shared_fd(&self) -> Arc<VmFd> {
        Arc::clone(&self.fd)
    }

    /// Lets KVM raise interrupt line `gsi` whenever `event` is signalled.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(&lend(event), gsi).ioctl("KVM_IRQFD")
    }
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}
