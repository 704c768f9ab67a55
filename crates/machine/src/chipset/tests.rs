//! Tests without a guest, and with a guest of a few instructions that reads its local APIC.

use std::fs;
use std::io::Write;
use std::path::Path;
use std::time::Instant;

use config::{HugePages, MachineConfig};
use memory::GuestRam;
use vesta_tests::elf::Elf;
use virtio::rate_limiter::RateLimiterConfig;
use vm_memory::{Bytes, GuestAddress};

use kvm_bindings::kvm_pic_state;

use super::*;
use crate::boot::BootFiles;
use crate::kvm::{Kvm, pic_state};
use crate::legacy::{Output, SerialSetup};
use crate::{DeviceSetup, Paused, Restore, Setup, event_channel};

const TIMEOUT: Duration = Duration::from_secs(20);

fn saved_at(realtime: u64, flags: u32) -> ChipsetState {
    let clock = kvm_clock_data { realtime, flags, ..Default::default() };
    ChipsetState { irqchips: Vec::new(), pit: kvm_pit_state2::default(), clock }
}

#[test]
fn host_time_is_saved_also_if_kvm_does_not_add_it() {
    let now = UNIX_EPOCH + Duration::from_secs(100);
    let saved = |flags, realtime| {
        let clock = with_real_time(kvm_clock_data { flags, realtime, clock: 7, ..Default::default() }, now);
        (clock.flags, clock.realtime, clock.clock)
    };
    assert_eq!(saved(KVM_CLOCK_REALTIME, 5), (KVM_CLOCK_REALTIME, 5, 7));
    assert_eq!(saved(2, 0), (2 | KVM_CLOCK_REALTIME, 100_000_000_000, 7));
}

#[test]
fn counters_catch_up_only_if_asked_and_never_go_back() {
    let now = UNIX_EPOCH + Duration::from_secs(100);
    let passed = |at: u64, flags, after| saved_at(at * 1_000_000_000, flags).time_passed(after, now);
    assert_eq!(passed(40, KVM_CLOCK_REALTIME, ClockAfter::CatchesUp), Duration::from_mins(1));
    assert_eq!(passed(40, KVM_CLOCK_REALTIME, ClockAfter::Continues), Duration::ZERO);
    assert_eq!(passed(140, KVM_CLOCK_REALTIME, ClockAfter::CatchesUp), Duration::ZERO);
    assert_eq!(passed(40, 0, ClockAfter::CatchesUp), Duration::ZERO);
}

#[test]
fn state_without_all_interrupt_controllers_is_refused() {
    let chips = |ids: &[u32]| ChipsetState {
        irqchips: ids.iter().map(|id| kvm_irqchip { chip_id: *id, ..Default::default() }).collect(),
        ..saved_at(0, 0)
    };
    assert!(chips(&CHIPS).check_chips().is_ok());
    for ids in [&[0, 1][..], &[0, 1, 2, 2], &[0, 1, 3], &[]] {
        let error = chips(ids).check_chips().unwrap_err().to_string();
        assert!(error.contains(&format!("{ids:?}")), "{error}");
    }
}

/// Whether this host has a KVM. Prints a line if not.
fn kvm_is_here() -> bool {
    let here = Path::new("/dev/kvm").exists();
    if !here {
        eprintln!("not run: there is no /dev/kvm here");
    }
    here
}

fn pics(vm: &VmFd) -> [kvm_pic_state; 2] {
    [KVM_IRQCHIP_PIC_MASTER, KVM_IRQCHIP_PIC_SLAVE]
        .map(|id| pic_state(&get_irqchip(vm, id).unwrap()).unwrap())
}

#[test]
fn pics_are_masked_before_a_guest_runs_and_after_a_restore() {
    if !kvm_is_here() {
        return;
    }
    let ram = GuestRam::map(2, HugePages::None, false).unwrap();
    let vm = Kvm::open().unwrap().create_vm().unwrap().map_ram(ram, false).unwrap();
    let (vm, _vcpus) = vm.create_irqchip().unwrap().create_vcpus(1).unwrap();
    assert_eq!(pics(&vm.shared_fd()).map(|pic| pic.imr), [0xff; 2]);

    // The state of a machine that was saved with unmasked PICs.
    let mut state = ChipsetState::save(&vm.shared_fd()).unwrap();
    for chip in &mut state.irqchips[..2] {
        chip.chip.pic = kvm_pic_state { imr: 0, ..pic_state(chip).unwrap() };
    }
    state.restore_irqchips(&vm.shared_fd()).unwrap();
    assert_eq!(pics(&vm.shared_fd()).map(|pic| pic.imr), [0xff; 2]);
}

/// A guest that enables its local APIC, routes the timer chip's line to vector 0x40, and writes to
/// the serial port in a loop whether that vector is pending (0 or 1). It leaves interrupts
/// disabled, so that the vector stays pending.
fn watching_guest() -> Elf {
    let store = |address: u32, value: u32| {
        // mov dword [address], value
        [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
    };
    let code = [
        store(0xfee0_00f0, 0x1ff),          // spurious vector register: enabled
        store(0xfec0_0000, 0x11),           // I/O APIC, line 0, high half
        store(0xfec0_0010, 0),              // to APIC 0
        store(0xfec0_0000, 0x10),           // low half
        store(0xfec0_0010, 0x40),           // vector 0x40, edge, not masked
        vec![0x66, 0xba, 0xf8, 0x03],       // mov dx, 0x3f8
        vec![0xa0, 0x20, 0x02, 0xe0, 0xfe], // again: mov al, [0xfee00220]
        vec![0xee, 0xeb, 0xf8],             // out dx, al; jmp again
    ];
    Elf::of(&code.concat())
}

fn serial(path: &Path) -> SerialSetup {
    SerialSetup {
        output: Some(Output::open(path).unwrap()),
        input: None,
        limit: RateLimiterConfig::default(),
    }
}

/// Waits until `enough` accepts the guest's output.
fn wait_for(path: &Path, enough: impl Fn(&[u8]) -> bool) -> Vec<u8> {
    let deadline = Instant::now() + TIMEOUT;
    loop {
        let output = fs::read(path).unwrap();
        if enough(&output) {
            return output;
        }
        assert!(
            Instant::now() < deadline,
            "the guest wrote {} bytes, the last {:?}",
            output.len(),
            output.last()
        );
        std::thread::yield_now();
    }
}

#[test]
fn timer_interrupt_right_after_a_restore_is_not_lost() {
    if !kvm_is_here() {
        return;
    }
    let config = MachineConfig { mem_size_mib: 4, ..MachineConfig::default() };
    let dir = tempfile::tempdir().unwrap();
    let mut kernel = tempfile::tempfile().unwrap();
    kernel.write_all(&watching_guest().bytes()).unwrap();
    let path = dir.path().join("first");
    let (events, _source) = event_channel().unwrap();
    let machine = Paused::build(Setup {
        config: &config,
        cpu_config: None,
        boot: BootFiles { kernel, initrd: None, cmdline: String::new() },
        serial: serial(&path),
        boot_timer: None,
        devices: DeviceSetup::default(),
        events,
    })
    .unwrap();
    let running = machine.resume().unwrap();
    assert_eq!(wait_for(&path, |output| !output.is_empty())[0], 0);
    let paused = running.pause().unwrap();

    // A one-shot timer that is due as soon as the timer chip gets its state.
    let mut state = paused.save().unwrap();
    let channel = &mut state.chipset.pit.channels[0];
    (channel.mode, channel.count, channel.gate, channel.rw_mode) = (0, 1, 1, 3);
    for round in 0..20 {
        let ram = GuestRam::map(config.mem_size_mib, config.huge_pages, false).unwrap();
        let mut bytes = vec![0; (config.mem_size_mib as usize) << 20];
        paused.ram().memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
        ram.memory().write_slice(&bytes, GuestAddress(0)).unwrap();
        let path = dir.path().join(format!("round{round}"));
        let (events, _source) = event_channel().unwrap();
        let restored = Paused::restore(Restore {
            config: &config,
            cpu_config: None,
            state: &state,
            ram,
            page_server: None,
            serial: serial(&path),
            devices: DeviceSetup::default(),
            clock: ClockAfter::Continues,
            stop: None,
            events,
        })
        .unwrap();
        let _running = restored.resume().unwrap();
        wait_for(&path, |output| output.ends_with(&[1]));
    }
}
