//! [`Template`]: the CPU template of a microVM, applied to what the host's KVM offers.
//!
//! # Order
//!
//! 1. The template's changes of CPUID, on the leaves that KVM supports.
//! 2. The monitor's own changes ([`super::cpuid`]): topology, brand string, and features that every
//!    or no guest has. They override the template.
//! 3. CPUID is set on a vCPU. It decides which MSRs the vCPU has.
//! 4. The template's changes of MSRs, on the values that the vCPU has then.
//! 5. The MSRs at boot ([`super::msrs`]). They override the template.
//!
//! # What the host must have
//!
//! Each leaf that the template changes, each feature that it shows to the guest, and each MSR. KVM
//! would accept a feature that the CPU lacks, and the guest would die of its first use. A template
//! of [`static_templates`](super::static_templates) is also bound to the models for which it was
//! made: elsewhere it would show mitigations that the CPU lacks, and leave features that no other
//! host of the fleet has.

use std::borrow::Cow;
use std::ops::RangeInclusive;

use config::{CpuConfig, CpuTemplate, CpuidModifier, CpuidRegister, MachineConfig};
use kvm_bindings::kvm_cpuid_entry2;
use kvm_ioctls::VcpuFd;

use super::compatibility::missing_features;
use super::cpuid::{Cpuid, HostCpuid};
use super::msrs::{get_msrs, set_msrs};
use super::state::CpuidLeaf;
use super::static_templates::static_template;
use super::topology::Topology;
use crate::kvm::KvmError;

/// Why a CPU template cannot be applied on this host.
#[derive(Debug, thiserror::Error)]
pub enum TemplateError {
    /// A static template for other CPUs.
    #[error("cpu_template {template}: it does not fit this host's CPU, {host}; it fits {fits}")]
    Host {
        /// The template's name.
        template: &'static str,
        /// The host's CPU: vendor, family, model and stepping.
        host: String,
        /// The CPUs that it is for.
        fits: &'static str,
    },
    /// A leaf that KVM does not have on this host.
    #[error(
        "{template}: this host's KVM has no CPUID leaf {leaf:#x} subleaf {subleaf:#x}, of which the \
         template changes {bits}"
    )]
    NoLeaf {
        /// The template's name.
        template: &'static str,
        /// The leaf's number.
        leaf: u32,
        /// Its index.
        subleaf: u32,
        /// The registers and bits that the template changes.
        bits: String,
    },
    /// The template shows features that the host's CPU does not have.
    #[error("{template}: this host's CPU lacks features that the template sets: {}", missing.join(", "))]
    MissingFeatures {
        /// The template's name.
        template: &'static str,
        /// The features, with leaf, register and bit.
        missing: Vec<String>,
    },
    /// An MSR that KVM does not have on this host.
    #[error(
        "{template}: this host's KVM cannot read the register (MSR) {addr:#x}, which the template changes"
    )]
    NoMsr {
        /// The template's name.
        template: &'static str,
        /// The register's address.
        addr: u32,
    },
    /// A value of an MSR that KVM refuses.
    #[error(
        "{template}: this host's KVM refuses the value {value:#x} that the template gives to the register \
         (MSR) {addr:#x}"
    )]
    MsrValue {
        /// The template's name.
        template: &'static str,
        /// The register's address.
        addr: u32,
        /// The value.
        value: u64,
    },
    /// A KVM call failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// The CPUs for which a static template is.
struct Fit {
    template: CpuTemplate,
    name: &'static str,
    vendor: &'static str,
    models: &'static [Model],
    text: &'static str,
}

/// CPUs of one model.
struct Model {
    family: u32,
    models: RangeInclusive<u32>,
    steppings: RangeInclusive<u32>,
}

const SKYLAKE: Model = Model { family: 6, models: 0x55..=0x55, steppings: 0..=4 };
const CASCADE_LAKE: Model = Model { family: 6, models: 0x55..=0x55, steppings: 5..=7 };
const ICE_LAKE: Model = Model { family: 6, models: 0x6a..=0x6a, steppings: 0..=15 };
const MILAN: Model = Model { family: 0x19, models: 0x0..=0xf, steppings: 0..=15 };

const FITS: [Fit; 5] = [
    Fit {
        template: CpuTemplate::C3,
        name: "C3",
        vendor: "GenuineIntel",
        models: &[SKYLAKE, CASCADE_LAKE, ICE_LAKE],
        text: "Intel Skylake, Cascade Lake and Ice Lake",
    },
    Fit {
        template: CpuTemplate::T2,
        name: "T2",
        vendor: "GenuineIntel",
        models: &[SKYLAKE, CASCADE_LAKE, ICE_LAKE],
        text: "Intel Skylake, Cascade Lake and Ice Lake",
    },
    Fit {
        template: CpuTemplate::T2S,
        name: "T2S",
        vendor: "GenuineIntel",
        models: &[SKYLAKE, CASCADE_LAKE],
        text: "Intel Skylake and Cascade Lake",
    },
    Fit {
        template: CpuTemplate::T2CL,
        name: "T2CL",
        vendor: "GenuineIntel",
        models: &[CASCADE_LAKE, ICE_LAKE],
        text: "Intel Cascade Lake and Ice Lake",
    },
    Fit {
        template: CpuTemplate::T2A,
        name: "T2A",
        vendor: "AuthenticAMD",
        models: &[MILAN],
        text: "AMD Milan",
    },
];

/// The CPU template of a microVM.
#[derive(Debug)]
pub(crate) struct Template<'a> {
    /// Its name in errors.
    name: &'static str,
    changes: Cow<'a, CpuConfig>,
}

impl<'a> Template<'a> {
    /// The template in force: the custom one, else the static one of `machine`, which must fit the
    /// host.
    pub(crate) fn choose(
        machine: &MachineConfig,
        custom: Option<&'a CpuConfig>,
        host: &HostCpuid,
    ) -> Result<Option<Self>, TemplateError> {
        if let Some(changes) = custom {
            return Ok(Some(Template { name: "cpu-config", changes: Cow::Borrowed(changes) }));
        }
        let fit = machine.cpu_template.and_then(|template| FITS.iter().find(|fit| fit.template == template));
        let Some(fit) = fit else { return Ok(None) };
        let cpu = HostCpu::of(host);
        if cpu.vendor != fit.vendor || !fit.models.iter().any(|model| cpu.is(model)) {
            let (template, fits) = (fit.name, fit.text);
            return Err(TemplateError::Host { template, host: cpu.to_string(), fits });
        }
        Ok(Some(Template { name: fit.name, changes: Cow::Owned(static_template(fit.template)) }))
    }

    /// CPUID for a guest: what KVM supports, changed by the template, then by the monitor. `normal`
    /// is that without a template.
    pub(crate) fn cpuid(
        &self,
        host: &HostCpuid,
        topology: Topology,
        normal: &Cpuid,
    ) -> Result<Cpuid, TemplateError> {
        let mut leaves = host.supported().to_vec();
        for change in &self.changes.cpuid_modifiers {
            let place = (change.leaf, change.subleaf);
            match leaves.iter_mut().find(|leaf| (leaf.function, leaf.index) == place) {
                Some(leaf) => apply(change, leaf),
                // The monitor adds the leaf and decides its contents.
                None if normal.has(change.leaf, change.subleaf) => {}
                None => {
                    let (template, (leaf, subleaf)) = (self.name, place);
                    return Err(TemplateError::NoLeaf {
                        template,
                        leaf,
                        subleaf,
                        bits: changed_bits(change),
                    });
                }
            }
        }
        Ok(host.normalized(leaves, topology))
    }

    /// Checks that the host's CPU has the features that `guest` shows because of the template. A
    /// new `vcpu` says what it has; `normal` is CPUID without a template.
    pub(crate) fn check_features(
        &self,
        normal: &Cpuid,
        guest: &Cpuid,
        vcpu: &VcpuFd,
    ) -> Result<(), TemplateError> {
        if self.changes.cpuid_modifiers.is_empty() {
            return Ok(());
        }
        let shown: Vec<_> = guest.for_vcpu(0)?.as_slice().iter().map(CpuidLeaf::from).collect();
        let missing = missing_features(normal, vcpu, &shown)?;
        if missing.is_empty() {
            return Ok(());
        }
        Err(TemplateError::MissingFeatures { template: self.name, missing })
    }

    /// Changes the MSRs of a `vcpu` whose CPUID is set.
    pub(crate) fn set_msrs(&self, vcpu: &VcpuFd) -> Result<(), TemplateError> {
        let template = self.name;
        let mut addresses: Vec<_> = self.msr_addresses().collect();
        addresses.sort_unstable();
        addresses.dedup();
        let mut msrs = get_msrs(vcpu, &addresses)?;
        for change in &self.changes.msr_modifiers {
            let msr = msrs.iter_mut().find(|msr| msr.index == change.addr);
            let msr = msr.ok_or(TemplateError::NoMsr { template, addr: change.addr })?;
            msr.value = change.bitmap.apply(msr.value);
        }
        set_msrs(vcpu, &msrs).map_err(|error| match error {
            KvmError::Msr { index, value } => TemplateError::MsrValue { template, addr: index, value },
            error => error.into(),
        })
    }

    /// The addresses of the MSRs that the template changes.
    pub(crate) fn msr_addresses(&self) -> impl Iterator<Item = u32> + '_ {
        self.changes.msr_modifiers.iter().map(|change| change.addr)
    }
}

fn apply(change: &CpuidModifier, leaf: &mut kvm_cpuid_entry2) {
    leaf.flags = change.flags;
    for register in &change.modifiers {
        let value = match register.register {
            CpuidRegister::Eax => &mut leaf.eax,
            CpuidRegister::Ebx => &mut leaf.ebx,
            CpuidRegister::Ecx => &mut leaf.ecx,
            CpuidRegister::Edx => &mut leaf.edx,
        };
        *value = register.bitmap.apply_to(*value);
    }
}

/// The registers and bits that a modifier changes, such as `eax bits 0 4 and ebx bit 3`.
fn changed_bits(change: &CpuidModifier) -> String {
    let registers = change.modifiers.iter().filter(|register| register.bitmap.mask() != 0).map(|register| {
        let mask = register.bitmap.mask();
        let bits: Vec<_> = (0..32).filter(|bit| mask >> bit & 1 == 1).map(|bit| bit.to_string()).collect();
        match bits.as_slice() {
            bits if bits.len() == 32 => register.register.name().to_owned(),
            [bit] => format!("{} bit {bit}", register.register.name()),
            bits => format!("{} bits {}", register.register.name(), bits.join(" ")),
        }
    });
    // A list may name a register as often as it likes.
    let text = registers.take(CpuidRegister::ALL.len()).collect::<Vec<_>>().join(" and ");
    if text.is_empty() { "no bit".to_owned() } else { text }
}

/// What leaves 0 and 1 say about the host's CPU.
struct HostCpu {
    vendor: String,
    /// Leaf 1, eax.
    signature: u32,
}

impl HostCpu {
    fn of(host: &HostCpuid) -> Self {
        let leaf = |number| host.supported().iter().find(|leaf| leaf.function == number);
        let vendor = leaf(0).map_or(Vec::new(), |l| [l.ebx, l.edx, l.ecx].map(u32::to_le_bytes).concat());
        HostCpu {
            vendor: String::from_utf8_lossy(&vendor).into_owned(),
            signature: leaf(1).map_or(0, |leaf| leaf.eax),
        }
    }

    fn is(&self, known: &Model) -> bool {
        let (family, model) = self.family_and_model();
        family == known.family && known.models.contains(&model) && known.steppings.contains(&self.stepping())
    }

    fn stepping(&self) -> u32 {
        self.signature & 0xf
    }

    /// Family and model, as the vendors number them.
    fn family_and_model(&self) -> (u32, u32) {
        let field = |at: u32, bits: u32| self.signature >> at & ((1 << bits) - 1);
        let family = if field(8, 4) == 0xf { 0xf + field(20, 8) } else { field(8, 4) };
        let extended = if family == 6 || family >= 0xf { field(16, 4) << 4 } else { 0 };
        (family, extended | field(4, 4))
    }
}

impl std::fmt::Display for HostCpu {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (family, model) = self.family_and_model();
        write!(f, "{} family {family:#x} model {model:#x} stepping {}", self.vendor, self.stepping())
    }
}

#[cfg(test)]
#[path = "template_tests.rs"]
mod tests;
