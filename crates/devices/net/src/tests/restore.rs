//! Tests of saved guests that are restored with another network.

use std::os::fd::OwnedFd;

use super::guest::{config, fake_tap};
use super::*;
use crate::backend::stream::Stream;
use crate::backend::tap::tap_offloads;
use crate::config_space::feature;
use crate::{Net, NetBackend, NetError, NetSetup};
use virtio::rate_limiter::RateLimiterConfig;
use virtio::testing::{Guest, Kind, TestWorker};
use virtio::transport::RestoreError;

const NONE: RateLimiterConfig = RateLimiterConfig { bandwidth: None, ops: None };
const LINK_UP: u16 = 1;
const ANNOUNCE: u16 = 2;

fn accepting(pairs: u16, accepts: u64) -> NetGuest {
    NetGuest::with(Kind::Pci, config(pairs), NONE, NONE, accepts)
}

fn tap(pairs: u16) -> (NetSetup, Vec<OwnedFd>) {
    let (tap, peers) = fake_tap(pairs);
    (NetSetup { backend: NetBackend::tap(tap), interceptor: None }, peers)
}

fn unplugged(pairs: u16) -> NetSetup {
    NetSetup { backend: NetBackend::unplugged(pairs), interceptor: None }
}

fn stream() -> (NetSetup, OwnedFd) {
    let (ours, theirs) = std::os::unix::net::UnixStream::pair().unwrap();
    let backend = NetBackend::stream(Stream::new("test".into(), ours.into()));
    (NetSetup { backend, interceptor: None }, theirs.into())
}

/// A frame from this MAC address.
fn from(mac: [u8; 6]) -> Vec<u8> {
    let mut frame = frame(60, 1);
    frame[6..12].copy_from_slice(&mac);
    frame
}

#[test]
fn restored_guest_is_asked_to_announce_itself_once() {
    let mut guest = accepting(2, u64::MAX);
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    let before = guest.state();
    assert_eq!(before.active_pairs, 2);
    let (setup, peers) = tap(2);
    guest.restore(None, setup, peers).unwrap();
    assert_eq!(guest.status(), LINK_UP | ANNOUNCE);
    assert!(guest.guest.interrupts.take() > 0);
    assert_eq!(guest.command(&[3, 0]), 0);
    assert_eq!(guest.status(), LINK_UP);
    let after = guest.state();
    assert_eq!((after.active_pairs, after.config), (before.active_pairs, before.config));
}

#[test]
fn restore_fails_if_the_backend_lacks_negotiated_features() {
    let mut guest = accepting(1, u64::MAX);
    let (setup, _theirs) = stream();
    let refused = guest.restore(None, setup, vec![]).unwrap_err();
    assert!(matches!(refused, RestoreError::Features { missing, .. } if missing & feature::CSUM != 0));
    let mut guest = accepting(1, u64::MAX);
    let state = guest.state();
    let refused = Net::restore(&state, None, tap(2).0, 1);
    assert!(matches!(refused, Err(NetError::Pairs { wanted: 1, has: 2, .. })));
}

#[test]
fn restore_ignores_missing_features_not_negotiated() {
    let all = feature::OFFLOADS
        | feature::CTRL_GUEST_OFFLOADS
        | feature::HOST_USO
        | feature::GUEST_USO4
        | feature::GUEST_USO6;
    let mut guest = accepting(1, !all);
    let (setup, _theirs) = stream();
    guest.restore(None, setup, vec![]).unwrap();
    assert_eq!(
        guest.guest.device_features() & all,
        0,
        "the next driver is offered what the backend supports"
    );
    assert_eq!(guest.guest.broken_count(), 0);
}

#[test]
fn link_is_down_after_restore_without_a_network() {
    let mut guest = accepting(2, u64::MAX);
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    guest.restore(None, unplugged(2), vec![]).unwrap();
    assert_eq!(guest.status() & LINK_UP, 0);
    guest.send(&frame(60, 1));
    assert_eq!(guest.control.stats().tap_write_fails.get(), 1);
    assert_eq!(guest.guest.broken_count(), 0);
}

#[test]
fn link_down_interrupts_a_driver_without_a_control_queue() {
    let mut guest =
        NetGuest::with(Kind::Mmio, config(1), NONE, NONE, !(feature::CTRL_VQ | feature::GUEST_ANNOUNCE));
    let generation = guest.guest.config_generation();
    guest.restore(None, unplugged(1), vec![]).unwrap();
    // Bit 1 of InterruptStatus: the configuration space has changed.
    let mut status = [0; 4];
    guest.guest.mmio().read(0x60, &mut status);
    assert_eq!(status[0] & 2, 2);
    assert_ne!(guest.guest.config_generation(), generation);
    assert_eq!(guest.status(), 0);
}

#[test]
fn runtime_offloads_and_pairs_reach_the_new_tap() {
    let mut guest = accepting(2, u64::MAX);
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    // `ethtool -K eth0 lro off`: checksum offload only.
    assert_eq!(guest.command(&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0]), 0);
    for _ in 0..2 {
        let (setup, peers) = tap(2);
        guest.restore(None, setup, peers).unwrap();
        let (offloads, queues, _) = guest.control.tap().settings();
        assert_eq!((offloads, queues), (tap_offloads(feature::GUEST_CSUM), Some(2)));
    }
}

#[test]
fn link_change_survives_a_save_before_the_guest_runs() {
    let mut guest =
        NetGuest::with(Kind::Mmio, config(1), NONE, NONE, !(feature::CTRL_VQ | feature::GUEST_ANNOUNCE));
    let state = guest.guest.save();
    let mut state = {
        let mut worker = TestWorker::new();
        worker.pause();
        let (paused, _control) = Net::restore(&guest.state(), None, unplugged(1), 1).unwrap();
        let mut paused = Guest::with(Kind::Mmio, Box::new(paused), guest.guest.ram.clone(), worker);
        paused.restore(&state).unwrap();
        paused.save_paused()
    };
    let own: crate::NetState = state.common().device.decode().expect("the state is this device's");
    let (copy, _control) = Net::restore(&own, None, unplugged(1), 1).unwrap();
    let mut copy = Guest::with(Kind::Mmio, Box::new(copy), guest.guest.ram.clone(), TestWorker::new());
    copy.restore(&state).unwrap();
    let mut status = [0; 4];
    copy.mmio().read(0x60, &mut status);
    assert_eq!(status[0] & 2, 2, "the driver is interrupted for its link");
}

#[test]
fn driver_started_after_restore_gets_default_settings() {
    let mut guest = accepting(2, u64::MAX);
    assert_eq!(guest.command(&[4, 0, 2, 0]), 0);
    // Saved between two drivers: the settings of the first one are in the state.
    guest.guest.reset();
    assert_eq!(guest.state().active_pairs, 2);
    let (setup, peers) = tap(2);
    guest.restore(None, setup, peers).unwrap();
    guest.start(!feature::GUEST_TSO4);
    let state = guest.state();
    assert_eq!(state.active_pairs, 1);
    assert_eq!(state.offloads, guest.features & feature::GUEST_OFFLOADS);
}

#[test]
fn former_mac_is_allowed_until_the_driver_resets() {
    const SECOND: [u8; 6] = [2, 0, 0, 0, 0, 2];
    const THIRD: [u8; 6] = [2, 0, 0, 0, 0, 3];
    const FOURTH: [u8; 6] = [2, 0, 0, 0, 0, 4];
    let mut guest = accepting(1, u64::MAX);
    for new in [SECOND, THIRD, FOURTH] {
        let (setup, peers) = tap(1);
        guest.restore(Some(new), setup, peers).unwrap();
        let mut space = [0; 6];
        guest.guest.read_config(0, &mut space);
        assert_eq!(space, new);
    }
    // Once more, with the same address.
    let (setup, peers) = tap(1);
    guest.restore(Some(FOURTH), setup, peers).unwrap();
    let passes = |guest: &mut NetGuest, mac| {
        guest.send(&from(mac));
        guest.sent().is_some()
    };
    for (mac, may) in [(MAC, true), (SECOND, false), (THIRD, true), (FOURTH, true), ([2; 6], false)] {
        assert_eq!(passes(&mut guest, mac), may, "{mac:x?}");
    }
    assert_eq!(guest.control.stats().tx_spoofed_mac_count.get(), 2);
    guest.start(u64::MAX);
    for (mac, may) in [(MAC, false), (THIRD, false), (FOURTH, true)] {
        assert_eq!(passes(&mut guest, mac), may, "{mac:x?}");
    }
}

#[test]
fn own_mac_is_allowed_until_the_driver_resets() {
    const NEW: [u8; 6] = [2, 0, 0, 0, 0, 2];
    let own = crate::NetConfig { mac: None, ..config(1) };
    let mut guest = NetGuest::with(Kind::Mmio, own, NONE, NONE, u64::MAX);
    let (setup, peers) = tap(1);
    guest.restore(Some(NEW), setup, peers).unwrap();
    guest.send(&from([6; 6]));
    assert!(guest.sent().is_some());
    guest.start(u64::MAX);
    assert_ne!(guest.features & feature::MAC, 0);
    guest.send(&from([6; 6]));
    assert!(guest.sent().is_none());
    guest.send(&from(NEW));
    assert!(guest.sent().is_some());
}
