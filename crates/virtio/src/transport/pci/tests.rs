//! What is PCI's own: the configuration space, the BAR, MSI-X, and the bus.

use std::sync::{Arc, Mutex};

use super::*;
use crate::device::Device;
use crate::testing::{
    BAR, DriverQueue, Echo, FakeIoEventFds, Guest, Kind, TestWorker, WINDOW, find_capability, guest_ram,
};
use crate::transport::{Attachment, IoEventFds, NotifyMatch};

const DATA: u64 = 0x10_0000;

fn guest() -> Guest {
    Guest::new(Kind::Pci, Box::new(Echo::new(&[64, 64], 0).0))
}

fn config<const N: usize>(guest: &mut Guest, at: usize) -> [u8; N] {
    let mut data = [0; N];
    guest.pci().read_config(at, &mut data);
    data
}

fn config32(guest: &mut Guest, at: usize) -> u32 {
    u32::from_le_bytes(config(guest, at))
}

fn bar32(guest: &mut Guest, at: u64) -> u32 {
    let mut data = [0; 4];
    guest.pci().read_bar(at, &mut data);
    u32::from_le_bytes(data)
}

fn set_decoding(guest: &mut Guest, on: bool) {
    guest.pci().write_config(4, &(if on { 6u16 } else { 0 }).to_le_bytes());
}

#[test]
fn the_header_says_what_the_device_is() {
    let mut guest = guest();
    assert_eq!(config32(&mut guest, 0), 0x1043_1af4);
    assert_eq!(config32(&mut guest, 8), 0x0780_0001);
    assert_eq!(config::<1>(&mut guest, 0x0e), [0], "a type 0 header, one function");
    assert_eq!(config32(&mut guest, 0x2c), 0x1043_1af4);
    assert_eq!(config::<1>(&mut guest, 0x3d), [0], "no pin interrupt");
    assert_eq!(config::<2>(&mut guest, 6), [0x10, 0], "there are capabilities");
    guest.pci().write_config(0, &[0xff; 4]);
    guest.pci().write_config(8, &[0xff; 4]);
    assert_eq!(config32(&mut guest, 0), 0x1043_1af4);
    assert_eq!(config32(&mut guest, 8), 0x0780_0001);
}

#[test]
fn the_capabilities_lead_to_every_part_of_the_bar() {
    let mut guest = guest();
    let mut found = Vec::new();
    let mut at = usize::from(config::<1>(&mut guest, 0x34)[0]);
    while at != 0 {
        let [id, next, len, kind] = config(&mut guest, at);
        if id == 9 {
            let bar = config::<1>(&mut guest, at + 4)[0];
            found.push((kind, len, bar, config32(&mut guest, at + 8), config32(&mut guest, at + 12)));
        } else {
            assert_eq!(id, 0x11);
            assert_eq!(config::<2>(&mut guest, at + 2), [2, 0], "three vectors");
            assert_eq!(config32(&mut guest, at + 4), 0x8000);
            assert_eq!(config32(&mut guest, at + 8), 0x48000);
        }
        if kind == 2 && id == 9 {
            assert_eq!(config32(&mut guest, at + 16), 4);
        }
        at = next.into();
    }
    assert_eq!(
        found,
        [
            (1, 16, 0, 0, 0x1000),
            (3, 16, 0, 0x2000, 0x1000),
            (4, 16, 0, 0x4000, 0x1000),
            (2, 20, 0, 0x6000, 0x1000),
            (5, 20, 0, 0, 0)
        ]
    );
}

#[test]
fn the_bar_is_sized_and_put_back_without_touching_the_kernel() {
    let mut guest = guest();
    set_decoding(&mut guest, true);
    let before = guest.io_events.registered();
    let original: [u8; 8] = config(&mut guest, 0x10);
    assert_eq!(u64::from_le_bytes(original), BAR | 4);
    set_decoding(&mut guest, false);
    guest.pci().write_config(0x10, &[0xff; 4]);
    guest.pci().write_config(0x14, &[0xff; 4]);
    let size = u64::from_le_bytes(config(&mut guest, 0x10));
    assert_eq!(!(size & !0xf) + 1, BAR_SIZE);
    assert_eq!(size & 0xf, 4, "64-bit memory");
    guest.pci().write_config(0x10, &original);
    set_decoding(&mut guest, true);
    assert_eq!(guest.io_events.registered(), before);
    for at in [0x18, 0x1c, 0x20, 0x24, 0x30] {
        guest.pci().write_config(at, &[0xff; 4]);
        assert_eq!(config32(&mut guest, at), 0, "there is no other BAR");
    }
}

#[test]
fn kicks_follow_a_moved_bar_inside_the_window() {
    let mut guest = guest();
    set_decoding(&mut guest, true);
    let moved = BAR + 4 * BAR_SIZE;
    guest.pci().write_config(0x10, &moved.to_le_bytes());
    let kicks = |at: u64| vec![(at + 0x6000, NotifyMatch::Any), (at + 0x6004, NotifyMatch::Any)];
    assert_eq!(guest.io_events.registered(), kicks(moved));
    for outside in [0, 0x1000_0000, WINDOW.start - BAR_SIZE, WINDOW.end, !0 << 19] {
        guest.pci().write_config(0x10, &outside.to_le_bytes());
        assert_eq!(guest.io_events.registered(), kicks(moved), "{outside:#x}");
    }
    let last = WINDOW.end - BAR_SIZE;
    guest.pci().write_config(0x10, &last.to_le_bytes());
    assert_eq!(guest.io_events.registered(), kicks(last));
}

#[test]
fn config_accesses_change_only_writable_bits() {
    let mut guest = guest();
    let before: [u8; 256] = config(&mut guest, 0);
    for at in (0..300).chain([0xfff, 0x1000, usize::MAX]) {
        for len in 0..=8 {
            guest.pci().write_config(at, &[0xff; 8][..len]);
            let mut data = [0xaa; 8];
            guest.pci().read_config(at, &mut data[..len]);
            if at >= 256 {
                assert_eq!(data[..len], [0; 8][..len]);
            }
        }
    }
    let after: [u8; 256] = config(&mut guest, 0);
    let msix = find_capability(guest.pci(), 0x11);
    let window = msix - 20;
    for (at, (before, after)) in before.iter().zip(&after).enumerate() {
        let writable = matches!(at, 4 | 5 | 0xc | 0x3c | 0x10..0x18)
            || at == msix + 3
            || at == window + 4
            || (window + 8..window + 20).contains(&at);
        assert!(before == after || writable, "{at:#x}: {before:#x} became {after:#x}");
    }
}

#[test]
fn the_window_reaches_the_bar_through_the_configuration_space() {
    let mut guest = guest();
    let window = find_capability(guest.pci(), 0x11) - 20;
    let mut access = |offset: u32, len: u32, write: Option<&[u8]>| {
        guest.pci().write_config(window + 8, &offset.to_le_bytes());
        guest.pci().write_config(window + 12, &len.to_le_bytes());
        match write {
            Some(data) => guest.pci().write_config(window + 16, data),
            None => return Some(config32(&mut guest, window + 16)),
        }
        None
    };
    access(0x14, 1, Some(&[3]));
    assert_eq!(access(0x14, 1, None), Some(3), "the status");
    assert_eq!(access(0x12, 2, None), Some(2), "the number of queues");
    access(0x00, 4, Some(&1u32.to_le_bytes()));
    assert_eq!(access(0x04, 4, None), Some(1), "VERSION_1");
    // What is not an access does nothing.
    for (offset, len) in [(0x14, 0), (0x14, 3), (0x14, 8), (0x15, 4), (0x7_fffe, 4), (u32::MAX, 1)] {
        access(offset, len, Some(&[0xff; 4]));
    }
    assert_eq!(access(0x14, 1, None), Some(3));
    // Another BAR does not exist.
    guest.pci().write_config(window + 4, &[1]);
    let status = |guest: &mut Guest| bar32(guest, 0x14) as u8;
    guest.pci().write_config(window + 16, &[0xff; 4]);
    assert_eq!(status(&mut guest), 3);
}

#[test]
fn a_masked_vector_stays_pending_until_it_is_unmasked() {
    let mut guest = guest();
    let mut driver = guest.start(0x1000, 64, false);
    assert_eq!(guest.interrupts.take(), 0);
    let message = MsiMessage { addr: 0xfee0_0000, data: 0x41 };
    let mut serve = |guest: &mut Guest| {
        driver.add(&[(DATA, 4)], &[(DATA + 8, 4)]).unwrap();
        driver.publish();
        guest.kick(0);
        driver.take_used().unwrap();
    };
    serve(&mut guest);
    assert_eq!(guest.interrupts.take_vector(1), Some((message, 1)));
    let mask = |guest: &mut Guest, on: u32| guest.pci().write_bar(0x801c, &on.to_le_bytes());
    mask(&mut guest, 1);
    serve(&mut guest);
    serve(&mut guest);
    assert_eq!(guest.interrupts.take_vector(1), Some((message, 0)));
    assert_eq!(bar32(&mut guest, 0x48000), 0b10);
    // A new message, while it is masked.
    guest.pci().write_bar(0x8018, &0x99u32.to_le_bytes());
    mask(&mut guest, 0);
    assert_eq!(guest.interrupts.take_vector(1), Some((MsiMessage { data: 0x99, ..message }, 1)));
    assert_eq!(bar32(&mut guest, 0x48000), 0);

    let control = find_capability(guest.pci(), 0x11) + 2;
    guest.pci().write_config(control, &0xc000u16.to_le_bytes());
    serve(&mut guest);
    assert_eq!(guest.interrupts.take(), 0, "the function is masked");
    guest.pci().write_config(control, &0x8000u16.to_le_bytes());
    assert_eq!(guest.interrupts.take(), 1);
    guest.pci().write_config(control, &0u16.to_le_bytes());
    serve(&mut guest);
    assert_eq!(guest.interrupts.take(), 0, "MSI-X is off");
    guest.reset();
    guest.pci().write_config(control, &0x8000u16.to_le_bytes());
    assert_eq!(guest.interrupts.take(), 0, "a reset forgets what is pending");
}

#[test]
fn vectors_that_do_not_exist_are_refused() {
    let mut guest = guest();
    for register in [0x10, 0x1a] {
        for (vector, reads) in [(2u16, 2u32), (3, 0xffff), (0xffff, 0xffff), (0, 0)] {
            guest.pci().write_bar(register, &vector.to_le_bytes());
            assert_eq!(bar32(&mut guest, register) & 0xffff, reads);
        }
    }
    guest.select_queue(9);
    guest.pci().write_bar(0x1a, &0u16.to_le_bytes());
    assert_eq!(bar32(&mut guest, 0x1a) & 0xffff, 0xffff);
}

#[test]
fn the_msix_table_takes_whole_words_and_reads_back() {
    let mut guest = guest();
    guest.pci().write_bar(0x8010, &0x1122_3344_5566_7788u64.to_le_bytes());
    guest.pci().write_bar(0x8018, &0x99u32.to_le_bytes());
    for (at, data) in
        [(0x8011u64, &[0xff; 4][..]), (0x8010, &[0xff; 1]), (0x8012, &[0xff; 2]), (0x8014, &[0xff; 8])]
    {
        guest.pci().write_bar(at, data);
    }
    let mut entry = [0; 16];
    guest.pci().read_bar(0x8010, &mut entry);
    assert_eq!(entry[..8], 0x1122_3344_5566_7788u64.to_le_bytes());
    assert_eq!(entry[8..], [0x99, 0, 0, 0, 1, 0, 0, 0], "masked at first");
    // Beyond the table and the pending bits.
    for at in [0x8030u64, 0x47ff8, 0x48001, 0x4fff8, 0x7fff8, BAR_SIZE - 1, BAR_SIZE, u64::MAX] {
        guest.pci().write_bar(at, &[0xff; 8]);
        let mut data = [0xaa; 8];
        guest.pci().read_bar(at, &mut data);
        assert_eq!(data, [0; 8], "{at:#x}");
    }
}

#[test]
fn reading_the_isr_status_clears_it() {
    let mut guest = guest();
    let driver = guest.start(0x1000, 64, true);
    driver.set_avail_idx(1000);
    guest.kick(0);
    assert_eq!(bar32(&mut guest, 0x2000), 2, "a configuration change: the device needs a reset");
    assert_eq!(bar32(&mut guest, 0x2000), 0);
}

#[test]
fn registers_are_written_whole() {
    let mut guest = guest();
    guest.negotiate(true);
    guest.select_queue(0);
    let setup = DriverQueue::new(&guest.ram, 0x1000, 64, 0).state();
    // 64-bit registers also in one go.
    guest.pci().write_bar(0x20, &setup.desc_table.to_le_bytes());
    guest.pci().write_bar(0x28, &[0xff; 3]);
    guest.pci().write_bar(0x18, &[32]);
    guest.pci().write_bar(0x1c, &0u16.to_le_bytes());
    guest.pci().write_bar(0x1c, &2u16.to_le_bytes());
    assert_eq!(u64::from(bar32(&mut guest, 0x20)), setup.desc_table);
    assert_eq!(bar32(&mut guest, 0x28), 0);
    assert_eq!(bar32(&mut guest, 0x18) & 0xffff, 64);
    assert!(!guest.queue_ready());
    let mut whole = [0; 0x40];
    guest.pci().read_bar(0, &mut whole);
    assert_eq!(whole[0x12], 2, "reads may have any size");
}

fn root() -> (PciRoot, Arc<FakeIoEventFds>) {
    let io_events = Arc::<FakeIoEventFds>::default();
    (PciRoot::new(WINDOW, Arc::clone(&io_events) as Arc<dyn IoEventFds>), io_events)
}

fn function(bar: u64, root: &PciRoot) -> Arc<Mutex<PciTransport>> {
    struct NoVectors;
    impl MsiVectors for NoVectors {
        fn set(&self, _: u16, _: MsiMessage) -> std::io::Result<()> {
            Ok(())
        }
        fn trigger(&self, _: u16) {}
    }
    let device: Box<dyn Device> = Box::new(Echo::new(&[64], 0).0);
    let attachment = Attachment {
        name: "test".into(),
        device,
        memory: guest_ram(1),
        workers: TestWorker::new().workers(),
        failures: Arc::new(()),
    };
    let function = root.new_function(attachment, bar, Box::new(NoVectors)).unwrap();
    Arc::new(Mutex::new(function))
}

#[test]
fn the_bus_finds_functions_by_slot_and_by_address() {
    let (root, _) = root();
    let bar = |slot: u8| BAR + u64::from(slot) * BAR_SIZE;
    for slot in 1..=31 {
        assert_eq!(root.plug(None, function(bar(slot), &root)), Ok(slot));
    }
    assert_eq!(root.plug(None, function(bar(40), &root)), Err(SlotError::Full));
    assert_eq!(root.plug(Some(3), function(bar(41), &root)), Err(SlotError::Taken(3)));
    assert_eq!(root.plug(Some(0), function(bar(42), &root)), Err(SlotError::Number(0)));
    assert_eq!(root.plug(Some(32), function(bar(43), &root)), Err(SlotError::Number(32)));

    let ecam = |address: u64| {
        let mut data = [0; 4];
        root.read_ecam(address, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!(ecam(0), 0x0d57_8086);
    assert_eq!(ecam(8) >> 8, 0x06_0000);
    assert_eq!(ecam(31 << 15), 0x1043_1af4);
    for nothing in [1 << 12, 1 << 15 | 1 << 12, 1 << 20, 255 << 20, 1 << 28, u64::MAX] {
        assert_eq!(ecam(nothing), u32::MAX, "{nothing:#x}");
        root.write_ecam(nothing, &[0xff; 4]);
    }

    let mut data = [0; 2];
    assert!(!root.read_bar(bar(7) + 0x12, &mut data), "it is not decoded");
    assert_eq!(data, [0xff; 2]);
    root.write_ecam(7 << 15 | 4, &[6, 0]);
    assert!(root.read_bar(bar(7) + 0x12, &mut data));
    assert_eq!(data, [1, 0]);
    assert!(root.write_bar(bar(7) + 0x14, &[1]));
    assert!(!root.read_bar(bar(8), &mut data) && !root.read_bar(bar(7) - 1, &mut data));
    assert!(!root.read_bar(u64::MAX, &mut data));

    assert!(root.unplug(7).is_some() && root.unplug(7).is_none() && root.unplug(0).is_none());
    assert_eq!(ecam(7 << 15), u32::MAX);
    assert_eq!(root.plug(None, function(bar(44), &root)), Ok(7));
}

#[test]
fn the_old_ports_reach_the_same_registers() {
    let (root, _) = root();
    root.plug(None, function(BAR, &root)).unwrap();
    let read = |offset: u16, len: usize| {
        let mut data = [0; 4];
        root.read_port(offset, &mut data[..len]);
        u32::from_le_bytes(data)
    };
    root.write_port(3, &[1]);
    assert_eq!(read(0, 4), 0, "only 32 bits at once set the address");
    assert_eq!(read(4, 4), u32::MAX, "not enabled");
    root.write_port(0, &0x8000_0000u32.to_le_bytes());
    assert_eq!((read(0, 4), read(4, 4)), (0x8000_0000, 0x0d57_8086));
    root.write_port(0, &0x8000_0800u32.to_le_bytes());
    assert_eq!((read(4, 4), read(6, 2), read(7, 1)), (0x1043_1af4, 0x1043, 0x10));
    root.write_port(0, &0x8000_083cu32.to_le_bytes());
    root.write_port(4, &[0x5a]);
    assert_eq!(read(4, 1), 0x5a);
    root.write_port(0, &0x8001_0800u32.to_le_bytes());
    assert_eq!(read(4, 4), u32::MAX, "another bus");
    let state = root.save();
    let (other, _) = self::root();
    other.restore(&state);
    assert_eq!(other.save(), state);
}

#[test]
fn two_functions_in_one_place_answer_as_one() {
    let (root, io_events) = root();
    for slot in 1..=2u64 {
        root.plug(None, function(BAR + slot * BAR_SIZE, &root)).unwrap();
        root.write_ecam(slot << 15 | 0x10, &BAR.to_le_bytes());
        root.write_ecam(slot << 15 | 4, &[6, 0]);
    }
    assert!(root.write_bar(BAR + 0x14, &[1]));
    let mut status = [0];
    assert!(root.read_bar(BAR + 0x14, &mut status));
    assert_eq!(status, [1]);
    assert_eq!(io_events.registered(), [(BAR + 0x6000, NotifyMatch::Any)], "only one can have the kicks");
    // It gets its kicks once it is alone.
    root.write_ecam(2 << 15 | 0x10, &(BAR + BAR_SIZE).to_le_bytes());
    assert_eq!(io_events.registered().len(), 2);
}

#[test]
fn functions_with_exchanged_bars_keep_their_kicks_after_restore() {
    fn enabled(root: &PciRoot, io_events: &FakeIoEventFds) -> [bool; 3] {
        // Writing a kick: to the kernel's table, or to the function that decodes the address.
        [0, 1, 2].map(|n| {
            io_events.write(BAR + n * BAR_SIZE + 0x6000, 0) && {
                root.read_bar(BAR + n * BAR_SIZE, &mut [0; 4])
            }
        })
    }
    let ((here, kicks_here), (there, kicks_there)) = (root(), root());
    let bars = [BAR, BAR + BAR_SIZE, BAR + 2 * BAR_SIZE];
    let functions = bars.map(|bar| function(bar, &here));
    for (slot, function) in (1u64..).zip(&functions) {
        here.plug(None, Arc::clone(function)).unwrap();
        here.write_ecam(slot << 15 | 0x10, &bars[slot as usize % 3].to_le_bytes());
        here.write_ecam(slot << 15 | 4, &[6, 0]);
    }
    assert_eq!(enabled(&here, &kicks_here), [true; 3]);
    let restored = bars.map(|bar| function(bar, &there));
    for (function, from) in restored.iter().zip(&functions) {
        there.plug(None, Arc::clone(function)).unwrap();
        let state = from.lock().unwrap().save();
        function.lock().unwrap().restore(&state).unwrap();
    }
    assert_eq!(enabled(&there, &kicks_there), [true; 3]);
}
