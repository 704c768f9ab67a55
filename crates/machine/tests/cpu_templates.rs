//! Guests of a few instructions that execute CPUID and RDMSR, and report what they see. Without
//! /dev/kvm the tests pass, but print that they did not run.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use config::{
    Bitmap, CpuConfig, CpuTemplate, CpuidModifier, CpuidRegister, KvmCapability, MachineConfig, MsrModifier,
    RegisterModifier,
};
use memory::GuestRam;
use vesta_machine::boot::BootFiles;
use vesta_machine::chipset::ClockAfter;
use vesta_machine::legacy::{Output, SerialSetup};
use vesta_machine::{
    DeviceSetup, MachineState, Paused, Restore, Setup, StartError, event_channel, shown_cpu,
};
use vesta_tests::elf::Elf;
use virtio::rate_limiter::RateLimiterConfig;

const TIMEOUT: Duration = Duration::from_secs(20);

fn kvm_is_here() -> bool {
    let here = Path::new("/dev/kvm").exists();
    if !here {
        eprintln!("not run: there is no /dev/kvm here");
    }
    here
}

fn small() -> MachineConfig {
    MachineConfig { mem_size_mib: 8, ..MachineConfig::default() }
}

/// `out dx, al; shr eax, 8` for each byte of eax.
const SEND_EAX: [u8; 16] =
    [0xee, 0xc1, 0xe8, 0x08, 0xee, 0xc1, 0xe8, 0x08, 0xee, 0xc1, 0xe8, 0x08, 0xee, 0xc1, 0xe8, 0x08];

/// A guest that sends eax, ebx, ecx and edx of a CPUID leaf over its serial port.
fn cpuid_guest(leaf: u32, subleaf: u32) -> Elf {
    let code = [
        &[0xb8][..], // mov eax, leaf
        &leaf.to_le_bytes(),
        &[0xb9], // mov ecx, subleaf
        &subleaf.to_le_bytes(),
        &[0x0f, 0xa2],             // cpuid
        &[0x89, 0xd6],             // mov esi, edx
        &[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8
        &SEND_EAX,
        &[0x89, 0xd8], // mov eax, ebx
        &SEND_EAX,
        &[0x89, 0xc8], // mov eax, ecx
        &SEND_EAX,
        &[0x89, 0xf0], // mov eax, esi
        &SEND_EAX,
        &[0xeb, 0xfe], // jmp $
    ];
    Elf::of(&code.concat())
}

/// A guest that sends an MSR over its serial port.
fn rdmsr_guest(addr: u32) -> Elf {
    let code = [
        &[0xb9][..], // mov ecx, addr
        &addr.to_le_bytes(),
        &[0x0f, 0x32],             // rdmsr
        &[0x89, 0xd6],             // mov esi, edx
        &[0x66, 0xba, 0xf8, 0x03], // mov dx, 0x3f8
        &SEND_EAX,
        &[0x89, 0xf0], // mov eax, esi
        &SEND_EAX,
        &[0xeb, 0xfe], // jmp $
    ];
    Elf::of(&code.concat())
}

struct Guest {
    machine: Paused,
    serial: PathBuf,
    _dir: tempfile::TempDir,
}

fn serial(path: &Path) -> SerialSetup {
    SerialSetup {
        output: Some(Output::open(path).unwrap()),
        input: None,
        limit: RateLimiterConfig::default(),
    }
}

fn build(kernel: &Elf, config: &MachineConfig, template: Option<&CpuConfig>) -> Result<Guest, StartError> {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("serial");
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&kernel.bytes()).unwrap();
    let (events, _source) = event_channel().unwrap();
    let machine = Paused::build(Setup {
        config,
        cpu_config: template,
        boot: BootFiles { kernel: file, initrd: None, cmdline: String::new() },
        serial: serial(&path),
        boot_timer: None,
        devices: DeviceSetup::default(),
        events,
    })?;
    Ok(Guest { machine, serial: path, _dir: dir })
}

impl Guest {
    /// Runs until the guest has sent `count` numbers of 32 bits.
    fn numbers(self, count: usize) -> Vec<u32> {
        let _running = self.machine.resume().unwrap();
        let deadline = Instant::now() + TIMEOUT;
        loop {
            let bytes = fs::read(&self.serial).unwrap();
            if bytes.len() >= 4 * count {
                let words = bytes.chunks_exact(4);
                return words.map(|word| u32::from_le_bytes(word.try_into().unwrap())).collect();
            }
            assert!(Instant::now() < deadline, "the guest has sent {} bytes", bytes.len());
            std::thread::yield_now();
        }
    }
}

/// One change of one register.
fn change(leaf: u32, subleaf: u32, flags: u32, register: CpuidRegister, bitmap: Bitmap<32>) -> CpuConfig {
    let modifiers = vec![RegisterModifier { register, bitmap }];
    CpuConfig {
        cpuid_modifiers: vec![CpuidModifier { leaf, subleaf, flags, modifiers }],
        ..CpuConfig::default()
    }
}

fn msr(addr: u32, bitmap: Bitmap<64>) -> CpuConfig {
    CpuConfig { msr_modifiers: vec![MsrModifier { addr, bitmap }], ..CpuConfig::default() }
}

/// A register of a leaf in a view of [`shown_cpu`].
fn register(view: &CpuConfig, leaf: u32, subleaf: u32, register: CpuidRegister) -> Option<u32> {
    let leaf = view.cpuid_modifiers.iter().find(|of| (of.leaf, of.subleaf) == (leaf, subleaf))?;
    Some(leaf.modifiers[register as usize].bitmap.value() as u32)
}

fn msr_of(state: &MachineState, addr: u32) -> Option<u64> {
    state.vcpus[0].msrs.iter().find(|msr| msr.index == addr).map(|msr| msr.value)
}

/// A feature: leaf, register and bit. All leaves have index 0.
#[derive(Debug, Clone, Copy)]
struct Feature {
    leaf: u32,
    register: CpuidRegister,
    bit: u32,
}

impl Feature {
    /// One that guests have here and that KVM hides on demand. A software KVM (PVM) cannot hide the
    /// instructions that its guests execute on the CPU itself.
    fn here(normal: &CpuConfig) -> Feature {
        let places = [
            (0x7, CpuidRegister::Ebx),
            (0x7, CpuidRegister::Ecx),
            (0x7, CpuidRegister::Edx),
            (0x8000_0001, CpuidRegister::Ecx),
            (0x8000_0008, CpuidRegister::Ebx),
        ];
        let hidden = places.into_iter().find_map(|(leaf, of)| {
            let flags = u32::from(leaf == 0x7);
            let without = shown_cpu(&small(), Some(&change(leaf, 0, flags, of, Bitmap::exactly(0)))).ok()?;
            let bits = register(normal, leaf, 0, of)? & !register(&without, leaf, 0, of)?;
            (bits != 0).then_some(Feature { leaf, register: of, bit: bits.trailing_zeros() })
        });
        hidden.expect("KVM hides no feature at all")
    }

    /// The template that hides it.
    fn hidden(self) -> CpuConfig {
        let flags = u32::from(self.leaf == 0x7);
        change(self.leaf, 0, flags, self.register, Bitmap::new(1 << self.bit, 0))
    }
}

/// The microcode's revision: a register that KVM only stores.
const MICROCODE: u32 = 0x8b;
const REVISION: u64 = 0x0123_4567_89ab_cdef;
/// A register with a constant value, which KVM has and does not list.
const UNLISTED: u32 = 0x11e;

#[test]
fn guest_sees_the_cpuid_of_its_template() {
    if !kvm_is_here() {
        return;
    }
    let normal = shown_cpu(&small(), None).unwrap();
    let feature = Feature::here(&normal);
    let mut template = feature.hidden();
    let signature = change(0x1, 0, 0, CpuidRegister::Eax, Bitmap::new(0xf, 0x7));
    template.cpuid_modifiers.extend(signature.cpuid_modifiers);
    for leaf in [feature.leaf, 0x1] {
        let mut expected = CpuidRegister::ALL.map(|r| register(&normal, leaf, 0, r).unwrap());
        match leaf {
            0x1 => expected[0] = expected[0] & !0xf | 0x7,
            _ => expected[feature.register as usize] &= !(1 << feature.bit),
        }
        let guest = build(&cpuid_guest(leaf, 0), &small(), Some(&template)).unwrap();
        assert_eq!(guest.numbers(4), expected, "leaf {leaf:#x}");
    }
    let guest = build(&cpuid_guest(feature.leaf, 0), &small(), None).unwrap();
    let shown = guest.numbers(4)[feature.register as usize];
    assert_ne!(shown & 1 << feature.bit, 0, "without the template");
}

#[test]
fn guest_reads_the_msr_of_its_template() {
    if !kvm_is_here() {
        return;
    }
    let template = msr(MICROCODE, Bitmap::exactly(REVISION));
    let guest = build(&rdmsr_guest(MICROCODE), &small(), Some(&template)).unwrap();
    let [low, high] = guest.numbers(2)[..] else { panic!("two numbers") };
    assert_eq!(u64::from(high) << 32 | u64::from(low), REVISION);
}

#[test]
fn effect_of_a_template_survives_save_and_restore() {
    if !kvm_is_here() {
        return;
    }
    let feature = Feature::here(&shown_cpu(&small(), None).unwrap());
    let mut template = feature.hidden();
    let msrs = [(MICROCODE, Bitmap::exactly(REVISION)), (UNLISTED, Bitmap::new(0, 0))];
    template.msr_modifiers.extend(msrs.map(|(addr, bitmap)| MsrModifier { addr, bitmap }));
    let config = small();
    let guest = build(&cpuid_guest(0x7, 0), &config, Some(&template)).unwrap();
    let mut machine = guest.machine;
    let first = machine.save().unwrap();
    assert!(msr_of(&first, UNLISTED).is_some());
    for generation in 0..2 {
        let state = machine.save().unwrap();
        assert_eq!(state.vcpus[0].cpuid, first.vcpus[0].cpuid, "{generation}");
        let mut leaves = state.vcpus[0].cpuid.iter();
        let leaf = leaves.find(|leaf| (leaf.leaf, leaf.index) == (feature.leaf, 0)).unwrap();
        assert_eq!(leaf.values[feature.register as usize] & 1 << feature.bit, 0);
        assert_eq!(msr_of(&state, MICROCODE), Some(REVISION));
        assert_eq!(msr_of(&state, UNLISTED), msr_of(&first, UNLISTED), "{generation}");
        let (events, _source) = event_channel().unwrap();
        machine = Paused::restore(Restore {
            config: &config,
            cpu_config: Some(&template),
            state: &state,
            ram: GuestRam::map(config.mem_size_mib, config.huge_pages, false).unwrap(),
            page_server: None,
            serial: serial(&guest.serial),
            devices: DeviceSetup::default(),
            clock: ClockAfter::Continues,
            events,
            stop: None,
        })
        .unwrap();
    }
    let plain = build(&cpuid_guest(0x7, 0), &config, None).unwrap().machine.save().unwrap();
    assert_eq!(msr_of(&plain, UNLISTED), None, "only a template makes it part of the state");
}

/// Why a machine with this template cannot be built.
fn refusal(template: &CpuConfig) -> String {
    let error = build(&cpuid_guest(0, 0), &small(), Some(template)).err().expect("it was built");
    assert_eq!(shown_cpu(&small(), Some(template)).unwrap_err().to_string(), error.to_string());
    error.to_string()
}

#[test]
fn what_the_host_lacks_is_named_at_the_start() {
    if !kvm_is_here() {
        return;
    }
    // UINTR: no KVM supports it in guests.
    assert_eq!(
        refusal(&change(0x7, 0, 1, CpuidRegister::Edx, Bitmap::new(1 << 5, 1 << 5))),
        "cpu-config: this host's CPU lacks features that the template sets: CPUID 0x7.0 edx bit 5"
    );
    assert_eq!(
        refusal(&change(0x12345, 0, 0, CpuidRegister::Ecx, Bitmap::new(1, 0))),
        "cpu-config: this host's KVM has no CPUID leaf 0x12345 subleaf 0x0, of which the template changes \
         ecx bit 0"
    );
    assert_eq!(
        refusal(&msr(0x12345, Bitmap::new(1, 1))),
        "cpu-config: this host's KVM cannot read the register (MSR) 0x12345, which the template changes"
    );
    let kvm_capabilities = vec![KvmCapability::Ignore(56), KvmCapability::Require(9999)];
    assert_eq!(
        refusal(&CpuConfig { kvm_capabilities, ..CpuConfig::default() }),
        "cpu-config: kvm_capabilities: this host's KVM lacks an unnamed capability (9999)"
    );
}

#[test]
fn static_template_of_another_vendor_is_refused() {
    if !kvm_is_here() {
        return;
    }
    let normal = shown_cpu(&small(), None).unwrap();
    let intel = register(&normal, 0, 0, CpuidRegister::Ebx) == Some(u32::from_le_bytes(*b"Genu"));
    for (template, for_intel) in [
        (CpuTemplate::C3, true),
        (CpuTemplate::T2, true),
        (CpuTemplate::T2S, true),
        (CpuTemplate::T2CL, true),
        (CpuTemplate::T2A, false),
    ] {
        if for_intel != intel {
            let config = MachineConfig { cpu_template: Some(template), ..small() };
            let error = build(&cpuid_guest(0, 0), &config, None).err().expect("it was built").to_string();
            let start = format!("cpu_template {template:?}: it does not fit this host's CPU");
            assert!(error.starts_with(&start), "{error}");
            // A custom template takes its place.
            assert!(build(&cpuid_guest(0, 0), &config, Some(&CpuConfig::default())).is_ok());
        }
    }
}

#[test]
fn what_a_vcpu_shows_is_a_template_for_it() {
    if !kvm_is_here() {
        return;
    }
    let config = MachineConfig { vcpu_count: 2, smt: true, ..small() };
    let mut view = shown_cpu(&config, None).unwrap();
    // The time stamp counter is another one each time.
    view.msr_modifiers.retain(|msr| msr.addr != 0x10);
    let again = shown_cpu(&config, Some(&view)).unwrap();
    assert_eq!(again.cpuid_modifiers, view.cpuid_modifiers);
    assert!(view.msr_modifiers.iter().all(|msr| again.msr_modifiers.contains(msr)));
    assert!(view.cpuid_modifiers.len() > 10 && view.msr_modifiers.len() > 10);
}
