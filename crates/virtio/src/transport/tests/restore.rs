//! Saved and restored transports: each test runs on both.

use super::*;

#[test]
fn restored_device_continues_and_interrupts_once() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        let mut driver = guest.start(BASE, 64, true);
        for _ in 0..70 {
            assert!(echoes(&mut guest, &mut driver));
        }
        // Made available, and the kick is lost on the way.
        driver.add(&[(DATA, 4)], &[(DATA + 0x1000, 4)]).unwrap();
        let paused = guest.worker.pause();
        assert!(paused.try_recv().is_ok());
        driver.publish();
        let state = guest.save_paused();
        let mut copy = restored(kind, &guest, &state, &[64]);
        assert!(copy.interrupts.take() >= 1, "an interrupt may have been on its way");
        assert!(matches!(driver.take_used(), Some(Used { written: 4, .. })), "the queue was looked at");
        assert!(echoes(&mut copy, &mut driver));
        assert_ne!(copy.config_generation(), guest.config_generation());
    });
}

#[test]
fn a_device_that_is_restored_paused_waits_for_its_workers() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        let mut driver = guest.start(BASE, 64, true);
        let state = guest.save();
        driver.add(&[(DATA, 4)], &[(DATA + 0x1000, 4)]).unwrap();
        driver.publish();
        let (device, _) = Echo::new(&[64], OWN_FEATURES);
        let mut worker = TestWorker::new();
        assert!(worker.pause().try_recv().is_ok());
        let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), worker);
        copy.restore(&state).unwrap();
        assert_eq!(driver.take_used(), None);
        copy.worker.resume();
        assert!(driver.take_used().is_some());
    });
}

#[test]
fn a_broken_device_is_restored_broken() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        let driver = guest.start(BASE, 64, true);
        driver.set_avail_idx(1000);
        guest.kick(0);
        let state = guest.save();
        let mut copy = restored(kind, &guest, &state, &[64]);
        assert_eq!(copy.status(), RUNNING | Status::DEVICE_NEEDS_RESET);
        let mut driver = copy.start(BASE, 64, true);
        assert!(echoes(&mut copy, &mut driver));
    });
}

#[test]
fn a_pending_config_interrupt_is_raised_after_a_restore() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        let driver = guest.start(BASE, 64, true);
        driver.set_avail_idx(1000);
        guest.kick(0);
        let state = guest.save();
        // A second save, before the driver runs, keeps it pending.
        let mut copy = restored(kind, &guest, &state, &[64]);
        assert_eq!(copy.interrupts.take(), 1, "the driver has not handled the first one");
        let state = copy.save();
        let mut copy = restored(kind, &guest, &state, &[64]);
        assert_eq!(copy.interrupts.take(), 1);
        acknowledge_config_change(&mut copy);
        let state = copy.save();
        let copy = restored(kind, &guest, &state, &[64]);
        assert_eq!(copy.interrupts.take(), 0, "the driver acknowledged it");
    });
}

/// The driver acknowledges a configuration-change interrupt.
fn acknowledge_config_change(guest: &mut Guest) {
    match guest.kind() {
        Kind::Mmio => _ = guest.mmio().write(0x64, &2u32.to_le_bytes()),
        Kind::Pci => guest.pci().read_bar(0x2000, &mut [0]),
    }
}

#[test]
fn invalid_states_are_refused_by_name() {
    on_both(|kind| {
        let (mut guest, _) = echo(kind, &[64]);
        guest.start(BASE, 64, true);
        let state = guest.save();
        let restore = |state: &TransportState, sizes: &[u16], features: u64| {
            let (device, _) = Echo::new(sizes, features);
            Guest::new(kind, Box::new(device)).restore(state)
        };
        assert!(restore(&state, &[64], OWN_FEATURES).is_ok());
        assert!(restore(&state, &[64, 64], OWN_FEATURES).is_err());
        let error = restore(&state, &[64], 1 << 3).unwrap_err();
        assert!(matches!(error, RestoreError::Features { missing, .. } if missing == 1 << 40));
        assert!(
            error
                .to_string()
                .contains("test: the driver uses features that the device does not offer: 0x10000000000"),
            "{error}"
        );
        let error = restore(&state, &[32], OWN_FEATURES).unwrap_err();
        assert!(matches!(error, RestoreError::Queue { index: 0, .. }), "{error}");
        let mut bad = state.clone();
        bad.common().queues[0].used_ring = 1 << 50;
        assert!(matches!(restore(&bad, &[64], OWN_FEATURES), Err(RestoreError::Queue { index: 0, .. })));
        let mut bad = state.clone();
        bad.common().status &= !Status::FEATURES_OK;
        assert!(matches!(restore(&bad, &[64], OWN_FEATURES), Err(RestoreError::Impossible { .. })));
        let mut bad = state;
        bad.common().queues[0].ready = false;
        assert!(matches!(restore(&bad, &[64], OWN_FEATURES), Err(RestoreError::Activate { .. })));
    });
}

/// A driver's act, sensible or not.
#[derive(Debug, Clone)]
enum Act {
    Status(u8),
    Features(u64),
    Select(u16),
    SetUp { size: u16, place: u64 },
    Start,
    MapVectors,
    Request,
    Break,
    Kick(u32),
    Config(u64, Vec<u8>),
    Save,
}

fn act() -> impl Strategy<Value = Act> {
    let status = prop_oneof![Just(0), Just(1), Just(3), Just(FEATURES_OK), Just(RUNNING), any::<u8>()];
    let features = prop_oneof![
        Just(feature::VERSION_1),
        Just(feature::VERSION_1 | feature::RING_EVENT_IDX),
        any::<u64>()
    ];
    let place = prop_oneof![4 => Just(BASE), 1 => Just(0x2_0000u64), 1 => any::<u64>()];
    prop_oneof![
        4 => status.prop_map(Act::Status),
        2 => features.prop_map(Act::Features),
        2 => (0u16..4).prop_map(Act::Select),
        2 => (prop_oneof![Just(64u16), any::<u16>()], place)
            .prop_map(|(size, place)| Act::SetUp { size, place }),
        2 => Just(Act::Start),
        1 => Just(Act::MapVectors),
        6 => Just(Act::Request),
        1 => Just(Act::Break),
        1 => any::<u32>().prop_map(Act::Kick),
        2 => (0u64..24, prop::collection::vec(any::<u8>(), 0..9)).prop_map(|(at, data)| Act::Config(at, data)),
        4 => Just(Act::Save),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(300))]

    /// A device that is saved and restored at any time is the same device, also for its driver.
    #[test]
    fn device_saved_at_any_time_is_restored_unchanged(
        acts in prop::collection::vec(act(), 1..40),
        pci: bool,
    ) {
        let kind = if pci { Kind::Pci } else { Kind::Mmio };
        let sizes = [64, 64, 32];
        let (device, _) = Echo::new(&sizes, OWN_FEATURES);
        let mut guest = Guest::with(kind, Box::new(device), reused_ram(4), TestWorker::new());
        let mut driver: Option<DriverQueue> = None;
        for act in acts {
            match act {
                Act::Status(status) => {
                    if status == 0 { driver = None; }
                    guest.set_status(status);
                }
                Act::Features(features) => guest.set_driver_features(features),
                Act::Select(index) => guest.select_queue(index),
                Act::SetUp { size, place } => {
                    let state = QueueState {
                        size, ready: false, desc_table: place, avail_ring: place.wrapping_add(0x1000),
                        used_ring: place.wrapping_add(0x2000), next_avail: 0, next_used: 0,
                    };
                    guest.set_up_queue(&state);
                }
                Act::Start => driver = Some(guest.start(BASE, 64, true)),
                Act::MapVectors => guest.map_vectors(),
                Act::Request => {
                    if let Some(driver) = &mut driver && guest.status() == RUNNING {
                        prop_assert!(echoes(&mut guest, driver));
                    }
                }
                Act::Break => {
                    if let Some(driver) = driver.take() {
                        driver.set_avail_idx(0x4000);
                        guest.kick(0);
                    }
                }
                Act::Kick(index) => guest.kick_slowly(index),
                Act::Config(at, data) => guest.write_config(at, &data),
                Act::Save => {
                    guest.worker.run();
                    let mut state = guest.save();
                    let mut copy = restored(kind, &guest, &state, &sizes);
                    let mut again = copy.save();
                    // The generation is a new one, and an interrupt too many is pending.
                    again.common().config_generation = state.common().config_generation;
                    match (&mut again, &state) {
                        (TransportState::Mmio(again), TransportState::Mmio(state)) => {
                            again.interrupt_status = state.interrupt_status;
                        }
                        (TransportState::Pci(again), TransportState::Pci(state)) => {
                            for (again, state) in again.msix.vectors.iter_mut().zip(&state.msix.vectors) {
                                again.pending = state.pending;
                            }
                        }
                        _ => unreachable!("it is the same transport"),
                    }
                    prop_assert_eq!(again, state);
                    // The configuration space of this device is not part of its state.
                    guest = copy;
                }
            }
            guest.worker.run();
        }
    }
}
