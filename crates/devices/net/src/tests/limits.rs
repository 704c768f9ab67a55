//! Tests of rate limits.

use vm_memory::{Bytes, GuestAddress};

use super::guest::config;
use super::*;
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::testing::Kind;

const NONE: RateLimiterConfig = RateLimiterConfig { bandwidth: None, ops: None };
const MS: u64 = 1_000_000;

fn bytes(size: u64, refill_time_ms: u64) -> RateLimiterConfig {
    RateLimiterConfig { bandwidth: Some(BucketConfig { size, refill_time_ms, one_time_burst: 0 }), ops: None }
}

fn ops(size: u64, refill_time_ms: u64) -> RateLimiterConfig {
    RateLimiterConfig { bandwidth: None, ops: Some(BucketConfig { size, refill_time_ms, one_time_burst: 0 }) }
}

/// Number of frames that pass in `ms` milliseconds if there are always more.
fn passed(guest: &mut NetGuest, ms: u64, to_guest: bool) -> u64 {
    let mut count = 0;
    for _ in 0..ms {
        loop {
            let before = count;
            if to_guest {
                while guest.add_rx_buffer(0, &[1536]) {}
                guest.publish(0);
                while guest.arrive_on(0, [0; 12], &frame(1000, 1)) {}
                while guest.received().is_some() {
                    count += 1;
                }
            } else {
                while guest.queues[1].take_used().is_some() {}
                while guest.send_on(0, [0; 12], &frame(1000, 1), &[]) {}
                guest.publish(1);
                while guest.sent().is_some() {
                    count += 1;
                }
                guest.guest.worker.run();
            }
            if count == before {
                break;
            }
        }
        guest.guest.worker.advance(MS);
    }
    count
}

#[test]
fn flood_behind_a_low_limit_delays_frames_by_one_second() {
    let mut guest = NetGuest::with(Kind::Mmio, config(1), ops(50, 1000), NONE, u64::MAX);
    let stamped = |ms: u64| {
        let mut stamped = frame(60, 1);
        stamped[20..28].copy_from_slice(&ms.to_le_bytes());
        stamped
    };
    // The socket holds some hundred frames, and the flood keeps it full.
    let (mut count, mut latest) = (0, 0);
    for ms in 0..20_000u64 {
        while guest.add_rx_buffer(0, &[1536]) {}
        guest.publish(0);
        while guest.arrive_on(0, [0; 12], &stamped(ms)) {}
        while let Some(frame) = guest.received() {
            count += 1;
            let sent = u64::from_le_bytes(frame[20..28].try_into().unwrap());
            if ms > 2500 {
                latest = latest.max(ms - sent);
            }
        }
        guest.guest.worker.advance(MS);
    }
    assert!(latest <= 1100, "a frame was delivered {latest} ms late");
    assert!((1000..1100).contains(&count), "the limit is kept: {count} frames");
    assert!(guest.control.stats().rx_late_frames.get() > 1000);
}

#[test]
fn burst_within_one_second_of_a_limit_is_delivered() {
    let mut guest = NetGuest::with(Kind::Mmio, config(1), ops(50, 1000), NONE, u64::MAX);
    for seed in 0..90 {
        assert!(guest.arrive_on(0, [0; 12], &frame(60, seed)));
    }
    let mut count = 0;
    for _ in 0..1000 {
        while guest.add_rx_buffer(0, &[1536]) {}
        guest.publish(0);
        while guest.received().is_some() {
            count += 1;
        }
        guest.guest.worker.advance(MS);
    }
    assert_eq!((count, guest.control.stats().rx_late_frames.get()), (90, 0));
}

#[test]
fn both_directions_keep_byte_and_frame_rates() {
    for (limits, want) in
        [(bytes(100_000, 100), 100 + 3000), (ops(50, 100), 50 + 1500), (bytes(1000, 10), 301)]
    {
        for to_guest in [false, true] {
            let (rx, tx) = if to_guest { (limits, NONE) } else { (NONE, limits) };
            let mut guest = NetGuest::with(Kind::Mmio, config(1), rx, tx, u64::MAX);
            let count = passed(&mut guest, 3000, to_guest);
            assert!(count.abs_diff(want) <= want / 100 + 2, "{limits:?} to guest {to_guest}: {count}");
        }
    }
}

#[test]
fn no_timer_is_armed_while_no_frame_waits() {
    let mut guest = NetGuest::with(Kind::Mmio, config(1), bytes(10_000, 100), bytes(10_000, 100), u64::MAX);
    guest.post_rx_buffer(&[1536]);
    guest.send(&frame(1000, 1));
    guest.arrive(&frame(1000, 1));
    assert_eq!(guest.guest.worker.next_timer(), None);
}

#[test]
fn removed_limits_release_delayed_frames_at_once() {
    let mut guest = NetGuest::with(Kind::Mmio, config(1), ops(1, 1_000_000), ops(1, 1_000_000), u64::MAX);
    for seed in 0..3 {
        assert!(guest.add_rx_buffer(0, &[1536]));
        guest.publish(0);
        guest.arrive(&frame(100, seed));
        assert!(guest.send_on(0, [0; 12], &frame(100, seed), &[]));
        guest.publish(1);
    }
    assert_eq!((guest.sent(), guest.received()), (Some(frame(100, 0)), Some(frame(100, 0))));
    assert_eq!((guest.sent(), guest.received()), (None, None));
    let off = BucketConfig { size: 0, refill_time_ms: 0, one_time_burst: 0 };
    let lifted = RateLimiterConfig { bandwidth: None, ops: Some(off) };
    let now = guest.guest.worker.now();
    guest.control.update_limits(lifted, lifted, now);
    guest.guest.worker.run();
    for seed in 1..3 {
        assert_eq!((guest.sent(), guest.received()), (Some(frame(100, seed)), Some(frame(100, seed))));
    }
    assert_eq!(guest.control.limits(), [NONE, NONE]);
}

#[test]
fn frame_for_a_full_network_is_charged_once() {
    let mut guest = NetGuest::with(Kind::Mmio, config(1), NONE, ops(300, 1_000_000), u64::MAX);
    let mut count = 0;
    for _ in 0..100 {
        while guest.queues[1].take_used().is_some() {}
        while guest.send_on(0, [0; 12], &frame(1400, 1), &[]) {}
        guest.publish(1);
        // The network is full most of the time: each frame taken out lets one in.
        for _ in 0..7 {
            if guest.sent().is_some() {
                count += 1;
            }
            guest.guest.worker.run();
        }
    }
    while guest.sent().is_some() {
        count += 1;
        guest.guest.worker.run();
    }
    assert_eq!(count, 300);
}

#[test]
fn frame_that_grows_while_delayed_is_charged_the_difference() {
    let mut guest = NetGuest::with(Kind::Mmio, config(1), NONE, bytes(200_000, 1_000_000), u64::MAX);
    let at = 8 << 20;
    let bytes = [&[0; 12][..], &frame(60_000, 1)].concat();
    guest.guest.ram.memory().write_slice(&bytes, GuestAddress(at)).unwrap();
    let delayed = loop {
        let head = guest.queues[1].add(&[(at, 112)], &[]).unwrap();
        guest.publish(1);
        if guest.queues[1].take_used().is_none() {
            break head;
        }
    };
    // The network is full, and the limiter has counted 100 bytes for this frame.
    let spent = |guest: &mut NetGuest| 200_000 - guest.state().tx_limiter.bandwidth.unwrap().tokens;
    let before = spent(&mut guest);
    guest.queues[1].set_descriptor(delayed, at, 60_012, 0, 0);
    while guest.sent().is_some() {
        guest.guest.worker.run();
    }
    assert!(guest.queues[1].take_used().is_some(), "the frame was sent");
    let after = spent(&mut guest);
    assert_eq!(after - before, 59_900);
}
