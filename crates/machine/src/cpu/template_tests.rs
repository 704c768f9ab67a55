//! CPU templates on the tables of synthetic hosts.

use config::{Bitmap, CpuTemplate, RegisterModifier};
use proptest::prelude::*;

use super::*;

const SKYLAKE: u32 = 0x5_0654;
const CASCADE_LAKE: u32 = 0x5_0657;
const ICE_LAKE: u32 = 0x6_06a6;
const BROADWELL: u32 = 0x4_06f1;
const COOPER_LAKE: u32 = 0x5_065b;
const SAPPHIRE_RAPIDS: u32 = 0x8_06f8;
const MILAN: u32 = 0x00a0_0f11;
const NAPLES: u32 = 0x0080_0f12;

fn entry(function: u32, index: u32, [eax, ebx, ecx, edx]: [u32; 4]) -> kvm_cpuid_entry2 {
    kvm_cpuid_entry2 { function, index, eax, ebx, ecx, edx, ..Default::default() }
}

/// A host with every feature, and this vendor and signature.
fn host_of(vendor: &[u8; 12], signature: u32) -> HostCpuid {
    let word = |at: usize| u32::from_le_bytes(vendor[at..at + 4].try_into().unwrap());
    let all = u32::MAX;
    HostCpuid::of(vec![
        entry(0x0, 0, [0x1f, word(0), word(8), word(4)]),
        entry(0x1, 0, [signature, 0, all, all]),
        entry(0x7, 0, [0, all, all, all]),
        entry(0xb, 0, [0; 4]),
        entry(0xd, 0, [all, 0, 0, 0]),
        entry(0xd, 1, [all, 0, 0, 0]),
        entry(0x8000_0000, 0, [0x8000_0008, 0, 0, 0]),
        entry(0x8000_0001, 0, [0, 0, all, all]),
        entry(0x8000_0008, 0, [48, all, 0, 0]),
    ])
}

fn intel(signature: u32) -> HostCpuid {
    host_of(b"GenuineIntel", signature)
}

fn amd(signature: u32) -> HostCpuid {
    host_of(b"AuthenticAMD", signature)
}

fn machine(template: CpuTemplate) -> MachineConfig {
    MachineConfig { cpu_template: Some(template), ..MachineConfig::default() }
}

/// One change of one register.
fn custom(leaf: u32, subleaf: u32, register: CpuidRegister, bitmap: Bitmap<32>) -> CpuConfig {
    let modifiers = vec![RegisterModifier { register, bitmap }];
    CpuConfig {
        cpuid_modifiers: vec![CpuidModifier { leaf, subleaf, flags: 0, modifiers }],
        ..CpuConfig::default()
    }
}

fn topology() -> Topology {
    Topology::new(2, false)
}

fn registers(cpuid: &Cpuid, leaf: u32, index: u32) -> Option<[u32; 4]> {
    let all = cpuid.for_vcpu(0).unwrap();
    let leaf = all.as_slice().iter().find(|e| (e.function, e.index) == (leaf, index))?;
    Some([leaf.eax, leaf.ebx, leaf.ecx, leaf.edx])
}

#[test]
fn static_template_fits_its_hosts_and_no_others() {
    use CpuTemplate::{C3, T2, T2A, T2CL, T2S};
    for (host, fitting) in [
        (intel(SKYLAKE), &[C3, T2, T2S][..]),
        (intel(CASCADE_LAKE), &[C3, T2, T2S, T2CL]),
        (intel(ICE_LAKE), &[C3, T2, T2CL]),
        (intel(COOPER_LAKE), &[]),
        (intel(SAPPHIRE_RAPIDS), &[]),
        (intel(BROADWELL), &[]),
        (amd(MILAN), &[T2A]),
        (amd(NAPLES), &[]),
        (host_of(b"HygonGenuine", MILAN), &[]),
    ] {
        for template in [C3, T2, T2S, T2CL, T2A] {
            let chosen = Template::choose(&machine(template), None, &host);
            let fits = fitting.contains(&template);
            assert_eq!(chosen.is_ok(), fits, "{template:?} on {}", HostCpu::of(&host));
            assert_eq!(chosen.is_ok_and(|chosen| chosen.is_some()), fits);
        }
    }
}

#[test]
fn refusal_names_template_host_and_what_fits() {
    let refusal = |template, host: &HostCpuid| {
        Template::choose(&machine(template), None, host).unwrap_err().to_string()
    };
    assert_eq!(
        refusal(CpuTemplate::C3, &amd(MILAN)),
        "cpu_template C3: it does not fit this host's CPU, AuthenticAMD family 0x19 model 0x1 stepping 1; \
         it fits Intel Skylake, Cascade Lake and Ice Lake"
    );
    assert_eq!(
        refusal(CpuTemplate::T2CL, &intel(SKYLAKE)),
        "cpu_template T2CL: it does not fit this host's CPU, GenuineIntel family 0x6 model 0x55 stepping 4; \
         it fits Intel Cascade Lake and Ice Lake"
    );
    assert!(refusal(CpuTemplate::T2A, &intel(ICE_LAKE)).ends_with("it fits AMD Milan"));
}

#[test]
fn static_template_changes_its_bits_and_no_others() {
    for (template, host) in [
        (CpuTemplate::C3, intel(SKYLAKE)),
        (CpuTemplate::T2, intel(ICE_LAKE)),
        (CpuTemplate::T2S, intel(CASCADE_LAKE)),
        (CpuTemplate::T2CL, intel(CASCADE_LAKE)),
        (CpuTemplate::T2A, amd(MILAN)),
    ] {
        let machine = machine(template);
        let normal = host.cpuid(topology());
        let chosen = Template::choose(&machine, None, &host).unwrap().unwrap();
        let guest = chosen.cpuid(&host, topology(), &normal).unwrap();
        for leaf in normal.for_vcpu(0).unwrap().as_slice() {
            let place = (leaf.function, leaf.index);
            let mut expected = *leaf;
            let changes = chosen.changes.cpuid_modifiers.iter();
            changes.filter(|c| (c.leaf, c.subleaf) == place).for_each(|c| apply(c, &mut expected));
            let expected = [expected.eax, expected.ebx, expected.ecx, expected.edx];
            assert_eq!(registers(&guest, place.0, place.1), Some(expected), "{template:?} {place:x?}");
        }
        assert!(chosen.changes.cpuid_modifiers.len() >= 5);
    }
}

#[test]
fn custom_template_takes_the_place_of_a_static_one() {
    let template = custom(0x7, 0, CpuidRegister::Ebx, Bitmap::new(1 << 5, 0));
    let (machine, host) = (machine(CpuTemplate::T2), amd(MILAN));
    let chosen = Template::choose(&machine, Some(&template), &host).unwrap().unwrap();
    let normal = host.cpuid(topology());
    let guest = chosen.cpuid(&host, topology(), &normal).unwrap();
    let before = registers(&normal, 0x7, 0).unwrap();
    assert_eq!(registers(&guest, 0x7, 0), Some([before[0], before[1] & !(1 << 5), before[2], before[3]]));
    assert_eq!(registers(&guest, 0x1, 0), registers(&normal, 0x1, 0));
}

#[test]
fn leaf_that_the_host_lacks_is_named_with_its_bits() {
    let host = intel(SKYLAKE);
    let error = |template: &CpuConfig| {
        let normal = host.cpuid(topology());
        let chosen = Template::choose(&MachineConfig::default(), Some(template), &host).unwrap().unwrap();
        chosen.cpuid(&host, topology(), &normal).unwrap_err().to_string()
    };
    let mut template = custom(0x12345, 7, CpuidRegister::Eax, Bitmap::new(1 << 3, 0));
    assert_eq!(
        error(&template),
        "cpu-config: this host's KVM has no CPUID leaf 0x12345 subleaf 0x7, of which the template changes \
         eax bit 3"
    );
    let more = [
        RegisterModifier { register: CpuidRegister::Ebx, bitmap: Bitmap::new(1 | 1 << 31, 1) },
        RegisterModifier { register: CpuidRegister::Ecx, bitmap: Bitmap::exactly(0) },
        RegisterModifier { register: CpuidRegister::Edx, bitmap: Bitmap::new(0, 0) },
    ];
    template.cpuid_modifiers[0].modifiers.extend(more);
    assert!(error(&template).ends_with("eax bit 3 and ebx bits 0 31 and ecx"));
    template.cpuid_modifiers[0].modifiers.clear();
    assert!(error(&template).ends_with("changes no bit"));
}

#[test]
fn leaf_that_the_monitor_adds_is_not_refused() {
    let host = amd(MILAN);
    let normal = host.cpuid(topology());
    for (leaf, subleaf) in [(0x8000_001e, 0), (0xb, 2)] {
        let template = custom(leaf, subleaf, CpuidRegister::Eax, Bitmap::exactly(0xffff));
        let chosen = Template::choose(&MachineConfig::default(), Some(&template), &host).unwrap().unwrap();
        let guest = chosen.cpuid(&host, topology(), &normal).unwrap();
        assert_eq!(registers(&guest, leaf, subleaf), registers(&normal, leaf, subleaf));
    }
}

#[test]
fn monitor_overrides_the_template() {
    let host = intel(SKYLAKE);
    let normal = host.cpuid(topology());
    // TSC deadline timer and hypervisor are set, PDCM is cleared.
    let template = custom(0x1, 0, CpuidRegister::Ecx, Bitmap::new(1 << 24 | 1 << 31 | 1 << 15, 1 << 15));
    let chosen = Template::choose(&MachineConfig::default(), Some(&template), &host).unwrap().unwrap();
    let guest = chosen.cpuid(&host, topology(), &normal).unwrap();
    assert_eq!(registers(&guest, 0x1, 0), registers(&normal, 0x1, 0));
}

#[test]
fn template_sets_the_flags_of_a_leaf() {
    let host = intel(SKYLAKE);
    let mut template = custom(0x7, 0, CpuidRegister::Eax, Bitmap::new(0, 0));
    template.cpuid_modifiers[0].flags = 1;
    let chosen = Template::choose(&MachineConfig::default(), Some(&template), &host).unwrap().unwrap();
    let guest = chosen.cpuid(&host, topology(), &host.cpuid(topology())).unwrap().for_vcpu(0).unwrap();
    assert_eq!(guest.as_slice().iter().find(|e| e.function == 7).unwrap().flags, 1);
}

proptest! {
    #[test]
    fn no_template_makes_applying_it_panic(template in config::testing::cpu_config(), known: bool) {
        let mut template = template;
        if known {
            let places = [(0, 0), (0xd, 0), (0xd, 1), (0x8000_0008, 0)];
            for (change, place) in template.cpuid_modifiers.iter_mut().zip(places) {
                (change.leaf, change.subleaf) = place;
            }
        }
        let host = amd(MILAN);
        let chosen = Template::choose(&MachineConfig::default(), Some(&template), &host).unwrap().unwrap();
        let guest = chosen.cpuid(&host, topology(), &host.cpuid(topology()));
        if known {
            prop_assert!(guest.unwrap().for_vcpu(1).is_ok());
        }
    }
}
