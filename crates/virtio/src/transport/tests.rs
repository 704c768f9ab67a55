//! What a driver can rely on, on either transport: each test runs on both.

mod restore;

use std::io;
use std::sync::Arc;
use std::time::Duration;

use proptest::prelude::*;
use vm_memory::{Bytes, GuestAddress};

use super::mmio::MmioTransport;
use super::{IoEventFds, NotifyMatch, RestoreError, Status};
use crate::device::{ActivateError, Activation, ConfigField, Device, DeviceKind, DeviceState, feature};
use crate::queue::QueueState;
use crate::testing::{
    DriverQueue, Echo, EchoControl, FakeIoEventFds, Guest, Kind, RUNNING, TestWorker, TransportState, Used,
    reused_ram,
};
use crate::worker::{Task, Workers};
use sync::EventFd;

const BASE: u64 = 0x1000;
const DATA: u64 = 0x10_0000;
const OWN_FEATURES: u64 = 1 << 3 | 1 << 40;
const FEATURES_OK: u8 = Status::ACKNOWLEDGE | Status::DRIVER | Status::FEATURES_OK;

fn echo(kind: Kind, sizes: &[u16]) -> (Guest, Arc<EchoControl>) {
    let (device, control) = Echo::new(sizes, OWN_FEATURES);
    (Guest::new(kind, Box::new(device)), control)
}

/// Runs a test on both transports.
fn on_both(test: impl Fn(Kind)) {
    for kind in [Kind::Mmio, Kind::Pci] {
        test(kind);
    }
}

/// Has the device echo one request.
fn request(guest: &mut Guest, driver: &mut DriverQueue) {
    driver.add(&[(DATA, 4)], &[(DATA + 0x1000, 4)]).unwrap();
    if driver.publish() {
        guest.kick(0);
    }
}

/// A fresh guest around the same memory, made what `state` says.
fn restored(kind: Kind, guest: &Guest, state: &TransportState, sizes: &[u16]) -> Guest {
    let (device, _) = Echo::new(sizes, OWN_FEATURES);
    let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), TestWorker::new());
    copy.restore(state).unwrap();
    copy
}

fn echoes(guest: &mut Guest, driver: &mut DriverQueue) -> bool {
    guest.ram.memory().write_obj(0x1234_5678u32, GuestAddress(DATA)).unwrap();
    guest.ram.memory().write_obj(0u32, GuestAddress(DATA + 0x1000)).unwrap();
    request(guest, driver);
    driver.take_used().is_some_and(|used| used.written == 4)
        && guest.ram.memory().read_obj::<u32>(GuestAddress(DATA + 0x1000)).unwrap() == 0x1234_5678
}

#[test]
fn requests_of_a_correct_driver_are_served() {
    on_both(|kind| {
        for event_idx in [false, true] {
            let (mut guest, control) = echo(kind, &[64]);
            let mut driver = guest.start(BASE, 64, event_idx);
            assert_eq!(guest.status(), RUNNING);
            assert_eq!(control.counts(), (1, 0, 0));
            for _ in 0..200 {
                driver.enable_interrupts();
                assert!(echoes(&mut guest, &mut driver));
                assert_eq!(guest.interrupts.take(), 1);
            }
        }
    });
}

#[test]
fn only_offered_features_are_accepted() {
    on_both(|kind| {
        let (mut guest, control) = echo(kind, &[64]);
        let offered = guest.device_features();
        let ring = feature::VERSION_1 | feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;
        assert_eq!(offered, OWN_FEATURES | ring);
        for (features, fits) in [
            (offered, true),
            (feature::VERSION_1, true),
            (offered & !feature::VERSION_1, true),
            (0, true),
            (1, false),
            (feature::VERSION_1 | 1, false),
            (feature::VERSION_1 | 1 << 63, false),
            (u64::MAX, false),
        ] {
            guest.reset();
            guest.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
            guest.set_driver_features(features);
            guest.set_status(FEATURES_OK);
            assert_eq!(guest.status() & Status::FEATURES_OK != 0, fits, "{features:#x}");
            guest.set_status(RUNNING);
            assert_eq!(guest.status() & Status::DRIVER_OK != 0, fits);
        }
        assert_eq!(control.counts().0, 0, "a device without its queue is not activated");
    });
}

#[test]
fn a_driver_without_version_1_is_served_and_restored() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        let mut driver = guest.start_without(BASE, 64, feature::VERSION_1);
        assert_eq!(guest.status(), RUNNING);
        assert!(echoes(&mut guest, &mut driver));
        let mut state = guest.save();
        assert_eq!(state.common().driver_features & feature::VERSION_1, 0);
        let mut copy = restored(kind, &guest, &state, &[64]);
        assert!(echoes(&mut copy, &mut driver));
        let mut again = copy.start_without(BASE, 64, u64::MAX);
        assert!(echoes(&mut copy, &mut again), "without any feature");
    });
}

/// An echo device with fields that depend on its two features.
struct WithFields(Echo);

impl Device for WithFields {
    fn kind(&self) -> DeviceKind {
        self.0.kind()
    }
    fn features(&self) -> u64 {
        self.0.features()
    }
    fn queue_sizes(&self) -> &[u16] {
        self.0.queue_sizes()
    }
    fn read_config(&self, offset: u64, data: &mut [u8]) {
        self.0.read_config(offset, data);
    }
    fn config_fields(&self) -> &'static [ConfigField] {
        const FIELDS: [ConfigField; 3] = [
            ConfigField::new(2..6, 1 << 3),
            ConfigField { bytes: 8..10, feature: 1 << 40, hint: true },
            ConfigField::new(12..13, 1 << 50),
        ];
        &FIELDS
    }
    fn activate(&mut self, activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        self.0.activate(activation)
    }
    fn reset(&mut self) {
        self.0.reset();
    }
    fn save(&self) -> DeviceState {
        self.0.save()
    }
}

/// Which of the configuration space's 20 bytes are not 0.
fn visible_bytes(guest: &mut Guest) -> Vec<usize> {
    let mut bytes = [0; 24];
    guest.read_config(0, &mut bytes);
    for (offset, len) in (0..20).flat_map(|offset| [1, 2, 4, 8].map(|len| (offset, len))) {
        let mut part = [0; 8];
        guest.read_config(offset as u64, &mut part[..len]);
        let end = (offset + len).min(bytes.len());
        assert_eq!(part[..end - offset], bytes[offset..end], "{len} bytes at {offset}");
    }
    (0..20).filter(|at| bytes[*at] != 0).collect()
}

#[test]
fn config_fields_of_features_that_are_not_accepted_are_0() {
    on_both(|kind| {
        let without = |hidden: &[usize]| (0..20).filter(|at| !hidden.contains(at)).collect::<Vec<_>>();
        let (device, _) = Echo::new(&[64], OWN_FEATURES);
        let mut guest = Guest::new(kind, Box::new(WithFields(device)));
        assert_eq!(visible_bytes(&mut guest), without(&[8, 9, 12]), "offered, but for hints");
        guest.negotiate_without(0);
        assert_eq!(visible_bytes(&mut guest), without(&[12]));
        guest.negotiate_without(1 << 3);
        assert_eq!(visible_bytes(&mut guest), without(&[2, 3, 4, 5, 12]));
        guest.start_without(BASE, 64, OWN_FEATURES);
        let hidden = without(&[2, 3, 4, 5, 8, 9, 12]);
        assert_eq!(visible_bytes(&mut guest), hidden);
        let state = guest.save();
        let (device, _) = Echo::new(&[64], OWN_FEATURES);
        let mut copy = Guest::with(kind, Box::new(WithFields(device)), guest.ram.clone(), TestWorker::new());
        copy.restore(&state).unwrap();
        assert_eq!(visible_bytes(&mut copy), hidden, "restored");
        copy.reset();
        assert_eq!(visible_bytes(&mut copy), without(&[8, 9, 12]), "reset");
    });
}

#[test]
fn status_bits_are_set_in_order_and_cleared_by_reset_only() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        for too_early in [Status::DRIVER, Status::FEATURES_OK, Status::DRIVER_OK, 0x10, 0x20] {
            guest.set_status(too_early);
            assert_eq!(guest.status(), 0);
        }
        guest.set_status(Status::DEVICE_NEEDS_RESET);
        assert_eq!(guest.status(), 0, "that bit is the device's");
        guest.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        guest.set_status(Status::ACKNOWLEDGE);
        assert_eq!(guest.status(), Status::ACKNOWLEDGE | Status::DRIVER);
        guest.set_status(Status::FAILED);
        assert_eq!(guest.status(), Status::ACKNOWLEDGE | Status::DRIVER | Status::FAILED);
        guest.set_status(0);
        assert_eq!(guest.status(), 0);
    });
}

#[test]
fn negotiated_features_stay() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        let features = guest.negotiate(false);
        guest.set_driver_features(0);
        let mut driver = DriverQueue::new(&guest.ram, BASE, 64, features);
        guest.select_queue(0);
        guest.set_up_queue(&driver.state());
        guest.map_vectors();
        guest.set_status(RUNNING);
        guest.worker.run();
        assert_eq!(guest.status(), RUNNING);
        assert!(echoes(&mut guest, &mut driver));
        let mut state = guest.save();
        assert_eq!(state.common().driver_features, features);
    });
}

#[test]
fn queues_are_set_up_between_features_ok_and_driver_ok() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64, 1024]);
        let setup = DriverQueue::new(&guest.ram, BASE, 64, 0).state();
        guest.set_status(Status::ACKNOWLEDGE | Status::DRIVER);
        guest.set_up_queue(&setup);
        assert!(!guest.queue_ready(), "too early");

        let mut driver = guest.start(BASE, 64, true);
        let mut before = guest.save();
        guest.select_queue(0);
        let elsewhere = QueueState { size: 8, desc_table: 0x2_0000, avail_ring: 0x3_0000, ..setup };
        guest.set_up_queue(&elsewhere);
        guest.select_queue(1);
        guest.set_up_queue(&elsewhere);
        assert!(!guest.queue_ready(), "too late");
        let mut after = guest.save();
        assert_eq!(after.common().queues, before.common().queues);
        assert!(echoes(&mut guest, &mut driver));
    });
}

#[test]
fn missing_queues_read_as_0() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64, 1024]);
        guest.negotiate(true);
        for (index, size) in [(0, 64), (1, 1024), (2, 0), (u16::MAX, 0)] {
            guest.select_queue(index);
            assert_eq!(guest.queue_max_size(), size);
            assert!(!guest.queue_ready());
        }
        guest.set_up_queue(&DriverQueue::new(&guest.ram, BASE, 64, 0).state());
        assert!(!guest.queue_ready());
        guest.kick_slowly(7);
        guest.kick_slowly(u32::MAX);
    });
}

#[test]
fn a_queue_of_1024_works() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[1024]);
        let mut driver = guest.start(BASE, 1024, true);
        for _ in 0..512 {
            driver.add(&[(DATA, 4)], &[(DATA + 0x1000, 4)]).unwrap();
        }
        assert_eq!(driver.free(), 0);
        assert!(driver.publish());
        guest.kick(0);
        assert_eq!(std::iter::from_fn(|| driver.take_used()).count(), 512);
        assert_eq!(guest.interrupts.take(), 1, "one interrupt for the batch");
    });
}

#[test]
fn queue_at_an_invalid_address_needs_a_reset() {
    on_both(|kind| {
        let (mut guest, control) = echo(kind, &[64]);
        let good = DriverQueue::new(&guest.ram, BASE, 64, 0).state();
        let bad = [
            QueueState { size: 0, ..good },
            QueueState { size: 48, ..good },
            QueueState { size: 128, ..good },
            QueueState { desc_table: 8, ..good },
            QueueState { desc_table: 1 << 40, ..good },
            QueueState { avail_ring: 0xffff_ffff_ffff_fffe, ..good },
            QueueState { used_ring: (4 << 20) - 4, ..good },
        ];
        for (count, state) in (1..).zip(bad) {
            guest.negotiate(true);
            guest.select_queue(0);
            guest.set_up_queue(&state);
            guest.map_vectors();
            guest.interrupts.take();
            guest.set_status(RUNNING);
            assert_eq!(guest.status(), RUNNING | Status::DEVICE_NEEDS_RESET, "{state:x?}");
            assert_eq!(guest.interrupts.take(), 1, "the driver is told");
            assert_eq!(guest.broken_count(), count);
        }
        assert_eq!(control.counts(), (0, 0, 0));
        let mut driver = guest.start(BASE, 64, true);
        assert_eq!(guest.status(), RUNNING);
        assert!(echoes(&mut guest, &mut driver));
    });
}

#[test]
fn queue_left_disabled_needs_a_reset() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        guest.negotiate(true);
        guest.set_status(RUNNING);
        assert_eq!(guest.status(), RUNNING | Status::DEVICE_NEEDS_RESET);
    });
}

#[test]
fn broken_ring_kills_the_device_until_reset() {
    on_both(|kind| {
        let (mut guest, control) = echo(kind, &[64]);
        let driver = guest.start(BASE, 64, true);
        guest.interrupts.take();
        driver.set_avail_idx(1000);
        guest.kick(0);
        assert_eq!(guest.status(), RUNNING | Status::DEVICE_NEEDS_RESET);
        assert_eq!((guest.interrupts.take(), guest.broken_count()), (1, 1));
        driver.set_avail_idx(1);
        guest.kick(0);
        assert_eq!(driver.used_idx(), 0, "it does nothing more");
        assert_eq!(guest.broken_count(), 1);
        let mut driver = guest.start(BASE, 64, true);
        assert_eq!(control.counts(), (2, 1, 1));
        assert!(echoes(&mut guest, &mut driver));
    });
}

#[test]
fn reset_restores_every_register() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64, 32]);
        let mut fresh = guest.save();
        let mut driver = guest.start(BASE, 64, true);
        assert!(echoes(&mut guest, &mut driver));
        guest.select_queue(1);
        guest.reset();
        let mut after = guest.save();
        assert_eq!(after.common(), fresh.common());
        if let (TransportState::Pci(after), TransportState::Pci(fresh)) = (&after, &fresh) {
            assert_eq!((after.isr, after.config_vector), (fresh.isr, fresh.config_vector));
            assert_eq!(after.queue_vectors, fresh.queue_vectors);
        }
    });
}

#[test]
fn reset_during_io_completes_when_the_device_has_drained() {
    on_both(|kind| {
        let (mut guest, control) = echo(kind, &[64]);
        let mut driver = guest.start(BASE, 64, true);
        control.hold(0);
        guest.worker.run();
        request(&mut guest, &mut driver);
        request(&mut guest, &mut driver);
        guest.set_status(0);
        guest.worker.run();
        assert_eq!(guest.status(), RUNNING, "two requests are in flight");
        // All other writes mean nothing meanwhile.
        guest.set_status(Status::ACKNOWLEDGE);
        guest.set_driver_features(0);
        guest.select_queue(0);
        guest.set_up_queue(&DriverQueue::new(&guest.ram, 0x2_0000, 8, 0).state());
        guest.write_config(0, &[1; 4]);
        guest.set_status(0);
        guest.worker.run();
        assert_eq!(guest.status(), RUNNING);
        control.hold(1);
        guest.worker.run();
        assert_eq!((guest.status(), control.counts()), (RUNNING, (1, 0, 0)));
        assert_eq!(driver.used_idx(), 1, "what is in flight completes");
        control.release();
        guest.worker.run();
        assert_eq!((guest.status(), control.counts()), (0, (1, 1, 1)));
        assert_eq!(driver.used_idx(), 2);
        let mut config = [0; 4];
        guest.read_config(0, &mut config);
        assert_eq!(config, [0xc0, 0xc1, 0xc2, 0xc3]);
        let mut driver = guest.start(BASE, 64, true);
        assert!(echoes(&mut guest, &mut driver));
    });
}

/// A device on mmio whose worker is a thread, with a request in flight that does not end until
/// `control` says so.
fn busy_on_mmio(events: Arc<dyn IoEventFds>) -> (MmioTransport, Arc<EchoControl>, Workers) {
    use super::Attachment;
    use super::mmio::IrqLine;

    struct NoLine;
    impl IrqLine for NoLine {
        fn trigger(&self) {}
    }

    let ram = reused_ram(4);
    let workers = Workers::start(1).unwrap();
    let (device, control) = Echo::new(&[64], 0);
    control.hold(0);
    let attachment = Attachment {
        name: "test".into(),
        device: Box::new(device),
        memory: ram.clone(),
        workers: workers.clone(),
        failures: Arc::new(()),
    };
    let mut mmio = MmioTransport::new(attachment, 0xc000_1000, Box::new(NoLine), events).unwrap();
    let mut driver = DriverQueue::new(&ram, BASE, 64, 0);
    let setup = driver.state();
    driver.add(&[(DATA, 4)], &[(DATA + 0x1000, 4)]).unwrap();
    driver.publish();
    for (register, value) in [
        (0x70, 1),
        (0x70, 3),
        (0x24, 1),
        (0x20, 1),
        (0x70, u32::from(FEATURES_OK)),
        (0x38, 64),
        (0x80, setup.desc_table as u32),
        (0x90, setup.avail_ring as u32),
        (0xa0, setup.used_ring as u32),
        (0x44, 1),
        (0x70, u32::from(RUNNING)),
    ] {
        assert!(mmio.write(register, &value.to_le_bytes()).is_none());
    }
    (mmio, control, workers)
}

#[test]
fn mmio_reset_is_awaited_without_the_transport_lock() {
    let (mut mmio, control, workers) = busy_on_mmio(Arc::<FakeIoEventFds>::default());
    let resetting = mmio.write(0x70, &[0; 4]).expect("a request is in flight");
    let waiting = std::thread::spawn(move || resetting.wait());
    let mut read = |register: u64| {
        let mut data = [0xff; 4];
        mmio.read(register, &mut data);
        u32::from_le_bytes(data)
    };
    assert_eq!((read(0x70), read(0x60)), (RUNNING.into(), 0), "registers can be read meanwhile");
    control.release();
    waiting.join().unwrap();
    assert_eq!(read(0x70), 0);
    assert_eq!(control.counts(), (1, 1, 1));
    workers.stop();
}

#[test]
fn device_without_ioeventfds_works() {
    struct Full;
    impl IoEventFds for Full {
        fn register(&self, _: u64, _: NotifyMatch, _: &EventFd) -> io::Result<()> {
            Err(io::ErrorKind::StorageFull.into())
        }
        fn unregister(&self, _: u64, _: NotifyMatch, _: &EventFd) {
            panic!("it has none")
        }
    }
    let (mut mmio, control, workers) = busy_on_mmio(Arc::new(Full));
    control.release();
    assert!(mmio.unplug(Duration::from_secs(20)));
    assert_eq!(control.counts(), (1, 1, 1));
    workers.stop();
}

#[test]
fn repeated_reset_has_the_deadline_of_the_first() {
    let (mut mmio, control, workers) = busy_on_mmio(Arc::<FakeIoEventFds>::default());
    let mut reset = || mmio.write(0x70, &[0; 4]);
    let first = reset().expect("a request is in flight");
    let deadline = first.until(Duration::from_millis(1));
    assert!(!first.wait_until(deadline));
    for _ in 0..32 {
        let again = reset().expect("it is still in flight");
        assert_eq!(again.until(Duration::from_millis(1)), deadline);
        assert!(!again.wait_until(deadline));
    }
    control.release();
    first.wait();
    assert!(reset().is_none(), "a device that is reset is reset at once");
    workers.stop();
}

#[test]
fn kicks_reach_the_transport_only_without_an_ioeventfd() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64, 64]);
        let registered = guest.io_events.registered();
        let want = match kind {
            Kind::Mmio => [(0xc000_1050, NotifyMatch::U32(0)), (0xc000_1050, NotifyMatch::U32(1))],
            Kind::Pci => [(0x40_0000_6000, NotifyMatch::Any), (0x40_0000_6004, NotifyMatch::Any)],
        };
        assert_eq!(registered, want);
        let mut driver = guest.start(BASE, 64, true);
        driver.add(&[(DATA, 4)], &[(DATA + 0x1000, 4)]).unwrap();
        assert!(driver.publish());
        guest.kick_slowly(0);
        guest.worker.run();
        assert!(driver.take_used().is_some());
        assert!(echoes(&mut guest, &mut driver));
    });
}

#[test]
fn config_space_takes_accesses_of_any_size_and_offset() {
    on_both(|kind| {
        let (mut guest, control) = echo(kind, &[64]);
        for offset in [0, 1, 3, 7, 15, 18, 19, 20, 21, 100, 0xeff] {
            for len in 0..=9 {
                let mut data = [0xaa; 9];
                guest.read_config(offset, &mut data[..len]);
                for (at, byte) in (offset..).zip(&data[..len]) {
                    assert_eq!(*byte, if at < 20 { 0xc0 | at as u8 } else { 0 }, "{offset} + {len}");
                }
                guest.write_config(offset, &data[..len]);
            }
        }
        guest.write_config(17, &[1, 2, 3, 4, 5]);
        let mut data = [0xaa; 6];
        guest.read_config(16, &mut data);
        assert_eq!(data, [0xd0, 1, 2, 3, 0, 0]);
        let generation = guest.config_generation();
        assert_eq!(guest.config_generation(), generation);
        control.change_config();
        assert_ne!(guest.config_generation(), generation);
    });
}

#[test]
fn unplugged_device_leaves_nothing_registered() {
    on_both(|kind| {
        let (mut guest, control) = echo(kind, &[64, 64]);
        let mut driver = guest.start(BASE, 64, true);
        control.hold(0);
        guest.worker.run();
        request(&mut guest, &mut driver);
        assert!(!guest.unplug());
        guest.worker.run();
        assert!(!guest.unplug());
        control.release();
        guest.worker.run();
        assert!(guest.unplug());
        assert_eq!((control.counts(), guest.io_events.registered()), ((1, 1, 1), vec![]));
    });
}
