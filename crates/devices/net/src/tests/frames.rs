//! Frames both ways.

use super::guest::{config, wires};
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
fn frames_go_both_ways_with_their_headers() {
    for kind in BOTH {
        let mut guest = NetGuest::new(kind);
        let (header, out) = ([1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 0, 0], frame(1000, 7));
        assert!(guest.send_on(0, header, &out, &[5, 7, 1, 300]));
        guest.publish(1);
        assert_eq!(guest.sent_on(0).unwrap(), [&header[..], &out].concat());
        assert!(guest.queues[1].take_used().is_some());

        guest.give(&[7, 3, 2000]);
        guest.guest.interrupts.take();
        assert!(guest.arrive_on(0, header, &out));
        assert!(guest.guest.interrupts.take() > 0);
        let came = guest.received_on(0).unwrap();
        assert_eq!((came.frame, came.buffers), (out, 1));
        assert_eq!(came.header, [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 1, 0]);
        let stats = guest.control.stats();
        assert_eq!((stats.tx_packets_count.get(), stats.tx_bytes_count.get()), (1, 1000));
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
            // Without offloads, what a header asks for does not matter.
            let (header, out) = ([0; 12], frame(1000, 7));
            assert!(guest.send_on(0, header, &out, &[12, 300]));
            guest.publish(1);
            assert_eq!(guest.sent_on(0).unwrap(), [&header[..], &out].concat());
            guest.give(&[2000]);
            assert!(guest.arrive_on(0, header, &out));
            let came = guest.received_on(0).unwrap();
            assert!(came.frame == out && came.header == [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0], "{life}");
            let (tap, wires) = wires(1);
            let setup = NetSetup { backend: NetBackend::tap(tap), interceptor: None };
            guest.restore(None, setup, wires).unwrap();
        }
    }
}

#[test]
fn a_large_frame_fills_several_buffers() {
    let mut guest = NetGuest::new(Kind::Mmio);
    for _ in 0..50 {
        assert!(guest.give_to(0, &[1536]));
    }
    guest.publish(0);
    let large = frame(65_000, 3);
    guest.arrive(&large);
    let came = guest.received_on(0).unwrap();
    assert_eq!(came.buffers, 65_012_u32.div_ceil(1536) as u16);
    assert!(came.frame == large);
    guest.arrive(&frame(60, 4));
    assert_eq!(guest.received().unwrap(), frame(60, 4));
}

#[test]
fn a_batch_of_frames_raises_one_interrupt() {
    let mut guest = NetGuest::new(Kind::Mmio);
    for _ in 0..20 {
        assert!(guest.give_to(0, &[1536]));
    }
    guest.publish(0);
    guest.queues[0].enable_interrupts();
    guest.guest.interrupts.take();
    for seed in 0..10 {
        let bytes = [&[0; 12][..], &frame(100, seed)].concat();
        rustix::net::send(&guest.wires[0], &bytes, rustix::net::SendFlags::empty()).unwrap();
    }
    guest.guest.worker.run();
    assert_eq!(guest.guest.interrupts.take(), 1);
    for seed in 0..10 {
        assert_eq!(guest.received().unwrap(), frame(100, seed));
    }
}

#[test]
fn without_mergeable_buffers_a_frame_that_does_not_fit_is_dropped_and_counted() {
    let mut guest = accepting(!feature::MRG_RXBUF);
    guest.give(&[12, 500]);
    guest.arrive(&frame(501, 1));
    assert_eq!(guest.received(), None);
    assert_eq!(guest.control.stats().rx_fails.get(), 1);
    guest.arrive(&frame(500, 2));
    assert_eq!(guest.received_on(0).unwrap().buffers, 1);
    assert_eq!(guest.control.stats().rx_fails.get(), 1);
}

#[test]
fn a_guest_without_buffers_is_asked_to_kick_and_one_with_buffers_is_not() {
    let mut guest = NetGuest::new(Kind::Mmio);
    guest.arrive(&frame(60, 1));
    assert_eq!(guest.control.stats().no_rx_avail_buffer.get(), 1);
    assert!(guest.give_to(0, &[1536]));
    assert!(guest.publish(0), "a kick is wanted");
    assert_eq!(guest.received().unwrap(), frame(60, 1));
    for _ in 0..60 {
        assert!(guest.give_to(0, &[1536]));
    }
    guest.publish(0);
    guest.arrive(&frame(60, 2));
    assert!(guest.give_to(0, &[1536]));
    assert!(!guest.publish(0), "there is room enough");
}

#[test]
fn the_network_waits_while_the_guest_has_no_buffers() {
    let mut guest = NetGuest::new(Kind::Mmio);
    let mut count = 0u16;
    while count < 1000 && guest.arrive_on(0, [0; 12], &frame(1400, count as u8)) {
        count += 1;
    }
    assert!(count < 1000, "the device reads frames that it has no room for");
    let events = guest.control.stats().rx_tap_event_count.get();
    assert!(events < 5, "{events} wake-ups for nothing");
    let mut got = 0u16;
    while got < count {
        guest.give(&[1536]);
        assert_eq!(guest.received().unwrap(), frame(1400, got as u8));
        got += 1;
    }
    assert_eq!(guest.control.stats().rx_fails.get(), 0);
}

#[test]
fn a_frame_that_was_read_waits_for_room_and_goes_on() {
    let mut guest = NetGuest::new(Kind::Mmio);
    guest.give(&[1000]);
    guest.arrive(&frame(2500, 1));
    assert_eq!(guest.received(), None);
    guest.give(&[1000]);
    assert_eq!(guest.received(), None);
    guest.give(&[100, 900]);
    let came = guest.received_on(0).unwrap();
    assert_eq!((came.frame, came.buffers), (frame(2500, 1), 3));
    assert_eq!(guest.guest.worker.next_timer(), None);
}

#[test]
fn a_frame_for_which_no_room_comes_is_dropped_in_the_end() {
    let mut guest = NetGuest::new(Kind::Mmio);
    guest.give(&[1000]);
    guest.arrive(&frame(2500, 1));
    guest.arrive(&frame(100, 2));
    guest.guest.worker.advance(BUFFER_TIMEOUT - 1);
    assert_eq!(guest.received(), None);
    guest.guest.worker.advance(1);
    assert_eq!(guest.received().unwrap(), frame(100, 2));
    assert_eq!(guest.control.stats().rx_fails.get(), 1);
}

#[test]
fn frames_from_another_address_are_dropped_where_the_guest_has_one() {
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
    let anybody = crate::NetConfig { mac: None, ..config(1) };
    let mut guest = NetGuest::with(Kind::Mmio, anybody, none, none, u64::MAX);
    guest.send(&spoofed);
    assert_eq!(guest.sent().unwrap(), spoofed);
}

#[test]
fn what_is_no_frame_goes_nowhere_and_comes_back() {
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
fn a_network_that_is_full_holds_frames_back_in_order() {
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
    assert!(held, "the network never was full");
    assert_eq!(guest.control.stats().tap_write_fails.get(), 0);
}

#[test]
fn a_network_that_goes_away_takes_the_link_down_and_the_device_goes_on() {
    for kind in BOTH {
        let mut guest = NetGuest::new(kind);
        guest.give(&[1536]);
        let mut status = [0; 2];
        guest.guest.read_config(6, &mut status);
        assert_eq!(status, [1, 0]);
        guest.wires.clear();
        guest.guest.interrupts.take();
        guest.guest.worker.run();
        assert!(guest.guest.interrupts.take() > 0, "the guest is told");
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
fn without_event_indices_and_indirect_tables_it_works_as_well() {
    let mut guest = accepting(!(RING_EVENT_IDX | RING_INDIRECT_DESC));
    for seed in 0..200 {
        guest.give(&[1536]);
        guest.arrive(&frame(200, seed));
        assert_eq!(guest.received().unwrap(), frame(200, seed));
        guest.send(&frame(300, seed));
        assert_eq!(guest.sent().unwrap(), frame(300, seed));
    }
}

#[test]
fn a_broken_queue_breaks_the_device_until_its_reset() {
    let mut guest = NetGuest::new(Kind::Mmio);
    guest.queues[1].set_descriptor(0, 1 << 40, 100, 0, 0);
    guest.queues[1].set_avail_entry(0, 0);
    guest.queues[1].set_avail_idx(1);
    guest.guest.kick(1);
    assert_eq!(guest.guest.broken_count(), 1);
    guest.arrive(&frame(100, 1));
    guest.start(u64::MAX);
    guest.give(&[1536]);
    assert_eq!(guest.received().unwrap(), frame(100, 1));
}

#[test]
fn a_pause_gives_back_what_was_taken_ahead_and_a_copy_goes_on_with_it() {
    let mut guest = NetGuest::new(Kind::Pci);
    for _ in 0..50 {
        assert!(guest.give_to(0, &[1536]));
    }
    guest.publish(0);
    guest.arrive(&frame(100, 1));
    assert_eq!(guest.received().unwrap(), frame(100, 1));
    let mut state = guest.guest.save();
    let net: crate::NetState = state.common().device.decode().expect("the state is this device's");
    let receive = &state.common().queues[0];
    assert_eq!((receive.next_avail, receive.next_used), (1, 1), "no chain is part of a state");
    // The original goes on, too.
    guest.arrive(&frame(100, 2));
    assert_eq!(guest.received().unwrap(), frame(100, 2));

    let (tap, wires) = guest::wires(1);
    let setup = crate::NetSetup { backend: crate::NetBackend::tap(tap), interceptor: None };
    let (copy, control) = crate::Net::restore(&net, None, setup, 1).unwrap();
    let worker = virtio::testing::TestWorker::new();
    let mut other = virtio::testing::Guest::with(Kind::Pci, Box::new(copy), guest.guest.ram.clone(), worker);
    other.restore(&state).unwrap();
    (guest.guest, guest.control, guest.wires) = (other, control, wires);
    // The receive queue of this driver is one frame ahead of the state: its buffer is filled again.
    let used_before = guest.queues[0].used_idx();
    guest.arrive(&frame(700, 3));
    assert_eq!(guest.queues[0].used_idx(), used_before, "the state's index is 2 again");
    guest.send(&frame(90, 4));
    assert_eq!(guest.sent().unwrap(), frame(90, 4));
}
