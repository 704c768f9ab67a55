//! A PCI bus with several functions.

use std::io;
use std::sync::{Arc, Mutex};

use super::{Input, MAX_ACTS, RAM_MIB, SIZE};
use crate::testing::{Echo, FakeIoEventFds, TestWorker, WINDOW, reused_ram};
use crate::transport::pci::{BAR_SIZE, MsiMessage, MsiVectors, PciRoot};
use crate::transport::{Attachment, IoEventFds, NotifyMatch};

/// Queues of the functions in slots 1, 2 and 3.
const QUEUES: [u64; 3] = [1, 3, 2];

struct NoVectors;

impl MsiVectors for NoVectors {
    fn set(&self, _: u16, _: MsiMessage) -> io::Result<()> {
        Ok(())
    }

    fn trigger(&self, _: u16) {}
}

/// A hostile guest on a bus: configuration spaces by either way, BARs anywhere, also in one place.
/// At the end it assigns them by the book, and each function is where it should be, with its kicks.
pub fn pci_bus(data: &[u8]) {
    let mut input = Input(data);
    let (mut worker, kernel) = (TestWorker::new(), Arc::<FakeIoEventFds>::default());
    let root = PciRoot::new(WINDOW, Arc::clone(&kernel) as Arc<dyn IoEventFds>);
    let bar = |place: u64| WINDOW.start + place * BAR_SIZE;
    for (place, queues) in (0..).zip(QUEUES) {
        let (device, _) = Echo::new(&vec![SIZE; queues as usize], 0);
        let attachment = Attachment {
            name: "test".into(),
            device: Box::new(device),
            memory: reused_ram(RAM_MIB),
            workers: worker.workers(),
            failures: Arc::new(()),
        };
        let function =
            root.new_function(attachment, bar(place), Box::new(NoVectors)).expect("a device can be attached");
        root.plug(None, Arc::new(Mutex::new(function))).expect("the slot is free");
    }
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        act(&mut input, &root);
        worker.run();
    }

    let slots = || (1u64..).zip(QUEUES);
    for (slot, _) in slots() {
        root.write_ecam(slot << 15 | 4, &[0, 0]);
    }
    // The other way round than in the beginning.
    let place = |slot: u64| bar(QUEUES.len() as u64 - slot);
    for (slot, _) in slots() {
        root.write_ecam(slot << 15 | 0x10, &place(slot).to_le_bytes());
        root.write_ecam(slot << 15 | 4, &[6, 0]);
    }
    let mut wanted = Vec::new();
    for (slot, queues) in slots() {
        let mut count = [0; 2];
        assert!(root.read_bar(place(slot) + 0x12, &mut count), "slot {slot} is not decoded");
        assert_eq!(u64::from(u16::from_le_bytes(count)), queues, "slot {slot} is elsewhere");
        wanted.extend((0..queues).map(|queue| place(slot) + 0x6000 + 4 * queue));
    }
    let mut registered: Vec<_> = kernel.registered();
    registered.sort_by_key(|(addr, _)| *addr);
    wanted.sort_unstable();
    assert_eq!(registered, wanted.into_iter().map(|addr| (addr, NotifyMatch::Any)).collect::<Vec<_>>());
}

fn act(input: &mut Input<'_>, root: &PciRoot) {
    let (len, mut data) = input.access();
    let data = &mut data[..len];
    let (how, at, slot) = (input.u8(), input.u16(), u64::from(input.u8() % 6));
    let ecam = slot << 15 | u64::from(at & 0x7fff & if how & 0x80 == 0 { 0x1ff } else { !0 });
    let addr = match how >> 5 & 3 {
        0 => input.u64(),
        _ => WINDOW.start + slot * BAR_SIZE + super::pci_offset(at),
    };
    match how % 9 {
        0 => root.write_ecam(ecam, data),
        1 => root.read_ecam(ecam, data),
        2 => root.write_port(at % 10, data),
        3 => root.read_port(at % 10, data),
        // The address register, with something that may be one.
        4 => root.write_port(0, &(1 << 31 | (slot as u32) << 11 | u32::from(at & 0x7ff)).to_le_bytes()),
        5 => _ = root.write_bar(addr, data),
        6 => _ = root.read_bar(addr, data),
        7 => root.write_ecam(slot << 15 | 0x10, &(WINDOW.start + u64::from(at % 5) * BAR_SIZE).to_le_bytes()),
        _ => root.write_ecam(slot << 15 | 4, &[(at & 7) as u8, 0]),
    }
}
