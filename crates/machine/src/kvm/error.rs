//! KVM calls that fail. The text names the ioctl as KVM's documentation does.

/// The version of the KVM API that this crate is written for. It has been 12 since 2007.
pub(super) const API_VERSION: i32 = 12;

/// Why KVM does not do what the machine needs.
#[derive(Debug, thiserror::Error)]
pub enum KvmError {
    /// `/dev/kvm` cannot be opened.
    #[error("cannot open /dev/kvm: {0}")]
    Open(#[source] kvm_ioctls::Error),
    /// `/dev/kvm` has another version.
    #[error("/dev/kvm: its API version is {0}; only {API_VERSION} is supported")]
    ApiVersion(i32),
    /// The kernel lacks a capability that every guest needs.
    #[error("this host's KVM lacks {0}")]
    Missing(&'static str),
    /// The kernel lacks capabilities that the CPU template requires.
    #[error("cpu-config: kvm_capabilities: this host's KVM lacks {0}")]
    MissingOfTemplate(String),
    /// More vCPUs than this host's KVM supports in one guest.
    #[error("machine-config: vcpu_count is {wanted}; this host's KVM allows at most {max}")]
    TooManyVcpus {
        /// What was asked for.
        wanted: u8,
        /// What KVM reports.
        max: usize,
    },
    /// RAM or the registers of PCI devices would end above the host CPUs' physical address width.
    #[error(
        "guest memory or device registers would end at {end:#x}; \
         this host's CPUs address {bits} bits of physical memory"
    )]
    AddressWidth {
        /// The highest end address.
        end: u64,
        /// Width of a physical address, in bits.
        bits: u8,
    },
    /// A saved vCPU used more extended state than this host's KVM has.
    #[error("the saved extended state of a vCPU is {saved} bytes; this host's KVM takes {here}")]
    XsaveSize {
        /// Bytes that were saved.
        saved: usize,
        /// Bytes that this host's KVM takes.
        here: usize,
    },
    /// A saved state has more entries of a list than KVM takes.
    #[error("the saved state has more {0} than KVM takes")]
    StateTooLarge(&'static str),
    /// The interrupt controllers in a saved state are not those of a machine.
    #[error("the saved state has the interrupt controllers {ids:?}; each machine has 0, 1 and 2")]
    Irqchips {
        /// Their IDs in KVM.
        ids: Vec<u32>,
    },
    /// A saved vCPU's time stamp counter ran at a frequency that this host cannot provide.
    #[error(
        "the saved time stamp counter runs at {saved} kHz; this host's runs at {here} kHz \
         and cannot be scaled: {source}"
    )]
    TscFrequency {
        /// The guest's frequency in kHz.
        saved: u32,
        /// The host's frequency in kHz.
        here: u32,
        /// The kernel's reason.
        source: kvm_ioctls::Error,
    },
    /// A saved register has a value that this host's KVM refuses.
    #[error("this host's KVM refuses the value {value:#x} of the saved register (MSR) {index:#x}")]
    Msr {
        /// The register.
        index: u32,
        /// The value.
        value: u64,
    },
    /// The saved state does not say at what time it was saved, so that the clock cannot catch up.
    #[error("clock_realtime: the saved state has no real time to catch up from")]
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

/// Adds an ioctl's name to its result.
pub(crate) trait Ioctl<T> {
    /// The same result, with the name of the ioctl in its error.
    fn ioctl(self, call: &'static str) -> Result<T, KvmError>;
}

impl<T> Ioctl<T> for Result<T, kvm_ioctls::Error> {
    fn ioctl(self, call: &'static str) -> Result<T, KvmError> {
        self.map_err(|source| KvmError::Call { call, source })
    }
}
