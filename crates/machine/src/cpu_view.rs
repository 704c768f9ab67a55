//! [`shown_cpu`]: what the first vCPU of a guest shows, read back from KVM.

use config::{Bitmap, CpuConfig, CpuidModifier, CpuidRegister, HugePages, MachineConfig, MsrModifier};
use config::{KvmCapability, RegisterModifier};
use kvm_bindings::KVM_MAX_CPUID_ENTRIES;
use memory::GuestRam;

use crate::StartError;
use crate::cpu::{CpuidLeaf, GuestCpu, StateFormat, get_msrs};
use crate::kvm::{Ioctl, Kvm};

/// Memory of the VM, in MiB. Nothing runs in it.
const MEMORY_MIB: u32 = 4;

/// What the first vCPU of a guest shows right before it boots: each register of CPUID, and each MSR
/// that is saved, as a template that would set exactly this.
///
/// The guest has the vCPUs of `machine`, and its static template or the `custom` one. A VM with one
/// vCPU is created for it, without the guest's memory or devices, which make no difference.
pub fn shown_cpu(machine: &MachineConfig, custom: Option<&CpuConfig>) -> Result<CpuConfig, StartError> {
    let capabilities: &[KvmCapability] = custom.map_or(&[], |template| &template.kvm_capabilities);
    let kvm = Kvm::open_with(capabilities)?;
    let cpu = GuestCpu::new(&kvm, machine, custom)?;
    let ram = GuestRam::map(MEMORY_MIB, HugePages::None, false)?;
    let (vm, vcpus) = kvm.create_vm()?.map_ram(ram, false)?.create_irqchip()?.create_vcpus(1)?;
    cpu.set_up(&vcpus)?;
    let Some(vcpu) = vcpus.first() else { return Ok(CpuConfig::default()) };

    let leaves = vcpu.get_cpuid2(KVM_MAX_CPUID_ENTRIES).ioctl("KVM_GET_CPUID2")?;
    let mut cpuid_modifiers: Vec<_> = leaves.as_slice().iter().map(CpuidLeaf::from).map(exactly).collect();
    cpuid_modifiers.sort_by_key(|leaf| (leaf.leaf, leaf.subleaf));
    let format = StateFormat::of(&kvm, &vm, &cpu.template_msrs())?;
    let msrs = get_msrs(vcpu, format.msrs())?;
    let mut msr_modifiers: Vec<_> =
        msrs.iter().map(|msr| MsrModifier { addr: msr.index, bitmap: Bitmap::exactly(msr.value) }).collect();
    msr_modifiers.sort_by_key(|msr| msr.addr);
    Ok(CpuConfig { kvm_capabilities: Vec::new(), cpuid_modifiers, msr_modifiers })
}

/// The change that makes a leaf exactly this.
fn exactly(leaf: CpuidLeaf) -> CpuidModifier {
    let registers = CpuidRegister::ALL.into_iter().zip(leaf.values);
    CpuidModifier {
        leaf: leaf.leaf,
        subleaf: leaf.index,
        flags: leaf.flags,
        modifiers: registers
            .map(|(register, value)| RegisterModifier { register, bitmap: Bitmap::exactly(value.into()) })
            .collect(),
    }
}
