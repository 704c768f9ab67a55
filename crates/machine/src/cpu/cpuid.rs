//! CPUID as a guest sees it.
//!
//! The leaves are those that KVM supports on this host, as a CPU template changes them
//! ([`super::template`]). Changed are then those that depend on the microVM (topology, APIC ID) and
//! those of features that a guest cannot use (power management, performance counters). Leaves are
//! described in the Intel SDM, volume 2, and the AMD APM, volume 3.
//!
//! # Features that are shown completely or not at all
//!
//! - **AMX** (tiles) needs a permission, because its state is large: [`super::xsave::request_amx`]
//!   asks for it before a vCPU exists. If the host grants it, guests have AMX, as with Firecracker.
//!   That costs 8 KiB of kernel memory and of state file for each vCPU, and such a snapshot loads
//!   only on hosts with AMX. Without the permission, kernels before 6.4 show TILECFG without
//!   TILEDATA (XSETBV refuses this combination, on which Linux dies). Later kernels still show the
//!   instructions.
//! - **CET** (shadow stacks, indirect branch tracking) is hidden. The shadow stack pointer is not
//!   among the registers that this monitor saves. A guest that was restored without it would die at
//!   its next return.

use std::arch::x86_64::__cpuid_count;

use kvm_bindings::{CpuId, KVM_CPUID_FLAG_SIGNIFCANT_INDEX, kvm_cpuid_entry2};

use super::topology::Topology;
use super::xsave::request_amx;
use crate::kvm::{Ioctl, Kvm, KvmError};

/// The vendor of the host's CPU. Some leaves depend on it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Vendor {
    Intel,
    Amd,
    Other,
}

/// Bits of one register of a leaf.
#[derive(Debug, Clone, Copy)]
pub(super) struct FeatureBits {
    pub(super) leaf: u32,
    pub(super) index: u32,
    /// 0 to 3: eax, ebx, ecx, edx.
    pub(super) register: usize,
    pub(super) bits: u32,
}

const fn bits(leaf: u32, index: u32, register: usize, bits: u32) -> FeatureBits {
    FeatureBits { leaf, index, register, bits }
}

/// Components of the extended state (leaf 0xD): TILECFG and TILEDATA, and those of CET.
const AMX_COMPONENTS: u32 = 3 << 17;
const CET_COMPONENTS: u32 = 3 << 11;

/// The bits of AMX, but for its own leaves: BF16, TILE and INT8; FP16; COMPLEX; its state
/// components; and the trap at their first use (XFD), which only AMX has.
pub(super) const AMX: [FeatureBits; 5] = [
    bits(0x7, 0, 3, 1 << 22 | 1 << 24 | 1 << 25),
    bits(0x7, 1, 0, 1 << 21),
    bits(0x7, 1, 3, 1 << 8),
    bits(0xd, 0, 0, AMX_COMPONENTS),
    bits(0xd, 1, 0, 1 << 4),
];
/// The leaves of AMX: tiles, and the tile matrix multiply unit.
const AMX_LEAVES: [u32; 2] = [0x1d, 0x1e];

/// The bits of CET: SHSTK; IBT; supervisor shadow stacks; its state components.
const CET: [FeatureBits; 4] = [
    bits(0x7, 0, 2, 1 << 7),
    bits(0x7, 0, 3, 1 << 20),
    bits(0x7, 1, 3, 1 << 18),
    bits(0xd, 1, 2, CET_COMPONENTS),
];

/// Bits of leaf 7, ebx, for what the x87 unit does *not* save: the data pointer except on
/// exceptions (FDP_EXCPTN_ONLY), and the selectors (ZERO_FCS_FDS). They describe the CPU: KVM
/// cannot change them, and not every KVM reports them.
pub(super) const X87_LIMITS: u32 = 1 << 6 | 1 << 13;

/// Whether `components` (leaf 0xD.0, eax) include both of AMX.
pub(super) fn shows_amx(components: u32) -> bool {
    components & AMX_COMPONENTS == AMX_COMPONENTS
}

/// The leaves that all vCPUs of a microVM have in common. [`Cpuid::for_vcpu`] adds those of one
/// vCPU.
#[derive(Debug, Clone)]
pub(crate) struct Cpuid {
    entries: Vec<kvm_cpuid_entry2>,
    vendor: Vendor,
    topology: Topology,
}

/// What this host offers to guests, before this monitor or a CPU template changes it.
#[derive(Debug, Clone)]
pub(crate) struct HostCpuid {
    /// The leaves that KVM supports.
    supported: Vec<kvm_cpuid_entry2>,
    /// Those [`X87_LIMITS`] that the host's CPU has.
    x87_limits: u32,
}

impl HostCpuid {
    /// Asks KVM and the CPU.
    pub(crate) fn read(kvm: &Kvm) -> Result<Self, KvmError> {
        // First: KVM reports permitted features only, and the process has no vCPU yet.
        request_amx();
        let processor = __cpuid_count(0x7, 0).ebx;
        let supported = kvm.supported_cpuid()?.as_slice().to_vec();
        Ok(HostCpuid { supported, x87_limits: processor & X87_LIMITS })
    }

    /// A host with these leaves.
    #[cfg(test)]
    pub(super) fn of(supported: Vec<kvm_cpuid_entry2>) -> Self {
        HostCpuid { supported, x87_limits: 0 }
    }

    /// The leaves that KVM supports.
    pub(super) fn supported(&self) -> &[kvm_cpuid_entry2] {
        &self.supported
    }

    /// What a guest without a CPU template sees, on vCPUs in this `topology`.
    pub(crate) fn cpuid(&self, topology: Topology) -> Cpuid {
        self.normalized(self.supported.clone(), topology)
    }

    /// The same for other `leaves`, which a template has changed.
    pub(super) fn normalized(&self, leaves: Vec<kvm_cpuid_entry2>, topology: Topology) -> Cpuid {
        Cpuid { entries: leaves, vendor: vendor(&self.supported), topology }.normalized(self.x87_limits)
    }
}

impl Cpuid {
    /// The leaves that this host supports, for vCPUs in this `topology`.
    pub(crate) fn new(kvm: &Kvm, topology: Topology) -> Result<Self, KvmError> {
        Ok(HostCpuid::read(kvm)?.cpuid(topology))
    }

    /// From the leaves that KVM supports, and those [`X87_LIMITS`] that the host's CPU has.
    #[cfg(test)]
    fn from_supported(supported: &[kvm_cpuid_entry2], x87_limits: u32, topology: Topology) -> Self {
        HostCpuid { supported: supported.to_vec(), x87_limits }.cpuid(topology)
    }

    /// Whether there is such a leaf.
    pub(super) fn has(&self, leaf: u32, index: u32) -> bool {
        self.entries.iter().any(|e| (e.function, e.index) == (leaf, index))
    }

    /// Makes all changes that do not depend on the vCPU.
    fn normalized(self, x87_limits: u32) -> Self {
        let mut cpuid = self;
        cpuid.hide_incomplete_units();
        cpuid.normalize_features();
        cpuid.for_each(0x7, |e| {
            if e.index == 0 {
                e.ebx = e.ebx & !X87_LIMITS | x87_limits;
            }
        });
        cpuid.set_brand_string();
        cpuid.normalize_topology();
        cpuid
    }

    /// The width of a guest-physical address, in bits.
    pub(crate) fn physical_address_bits(&self) -> u8 {
        // Without the leaf it is 36 bits.
        self.entries.iter().find(|e| e.function == 0x8000_0008).map_or(36, |e| e.eax as u8)
    }

    /// All leaves of the vCPU whose number and APIC ID is `id`.
    pub(crate) fn for_vcpu(&self, id: u8) -> Result<CpuId, KvmError> {
        let mut entries = self.entries.clone();
        for entry in &mut entries {
            match entry.function {
                0x1 => entry.ebx = entry.ebx & 0x00ff_ffff | u32::from(id) << 24,
                0xb | 0x1f => entry.edx = id.into(),
                0x8000_001e if self.vendor == Vendor::Amd => {
                    entry.eax = id.into();
                    let core = u32::from(id / self.topology.threads_per_core);
                    entry.ebx = core | u32::from(self.topology.threads_per_core - 1) << 8;
                }
                _ => {}
            }
        }
        CpuId::from_entries(&entries).map_err(|_| kvm_ioctls::Error::new(libc::E2BIG)).ioctl("KVM_SET_CPUID2")
    }

    fn for_each(&mut self, function: u32, mut change: impl FnMut(&mut kvm_cpuid_entry2)) {
        self.entries.iter_mut().filter(|e| e.function == function).for_each(&mut change);
    }

    fn hide_incomplete_units(&mut self) {
        self.hide(&CET, CET_COMPONENTS);
        let components = self.entries.iter().find(|e| (e.function, e.index) == (0xd, 0)).map_or(0, |e| e.eax);
        if !shows_amx(components) {
            self.hide(&AMX, AMX_COMPONENTS);
            self.entries.retain(|e| !AMX_LEAVES.contains(&e.function));
        }
    }

    /// Hides features and the components of their state.
    fn hide(&mut self, features: &[FeatureBits], components: u32) {
        for feature in features {
            let of_feature =
                |e: &&mut kvm_cpuid_entry2| (e.function, e.index) == (feature.leaf, feature.index);
            for e in self.entries.iter_mut().filter(of_feature) {
                let register = [&mut e.eax, &mut e.ebx, &mut e.ecx, &mut e.edx];
                *register[feature.register] &= !feature.bits;
            }
        }
        let before = self.entries.len();
        self.entries.retain(|e| e.function != 0xd || e.index >= 32 || components >> e.index & 1 == 0);
        if self.entries.len() < before {
            self.set_xsave_size();
        }
    }

    /// Sets leaf 0xD.0, ecx: the size of the XSAVE area with all components that XCR0 can have. KVM
    /// itself sets the size with those that the guest has enabled (ebx).
    fn set_xsave_size(&mut self) {
        const LEGACY_AND_HEADER: u32 = 512 + 64;
        const SUPERVISOR: u32 = 1;
        let user = |e: &&kvm_cpuid_entry2| e.function == 0xd && e.index >= 2 && e.ecx & SUPERVISOR == 0;
        // A component ends at its offset (ebx) plus its size (eax).
        let ends = self.entries.iter().filter(user).map(|e| e.ebx.saturating_add(e.eax));
        let size = ends.max().unwrap_or(0).max(LEGACY_AND_HEADER);
        self.for_each(0xd, |e| {
            if e.index == 0 {
                e.ecx = size;
            }
        });
    }

    /// Sets features that every microVM has, and clears those that none has.
    fn normalize_features(&mut self) {
        let vendor = self.vendor;
        let cpus = self.topology.cpus;
        self.for_each(0x1, |e| {
            const CLFLUSH_LINE_IN_QUADWORDS: u32 = 8;
            const PDCM: u32 = 1 << 15;
            const TSC_DEADLINE: u32 = 1 << 24;
            const HYPERVISOR: u32 = 1 << 31;
            const HTT: u32 = 1 << 28;
            e.ebx = e.ebx & 0xff | CLFLUSH_LINE_IN_QUADWORDS << 8 | u32::from(cpus) << 16;
            e.ecx = e.ecx & !PDCM | TSC_DEADLINE | HYPERVISOR;
            e.edx = if cpus > 1 { e.edx | HTT } else { e.edx & !HTT };
        });
        self.for_each(0x6, |e| {
            const TURBO: u32 = 1 << 1;
            const ENERGY_BIAS: u32 = 1 << 3;
            e.eax &= !TURBO;
            e.ecx &= !ENERGY_BIAS;
        });
        self.for_each(0x7, |e| {
            const WAITPKG: u32 = 1 << 5;
            const ARCH_CAPABILITIES: u32 = 1 << 29;
            if e.index == 0 {
                e.ecx &= !WAITPKG;
                if vendor == Vendor::Amd {
                    // KVM emulates this Intel feature on AMD, where guests would misread it.
                    e.edx &= !ARCH_CAPABILITIES;
                }
            }
        });
        // Guests have no architectural performance counters.
        self.for_each(0xa, |e| (e.eax, e.ebx, e.ecx, e.edx) = (0, 0, 0, 0));
    }

    /// Sets a brand string with vendor and nominal frequency, but without the model.
    fn set_brand_string(&mut self) {
        let host = self.brand_string();
        let brand = match self.vendor {
            Vendor::Intel => match frequency(&host) {
                Some(ghz) => format!("Intel(R) Xeon(R) Processor @ {ghz}"),
                None => "Intel(R) Xeon(R) Processor".to_owned(),
            },
            Vendor::Amd => "AMD EPYC".to_owned(),
            Vendor::Other => return,
        };
        let mut bytes = [0; 48];
        bytes[..brand.len()].copy_from_slice(brand.as_bytes());
        let word = |i: usize| u32::from_le_bytes([bytes[i], bytes[i + 1], bytes[i + 2], bytes[i + 3]]);
        for (leaf, at) in (0x8000_0002..=0x8000_0004).zip((0..).step_by(16)) {
            self.for_each(leaf, |e| {
                (e.eax, e.ebx, e.ecx, e.edx) = (word(at), word(at + 4), word(at + 8), word(at + 12));
            });
        }
    }

    fn brand_string(&self) -> String {
        let leaves = self.entries.iter().filter(|e| (0x8000_0002..=0x8000_0004).contains(&e.function));
        let bytes: Vec<u8> =
            leaves.flat_map(|e| [e.eax, e.ebx, e.ecx, e.edx]).flat_map(u32::to_le_bytes).collect();
        String::from_utf8_lossy(&bytes).trim_end_matches('\0').to_owned()
    }

    /// Sets the leaves for threads, cores and shared caches.
    fn normalize_topology(&mut self) {
        let topology = self.topology;
        let (cores, threads) = (u32::from(topology.cores()), u32::from(topology.threads_per_core));
        if self.vendor == Vendor::Intel {
            self.for_each(0x4, |e| {
                let level = e.eax >> 5 & 0x7;
                // Caches of level 1 and 2 belong to a core, those of level 3 to the package. Both
                // counts are stored less one.
                let sharing = if level >= 3 { u32::from(topology.cpus) } else { threads };
                e.eax = e.eax & 0x3fff | (sharing - 1) << 14 | (cores - 1).min(0x3f) << 26;
            });
        }
        self.set_extended_topology(0xb);
        if self.entries.iter().any(|e| e.function == 0x1f) {
            self.set_extended_topology(0x1f);
        }
        if self.vendor == Vendor::Amd {
            self.normalize_amd_topology();
        }
    }

    /// Sets leaf 0xB or 0x1F: an entry for threads, one for cores, and one that ends the list.
    fn set_extended_topology(&mut self, function: u32) {
        const LEVEL_THREAD: u32 = 1;
        const LEVEL_CORE: u32 = 2;
        let levels = [
            (LEVEL_THREAD, self.topology.thread_bits(), u32::from(self.topology.threads_per_core)),
            (LEVEL_CORE, self.topology.package_bits(), u32::from(self.topology.cpus)),
            (0, 0, 0),
        ];
        self.entries.retain(|e| e.function != function);
        for (index, (level, bits, count)) in (0..).zip(levels) {
            self.entries.push(kvm_cpuid_entry2 {
                function,
                index,
                flags: KVM_CPUID_FLAG_SIGNIFCANT_INDEX,
                eax: bits,
                ebx: count,
                ecx: index | level << 8,
                ..Default::default()
            });
        }
    }

    fn normalize_amd_topology(&mut self) {
        let topology = self.topology;
        self.for_each(0x8000_0001, |e| {
            const CORE_PROCESSOR_LEGACY: u32 = 1 << 1;
            const TOPOLOGY_EXTENSIONS: u32 = 1 << 22;
            e.ecx |= TOPOLOGY_EXTENSIONS;
            e.ecx = if topology.cpus > 1 {
                e.ecx | CORE_PROCESSOR_LEGACY
            } else {
                e.ecx & !CORE_PROCESSOR_LEGACY
            };
        });
        self.for_each(0x8000_0008, |e| {
            // The number of threads less one, and the number of bits of the APIC ID for them.
            e.ecx = e.ecx & !0xf0ff | u32::from(topology.cpus - 1) | topology.package_bits() << 12;
        });
        self.for_each(0x8000_001d, |e| {
            let level = e.eax >> 5 & 0x7;
            let sharing = if level >= 3 { topology.cpus } else { topology.threads_per_core };
            e.eax = e.eax & !(0xfff << 14) | u32::from(sharing - 1) << 14;
        });
        // ecx: one node, in one package. `for_vcpu` sets the other registers.
        if !self.entries.iter().any(|e| e.function == 0x8000_001e) {
            self.entries.push(kvm_cpuid_entry2 { function: 0x8000_001e, ..Default::default() });
        }
        self.for_each(0x8000_001e, |e| (e.ecx, e.edx) = (0, 0));
        self.for_each(0x8000_0000, |e| e.eax = e.eax.max(0x8000_001e));
        // This newer leaf has the host's topology, which would contradict these leaves.
        self.entries.retain(|e| e.function != 0x8000_0026);
    }
}

fn vendor(entries: &[kvm_cpuid_entry2]) -> Vendor {
    let name = entries
        .iter()
        .find(|e| e.function == 0)
        .map(|e| [e.ebx, e.edx, e.ecx].map(u32::to_le_bytes).concat());
    match name.as_deref() {
        Some(b"GenuineIntel") => Vendor::Intel,
        Some(b"AuthenticAMD" | b"HygonGenuine") => Vendor::Amd,
        _ => Vendor::Other,
    }
}

/// The frequency at the end of an Intel brand string, as in `2.50GHz`.
fn frequency(brand: &str) -> Option<&str> {
    let (_, after) = brand.rsplit_once("@ ")?;
    let end = after.find("Hz")? + 2;
    let frequency = &after[..end];
    (frequency.len() <= 12 && frequency.is_ascii()).then_some(frequency)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
        kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
    }

    fn registers(name: &[u8]) -> [u32; 4] {
        let word = |i: usize| u32::from_le_bytes(name[4 * i..4 * i + 4].try_into().unwrap());
        [word(0), word(1), word(2), word(3)]
    }

    fn host(vendor: &[u8; 12]) -> Vec<kvm_cpuid_entry2> {
        let [ebx, edx, ecx, _] = registers(&[&vendor[..], b"0000"].concat());
        let brand = b"Intel(R) Xeon(R) Platinum 8175M CPU @ 2.50GHz\0\0\0";
        vec![
            leaf(0, 0, [0x1f, ebx, ecx, edx]),
            leaf(1, 0, [0, 0xffff_ffff, 0, 0]),
            leaf(4, 0, [0xfc00_4121, 0, 0, 0]),
            leaf(4, 3, [0xfc00_4163, 0, 0, 0]),
            leaf(0xa, 0, [1, 2, 3, 4]),
            leaf(0xb, 0, [9, 9, 9, 9]),
            leaf(0x1f, 0, [9, 9, 9, 9]),
            leaf(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
            leaf(0x8000_0001, 0, [0, 0, 0, 0]),
            leaf(0x8000_0002, 0, registers(&brand[..16])),
            leaf(0x8000_0003, 0, registers(&brand[16..32])),
            leaf(0x8000_0004, 0, registers(&brand[32..])),
            leaf(0x8000_0008, 0, [48, 0, 0xffff, 0]),
        ]
    }

    fn find(cpuid: &Cpuid, vcpu: u8, function: u32, index: u32) -> kvm_cpuid_entry2 {
        let all = cpuid.for_vcpu(vcpu).unwrap();
        *all.as_slice().iter().find(|e| e.function == function && e.index == index).unwrap()
    }

    #[test]
    fn each_vcpu_has_its_own_apic_id() {
        let cpuid = Cpuid::from_supported(&host(b"AuthenticAMD"), 0, Topology::new(4, true));
        for id in 0..4u8 {
            let apic_id = u32::from(id);
            assert_eq!(find(&cpuid, id, 1, 0).ebx >> 24, apic_id);
            assert_eq!(find(&cpuid, id, 0xb, 0).edx, apic_id);
            assert_eq!(find(&cpuid, id, 0x8000_001e, 0).eax, apic_id);
            assert_eq!(find(&cpuid, id, 0x8000_001e, 0).ebx, u32::from(id / 2) | 1 << 8);
        }
    }

    #[test]
    fn topology_leaves_count_threads_and_cores() {
        let cpuid = Cpuid::from_supported(&host(b"GenuineIntel"), 0, Topology::new(6, true));
        let (threads, cores) = (find(&cpuid, 0, 0x1f, 0), find(&cpuid, 0, 0x1f, 1));
        assert_eq!((threads.eax, threads.ebx, threads.ecx), (1, 2, 0x100));
        assert_eq!((cores.eax, cores.ebx, cores.ecx), (3, 6, 0x201));
        assert_eq!(find(&cpuid, 0, 0xb, 2).ebx, 0);
        let (l1, l3) = (find(&cpuid, 0, 4, 0).eax, find(&cpuid, 0, 4, 3).eax);
        assert_eq!((l1 >> 14 & 0xfff, l3 >> 14 & 0xfff, l1 >> 26), (1, 5, 2));
    }

    #[test]
    fn amd_leaf_counts_threads() {
        let cpuid = Cpuid::from_supported(&host(b"AuthenticAMD"), 0, Topology::new(5, false));
        assert_eq!(find(&cpuid, 0, 0x8000_0008, 0).ecx, 4 | 3 << 12 | 0x0f00);
        assert_eq!(find(&cpuid, 0, 0x8000_0000, 0).eax, 0x8000_001e);
    }

    #[test]
    fn required_features_are_set_and_counters_are_cleared() {
        let cpuid = Cpuid::from_supported(&host(b"GenuineIntel"), 0, Topology::new(1, false));
        let features = find(&cpuid, 0, 1, 0);
        assert_eq!(features.ecx, 1 << 24 | 1 << 31);
        assert_eq!((features.ebx >> 8 & 0xff, features.edx >> 28 & 1), (8, 0));
        let counters = find(&cpuid, 0, 0xa, 0);
        assert_eq!((counters.eax, counters.ebx, counters.ecx, counters.edx), (0, 0, 0, 0));
    }

    #[test]
    fn brand_name_keeps_the_frequency_and_not_the_model() {
        let cpuid = Cpuid::from_supported(&host(b"GenuineIntel"), 0, Topology::new(1, false));
        assert_eq!(cpuid.brand_string(), "Intel(R) Xeon(R) Processor @ 2.50GHz");
        let cpuid = Cpuid::from_supported(&host(b"AuthenticAMD"), 0, Topology::new(1, false));
        assert_eq!(cpuid.brand_string(), "AMD EPYC");
    }

    /// An Intel host with all features, the first components of XCR0, and these `components`.
    fn host_with(components: u32) -> Vec<kvm_cpuid_entry2> {
        let mut leaves = host(b"GenuineIntel");
        leaves.extend([
            leaf(7, 0, [2, 1 << 5, 1 << 5 | 1 << 7 | 1 << 9, u32::MAX]),
            leaf(7, 1, [1 << 4 | 1 << 21, 0, 0, 1 << 4 | 1 << 8 | 1 << 18]),
            leaf(0xd, 0, [0xe7 | components, 0, 11_008, 0]),
            leaf(0xd, 1, [0x1f, 0, CET_COMPONENTS | 1 << 8, 0]),
            leaf(0xd, 2, [256, 576, 0, 0]),
            leaf(0xd, 7, [1024, 1664, 0, 0]),
            leaf(0xd, 11, [16, 0, 1, 0]),
            leaf(0xd, 12, [24, 0, 1, 0]),
            leaf(0x1d, 0, [1, 0, 0, 0]),
            leaf(0x1d, 1, [8192 | 1024 << 16, 64 | 8 << 16, 16, 0]),
            leaf(0x1e, 0, [0, 16 | 64 << 8, 0, 0]),
        ]);
        for (index, size, offset) in [(17, 64, 2752), (18, 8192, 2816)] {
            if components >> index & 1 == 1 {
                leaves.push(leaf(0xd, index, [size, offset, 2, 0]));
            }
        }
        leaves
    }

    fn all_of(cpuid: &Cpuid, features: &[FeatureBits]) -> Vec<u32> {
        let register = |f: &FeatureBits| {
            let e = find(cpuid, 0, f.leaf, f.index);
            [e.eax, e.ebx, e.ecx, e.edx][f.register] & f.bits
        };
        features.iter().map(register).collect()
    }

    fn has(cpuid: &Cpuid, function: u32, index: u32) -> bool {
        cpuid.has(function, index)
    }

    #[test]
    fn amx_is_shown_completely_if_permitted() {
        let cpuid = Cpuid::from_supported(&host_with(AMX_COMPONENTS), 0, Topology::new(1, false));
        assert_eq!(all_of(&cpuid, &AMX), AMX.map(|feature| feature.bits));
        assert!(has(&cpuid, 0xd, 17) && has(&cpuid, 0xd, 18) && has(&cpuid, 0x1d, 1) && has(&cpuid, 0x1e, 0));
        assert_eq!(find(&cpuid, 0, 0xd, 0).ecx, 11_008);
    }

    #[test]
    fn amx_is_hidden_completely_if_not_permitted() {
        // Kernels before 6.4 show TILECFG, later ones neither component.
        for components in [1 << 17, 0] {
            let cpuid = Cpuid::from_supported(&host_with(components), 0, Topology::new(1, false));
            assert_eq!(all_of(&cpuid, &AMX), [0; 5]);
            for (leaf, index) in [(0xd, 17), (0xd, 18), (0x1d, 0), (0x1d, 1), (0x1e, 0)] {
                assert!(!has(&cpuid, leaf, index), "{leaf:#x}.{index}");
            }
            let state = find(&cpuid, 0, 0xd, 0);
            assert_eq!((state.eax, state.ecx), (0xe7, 1664 + 1024));
            // Other features stay.
            assert_eq!(find(&cpuid, 0, 0xd, 1).eax, 0xf);
            assert_eq!(find(&cpuid, 0, 7, 1).eax, 1 << 4);
            assert_eq!(find(&cpuid, 0, 7, 0).edx, !(1 << 20 | 1 << 22 | 1 << 24 | 1 << 25));
        }
    }

    #[test]
    fn cet_is_hidden_with_its_components() {
        let cpuid = Cpuid::from_supported(&host_with(AMX_COMPONENTS), 0, Topology::new(1, false));
        assert_eq!(all_of(&cpuid, &CET), [0; 4]);
        assert!(!has(&cpuid, 0xd, 11) && !has(&cpuid, 0xd, 12));
        // Other supervisor components and features stay.
        assert_eq!(find(&cpuid, 0, 0xd, 1).ecx, 1 << 8);
        assert_eq!(find(&cpuid, 0, 7, 0).ecx, 1 << 9);
    }

    #[test]
    fn x87_limits_are_those_of_the_host_cpu() {
        for limits in [0, 1 << 6, 1 << 13, X87_LIMITS] {
            for reported in [0, X87_LIMITS] {
                let mut leaves = host_with(0);
                leaves.iter_mut().filter(|e| (e.function, e.index) == (7, 0)).for_each(|e| e.ebx |= reported);
                let cpuid = Cpuid::from_supported(&leaves, limits, Topology::new(1, false));
                assert_eq!(find(&cpuid, 0, 7, 0).ebx, 1 << 5 | limits);
            }
        }
    }

    #[test]
    fn leaves_that_the_host_lacks_are_not_added() {
        let cpuid = Cpuid::from_supported(&host(b"GenuineIntel"), X87_LIMITS, Topology::new(1, false));
        assert!(!has(&cpuid, 0xd, 0) && !has(&cpuid, 7, 0));
    }

    #[test]
    fn apic_ids_fit_for_any_number_of_vcpus() {
        for cpus in 1..=128 {
            let topology = Topology::new(cpus, cpus % 2 == 0);
            assert!(1u32 << topology.package_bits() >= cpus.into());
            assert_eq!(topology.cores() * topology.threads_per_core, cpus);
        }
    }
}
