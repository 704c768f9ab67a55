//! KVM, with the order of its calls in the types.
//!
//! From Linux 6.18 on, a memory slot that is added after an interrupt chip, a PIT or an ioeventfd waits for a grace period
//! of the kernel: 6 to 25 ms instead of microseconds. So a VM comes about in one order only, and each step gives the type
//! that has the next one:
//!
//! ```text
//! Kvm::create_vm -> VmWithoutMemory --map_ram--> VmWithMemory --create_irqchip--> VmWithIrqchip --create_vcpus--> Vm
//! ```
//!
//! [`Vm`] is what takes ioeventfds and irqfds; it offers no memory slots for boot memory any more.
//!
//! # Errors
//!
//! [`KvmError`] names the call (as KVM's documentation does) and the kernel's reason.

use std::os::fd::AsRawFd;
use std::sync::Arc;

use kvm_bindings::{
    CpuId, KVM_MAX_CPUID_ENTRIES, KVM_MEM_LOG_DIRTY_PAGES, KVM_PIT_SPEAKER_DUMMY, kvm_pit_config,
    kvm_userspace_memory_region,
};
use kvm_ioctls::{Cap, VcpuFd, VmFd};
use memory::GuestRam;
use vmm_sys_util::eventfd::EventFd;

use crate::{chipset, layout};

/// The version of the KVM API that this is written for; it has been 12 since 2007.
const API_VERSION: i32 = 12;

/// What must be there, with the name to show where it is not.
const REQUIRED: [(Cap, &str); 13] = [
    (Cap::Irqchip, "KVM_CAP_IRQCHIP"),
    (Cap::Ioeventfd, "KVM_CAP_IOEVENTFD"),
    (Cap::Irqfd, "KVM_CAP_IRQFD"),
    (Cap::UserMemory, "KVM_CAP_USER_MEMORY"),
    (Cap::SetTssAddr, "KVM_CAP_SET_TSS_ADDR"),
    (Cap::Pit2, "KVM_CAP_PIT2"),
    (Cap::ImmediateExit, "KVM_CAP_IMMEDIATE_EXIT"),
    (Cap::Debugregs, "KVM_CAP_DEBUGREGS"),
    (Cap::MpState, "KVM_CAP_MP_STATE"),
    (Cap::VcpuEvents, "KVM_CAP_VCPU_EVENTS"),
    (Cap::Xcrs, "KVM_CAP_XCRS"),
    (Cap::Xsave, "KVM_CAP_XSAVE"),
    (Cap::ExtCpuid, "KVM_CAP_EXT_CPUID"),
];

/// What can go wrong with KVM before a guest runs.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {0}")]
    Open(#[source] kvm_ioctls::Error),
    /// `/dev/kvm` speaks another version.
    #[error("/dev/kvm has API version {0}: only {API_VERSION} is known")]
    ApiVersion(i32),
    /// The kernel lacks something that every guest needs.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// More vCPUs than this host's KVM can give one guest.
    #[error("vcpu_count is {wanted}: this host's KVM allows at most {max}")]
    TooManyVcpus {
        /// What was asked for.
        wanted: u8,
        /// What KVM reports.
        max: usize,
    },
    /// RAM or the registers of PCI devices would lie where this host's processors cannot address it.
    #[error(
        "guest memory or device registers would end at {end:#x}: this host's processors address {bits} bits of physical memory"
    )]
    AddressWidth {
        /// End of what lies highest.
        end: u64,
        /// Width of a physical address.
        bits: u8,
    },
    /// A saved vCPU used units that this host's processor does not have.
    #[error("the saved extended state of a vCPU is {saved} bytes: this host's KVM has room for {here}")]
    XsaveSize {
        /// Bytes that were saved.
        saved: usize,
        /// Bytes that there is room for.
        here: usize,
    },
    /// A saved state has more of something than KVM takes.
    #[error("the saved state has more {0} than KVM takes")]
    StateTooLarge(&'static str),
    /// A saved vCPU ran at a frequency that this host cannot give it.
    #[error(
        "the saved time stamp counter runs at {saved} kHz: this host's runs at {here} kHz and cannot be scaled: {source}"
    )]
    TscFrequency {
        /// The guest's.
        saved: u32,
        /// The host's.
        here: u32,
        /// The kernel's reason.
        source: kvm_ioctls::Error,
    },
    /// A saved register has a value that this host's KVM refuses.
    #[error("this host's KVM refuses the value {value:#x} of the saved register (MSR) {index:#x}")]
    Msr {
        /// Which register.
        index: u32,
        /// The value.
        value: u64,
    },
    /// The clock cannot catch up.
    #[error("clock_realtime: the host that saved this state did not say what time it was")]
    NoRealTime,
    /// A call failed.
    #[error("{call}: {source}")]
    Call {
        /// The ioctl's name.
        call: &'static str,
        /// The kernel's reason.
        source: kvm_ioctls::Error,
    },
}

/// Names the call in a failed result.
pub(crate) trait Named<T> {
    /// The same result, with the call's name in its error.
    fn named(self, call: &'static str) -> Result<T, KvmError>;
}

impl<T> Named<T> for Result<T, kvm_ioctls::Error> {
    fn named(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError::Call { call, source })
    }
}

/// `/dev/kvm`, checked for what this monitor needs.
#[derive(Debug)]
pub struct Kvm(kvm_ioctls::Kvm);

impl Kvm {
    /// Opens `/dev/kvm`.
    pub fn open() -> Result<Self, KvmError> {
        let kvm = kvm_ioctls::Kvm::new().map_err(KvmError::Open)?;
        let version = kvm.get_api_version();
        if version != API_VERSION {
            return Err(KvmError::ApiVersion(version));
        }
        match REQUIRED.iter().find(|(cap, _)| !kvm.check_extension(*cap)) {
            Some((_, name)) => Err(KvmError::Missing(name)),
            None => Ok(Kvm(kvm)),
        }
    }

    /// The CPUID leaves that this host can show a guest.
    pub fn supported_cpuid(&self) -> Result<CpuId, KvmError> {
        self.0.get_supported_cpuid(KVM_MAX_CPUID_ENTRIES).named("KVM_GET_SUPPORTED_CPUID")
    }

    /// The model-specific registers that KVM lists as part of a vCPU's state.
    pub fn msr_indices(&self) -> Result<Vec<u32>, KvmError> {
        Ok(self.0.get_msr_index_list().named("KVM_GET_MSR_INDEX_LIST")?.as_slice().to_vec())
    }

    /// Whether the state of a guest's own guests can be saved.
    pub fn saves_nested_state(&self) -> bool {
        self.0.check_extension(Cap::NestedState)
    }

    /// Most vCPUs of one VM.
    pub fn max_vcpus(&self) -> usize {
        self.0.get_max_vcpus()
    }

    /// A VM with nothing in it. (The call can be interrupted by a signal; it is made again then.)
    pub fn create_vm(&self) -> Result<VmWithoutMemory, KvmError> {
        loop {
            match self.0.create_vm() {
                Ok(fd) => return Ok(VmWithoutMemory { fd }),
                Err(e) if e.errno() == libc::EINTR => {}
                Err(e) => return Err(e).named("KVM_CREATE_VM"),
            }
        }
    }
}

/// Step 1: a VM with nothing in it.
#[derive(Debug)]
pub struct VmWithoutMemory {
    fd: VmFd,
}

impl VmWithoutMemory {
    /// Gives the guest its RAM, one slot per region. With `log_dirty`, KVM keeps a log of the pages that the guest writes.
    pub fn map_ram(self, ram: GuestRam, log_dirty: bool) -> Result<VmWithMemory, KvmError> {
        // Intel's KVM keeps three pages of its own in the guest's address space; that too is a memory slot.
        self.fd.set_tss_address(layout::KVM_TSS).named("KVM_SET_TSS_ADDR")?;
        let flags = if log_dirty { KVM_MEM_LOG_DIRTY_PAGES } else { 0 };
        for (slot, region) in (0..).zip(ram.regions()) {
            let region = kvm_userspace_memory_region {
                slot,
                flags,
                guest_phys_addr: region.guest_addr,
                memory_size: region.size,
                userspace_addr: region.host_addr,
            };
            // SAFETY: the region is guest RAM of exactly this size. `Vm` holds the `GuestRam` for as long as the slot is
            // there, its addresses are never unmapped, and its regions do not overlap.
            unsafe { self.fd.set_user_memory_region(region) }.named("KVM_SET_USER_MEMORY_REGION")?;
        }
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
    /// APIC for each vCPU to come.
    pub fn create_irqchip(self) -> Result<VmWithIrqchip, KvmError> {
        self.fd.create_irq_chip().named("KVM_CREATE_IRQCHIP")?;
        chipset::mask_new_pics(&self.fd)?;
        Ok(VmWithIrqchip { fd: self.fd, ram: self.ram })
    }

    /// A VM without interrupt controllers, for guests that run a few instructions to an exit.
    pub(crate) fn create_lone_vcpu(self) -> Result<(Vm, VcpuFd), KvmError> {
        let vcpu = self.fd.create_vcpu(0).named("KVM_CREATE_VCPU")?;
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
    /// Adds `count` vCPUs, with APIC ids from 0, and then the timer chip (its ports go on the bus that makes slots slow).
    pub fn create_vcpus(self, count: u8) -> Result<(Vm, Vec<VcpuFd>), KvmError> {
        let vcpus = (0..count)
            .map(|id| self.fd.create_vcpu(id.into()).named("KVM_CREATE_VCPU"))
            .collect::<Result<Vec<_>, _>>()?;
        let pit = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        self.fd.create_pit2(pit).named("KVM_CREATE_PIT2")?;
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

    /// The VM's descriptor, for devices that register their own events.
    pub(crate) fn shared_fd(&self) -> Arc<VmFd> {
        Arc::clone(&self.fd)
    }

    /// Lets a write to `event` raise interrupt line `gsi`, without passing through this process.
    pub fn register_irqfd(&self, event: &EventFd, gsi: u32) -> Result<(), KvmError> {
        self.fd.register_irqfd(event, gsi).named("KVM_IRQFD")
    }
}

impl AsRawFd for Vm {
    fn as_raw_fd(&self) -> std::os::fd::RawFd {
        self.fd.as_raw_fd()
    }
}
