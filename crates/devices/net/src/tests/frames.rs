//! Tests of frames in both directions.

use vm_memory::{Bytes, GuestAddress};

use super::guest::{config, fake_tap};
use super::*;
use crate::config_space::feature;
use crate::pair::BUFFER_TIMEOUT;
use crate::{NetBackend, NetSetup};
use virtio::device::feature::{RING_EVENT_IDX, RING_INDIRECT_DESC, VERSION_1};
use virtio::rate_limiter::RateLimiterConfig;
use virtio::testing::{Kind, RUNNING};

const BOTH: [Kind; 2] = [Kind::Mmio, Kind::Pci];

fn accepting(accepts: u64) -> NetGuest {
    let none = RateLimiterConfig::default();
    NetGuest::with(Kind::Mmio, config(1), none, none, accepts)
}

#[test]
fn frames_pass_both_ways_with_their_headers() {
    for kind in BOTH {
        let mut guest = NetGuest::new(kind);
        let (header, out) = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0], frame(1000, 7));
        assert!(guest.send_on(0, header, &out, &[5, 7, 1, 300]));
        guest.publish(1);
        assert_eq!(guest.sent_on(0).unwrap(), [&header[..], &out].concat());
        assert!(guest.queues[1].take_used().is_some());

        guest.post_rx_buffer(&[7, 3, 2000]);
        guest.guest.interrupts.take();
        assert!(guest.arrive_on(0, header, &out));
        assert!(guest.guest.interrupts.take() > 0);
        let rx = guest.received_on(0).unwrap();
        assert_eq!((rx.frame, rx.buffers), (out, 1));
        assert_eq!(rx.header, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 0]);
        let stats = guest.control.stats();
        assert_eq!((stats.tx_packets_count.get(), stats.tx_bytes_count.get()), (1, 1000));
        assert_eq!(stats.no_tx_avail_buffer.get(), 0);
        assert_eq!((stats.rx_packets_count.get(), stats.rx_bytes_count.get()), (1, 1000));
    }
}

#[test]
fn frames_have_a_12_byte_header_without_version_1() {
    for (kind, accepts) in BOTH.into_iter().flat_map(|kind| [(kind, !VERSION_1), (kind, 0)]) {
        let mut guest = NetGuest::new(kind);
        guest.start_exactly(accepts);
        for life in 0..2 {
            assert_eq!((guest.guest.status(), guest.features & VERSION_1), (RUNNING, 0));
            // Without offloads the header is not used.
            let (header, out) = ([0; 12], frame(1000, 7));
            assert!(guest.send_on(0, header, &out, &[12, 300]));
            guest.publish(1);
            assert_eq!(guest.sent_on(0).unwrap(), [&header[..], &out].concat());
            guest.post_rx_buffer(&[2000]);
            assert!(guest.arrive_on(0, header, &out));
            let rx = guest.received_on(0).unwrap();
            assert!(rx.frame == out && rx.header == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "{life}");
            let (tap, peers) = fake_tap(1);
            let setup = NetSetup { backend: NetBackend::tap(tap), interceptor: None };
            guest.restore(None, setup, peers).unwrap();
        }
    }
}

#[test]
fn large_frame_fills_several_buffers() {
    let mut guest = NetGuest::new(Kind::Mmio);
    for _ in 0..50 {
        assert!(guest.add_rx_buffer(0, &[1536]));
    }
    guest.publish(0);
    let large = frame(65_000, 3);
    guest.arrive(&large);
    let rx = guest.received_on(0).unwrap();
    assert_eq!(rx.buffers, 65_012_u32.div_ceil(1536) as u16);
    assert!(rx.frame == large);
    guest.arrive(&frame(60, 4));
    assert_eq!(guest.received().unwrap(), frame(60, 4));
}

#[test]
fn batch_of_frames_raises_one_interrupt() {
    let mut guest = NetGuest::new(Kind::Mmio);
    for _ in 0..20 {
        assert!(guest.add_rx_buffer(0, &[1536]));
    }
    guest.publish(0);
    guest.queues[0].enable_interrupts();
    guest.guest.interrupts.take();
    for seed in 0..10 {
        let bytes = [&[0; 12][..], &frame(100, seed)].concat();
        rustix::net::send(&guest.peers[0], &bytes, rustix::net::SendFlags::empty()).unwrap();
    }
    guest.guest.worker.run();
    assert_eq!(guest.guest.interrupts.take(), 1);
    for seed in 0..10 {
        assert_eq!(guest.received().unwrap(), frame(100, seed));
    }
}

#[test]
fn too_large_frame_without_mergeable_buffers_is_dropped() {
    let mut guest = accepting(!feature::MRG_RXBUF);
    guest.post_rx_buffer(&[12, 500]);
    guest.arrive(&frame(501, 1));
    assert_eq!(guest.received(), None);
    assert_eq!(guest.control.stats().rx_fails.get(), 1);
    guest.arrive(&frame(500, 2));
    assert_eq!(guest.received_on(0).unwrap().buffers, 1);
    assert_eq!(guest.control.stats().rx_fails.get(), 1);
}

#[test]
fn kick_is_requested_only_without_receive_buffers() {
    let mut guest = NetGuest::new(Kind::Mmio);
    guest.arrive(&frame(60, 1));
    assert_eq!(guest.control.stats().no_rx_avail_buffer.get(), 1);
    assert!(guest.add_rx_buffer(0, &[1536]));
    assert!(guest.publish(0), "the device asks for a kick");
    assert_eq!(guest.received().unwrap(), frame(60, 1));
    for _ in 0..60 {
        assert!(guest.add_rx_buffer(0, &[1536]));
    }
    guest.publish(0);
    guest.arrive(&frame(60, 2));
    assert!(guest.add_rx_buffer(0, &[1536]));
    assert!(!guest.publish(0), "the device has enough buffers");
}

#[test]
fn frames_stay_in_the_network_without_receive_buffers() {
    let mut guest = NetGuest::new(Kind::Mmio);
    let mut count = 0u16;
    while count < 1000 && guest.arrive_on(0, [0; 12], &frame(1400, count as u8)) {
        count += 1;
    }
    assert!(count < 1000, "the device reads frames without receive buffers");
    let events = guest.control.stats().rx_tap_event_count.get();
    assert!(events < 5, "{events} wake-ups for nothing");
    let mut got = 0u16;
    while got < count {
        guest.post_rx_buffer(&[1536]);
        assert_eq!(guest.received().unwrap(), frame(1400, got as u8));
        got += 1;
    }
    assert_eq!(guest.control.stats().rx_fails.get(), 0);
}

#[test]
fn partial_frame_completes_when_buffers_are_added() {
    let mut guest = NetGuest::new(Kind::Mmio);
    guest.post_rx_buffer(&[1000]);
    guest.arrive(&frame(2500, 1));
    assert_eq!(guest.received(), None);
    guest.post_rx_buffer(&[1000]);
    assert_eq!(guest.received(), None);
    guest.post_rx_buffer(&[100, 900]);
    let rx = guest.received_on(0).unwrap();
    assert_eq!((rx.frame, rx.buffers), (frame(2500, 1), 3));
    assert_eq!(guest.guest.worker.next_timer(), None);
}

#[test]
fn partial_frame_is_dropped_after_the_timeout() {
    let mut guest = NetGuest::new(Kind::Mmio);
    guest.post_rx_buffer(&[1000]);
    guest.arrive(&frame(2500, 1));
    guest.arrive(&frame(100, 2));
    guest.guest.worker.advance(BUFFER_TIMEOUT - 1);
    assert_eq!(guest.received(), None);
    guest.guest.worker.advance(1);
    assert_eq!(guest.received().unwrap(), frame(100, 2));
    assert_eq!(guest.control.stats().rx_fails.get(), 1);
}

#[test]
fn spoofed_source_mac_is_dropped_if_a_mac_is_configured() {
    let mut guest = NetGuest::new(Kind::Mmio);
    let mut spoofed = frame(100, 1);
    spoofed[11] ^= 1;
    guest.send(&spoofed);
    guest.send(&frame(100, 2));
    assert_eq!(guest.sent().unwrap(), frame(100, 2));
    assert_eq!(guest.sent(), None);
    assert_eq!(guest.control.stats().tx_spoofed_mac_count.get(), 1);
    assert_eq!(guest.control.stats().tx_packets_count.get(), 1);

    let none = RateLimiterConfig::default();
    let any_mac = crate::NetConfig { mac: None, ..config(1) };
    let mut guest = NetGuest::with(Kind::Mmio, any_mac, none, none, u64::MAX);
    guest.send(&spoofed);
    assert_eq!(guest.sent().unwrap(), spoofed);
}

#[test]
fn malformed_frames_are_completed_and_not_sent() {
    let mut guest = NetGuest::new(Kind::Mmio);
    for bytes in [0, 1, 13] {
        assert!(guest.send_on(0, [0; 12], &vec![0; bytes], &[1]));
    }
    assert!(guest.send_on(0, [0; 12], &vec![0; 18 + 65536], &[]));
    guest.publish(1);
    for _ in 0..4 {
        assert!(guest.queues[1].take_used().is_some());
    }
    assert_eq!(guest.sent(), None);
    assert_eq!(guest.control.stats().tx_malformed_frames.get(), 4);
    guest.send(&frame(14, 1));
    assert_eq!(guest.sent().unwrap().len(), 14);
}

#[test]
fn full_network_delays_frames_in_order() {
    let mut guest = NetGuest::new(Kind::Mmio);
    let mut sent = 0u8;
    let mut made = 0u8;
    let mut held = false;
    while sent < 200 {
        while made < 200 && guest.send_on(0, [0; 12], &frame(1400, made), &[]) {
            made += 1;
            guest.publish(1);
        }
        held |= guest.queues[1].out() == 64;
        while let Some(frame_) = guest.sent() {
            assert_eq!(frame_, frame(1400, sent));
            sent += 1;
        }
        guest.guest.worker.run();
        while guest.queues[1].take_used().is_some() {}
    }
    assert!(held, "the network was never full");
    assert_eq!(guest.control.stats().tap_write_fails.get(), 0);
}

#[test]
fn lost_network_takes_the_link_down_not_the_device() {
    for kind in BOTH {
        let mut guest = NetGuest::new(kind);
        guest.post_rx_buffer(&[1536]);
        let mut status = [0; 2];
        guest.guest.read_config(6, &mut status);
        assert_eq!(status, [1, 0]);
        guest.peers.clear();
        guest.guest.interrupts.take();
        guest.guest.worker.run();
        assert!(guest.guest.interrupts.take() > 0, "the driver is interrupted");
        guest.guest.read_config(6, &mut status);
        assert_eq!(status, [0, 0]);
        assert!(!guest.control.link_is_up());
        for seed in 0..100 {
            guest.send(&frame(60, seed));
        }
        assert_eq!(guest.control.stats().tap_write_fails.get(), 100);
        assert_eq!(guest.guest.broken_count(), 0);
    }
}

#[test]
fn frames_pass_without_event_idx_and_indirect_descriptors() {
    let mut guest = accepting(!(RING_EVENT_IDX | RING_INDIRECT_DESC));
    for seed in 0..200 {
        guest.post_rx_buffer(&[1536]);
        guest.arrive(&frame(200, seed));
        assert_eq!(guest.received().unwrap(), frame(200, seed));
        guest.send(&frame(300, seed));
        assert_eq!(guest.sent().unwrap(), frame(300, seed));
    }
}

#[test]
fn chain_of_more_buffers_than_a_system_call_takes() {
    let none = RateLimiterConfig::default();
    // Without a MAC address no byte of a sent frame is copied.
    let config = crate::NetConfig { mac: None, ..config(1) };
    let mut guest = NetGuest::with(Kind::Mmio, config, none, none, u64::MAX);
    let (table, data) = (12 << 20, 13 << 20);
    for (count, malformed) in [(1022, 0), (1023, 1), (1024, 2)] {
        let buffers: Vec<_> = (0..count).map(|n| (data + 2 * n, 1)).collect();
        guest.queues[1].add_indirect(table, &buffers, &[]).unwrap();
        guest.publish(1);
        assert_eq!(guest.sent_on(0).map(|sent| sent.len()), (malformed == 0).then_some(1022));
        assert_eq!(guest.control.stats().tx_malformed_frames.get(), malformed);
    }
    // The end of the received frame is in the two buffers that are not read into.
    let buffers: Vec<_> = (0..1024).map(|n| (data + 128 * n, 64)).collect();
    guest.queues[0].add_indirect(table, &[], &buffers).unwrap();
    guest.publish(0);
    let large = frame(64 * 1024 - 12, 5);
    guest.arrive(&large);
    let used = guest.queues[0].take_used().unwrap();
    assert_eq!(used.written, 64 * 1024);
    let mut received = vec![0; 64 * 1024];
    for (part, (addr, _)) in received.chunks_mut(64).zip(buffers) {
        guest.guest.ram.memory().read_slice(part, GuestAddress(addr)).unwrap();
    }
    assert!(received[12..] == large);
}

#[test]
fn broken_queue_breaks_the_device_until_reset() {
    let mut guest = NetGuest::new(Kind::Mmio);
    guest.queues[1].set_descriptor(0, 1 << 40, 100, 0, 0);
    guest.queues[1].set_avail_entry(0, 0);
    guest.queues[1].set_avail_idx(1);
    guest.guest.kick(1);
    assert_eq!(guest.guest.broken_count(), 1);
    guest.arrive(&frame(100, 1));
    guest.start(u64::MAX);
    guest.post_rx_buffer(&[1536]);
    assert_eq!(guest.received().unwrap(), frame(100, 1));
}

#[test]
fn pause_unpops_chains_and_a_restored_copy_uses_them() {
    let mut guest = NetGuest::new(Kind::Pci);
    for _ in 0..50 {
        assert!(guest.add_rx_buffer(0, &[1536]));
    }
    guest.publish(0);
    guest.arrive(&frame(100, 1));
    assert_eq!(guest.received().unwrap(), frame(100, 1));
    let mut state = guest.guest.save();
    let net: crate::NetState = state.common().device.decode().expect("the state is this device's");
    let receive = &state.common().queues[0];
    assert_eq!((receive.next_avail, receive.next_used), (1, 1), "popped chains are not part of the state");
    // The original guest continues.
    guest.arrive(&frame(100, 2));
    assert_eq!(guest.received().unwrap(), frame(100, 2));

    let (tap, peers) = guest::fake_tap(1);
    let setup = crate::NetSetup { backend: crate::NetBackend::tap(tap), interceptor: None };
    let (copy, control) = crate::Net::restore(&net, None, setup, 1).unwrap();
    let worker = virtio::testing::TestWorker::new();
    let mut other = virtio::testing::Guest::with(Kind::Pci, Box::new(copy), guest.guest.ram.clone(), worker);
    other.restore(&state).unwrap();
    (guest.guest, guest.control, guest.peers) = (other, control, peers);
    // The driver's receive queue is one frame ahead of the saved state: its buffer is filled again.
    let used_before = guest.queues[0].used_idx();
    guest.arrive(&frame(700, 3));
    assert_eq!(guest.queues[0].used_idx(), used_before, "the used index is 2 again");
    guest.send(&frame(90, 4));
    assert_eq!(guest.sent().unwrap(), frame(90, 4));
}
