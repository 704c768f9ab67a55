//! The control queue, several pairs, and the configuration space.

use super::guest::{config, wires};
use super::*;
use crate::device::{Device, DeviceState};
use crate::net::config_space::feature;
use crate::net::{Net, NetBackend, NetConfig, NetError, NetSetup};
use crate::rate_limiter::{BucketConfig, RateLimiterConfig};
use crate::testing::Kind;

const NONE: RateLimiterConfig = RateLimiterConfig { bandwidth: None, ops: None };

fn with_pairs(pairs: u16) -> NetGuest {
    NetGuest::with(Kind::Pci, config(pairs), NONE, NONE, u64::MAX)
}

#[test]
fn the_guest_reads_its_address_mtu_link_and_pairs() {
    let mut guest = with_pairs(3);
    let mut space = [0xaa; 14];
    guest.guest.read_config(0, &mut space);
    assert_eq!(space[..6], MAC);
    assert_eq!(space[6..], [1, 0, 3, 0, 0xdc, 5, 0, 0]);
}

#[test]
fn only_what_there_is_is_offered() {
    let offered = |config: NetConfig| {
        let pairs = config.pairs;
        let setup = NetSetup { backend: NetBackend::tap(wires(pairs).0), detour: None };
        Net::new(config, setup, NONE, NONE, 1).unwrap().0.features()
    };
    let all = feature::MAC | feature::MTU | feature::MQ;
    assert_eq!(offered(config(2)) & all, all);
    let bare = offered(NetConfig { mac: None, mtu: None, ..config(1) });
    assert_eq!(bare & all, 0);
    assert_eq!(bare & feature::OFFLOADS, feature::OFFLOADS);
}

#[test]
fn pairs_of_queues_work_side_by_side() {
    let mut guest = with_pairs(3);
    assert_eq!(guest.command(&[4, 0, 3, 0]), 0);
    for pair in 0..3 {
        assert!(guest.give_to(pair, &[1536]));
        guest.publish(2 * pair);
        assert!(guest.arrive_on(pair, [0; 12], &frame(100, pair as u8)));
        assert_eq!(guest.received_on(pair).unwrap().frame, frame(100, pair as u8));
        assert!(guest.send_on(pair, [0; 12], &frame(200, pair as u8), &[]));
        guest.publish(2 * pair + 1);
        assert_eq!(guest.sent_on(pair).unwrap()[12..], frame(200, pair as u8));
    }
}

#[test]
fn a_driver_that_uses_one_pair_finds_the_control_queue_behind_it() {
    let mut guest = NetGuest::with(Kind::Mmio, config(3), NONE, NONE, !feature::MQ);
    assert_eq!(guest.queues.len(), 3);
    assert_eq!(guest.command(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    guest.send(&frame(60, 1));
    assert_eq!(guest.sent().unwrap(), frame(60, 1));
}

#[test]
fn commands_that_make_no_sense_are_answered_and_counted() {
    let mut guest = with_pairs(2);
    let unknown_offload = [5, 0, 0, 0, 0, 0, 0, 0, 0, 0x80];
    for bad in [
        &[4, 0, 0, 0][..],
        &[4, 0, 3, 0],
        &[4, 0, 1],
        &[4, 1, 1, 0],
        &[9, 9, 9],
        &[4],
        &[5, 0, 1],
        &unknown_offload,
    ] {
        assert_eq!(guest.command(bad), 1, "{bad:?}");
    }
    assert_eq!(guest.control.stats().ctrl_fails.get(), 8);
    assert_eq!(guest.command(&[4, 0, 1, 0]), 0);
    assert_eq!(guest.guest.broken_count(), 0);
}

#[test]
fn a_restored_guest_is_asked_to_announce_itself_until_it_has() {
    let mut guest = with_pairs(2);
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    let mut state = guest.guest.save();
    let DeviceState::Net(net) = state.common().device.clone() else { panic!() };
    assert_eq!(net.active_pairs, 2);
    let (tap, wires) = wires(2);
    let setup = NetSetup { backend: NetBackend::tap(tap), detour: None };
    let (copy, control) = Net::restore(&net, setup, 1).unwrap();
    let worker = crate::testing::TestWorker::new();
    guest.guest = crate::testing::Guest::with(Kind::Pci, Box::new(copy), guest.guest.ram.clone(), worker);
    (guest.control, guest.wires) = (control, wires);
    guest.guest.restore(&state).unwrap();
    let mut status = [0; 2];
    guest.guest.read_config(6, &mut status);
    assert_eq!(status, [3, 0]);
    assert!(guest.guest.interrupts.take() > 0);
    assert_eq!(guest.command(&[3, 0]), 0);
    guest.guest.read_config(6, &mut status);
    assert_eq!(status, [1, 0]);
    let DeviceState::Net(again) = guest.guest.save().common().device.clone() else { panic!() };
    assert_eq!((again.active_pairs, again.config), (net.active_pairs, net.config));
}

#[test]
fn a_network_that_lacks_what_the_guest_relies_on_is_refused() {
    let guest = &mut with_pairs(1);
    let DeviceState::Net(net) = guest.guest.save().common().device.clone() else { panic!() };
    let (ours, _theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let stream = crate::net::stream::Stream::new("s".into(), ours.into());
    let setup = NetSetup { backend: NetBackend::stream(stream), detour: None };
    let refused = Net::restore(&net, setup, 1).err().unwrap();
    assert!(matches!(refused, NetError::Features { missing, .. } if missing & feature::CSUM != 0));
    let setup = NetSetup { backend: NetBackend::tap(wires(2).0), detour: None };
    assert!(matches!(Net::restore(&net, setup, 1), Err(NetError::Pairs { wanted: 1, has: 2, .. })));
}

#[test]
fn a_restored_guest_without_a_network_finds_its_link_down() {
    let mut guest = with_pairs(2);
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    let mut state = guest.guest.save();
    let DeviceState::Net(net) = state.common().device.clone() else { panic!() };
    let setup = NetSetup { backend: NetBackend::unplugged(2), detour: None };
    let (copy, control) = Net::restore(&net, setup, 1).unwrap();
    let worker = crate::testing::TestWorker::new();
    guest.guest = crate::testing::Guest::with(Kind::Pci, Box::new(copy), guest.guest.ram.clone(), worker);
    guest.control = control;
    guest.guest.restore(&state).unwrap();
    let mut status = [0xff; 1];
    guest.guest.read_config(6, &mut status);
    assert_eq!(status[0] & 1, 0);
    guest.send(&frame(60, 1));
    assert_eq!(guest.control.stats().tap_write_fails.get(), 1);
    assert_eq!(guest.guest.broken_count(), 0);
}

#[test]
fn states_are_plain_data() {
    let bucket = BucketConfig { size: 100, refill_time_ms: 100, one_time_burst: 5 };
    let limits = RateLimiterConfig { bandwidth: Some(bucket), ops: None };
    let mut guest = NetGuest::with(Kind::Mmio, config(1), limits, NONE, u64::MAX);
    let DeviceState::Net(net) = guest.guest.save().common().device.clone() else { panic!() };
    let text = serde_json::to_string(&net).unwrap();
    assert_eq!(serde_json::from_str::<crate::net::NetState>(&text).unwrap(), net);
}
