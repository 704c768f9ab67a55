//! Whether a guest's vCPU shows what its template says.
//!
//! It may not: the monitor overrides some bits (see docs/cpu-templates.md), and KVM ignores some
//! without an error.

use std::fmt::Write as _;

use config::CpuConfig;
use machine::shown_cpu;

use super::command::GuestFiles;
use super::dump::Guest;
use super::error::ToolError;
use super::registers::{Register, Registers};

/// Verifies the template of a guest. Returns a report.
pub(super) fn verify(files: &GuestFiles) -> Result<String, ToolError> {
    let guest = Guest::read(files)?;
    let template = guest.changes().ok_or(ToolError::NoTemplate)?;
    // Not `shown`, which leaves out registers that the template may change.
    let count = compare(&template, &shown_cpu(&guest.machine, guest.template.as_ref())?)?;
    Ok(format!("the vCPU shows what the template says of {count} registers\n"))
}

/// Compares the registers that `template` changes with what is `shown`. Returns their number.
fn compare(template: &CpuConfig, shown: &CpuConfig) -> Result<usize, ToolError> {
    let (template, shown) = (Registers::of(template), Registers::of(shown));
    let mut text = String::new();
    for (register, wanted) in &template.bits {
        let found = shown.bits.get(register).map(|bits| bits.value());
        if found.map(|found| found & wanted.mask()) != Some(wanted.value()) {
            mismatch(&mut text, *register, &wanted.to_string(), found);
        }
    }
    if text.is_empty() {
        Ok(template.bits.len())
    } else {
        Err(ToolError::Mismatch(text.trim_end().to_owned()))
    }
}

fn mismatch(text: &mut String, register: Register, wanted: &str, found: Option<u64>) {
    let width = register.width() as usize;
    // Without the prefix, and without bits beyond the register.
    let wanted = &wanted[wanted.len() - width..];
    let written = match found {
        None => writeln!(text, "{register}: the vCPU has no such register; the template sets it to {wanted}"),
        Some(found) => {
            let found = format!("{found:0width$b}");
            let differs = wanted.chars().zip(found.chars());
            let marks: String = differs.map(|(w, f)| if w == 'x' || w == f { ' ' } else { '^' }).collect();
            writeln!(
                text,
                "{register}:\n  template {wanted}\n  vCPU     {found}\n           {}",
                marks.trim_end()
            )
        }
    };
    written.expect("a string takes any text");
}

#[cfg(test)]
mod tests {
    use config::{Bitmap, CpuidModifier, CpuidRegister, MsrModifier, RegisterModifier};

    use super::*;

    fn template(bitmap: Bitmap<32>, msr: Bitmap<64>) -> CpuConfig {
        let modifiers = vec![RegisterModifier { register: CpuidRegister::Ecx, bitmap }];
        CpuConfig {
            kvm_capabilities: Vec::new(),
            cpuid_modifiers: vec![CpuidModifier { leaf: 7, subleaf: 1, flags: 1, modifiers }],
            msr_modifiers: vec![MsrModifier { addr: 0x8b, bitmap: msr }],
        }
    }

    #[test]
    fn only_bits_of_the_template_count() {
        let shown = template(Bitmap::exactly(0b1010), Bitmap::exactly(0xff));
        assert_eq!(compare(&template(Bitmap::new(0b11, 0b10), Bitmap::new(1, 1)), &shown).unwrap(), 2);
        assert_eq!(compare(&CpuConfig::default(), &shown).unwrap(), 0);
    }

    #[test]
    fn each_mismatch_shows_its_bits() {
        let shown = template(Bitmap::exactly(0b1010), Bitmap::exactly(0xff));
        let mut wanted = template(Bitmap::new(0b11, 0b01), Bitmap::new(1, 1));
        wanted.msr_modifiers[0].addr = 0x8c;
        let error = compare(&wanted, &shown).unwrap_err().to_string();
        let expected = format!(
            "the vCPU does not show what the template says:\n\
             CPUID 0x7.0x1 ecx:\n  template {}01\n  vCPU     {}1010\n           {}^^\n\
             MSR 0x8c: the vCPU has no such register; the template sets it to {}1",
            "x".repeat(30),
            "0".repeat(28),
            " ".repeat(30),
            "x".repeat(63),
        );
        assert_eq!(error, expected);
    }
}
