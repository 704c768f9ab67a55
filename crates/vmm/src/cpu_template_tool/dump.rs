//! What a guest's vCPU shows, as a template.

use std::fs;
use std::ops::RangeInclusive;
use std::path::Path;

use config::{CpuConfig, CpuConfigSource, CpuTemplate, MachineConfig, VmConfig};
use machine::{shown_cpu, static_template};

use super::command::GuestFiles;
use super::error::ToolError;
use crate::template_file;

/// MSRs that say nothing about a CPU: those that change with time, and those of features that no
/// guest has (performance counters, machine checks, nested virtualization, Hyper-V). Firecracker
/// leaves the same out.
const LEFT_OUT: [RangeInclusive<u32>; 17] = [
    0x10..=0x10,               // time stamp counter
    0xc1..=0xd2,               // performance counters
    0x17a..=0x17b,             // machine checks
    0x186..=0x197,             // performance events
    0x309..=0x30b,             // fixed counters
    0x345..=0x345,             // performance capabilities
    0x38d..=0x390,             // control of counters
    0x3f1..=0x3f2,             // event-based sampling
    0x400..=0x47f,             // machine check banks
    0x480..=0x491,             // VMX
    0x4d0..=0x4d0,             // machine checks
    0x600..=0x600,             // debug store
    0x6e0..=0x6e0,             // deadline timer
    0x4000_0000..=0x4000_0118, // Hyper-V
    0xc001_0000..=0xc001_0007, // performance counters of AMD
    0xc001_0200..=0xc001_020b, // the same
    0xc001_0114..=0xc001_0117, // SVM
];
/// What KVM emulates on AMD without a guest seeing it.
const ARCH_CAPABILITIES: u32 = 0x10a;
/// Leaf 0, ebx, of an AMD CPU.
const AMD: u64 = u32::from_le_bytes(*b"Auth") as u64;

/// The vCPUs and the CPU template of a guest.
pub(super) struct Guest {
    pub(super) machine: MachineConfig,
    pub(super) template: Option<CpuConfig>,
}

impl Guest {
    /// Reads the files of a guest.
    pub(super) fn read(files: &GuestFiles) -> Result<Self, ToolError> {
        let config = files.config.as_deref().map(read_config).transpose()?;
        let (mut machine, in_config) = match config {
            Some(config) => (config.machine_config, config.cpu_config.and_then(CpuConfigSource::inline)),
            None => (MachineConfig::default(), None),
        };
        let given = files.template.as_deref().map(template_file::read).transpose()?;
        let template = given.or(in_config);
        if template.is_some() {
            machine.cpu_template = None;
        }
        Ok(Guest { machine, template })
    }

    /// What its vCPU shows.
    pub(super) fn shown(&self) -> Result<CpuConfig, ToolError> {
        let mut shown = shown_cpu(&self.machine, self.template.as_ref())?;
        leave_out(&mut shown);
        Ok(shown)
    }

    /// The changes of its template, custom or static.
    pub(super) fn changes(&self) -> Option<CpuConfig> {
        let named = || self.machine.cpu_template.filter(|name| *name != CpuTemplate::None);
        self.template.clone().or_else(|| named().map(static_template))
    }
}

/// What the vCPU of a guest shows.
pub(super) fn dump(files: &GuestFiles) -> Result<CpuConfig, ToolError> {
    Guest::read(files)?.shown()
}

fn read_config(path: &Path) -> Result<VmConfig, ToolError> {
    let failed = |reason: String| ToolError::Config { path: path.to_owned(), reason };
    let text = fs::read(path).map_err(|e| failed(e.to_string()))?;
    let mut config: VmConfig = serde_json::from_slice(&text).map_err(|e| failed(e.to_string()))?;
    config.check().map_err(|e| failed(e.to_string()))?;
    template_file::resolve(&mut config)?;
    Ok(config)
}

fn leave_out(shown: &mut CpuConfig) {
    let vendor = shown.cpuid_modifiers.iter().find(|leaf| leaf.leaf == 0).and_then(|l| l.modifiers.get(1));
    let amd = vendor.is_some_and(|ebx| ebx.bitmap.value() == AMD);
    shown.msr_modifiers.retain(|msr| {
        let unseen = amd && msr.addr == ARCH_CAPABILITIES;
        !unseen && !LEFT_OUT.iter().any(|range| range.contains(&msr.addr))
    });
}

#[cfg(test)]
mod tests {
    use config::{Bitmap, CpuidModifier, CpuidRegister, MsrModifier, RegisterModifier};

    use super::*;

    #[test]
    fn msrs_that_say_nothing_are_left_out() {
        for (vendor, left) in [(b"Auth", vec![0x8b]), (b"Genu", vec![0x8b, 0x10a])] {
            let ebx = Bitmap::exactly(u32::from_le_bytes(*vendor).into());
            let registers = [(CpuidRegister::Eax, Bitmap::exactly(1)), (CpuidRegister::Ebx, ebx)];
            let modifiers =
                registers.map(|(register, bitmap)| RegisterModifier { register, bitmap }).to_vec();
            let addresses = [0x10, 0x8b, 0x10a, 0x6e0, 0x47f, 0xc001_0004];
            let mut shown = CpuConfig {
                kvm_capabilities: Vec::new(),
                cpuid_modifiers: vec![CpuidModifier { leaf: 0, subleaf: 0, flags: 0, modifiers }],
                msr_modifiers: addresses
                    .map(|addr| MsrModifier { addr, bitmap: Bitmap::exactly(0) })
                    .to_vec(),
            };
            leave_out(&mut shown);
            let addresses: Vec<_> = shown.msr_modifiers.iter().map(|msr| msr.addr).collect();
            assert_eq!(addresses, left);
        }
    }
}
