//! Tests of the stream backend.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use super::guest::config;
use super::*;
use crate::backend::stream::Stream;
use crate::config_space::feature;
use crate::{Net, NetBackend, NetSetup};
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::testing::Kind;

fn guest() -> (NetGuest, UnixStream) {
    limited(RateLimiterConfig::default())
}

/// A guest with a receive limit.
fn limited(rx: RateLimiterConfig) -> (NetGuest, UnixStream) {
    let (ours, theirs) = UnixStream::pair().unwrap();
    theirs.set_nonblocking(true).unwrap();
    let setup =
        NetSetup { backend: NetBackend::stream(Stream::new("test".into(), ours.into())), interceptor: None };
    let none = RateLimiterConfig::default();
    let (net, control) = Net::new(config(1), setup, rx, none, 1).unwrap();
    (NetGuest::with_device(Kind::Mmio, net, control, vec![], u64::MAX), theirs)
}

fn framed(frame: &[u8]) -> Vec<u8> {
    [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
}

#[test]
fn stream_passes_frames_and_offers_no_offloads() {
    let (mut guest, mut peer) = guest();
    assert_eq!(guest.features & feature::OFFLOADS, 0);
    guest.send(&frame(1000, 1));
    let mut got = vec![0; 1004];
    peer.read_exact(&mut got).unwrap();
    assert_eq!(got, framed(&frame(1000, 1)));
    for _ in 0..50 {
        assert!(guest.add_rx_buffer(0, &[1536]));
    }
    guest.publish(0);
    peer.write_all(&[framed(&frame(60, 2)), framed(&frame(60_000, 3))].concat()).unwrap();
    guest.guest.worker.run();
    assert_eq!(guest.received().unwrap(), frame(60, 2));
    assert_eq!(guest.received().unwrap(), frame(60_000, 3));
    assert_eq!(guest.control.stats().rx_packets_count.get(), 2);
}

#[test]
fn slow_peer_gets_all_frames_in_order() {
    let (mut guest, mut peer) = guest();
    let (mut made, mut got) = (0u32, Vec::new());
    while got.len() < 2000 * 1004 {
        while guest.queues[1].take_used().is_some() {}
        while made < 2000 && guest.send_on(0, [0; 12], &frame(1000, made as u8), &[]) {
            made += 1;
        }
        guest.publish(1);
        let mut piece = vec![0; 100_000];
        if let Ok(count) = peer.read(&mut piece) {
            got.extend_from_slice(&piece[..count]);
        }
        guest.guest.worker.run();
    }
    for (seed, sent) in got.chunks(1004).enumerate() {
        assert!(sent == framed(&frame(1000, seed as u8)), "frame {seed}");
    }
}

#[test]
fn hangup_or_invalid_length_takes_the_link_down() {
    for invalid in [false, true] {
        let (mut guest, mut peer) = guest();
        guest.post_rx_buffer(&[1536]);
        if invalid {
            peer.write_all(&[0xff; 8]).unwrap();
        } else {
            drop(peer);
        }
        guest.guest.worker.run();
        assert!(!guest.control.link_is_up());
        guest.send(&frame(60, 1));
        assert_eq!(guest.control.stats().tap_write_fails.get(), 1);
    }
}

/// Number of frames that fit in the transmit queue.
const TX_SLOTS: usize = 64;

#[test]
fn transmit_continues_after_a_full_peer_hangs_up() {
    let (mut guest, mut peer) = guest();
    // A second event without receive buffers ends the watch for reading. It starts again after the
    // watch for writing, so that the kernel reports the event for reading first.
    for seed in 1..=2 {
        peer.write_all(&framed(&frame(60, seed))).unwrap();
        guest.guest.worker.run();
    }
    let mut sent = 0;
    let in_queue = loop {
        while guest.queues[1].take_used().is_some() {
            sent += 1;
        }
        let added = (0..TX_SLOTS).filter(|_| guest.send_on(0, [0; 12], &frame(1000, 1), &[])).count();
        guest.publish(1);
        guest.guest.worker.run();
        if added == 0 {
            break TX_SLOTS;
        }
    };
    assert!(sent > 0);
    for seed in 1..=2 {
        guest.post_rx_buffer(&[1536]);
        assert_eq!(guest.received().unwrap(), frame(60, seed));
    }
    drop(peer);
    guest.guest.worker.run();
    assert!(!guest.control.link_is_up());
    let used = std::iter::from_fn(|| guest.queues[1].take_used()).count();
    assert_eq!(used, in_queue, "frames that waited for the peer are dropped, not kept");
    guest.send(&frame(60, 2));
    assert!(guest.queues[1].take_used().is_some());
    assert_eq!(guest.control.stats().tap_write_fails.get(), in_queue as u64 + 1);
}

#[test]
fn too_large_frame_does_not_block_those_behind_it() {
    let (mut guest, mut peer) = guest();
    guest.post_rx_buffer(&[500]);
    peer.write_all(&[framed(&frame(2000, 1)), framed(&frame(60, 2))].concat()).unwrap();
    guest.guest.worker.run();
    assert_eq!(guest.received(), None);
    guest.guest.worker.advance(crate::pair::BUFFER_TIMEOUT);
    assert_eq!(guest.received().unwrap(), frame(60, 2));
    assert_eq!(guest.control.stats().rx_fails.get(), 1);
}

#[test]
fn frames_wait_until_the_guest_adds_buffers() {
    let (mut guest, mut peer) = guest();
    for seed in 0..20 {
        peer.write_all(&framed(&frame(100, seed))).unwrap();
    }
    for _ in 0..10 {
        guest.guest.worker.run();
        guest.guest.worker.advance(crate::pair::BUFFER_TIMEOUT);
    }
    for seed in 0..20 {
        guest.post_rx_buffer(&[1536]);
        assert_eq!(guest.received().unwrap(), frame(100, seed));
    }
    assert_eq!(guest.control.stats().rx_fails.get(), 0);
}

#[test]
fn throttled_frame_is_not_dropped_for_lack_of_buffers() {
    let once = BucketConfig { size: 1, refill_time_ms: 1000, one_time_burst: 0 };
    let (mut guest, mut peer) = limited(RateLimiterConfig { bandwidth: None, ops: Some(once) });
    // Too small for the first frame.
    guest.post_rx_buffer(&[100]);
    peer.write_all(&[framed(&frame(500, 1)), framed(&frame(500, 2))].concat()).unwrap();
    guest.guest.worker.run();
    for _ in 0..4 {
        guest.post_rx_buffer(&[1536]);
    }
    assert_eq!(guest.received().unwrap(), frame(500, 1));
    for _ in 0..99 {
        guest.guest.worker.advance(crate::pair::BUFFER_TIMEOUT);
        assert_eq!(guest.received(), None);
    }
    guest.guest.worker.advance(2 * crate::pair::BUFFER_TIMEOUT);
    assert_eq!(guest.received().unwrap(), frame(500, 2));
    assert_eq!(guest.control.stats().rx_fails.get(), 0);
}

#[test]
fn invalid_length_closes_the_connection() {
    let (mut guest, mut peer) = guest();
    guest.post_rx_buffer(&[1536]);
    peer.write_all(&[0xff; 8]).unwrap();
    guest.guest.worker.run();
    assert_eq!(peer.read(&mut [0; 1]).unwrap(), 0);
}
