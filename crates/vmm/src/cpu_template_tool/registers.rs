//! [`Registers`]: a template as a map from registers to their bits.

use std::collections::BTreeMap;
use std::fmt;

use config::{Bitmap, CpuConfig, CpuidModifier, CpuidRegister, MsrModifier, RegisterModifier};

/// A register that a template changes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) enum Register {
    /// A register of a leaf of CPUID.
    Cpuid { leaf: u32, subleaf: u32, register: CpuidRegister },
    /// A model-specific register.
    Msr(u32),
}

impl Register {
    /// Its width in bits.
    pub(super) fn width(self) -> u32 {
        match self {
            Register::Cpuid { .. } => 32,
            Register::Msr(_) => 64,
        }
    }
}

impl fmt::Display for Register {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Register::Cpuid { leaf, subleaf, register } => {
                write!(f, "CPUID {leaf:#x}.{subleaf:#x} {}", register.name())
            }
            Register::Msr(addr) => write!(f, "MSR {addr:#x}"),
        }
    }
}

/// Bits of a register. It has at most 64.
pub(super) type Bits = Bitmap<64>;

/// The registers that a template changes, and KVM's flags of the leaves among them.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Registers {
    pub(super) bits: BTreeMap<Register, Bits>,
    flags: BTreeMap<(u32, u32), u32>,
}

impl Registers {
    /// Those of a template. Of several changes of a register each continues the one before.
    pub(super) fn of(template: &CpuConfig) -> Self {
        let mut registers = Registers::default();
        for change in &template.cpuid_modifiers {
            let (leaf, subleaf) = (change.leaf, change.subleaf);
            registers.flags.insert((leaf, subleaf), change.flags);
            for RegisterModifier { register, bitmap } in &change.modifiers {
                let register = Register::Cpuid { leaf, subleaf, register: *register };
                registers.change(register, Bits::new(bitmap.mask(), bitmap.value()));
            }
        }
        for MsrModifier { addr, bitmap } in &template.msr_modifiers {
            registers.change(Register::Msr(*addr), *bitmap);
        }
        registers
    }

    fn change(&mut self, register: Register, bits: Bits) {
        let old = self.bits.entry(register).or_default();
        *old = Bits::new(old.mask() | bits.mask(), bits.apply(old.value()));
    }

    /// The template, with registers in order.
    pub(super) fn template(&self) -> CpuConfig {
        let mut template = CpuConfig::default();
        for (register, bits) in &self.bits {
            match *register {
                Register::Msr(addr) => template.msr_modifiers.push(MsrModifier { addr, bitmap: *bits }),
                Register::Cpuid { leaf, subleaf, register } => {
                    let bitmap = Bitmap::new(bits.mask(), bits.value());
                    let change = RegisterModifier { register, bitmap };
                    match template.cpuid_modifiers.last_mut() {
                        Some(last) if (last.leaf, last.subleaf) == (leaf, subleaf) => {
                            last.modifiers.push(change);
                        }
                        _ => template.cpuid_modifiers.push(CpuidModifier {
                            leaf,
                            subleaf,
                            flags: self.flags.get(&(leaf, subleaf)).copied().unwrap_or(0),
                            modifiers: vec![change],
                        }),
                    }
                }
            }
        }
        template
    }
}
