//! What templates do not have in common.
//!
//! Of a register that all of them set, only the bits that differ stay, in each. A register that one
//! of them does not set stays whole in the others.

use std::ffi::OsString;
use std::path::{Path, PathBuf};

use config::{CpuConfig, KvmCapability};

use super::error::ToolError;
use super::registers::{Bits, Register, Registers};

/// The templates without what all have in common.
pub(super) fn strip(templates: &[CpuConfig]) -> Vec<CpuConfig> {
    let mut all: Vec<_> = templates.iter().map(Registers::of).collect();
    let Some(first) = all.first() else { return Vec::new() };
    let common = first.bits.iter().filter_map(|(register, of_first)| {
        all.iter()
            .try_fold(0, |differing, registers| {
                let bits = registers.bits.get(register)?;
                Some(differing | (bits.value() ^ of_first.value()) | (bits.mask() ^ of_first.mask()))
            })
            .map(|differing| (*register, differing))
    });
    let common: Vec<(Register, u64)> = common.collect();
    for registers in &mut all {
        for (register, differing) in &common {
            let bits = registers.bits.get(register).copied().unwrap_or_default();
            if *differing == 0 {
                registers.bits.remove(register);
            } else {
                registers.bits.insert(*register, Bits::new(bits.mask() & differing, bits.value()));
            }
        }
    }
    let shared = |capability: &KvmCapability| {
        templates.iter().all(|template| template.kvm_capabilities.contains(capability))
    };
    let own = templates.iter().map(|template| {
        let capabilities = template.kvm_capabilities.iter().copied();
        capabilities.filter(|capability| !shared(capability)).collect()
    });
    all.iter()
        .zip(own)
        .map(|(of, kvm_capabilities)| CpuConfig { kvm_capabilities, ..of.template() })
        .collect()
}

/// `STEM` `suffix` `.EXTENSION` in the same directory.
pub(super) fn with_suffix(path: &Path, suffix: &str) -> Result<PathBuf, ToolError> {
    let stem = path.file_stem().ok_or_else(|| ToolError::NoFileName(path.display().to_string()))?;
    let mut name = OsString::from(stem);
    name.push(suffix);
    if let Some(extension) = path.extension() {
        name.push(".");
        name.push(extension);
    }
    Ok(path.with_file_name(name))
}

#[cfg(test)]
mod tests {
    use config::{Bitmap, CpuidModifier, CpuidRegister, MsrModifier, RegisterModifier};

    use super::*;

    fn leaf(leaf: u32, registers: &[(CpuidRegister, Bitmap<32>)]) -> CpuidModifier {
        let modifiers = registers
            .iter()
            .map(|(register, bitmap)| RegisterModifier { register: *register, bitmap: *bitmap });
        CpuidModifier { leaf, subleaf: 0, flags: 1, modifiers: modifiers.collect() }
    }

    fn template(leaves: Vec<CpuidModifier>, msrs: &[(u32, u64)]) -> CpuConfig {
        let msr_modifiers =
            msrs.iter().map(|(addr, value)| MsrModifier { addr: *addr, bitmap: Bitmap::exactly(*value) });
        CpuConfig { cpuid_modifiers: leaves, msr_modifiers: msr_modifiers.collect(), ..CpuConfig::default() }
    }

    #[test]
    fn only_differing_bits_and_registers_stay() {
        use CpuidRegister::{Eax, Ebx};
        let exactly = Bitmap::<32>::exactly;
        let first = template(
            vec![leaf(1, &[(Eax, exactly(5)), (Ebx, exactly(0b1100))]), leaf(2, &[(Eax, exactly(1))])],
            &[(0x8b, 1), (0x10a, 0b01)],
        );
        let second = template(
            vec![leaf(1, &[(Eax, exactly(5)), (Ebx, exactly(0b1010))])],
            &[(0x8b, 1), (0x10a, 0b11)],
        );
        let stripped = strip(&[first, second]);
        let differing = |value| (Ebx, Bitmap::new(0b0110, value));
        let msr = |value| MsrModifier { addr: 0x10a, bitmap: Bitmap::new(0b10, value) };
        assert_eq!(
            stripped[0].cpuid_modifiers,
            [leaf(1, &[differing(0b1100)]), leaf(2, &[(Eax, exactly(1))])]
        );
        assert_eq!(stripped[1].cpuid_modifiers, [leaf(1, &[differing(0b1010)])]);
        assert_eq!((stripped[0].msr_modifiers[0], stripped[1].msr_modifiers[0]), (msr(0), msr(0b10)));
    }

    #[test]
    fn equal_templates_have_nothing_left() {
        let same = template(vec![leaf(1, &[(CpuidRegister::Ecx, Bitmap::new(3, 1))])], &[(0x8b, 1)]);
        assert_eq!(strip(&[same.clone(), same.clone(), same]), vec![CpuConfig::default(); 3]);
    }

    #[test]
    fn capabilities_that_all_have_are_stripped() {
        let with = |kvm_capabilities: &[KvmCapability]| CpuConfig {
            kvm_capabilities: kvm_capabilities.to_vec(),
            ..CpuConfig::default()
        };
        let (one, two) = (KvmCapability::Require(1), KvmCapability::Ignore(2));
        assert_eq!(strip(&[with(&[one, two]), with(&[one])]), [with(&[two]), with(&[])]);
    }

    #[test]
    fn suffix_comes_before_the_extension() {
        let named = |path: &str, suffix| with_suffix(Path::new(path), suffix).unwrap();
        assert_eq!(named("a/b.json", "_stripped"), Path::new("a/b_stripped.json"));
        assert_eq!(named("b", "_s"), Path::new("b_s"));
        assert_eq!(named("/x/b.c.json", ""), Path::new("/x/b.c.json"));
        assert!(with_suffix(Path::new("/"), "_s").is_err());
    }
}
