//! Tests of the control queue, of several queue pairs, and of the configuration space.

use vm_memory::{Bytes, GuestAddress};

use super::guest::{config, fake_tap};
use super::*;
use crate::backend::tap::tap_offloads;
use crate::config_space::feature;
use crate::rtnl_budget::{BURST, REFILL_MS};
use crate::{Net, NetBackend, NetConfig, NetSetup};
use virtio::device::Device;
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::testing::Kind;

const NONE: RateLimiterConfig = RateLimiterConfig { bandwidth: None, ops: None };

fn with_pairs(pairs: u16) -> NetGuest {
    NetGuest::with(Kind::Pci, config(pairs), NONE, NONE, u64::MAX)
}

#[test]
fn config_space_has_mac_status_pairs_and_mtu() {
    let mut guest = with_pairs(3);
    let mut space = [0xaa; 14];
    guest.guest.read_config(0, &mut space);
    assert_eq!(space[..6], MAC);
    assert_eq!(space[6..], [1, 0, 3, 0, 0xdc, 5, 0, 0]);
}

#[test]
fn offered_features_follow_the_configuration() {
    let offered = |config: NetConfig| {
        let pairs = config.pairs;
        let setup = NetSetup { backend: NetBackend::tap(fake_tap(pairs).0), interceptor: None };
        Net::new(config, setup, NONE, NONE, 1).unwrap().0.features()
    };
    let all = feature::MAC | feature::MTU | feature::MQ;
    assert_eq!(offered(config(2)) & all, all);
    let bare = offered(NetConfig { mac: None, mtu: None, ..config(1) });
    assert_eq!(bare & all, 0);
    assert_eq!(bare & feature::OFFLOADS, feature::OFFLOADS);
}

#[test]
fn queue_pairs_work_independently() {
    let mut guest = with_pairs(3);
    assert_eq!(guest.command(&[4, 0, 3, 0]), 0);
    for pair in 0..3 {
        assert!(guest.add_rx_buffer(pair, &[1536]));
        guest.publish(2 * pair);
        assert!(guest.arrive_on(pair, [0; 12], &frame(100, pair as u8)));
        assert_eq!(guest.received_on(pair).unwrap().frame, frame(100, pair as u8));
        assert!(guest.send_on(pair, [0; 12], &frame(200, pair as u8), &[]));
        guest.publish(2 * pair + 1);
        assert_eq!(guest.sent_on(pair).unwrap()[12..], frame(200, pair as u8));
    }
}

#[test]
fn control_queue_follows_the_first_pair_without_mq() {
    let mut guest = NetGuest::with(Kind::Mmio, config(3), NONE, NONE, !feature::MQ);
    assert_eq!(guest.queues.len(), 3);
    assert_eq!(guest.command(&[5, 0, 0, 0, 0, 0, 0, 0, 0, 0]), 0);
    guest.send(&frame(60, 1));
    assert_eq!(guest.sent().unwrap(), frame(60, 1));
}

#[test]
fn invalid_control_commands_fail_and_are_counted() {
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
fn state_survives_json() {
    let bucket = BucketConfig { size: 100, refill_time_ms: 100, one_time_burst: 5 };
    let limits = RateLimiterConfig { bandwidth: Some(bucket), ops: None };
    let mut guest = NetGuest::with(Kind::Mmio, config(1), limits, NONE, u64::MAX);
    let net = guest.state();
    let text = serde_json::to_string(&net).unwrap();
    assert_eq!(serde_json::from_str::<crate::NetState>(&text).unwrap(), net);
}

/// Most ioctls under RTNL in `seconds`.
fn bound(seconds: u64) -> u64 {
    BURST + seconds * 1000 * BURST / REFILL_MS
}

#[test]
fn control_command_loop_is_bounded_in_rtnl_ioctls() {
    const SECONDS: u64 = 10;
    let mut guest = with_pairs(3);
    let before = guest.control.tap().settings().2;
    let last = guest.queues.len() - 1;
    let memory = guest.guest.ram.memory().clone();
    let commands: [&[u8]; 4] =
        [&[5, 0, 2, 0, 0, 0, 0, 0, 0, 0], &[4, 0, 3, 0], &[5, 0, 0, 0, 0, 0, 0, 0, 0, 0], &[4, 0, 1, 0]];
    let at = |index: usize| 0x70_0000 + 0x100 * index as u64;
    for (index, command) in commands.iter().enumerate() {
        memory.write_slice(command, GuestAddress(at(index))).unwrap();
    }
    let (mut next, mut answers) = (0, 0);
    for _ in 0..SECONDS * 100 {
        for _ in 0..100 {
            let (command, len) = (at(next), commands[next].len() as u32);
            if guest.queues[last].add(&[(command, len)], &[(command + 0x80, 1)]).is_none() {
                break;
            }
            next = (next + 1) % commands.len();
        }
        guest.publish(last);
        guest.guest.worker.run();
        while guest.queues[last].take_used().is_some() {
            let answer: u8 = memory.read_obj(GuestAddress(at(answers % commands.len()) + 0x80)).unwrap();
            assert_eq!(answer, 0);
            answers += 1;
        }
        guest.guest.worker.advance(10_000_000);
    }
    let changes = guest.control.tap().settings().2 - before;
    assert!(changes <= bound(SECONDS), "{changes} ioctls for {answers} commands");
    assert!(answers > 100, "commands are delayed, not lost");
    // After the last command the tap has the settings of the last one that completed.
    for _ in 0..1000 {
        guest.guest.worker.advance(100_000_000);
        while guest.queues[last].take_used().is_some() {
            answers += 1;
        }
    }
    assert_eq!(answers % commands.len(), next, "each command completed");
    let state = guest.state();
    let (offloads, queues, _) = guest.control.tap().settings();
    assert_eq!((offloads, queues), (tap_offloads(state.offloads), Some(state.active_pairs.into())));
}

#[test]
fn reset_loop_is_bounded_in_rtnl_ioctls() {
    let mut guest = with_pairs(2);
    let before = guest.control.tap().settings().2;
    for _ in 0..500 {
        guest.start(u64::MAX);
        guest.start(!feature::GUEST_OFFLOADS);
    }
    guest.start(u64::MAX);
    guest.start(!feature::GUEST_OFFLOADS);
    assert!(guest.control.tap().settings().2 - before <= bound(1));
    // Frames wait until the tap has the settings of the last driver.
    guest.post_rx_buffer(&[1536]);
    guest.arrive(&frame(60, 1));
    if guest.control.tap().settings().0 != 0 {
        assert_eq!(guest.received(), None);
    }
    guest.guest.worker.advance(REFILL_MS * 1_000_000);
    assert_eq!(guest.control.tap().settings().0, 0);
    assert_eq!(guest.received().unwrap(), frame(60, 1));
}
