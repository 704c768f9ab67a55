//! Machines with guests of a few instructions, which run on any KVM, also a software one (PVM).
//! Without /dev/kvm the tests pass, but print that they did not run.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use config::MachineConfig;
use memory::GuestRam;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vesta_machine::boot::BootFiles;
use vesta_machine::chipset::ClockAfter;
use vesta_machine::legacy::{Output, SerialSetup};
use vesta_machine::{
    DeviceSetup, EventSource, MachineEvent, MachineState, Paused, Restore, Setup, StartError, event_channel,
};
use vesta_tests::elf::{self, Elf};
use vm_memory::{Bytes, GuestAddress};

const TIMEOUT: Duration = Duration::from_secs(20);

/// A guest before its first instruction.
struct Guest {
    machine: Paused,
    events: EventSource,
    serial: PathBuf,
    _dir: tempfile::TempDir,
}

/// Builds a machine with this `kernel`. `None` if this host has no KVM.
fn guest(kernel: &Elf, config: &MachineConfig) -> Option<Guest> {
    if !Path::new("/dev/kvm").exists() {
        eprintln!("not run: there is no /dev/kvm here");
        return None;
    }
    let dir = tempfile::tempdir().unwrap();
    let mut file = tempfile::tempfile().unwrap();
    file.write_all(&kernel.bytes()).unwrap();
    let serial = dir.path().join("serial");
    let (sink, events) = event_channel().unwrap();
    let machine = Paused::build(Setup {
        config,
        cpu_config: None,
        boot: BootFiles { kernel: file, initrd: None, cmdline: String::new() },
        serial: SerialSetup {
            output: Some(Output::open(&serial).unwrap()),
            input: None,
            limit: virtio::rate_limiter::RateLimiterConfig::default(),
        },
        boot_timer: None,
        devices: DeviceSetup::default(),
        events: sink,
    })
    .unwrap();
    Some(Guest { machine, events, serial, _dir: dir })
}

/// Waits for the event that ends the guest.
fn event(events: &EventSource) -> MachineEvent {
    let limit = Timespec { tv_sec: TIMEOUT.as_secs().cast_signed(), tv_nsec: 0 };
    let ready = poll(&mut [PollFd::new(events, PollFlags::IN)], Some(&limit)).unwrap();
    assert_eq!(ready, 1, "the guest did not end within {TIMEOUT:?}");
    events.take().expect("the descriptor is readable")
}

/// A guest that writes 0, 1, 2, ... to the serial port, for ever.
fn counting_guest() -> Elf {
    // mov dx, 0x3f8; xor eax, eax; again: out dx, al; inc eax; jmp again
    Elf::of(&[0x66, 0xba, 0xf8, 0x03, 0x31, 0xc0, 0xee, 0x40, 0xeb, 0xfc])
}

/// A [`counting_guest`] with interrupts enabled. It has programmed no interrupt controller and no
/// interrupt table, so any interrupt ends it.
fn open_guest() -> Elf {
    // sti; mov dx, 0x3f8; xor eax, eax; again: out dx, al; inc eax; jmp again
    Elf::of(&[0xfb, 0x66, 0xba, 0xf8, 0x03, 0x31, 0xc0, 0xee, 0x40, 0xeb, 0xfc])
}

/// A guest that powers off through the ACPI sleep control register.
fn power_off_guest() -> Elf {
    // mov dx, 0x600; mov al, SLP_EN | 5 << 2; out dx, al; hlt
    Elf::of(&[0x66, 0xba, 0x00, 0x06, 0xb0, 0x34, 0xee, 0xf4])
}

#[test]
fn pause_at_any_time_loses_and_repeats_no_port_access() {
    let Some(guest) = guest(&counting_guest(), &MachineConfig::default()) else { return };
    let mut machine = guest.machine;
    let mut seen = 0;
    for round in 0..200 {
        let running = machine.resume().unwrap();
        let deadline = Instant::now() + TIMEOUT;
        // The guest runs for a while, a different one in each round.
        while fs::metadata(&guest.serial).unwrap().len() < seen + round % 7 {
            assert!(Instant::now() < deadline, "the guest makes no progress");
            std::thread::yield_now();
        }
        machine = running.pause().unwrap();
        assert!(machine.drain_serial(TIMEOUT));
        seen = fs::metadata(&guest.serial).unwrap().len();
    }
    let bytes = fs::read(&guest.serial).unwrap();
    let wrong = bytes.iter().enumerate().position(|(i, byte)| *byte != (i % 256) as u8);
    assert_eq!(wrong, None, "of {} bytes", bytes.len());
}

#[test]
fn paused_guest_does_not_run() {
    let Some(guest) = guest(&counting_guest(), &MachineConfig::default()) else { return };
    let paused = guest.machine.resume().unwrap().pause().unwrap();
    assert!(paused.drain_serial(TIMEOUT));
    let before = fs::metadata(&guest.serial).unwrap().len();
    // There is no event to wait for: a guest that ran on would write within this time.
    std::thread::sleep(Duration::from_millis(50));
    assert!(paused.drain_serial(TIMEOUT));
    assert_eq!(fs::metadata(&guest.serial).unwrap().len(), before);
}

#[test]
fn guest_powers_off_by_acpi() {
    let Some(guest) = guest(&power_off_guest(), &MachineConfig::default()) else { return };
    let _running = guest.machine.resume().unwrap();
    assert_eq!(event(&guest.events), MachineEvent::PowerOff);
}

#[test]
fn kernel_64_bit_boots_at_any_address() {
    for address in [1 << 30, (5 << 29) + 0x1000, (4 << 30) + 0x20_0000] {
        let mut kernel = power_off_guest();
        kernel.segments[0].address = address;
        kernel.entry = address;
        kernel.pvh_entry = None;
        // The last GiB of RAM is above 4 GiB, behind the gap for devices.
        let config = MachineConfig { mem_size_mib: 4096, ..MachineConfig::default() };
        let Some(guest) = guest(&kernel, &config) else { return };
        let _running = guest.machine.resume().unwrap();
        assert_eq!(event(&guest.events), MachineEvent::PowerOff, "{address:#x}");
    }
}

#[test]
fn guest_resets_by_its_keyboard_controller() {
    let Some(guest) = guest(&elf::reset_guest(), &MachineConfig::default()) else { return };
    let _running = guest.machine.resume().unwrap();
    assert_eq!(event(&guest.events), MachineEvent::Reset);
}

/// The instruction pointer after a reset: kvm-amd resets a vCPU before it reports its shutdown.
const RESET_VECTOR: u64 = 0xfff0;

#[test]
fn triple_fault_is_reported_with_its_instruction() {
    let (kernel, address) = elf::triple_fault_guest();
    let Some(guest) = guest(&kernel, &MachineConfig::default()) else { return };
    let _running = guest.machine.resume().unwrap();
    let MachineEvent::TripleFault(fault) = event(&guest.events) else { panic!("another event") };
    let (rip, bytes) = fault.instruction.unwrap();
    assert!(
        (rip, &bytes[..2]) == (address.into(), &[0x0f, 0x0b]) || rip == RESET_VECTOR,
        "{rip:#x} {bytes:x?}"
    );
}

#[test]
fn machine_with_128_vcpus_starts_pauses_and_ends() {
    let config = MachineConfig { vcpu_count: 128, ..MachineConfig::default() };
    let Some(guest) = guest(&counting_guest(), &config) else { return };
    let paused = guest.machine.resume().unwrap().pause().unwrap();
    drop(paused.resume().unwrap());
}

#[test]
fn dropping_a_running_machine_ends_its_threads() {
    let Some(guest) = guest(&counting_guest(), &MachineConfig::default()) else { return };
    drop(guest.machine.resume().unwrap());
    let left = fs::read_dir("/proc/self/task").unwrap().filter_map(|task| {
        let name = fs::read_to_string(task.ok()?.path().join("comm")).ok()?;
        Some(name.trim().to_owned())
    });
    // Other tests in this process have vCPU threads too, unless each test runs in its own process.
    if std::env::var_os("NEXTEST").is_some() {
        assert_eq!(left.filter(|name| name.starts_with("fc_vcpu")).collect::<Vec<_>>(), Vec::<String>::new());
    }
}

/// Saves the machine `of` and restores it with a copy of its memory.
fn clone_of(of: &Paused, config: &MachineConfig, serial: &Path, clock: ClockAfter) -> Paused {
    restored(of, &of.save().unwrap(), config, serial, clock).unwrap()
}

/// Restores `state` with a copy of the memory of `of`.
fn restored(
    of: &Paused,
    state: &MachineState,
    config: &MachineConfig,
    serial: &Path,
    clock: ClockAfter,
) -> Result<Paused, StartError> {
    let ram = GuestRam::map(config.mem_size_mib, config.huge_pages, false).unwrap();
    for (from, to) in of.ram().regions().iter().zip(ram.regions()) {
        let mut bytes = vec![0; from.size as usize];
        of.ram().memory().read_slice(&mut bytes, GuestAddress(from.guest_addr)).unwrap();
        ram.memory().write_slice(&bytes, GuestAddress(to.guest_addr)).unwrap();
    }
    let (sink, _events) = event_channel().unwrap();
    Paused::restore(Restore {
        config,
        cpu_config: None,
        state,
        ram,
        page_server: None,
        serial: SerialSetup {
            output: Some(Output::open(serial).unwrap()),
            input: None,
            limit: virtio::rate_limiter::RateLimiterConfig::default(),
        },
        devices: DeviceSetup::default(),
        clock,
        events: sink,
        stop: None,
    })
}

/// Runs the machine until it has written this many more bytes to `serial`, and pauses it again.
fn run_for(machine: Paused, serial: &Path, bytes: u64) -> Paused {
    let wanted = fs::metadata(serial).unwrap().len() + bytes;
    let running = machine.resume().unwrap();
    let deadline = Instant::now() + TIMEOUT;
    while fs::metadata(serial).unwrap().len() < wanted {
        assert!(Instant::now() < deadline, "the guest makes no progress");
        std::thread::yield_now();
    }
    let paused = running.pause().unwrap();
    assert!(paused.drain_serial(TIMEOUT));
    paused
}

#[test]
fn saved_and_restored_machines_both_continue() {
    let config = MachineConfig { mem_size_mib: 8, vcpu_count: 2, ..MachineConfig::default() };
    let Some(guest) = guest(&counting_guest(), &config) else { return };
    let mut first = run_for(guest.machine, &guest.serial, 10);
    // Three restored machines, one after another.
    for generation in 0..3 {
        let next = fs::read(&guest.serial).unwrap().len();
        let serial = guest.serial.with_file_name(format!("serial{generation}"));
        let clone = clone_of(&first, &config, &serial, ClockAfter::Continues);
        first = run_for(first, &guest.serial, 10);
        let clone = run_for(clone, &serial, 10);
        drop(clone);
        let bytes = fs::read(&serial).unwrap();
        let wrong = bytes.iter().enumerate().position(|(i, byte)| *byte != ((next + i) % 256) as u8);
        assert_eq!(wrong, None, "generation {generation} begins with {:?}, not {}", bytes[0], next % 256);
    }
    let bytes = fs::read(&guest.serial).unwrap();
    assert!(bytes.iter().enumerate().all(|(i, byte)| *byte == (i % 256) as u8));
}

#[test]
fn guest_that_never_programmed_its_pic_is_restored() {
    let config = MachineConfig { mem_size_mib: 8, ..MachineConfig::default() };
    let Some(guest) = guest(&open_guest(), &config) else { return };
    let mut machine = run_for(guest.machine, &guest.serial, 10);
    for generation in 0..3 {
        let serial = guest.serial.with_file_name(format!("serial{generation}"));
        machine = run_for(clone_of(&machine, &config, &serial, ClockAfter::Continues), &serial, 10);
        let bytes = fs::read(&serial).unwrap();
        assert!(bytes.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1)), "{bytes:?}");
    }
}

/// An MSR of the first vCPU.
fn msr(machine: &Paused, index: u32) -> Option<u64> {
    let state = machine.save().unwrap();
    state.vcpus[0].msrs.iter().find(|msr| msr.index == index).map(|msr| msr.value)
}

const IA32_TSC: u32 = 0x10;

/// The time stamp counters of a saved machine.
fn counters(state: &MachineState) -> Vec<u64> {
    let msrs = state.vcpus.iter().flat_map(|vcpu| &vcpu.msrs);
    msrs.filter(|msr| msr.index == IA32_TSC).map(|msr| msr.value).collect()
}

#[test]
fn restored_vcpus_share_one_counter_that_never_goes_back() {
    let config = MachineConfig { mem_size_mib: 8, vcpu_count: 4, ..MachineConfig::default() };
    let Some(guest) = guest(&counting_guest(), &config) else { return };
    let mut machine = run_for(guest.machine, &guest.serial, 1);
    let mut state = machine.save().unwrap();
    if state.vcpus[0].tsc_offset == Some(0) {
        eprintln!("not run: this KVM shows guests the host's counter");
        return;
    }
    for hop in 0..5 {
        if hop == 1 {
            // As if the thread of one vCPU had read its registers later than the others.
            let (khz, last) = (state.vcpus[3].tsc_khz, state.vcpus.last_mut().unwrap());
            let tsc = last.msrs.iter_mut().find(|msr| msr.index == IA32_TSC).unwrap();
            tsc.value += 3_000 * u64::from(khz.unwrap_or(1_000_000));
        }
        let last = counters(&state).into_iter().max().unwrap();
        // The last states are as if saved by a version, or on a host, without offsets.
        if hop > 2 {
            state.vcpus.iter_mut().for_each(|vcpu| vcpu.tsc_offset = None);
        }
        let serial = guest.serial.with_file_name(format!("serial{hop}"));
        machine = restored(&machine, &state, &config, &serial, ClockAfter::Continues).unwrap();
        state = machine.save().unwrap();
        let now = counters(&state).into_iter().min().unwrap();
        assert!(now > last, "hop {hop}: {now} after {last}");
        let offsets: Vec<_> = state.vcpus.iter().filter_map(|vcpu| vcpu.tsc_offset).collect();
        assert!(offsets.iter().all(|offset| *offset == offsets[0]), "hop {hop}: {offsets:x?}");
        if offsets.is_empty() {
            eprintln!("this KVM does not report the offsets of vCPUs");
        }
    }
}

#[test]
fn memory_types_that_kvm_does_not_list_are_restored() {
    const IA32_MTRR_DEF_TYPE: u32 = 0x2ff;
    let config = MachineConfig { mem_size_mib: 8, ..MachineConfig::default() };
    let Some(guest) = guest(&counting_guest(), &config) else { return };
    let Some(saved) = msr(&guest.machine, IA32_MTRR_DEF_TYPE) else {
        eprintln!("not run: this KVM has no memory type registers");
        return;
    };
    assert_eq!(saved, 1 << 11 | 6);
    let serial = guest.serial.with_file_name("clone");
    let clone = clone_of(&guest.machine, &config, &serial, ClockAfter::Continues);
    assert_eq!(msr(&clone, IA32_MTRR_DEF_TYPE), Some(saved));
}

#[test]
fn guest_that_uses_missing_cpu_features_is_refused() {
    let config = MachineConfig { mem_size_mib: 8, ..MachineConfig::default() };
    let Some(guest) = guest(&counting_guest(), &config) else { return };
    let mut state = guest.machine.save().unwrap();
    let features = state.vcpus[0].cpuid.iter_mut().find(|leaf| (leaf.leaf, leaf.index) == (7, 0)).unwrap();
    // UINTR: no KVM supports it in guests.
    features.values[3] |= 1 << 5;
    let serial = guest.serial.with_file_name("clone");
    let Err(error) = restored(&guest.machine, &state, &config, &serial, ClockAfter::Continues) else {
        panic!("it was restored without a feature that no KVM supports")
    };
    assert!(matches!(&error, StartError::MissingCpuFeatures { missing } if missing.len() == 1), "{error}");
    assert!(error.to_string().contains("CPUID 0x7.0 edx bit 5"), "{error}");
}
