//! How vCPUs are arranged into cores and packages, as CPUID shows it.

/// One package, with cores of one or two threads. APIC IDs count up from 0.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Topology {
    /// Number of vCPUs.
    pub(crate) cpus: u8,
    /// vCPUs per core: 1, or 2 with `smt`.
    pub(crate) threads_per_core: u8,
}

impl Topology {
    /// The topology of `cpus` vCPUs. A single vCPU has a core of one thread also with `smt`.
    pub(crate) fn new(cpus: u8, smt: bool) -> Self {
        Topology { cpus, threads_per_core: if smt && cpus > 1 { 2 } else { 1 } }
    }

    /// Number of cores.
    pub(crate) fn cores(self) -> u8 {
        self.cpus / self.threads_per_core
    }

    /// Bits of an APIC ID that number the threads of a core.
    pub(crate) fn thread_bits(self) -> u32 {
        self.threads_per_core.trailing_zeros()
    }

    /// Bits of an APIC ID that number threads and cores of the package.
    pub(crate) fn package_bits(self) -> u32 {
        u32::from(self.cpus).next_power_of_two().trailing_zeros()
    }
}
