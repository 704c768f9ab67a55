//! What a vCPU looks like from inside: CPUID, model-specific registers, and the registers that it starts with.

mod compatibility;
mod cpuid;
mod msrs;
pub(crate) mod registers;
pub(crate) mod state;
mod tsc;
mod xsave;

pub(crate) use compatibility::missing_features;
pub(crate) use cpuid::Cpuid;
pub(crate) use msrs::{set_boot_msrs, unlisted_msrs};
pub(crate) use state::{StateFormat, VcpuState};
pub(crate) use tsc::restore_counters;
pub(crate) use xsave::XsaveSize;

/// How vCPUs are shown to be arranged: one package, cores of one thread or two, APIC ids counting up from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Topology {
    /// Number of vCPUs.
    pub(crate) cpus: u8,
    /// vCPUs per core: 1, or 2 with `smt`.
    pub(crate) threads_per_core: u8,
}

impl Topology {
    /// With `smt` and a single vCPU there is nothing to share a core with.
    pub(crate) fn new(cpus: u8, smt: bool) -> Self {
        Topology { cpus, threads_per_core: if smt && cpus > 1 { 2 } else { 1 } }
    }

    pub(crate) fn cores(self) -> u8 {
        self.cpus / self.threads_per_core
    }

    /// Bits of an APIC id that number the threads of a core.
    pub(crate) fn thread_bits(self) -> u32 {
        self.threads_per_core.trailing_zeros()
    }

    /// Bits of an APIC id that number threads and cores of the package.
    pub(crate) fn package_bits(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
}
