//! Whether this host's CPU has the features that a guest uses: a saved guest, or a new one with a
//! CPU template.
//!
//! A guest may use all features that CPUID shows to it. Two kinds of bits do not count: those of
//! AMX without its state components, which older versions of this monitor showed
//! ([`super::cpuid`]), and those for what the CPU does not do.
//!
//! Only leaves with feature bits are compared. Other leaves (names, sizes, topology) are restored
//! from the saved state.

use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use kvm_ioctls::VcpuFd;

use super::cpuid::{AMX, Cpuid, X87_LIMITS, shows_amx};
use super::state::CpuidLeaf;
use crate::kvm::{Ioctl, KvmError};

/// The names of a leaf's registers, in order.
const REGISTERS: [&str; 4] = ["eax", "ebx", "ecx", "edx"];

/// A leaf with feature bits: for each register, which of its bits are features.
struct FeatureLeaf {
    leaf: u32,
    index: u32,
    bits: [u32; 4],
}

/// Bits that reflect CR4, which the guest sets: OSXSAVE in leaf 1, OSPKE in leaf 7.
const OSXSAVE: u32 = 1 << 27;
const OSPKE: u32 = 1 << 4;
/// The time stamp counter never stops. The other bits of its leaf are about power management, which
/// guests do not have.
const INVARIANT_TSC: u32 = 1 << 8;
/// Statements about how speculation is best controlled, and that a bit of EFER is missing. KVM
/// provides nothing for them. The template T2A shows them on each host.
const T2A_STATEMENTS: u32 = 7 << 18;
/// All bits.
const ALL: u32 = u32::MAX;

/// The leaves that are compared: Intel SDM, volume 2, CPUID; AMD APM, volume 3, appendix E; and for
/// the last one KVM's `cpuid.rst`.
const FEATURES: [FeatureLeaf; 11] = [
    FeatureLeaf { leaf: 0x1, index: 0, bits: [0, 0, !OSXSAVE, ALL] },
    FeatureLeaf { leaf: 0x7, index: 0, bits: [0, !X87_LIMITS, !OSPKE, ALL] },
    FeatureLeaf { leaf: 0x7, index: 1, bits: [ALL, 0, 0, ALL] },
    FeatureLeaf { leaf: 0x7, index: 2, bits: [0, 0, 0, ALL] },
    FeatureLeaf { leaf: 0xd, index: 0, bits: [ALL, 0, 0, ALL] },
    FeatureLeaf { leaf: 0xd, index: 1, bits: [ALL, 0, 0, 0] },
    FeatureLeaf { leaf: 0x8000_0001, index: 0, bits: [0, 0, ALL, ALL] },
    FeatureLeaf { leaf: 0x8000_0007, index: 0, bits: [0, 0, 0, INVARIANT_TSC] },
    FeatureLeaf { leaf: 0x8000_0008, index: 0, bits: [0, !T2A_STATEMENTS, 0, 0] },
    FeatureLeaf { leaf: 0x8000_0021, index: 0, bits: [ALL, 0, 0, 0] },
    FeatureLeaf { leaf: 0x4000_0001, index: 0, bits: [ALL, 0, 0, 0] },
];

/// Names of the features that a guest most likely uses: leaf, index, register, bit.
const NAMES: [(u32, u32, usize, u32, &str); 28] = [
    (0x1, 0, 2, 0, "sse3"),
    (0x1, 0, 2, 1, "pclmulqdq"),
    (0x1, 0, 2, 9, "ssse3"),
    (0x1, 0, 2, 12, "fma"),
    (0x1, 0, 2, 17, "pcid"),
    (0x1, 0, 2, 19, "sse4_1"),
    (0x1, 0, 2, 20, "sse4_2"),
    (0x1, 0, 2, 21, "x2apic"),
    (0x1, 0, 2, 23, "popcnt"),
    (0x1, 0, 2, 25, "aes"),
    (0x1, 0, 2, 26, "xsave"),
    (0x1, 0, 2, 28, "avx"),
    (0x1, 0, 2, 29, "f16c"),
    (0x1, 0, 2, 30, "rdrand"),
    (0x7, 0, 1, 3, "bmi1"),
    (0x7, 0, 1, 5, "avx2"),
    (0x7, 0, 1, 8, "bmi2"),
    (0x7, 0, 1, 16, "avx512f"),
    (0x7, 0, 1, 18, "rdseed"),
    (0x7, 0, 1, 29, "sha_ni"),
    (0x7, 0, 2, 7, "shstk"),
    (0x7, 0, 2, 9, "vaes"),
    (0x7, 0, 3, 20, "ibt"),
    (0x7, 0, 3, 24, "amx_tile"),
    (0x8000_0001, 0, 3, 26, "pdpe1gb"),
    (0x8000_0001, 0, 3, 27, "rdtscp"),
    (0x8000_0007, 0, 3, 8, "constant_tsc"),
    (0x8000_0021, 0, 0, 8, "autoibrs"),
];

/// The features in the `saved` leaves that this host lacks, as text. Empty if the guest can run
/// here.
///
/// The CPUID of `host` is set on the new `vcpu` and read back: a software KVM (PVM) shows more to a
/// vCPU than it reports as supported.
pub(crate) fn missing_features(
    host: &Cpuid,
    vcpu: &VcpuFd,
    saved: &[CpuidLeaf],
) -> Result<Vec<String>, KvmError> {
    vcpu.set_cpuid2(&host.for_vcpu(0)?).ioctl("KVM_SET_CPUID2")?;
    let here = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).ioctl("KVM_GET_CPUID2")?;
    let here: Vec<_> = here.as_slice().iter().map(CpuidLeaf::from).collect();
    Ok(missing(&here, saved))
}

fn missing(here: &[CpuidLeaf], saved: &[CpuidLeaf]) -> Vec<String> {
    let values = |leaves: &[CpuidLeaf], leaf, index| {
        leaves.iter().find(|l| (l.leaf, l.index) == (leaf, index)).map_or([0; 4], |l| l.values)
    };
    let vendor = |leaves| {
        let [_, b, c, d] = values(leaves, 0, 0);
        [b, d, c].map(|word| String::from_utf8_lossy(&word.to_le_bytes()).into_owned()).concat()
    };
    let mut missing = Vec::new();
    if vendor(here) != vendor(saved) {
        missing.push(format!("a CPU by {} (this host's is by {})", vendor(saved), vendor(here)));
    }
    let amx = shows_amx(values(saved, 0xd, 0)[0]);
    // Bits that the guest saw but could not use.
    let unusable = |leaf, index, register| {
        let of = AMX.iter().filter(|f| !amx && (f.leaf, f.index, f.register) == (leaf, index, register));
        of.fold(0, |bits, f| bits | f.bits)
    };
    for FeatureLeaf { leaf, index, bits } in FEATURES {
        let (saved, here) = (values(saved, leaf, index), values(here, leaf, index));
        for register in 0..4 {
            let usable = bits[register] & !unusable(leaf, index, register);
            let lacking = saved[register] & usable & !here[register];
            missing.extend((0..32).filter(|bit| lacking >> bit & 1 == 1).map(|bit| {
                let place = format!("CPUID {leaf:#x}.{index} {} bit {bit}", REGISTERS[register]);
                match NAMES.iter().find(|n| (n.0, n.1, n.2, n.3) == (leaf, index, register, bit)) {
                    Some((.., name)) => format!("{name} ({place})"),
                    None => place,
                }
            }));
        }
    }
    missing
}

#[cfg(test)]
mod tests {
    use super::*;

    fn leaf(leaf: u32, values: [u32; 4]) -> CpuidLeaf {
        CpuidLeaf { leaf, index: 0, flags: 0, values }
    }

    const INTEL: [u32; 4] = [0, 0x756e_6547, 0x6c65_746e, 0x4965_6e69];
    const AMD: [u32; 4] = [0, 0x6874_7541, 0x444d_4163, 0x6974_6e65];

    #[test]
    fn more_features_than_were_saved_are_compatible() {
        let saved = [leaf(0, INTEL), leaf(7, [0, 1 << 5, 0, 0])];
        let here = [leaf(0, INTEL), leaf(7, [0, 1 << 5 | 1 << 16, 0, 0])];
        assert_eq!(missing(&here, &saved), [] as [&str; 0]);
    }

    #[test]
    fn missing_features_are_named() {
        let saved = [leaf(0, INTEL), leaf(7, [0, 1 << 16 | 1 << 2, 0, 0])];
        let here = [leaf(0, AMD)];
        assert_eq!(
            missing(&here, &saved),
            [
                "a CPU by GenuineIntel (this host's is by AuthenticAMD)",
                "CPUID 0x7.0 ebx bit 2",
                "avx512f (CPUID 0x7.0 ebx bit 16)"
            ]
        );
    }

    /// A saved register may have each of these features enabled. Without this check, the only error
    /// would be KVM's refusal of that register.
    #[test]
    fn missing_features_of_newer_leaves_are_named() {
        let index = |leaf, index, values| CpuidLeaf { leaf, index, flags: 0, values };
        let saved = [
            index(7, 2, [0, 0, 0, 1]),
            index(0x8000_0007, 0, [0, 0, 0, 1 << 8 | 1]),
            index(0x8000_0021, 0, [1 << 8, 0, 0, 0]),
        ];
        assert_eq!(
            missing(&[], &saved),
            [
                "CPUID 0x7.2 edx bit 0",
                "constant_tsc (CPUID 0x80000007.0 edx bit 8)",
                "autoibrs (CPUID 0x80000021.0 eax bit 8)"
            ]
        );
        assert_eq!(missing(&saved, &saved), [] as [&str; 0]);
    }

    #[test]
    fn amx_counts_only_with_its_state_components() {
        let index = |leaf, index, values| CpuidLeaf { leaf, index, flags: 0, values };
        let saved = |components| {
            [
                index(7, 0, [0, 0, 0, 1 << 24]),
                index(7, 1, [1 << 21, 0, 0, 0]),
                index(0xd, 0, [components, 0, 0, 0]),
            ]
        };
        assert_eq!(missing(&[], &saved(1 << 17)), [] as [&str; 0]);
        assert_eq!(missing(&[], &saved(0)), [] as [&str; 0]);
        assert_eq!(
            missing(&[], &saved(3 << 17)),
            [
                "amx_tile (CPUID 0x7.0 edx bit 24)",
                "CPUID 0x7.1 eax bit 21",
                "CPUID 0xd.0 eax bit 17",
                "CPUID 0xd.0 eax bit 18"
            ]
        );
    }

    #[test]
    fn bits_for_what_the_cpu_does_not_do_are_ignored() {
        assert_eq!(missing(&[], &[leaf(7, [0, X87_LIMITS, 0, 0])]), [] as [&str; 0]);
    }

    #[test]
    fn bits_that_reflect_cr4_are_ignored() {
        let saved = [leaf(1, [0, 0, OSXSAVE, 0]), leaf(7, [0, 0, OSPKE, 0])];
        assert_eq!(missing(&[], &saved), [] as [&str; 0]);
    }
}
