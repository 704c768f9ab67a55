//! This host's CPU.

/// Whether it is by Intel, as CPUID leaf 0 says.
pub fn is_intel() -> bool {
    let leaf = std::arch::x86_64::__cpuid(0);
    [leaf.ebx, leaf.edx, leaf.ecx].map(u32::to_le_bytes).concat() == b"GenuineIntel"
}
