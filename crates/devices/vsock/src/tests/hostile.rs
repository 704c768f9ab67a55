//! Guests that violate the protocol, and hosts that never read.

use std::io::ErrorKind::WouldBlock;
use std::io::Write;
use std::os::unix::net::UnixStream;

use zerocopy::IntoBytes;

use super::guest::{CID, End, Rig, allow_connections, is_at_end, read};
use crate::MAX_CONNECTIONS;
use crate::packet::{HOST_CID, Header, Op, SocketKind};
use virtio::testing::{Kind, RUNNING};

#[test]
fn data_beyond_the_credit_resets_the_connection() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    let mut sent = 0;
    // The socket takes some of it. What is buffered is bounded by the credit.
    while rig.control.stats().conns_killed.get() == 0 {
        rig.send_data(&end, 0, &vec![3; 100_000]);
        sent += 100_000;
    }
    rig.expect_reset();
    assert!((256 << 10..1 << 20).contains(&sent), "{sent}");
    read(&mut client);
    assert!(is_at_end(&mut client) || client.write_all(b"x").is_err());
    assert_eq!(rig.control.stats().conns_killed.get(), 1);
}

#[test]
fn forwarding_unsent_bytes_resets_the_connection() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, mut end) = rig.open_by_host(1);
    end.fwd_cnt = 1;
    rig.send(&end, Op::CreditUpdate, 0);
    rig.expect(Op::Rst);
    assert!(is_at_end(&mut client));
}

#[test]
fn a_host_that_never_reads_does_not_stop_the_others() {
    let mut rig = Rig::new(Kind::Pci);
    let (lazy, a) = rig.open_by_host(1);
    let (mut other, b) = rig.open_by_host(2);
    for _ in 0..4 {
        rig.send_data(&a, 0, &vec![1; 60_000]);
    }
    for round in 0..50u8 {
        rig.send_data(&b, 0, &[round; 1000]);
        assert_eq!(read(&mut other), [round; 1000]);
    }
    drop(lazy);
}

#[test]
fn invalid_packets_are_answered_with_a_reset_or_dropped() {
    let mut rig = Rig::new(Kind::Mmio);
    let end = End { port: 1, host_port: 2, kind: SocketKind::Stream, buf_alloc: 0, fwd_cnt: 0 };
    let good = Rig::header(&end, Op::Rw, 0, 0);
    for header in [
        good,
        Header { op: 0.into(), ..good },
        Header { op: 99.into(), ..good },
        Header { kind: 7.into(), ..good },
        Header { op: (Op::CreditRequest as u16).into(), ..good },
        Header { op: (Op::Response as u16).into(), ..good },
        Header { dst_cid: 5.into(), ..good },
        Header { dst_cid: u64::MAX.into(), op: (Op::Request as u16).into(), ..good },
    ] {
        rig.send_raw(header.as_bytes(), &[]);
        let reset = rig.expect(Op::Rst).header;
        assert_eq!(reset.src_cid, header.dst_cid);
        assert_eq!(
            (reset.src_port, reset.dst_port, reset.kind),
            (header.dst_port, header.src_port, header.kind)
        );
    }
    for header in [
        Header { op: (Op::Rst as u16).into(), ..good },
        Header { src_cid: HOST_CID.into(), ..good },
        Header { src_cid: (CID + 1).into(), ..good },
    ] {
        rig.send_raw(header.as_bytes(), &[]);
        assert_eq!(rig.next(), None, "{header:?}");
    }
    rig.send_raw(&good.as_bytes()[..43], &[]);
    rig.send_raw(Header { len: u32::MAX.into(), ..good }.as_bytes(), b"short");
    assert_eq!(rig.next(), None);
    assert_eq!(rig.control.stats().malformed_count.get(), 4);
    assert_eq!(rig.guest.status(), RUNNING);
}

#[test]
fn a_truncated_packet_resets_its_connection() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    rig.send_raw(Rig::header(&end, Op::Rw, 0, 1000).as_bytes(), b"short");
    rig.expect(Op::Rst);
    assert!(is_at_end(&mut client));
}

#[test]
fn operations_invalid_in_the_state_reset_the_connection() {
    for op in [Op::Response, Op::Rw] {
        let mut rig = Rig::new(Kind::Mmio);
        let mut client = rig.connect(1);
        let end = rig.take_request(9);
        if op == Op::Response {
            rig.send(&end, Op::Response, 0);
            read(&mut client);
        }
        rig.send(&end, op, 0);
        rig.expect(Op::Rst);
        assert!(is_at_end(&mut client));
    }
    // Data after a shutdown of the sending side.
    let mut rig = Rig::new(Kind::Mmio);
    let (_client, end) = rig.open_by_host(1);
    rig.send(&end, Op::Shutdown, 2);
    rig.send_data(&end, 0, b"x");
    rig.expect(Op::Rst);
    // A packet of the other socket type.
    let (_client, end) = rig.open_by_host(1);
    rig.send_data(&End { kind: SocketKind::SeqPacket, ..end }, 1, b"x");
    rig.expect(Op::Rst);
}

#[test]
fn guest_packets_are_handled_without_rx_buffers() {
    let mut rig = Rig::with(Kind::Mmio, 1, 100);
    let server = rig.serve(1);
    let (mut peer, end) = rig.open_by_guest(&server, 1, 1);
    // From here on the device has no buffer until `next` gives it back.
    let unknown = End { port: 9, host_port: 9, ..end };
    for _ in 0..200 {
        rig.send(&unknown, Op::Rw, 0);
    }
    rig.send_data(&end, 0, b"still handled");
    assert_eq!(read(&mut peer), b"still handled");
    let resets = std::iter::from_fn(|| rig.next()).filter(|packet| packet.op() == Op::Rst).count();
    assert_eq!(resets, 200);
}

#[test]
fn buffers_that_are_too_small_are_discarded() {
    let mut rig = Rig::with(Kind::Mmio, 4, 45);
    let (mut client, _) = rig.open_by_host(1);
    client.write_all(b"abc").unwrap();
    for byte in b"abc" {
        assert_eq!(rig.expect(Op::Rw).data, [*byte], "one byte is enough");
    }
    let mut rig = Rig::with(Kind::Mmio, 4, 44);
    let (mut client, _) = rig.open_by_host(1);
    client.write_all(b"abc").unwrap();
    rig.guest.worker.run();
    assert_eq!(rig.guest.status(), RUNNING);
    // All but the one that the request was in.
    assert_eq!(rig.control.stats().malformed_count.get(), 3);
}

#[test]
fn discarding_refilled_tiny_buffers_is_bounded_by_the_budget() {
    // With a reset to send, which takes one chain, and with data, which is read into several.
    for with_data in [false, true] {
        let mut rig = Rig::with(Kind::Mmio, 1, 100);
        let (mut client, end) = rig.open_by_host(1);
        let tiny = rig.give_tiny_buffers();
        let mut before = 0;
        // How quickly the driver refills depends on the scheduler. The bound holds in any case, as
        // the device runs in `step` only.
        for _ in 0..100 {
            if with_data {
                client.write_all(b"x").unwrap();
            } else {
                rig.post(Rig::header(&End { port: 9, ..end }, Op::Rw, 0, 0).as_bytes(), &[]);
                rig.publish_tx();
            }
            rig.guest.worker.step();
            let discarded = rig.control.stats().malformed_count.get();
            // One budget for the kick, and one for the reschedule.
            assert!(discarded - before <= 2 * 1024, "{} in one step", discarded - before);
            before = discarded;
        }
        assert!(before > 0);
        drop(tiny);
        rig.guest.worker.run();
        assert_eq!(rig.guest.status(), RUNNING);
    }
}

#[test]
fn a_client_beyond_the_maximum_is_closed_at_once() {
    allow_connections(MAX_CONNECTIONS);
    let mut rig = Rig::new(Kind::Mmio);
    let mut clients = Vec::new();
    for _ in 0..MAX_CONNECTIONS {
        clients.push(UnixStream::connect(rig.path("")).unwrap());
        if clients.len() % 64 == 0 {
            rig.guest.worker.run();
        }
    }
    rig.guest.worker.run();
    let mut refused = UnixStream::connect(rig.path("")).unwrap();
    rig.guest.worker.run();
    assert!(is_at_end(&mut refused));
    assert_eq!(rig.control.stats().conns_refused.get(), 1);
    // A connection of the guest is refused, too.
    let server = rig.serve(1);
    let end = End { port: 1, host_port: 1, kind: SocketKind::Stream, buf_alloc: 9, fwd_cnt: 0 };
    rig.send(&end, Op::Request, 0);
    rig.expect(Op::Rst);
    // A client that closes frees its place.
    clients.pop();
    rig.open_by_guest(&server, 1, 1);
}

#[test]
fn a_broken_queue_ends_all_connections_until_a_reset() {
    let mut rig = Rig::new(Kind::Pci);
    let (mut client, _) = rig.open_by_host(1);
    rig.break_tx();
    assert!(is_at_end(&mut client));
    assert_ne!(rig.guest.status(), RUNNING);
    let mut too_late = rig.connect(1);
    rig.guest.worker.run();
    assert_ne!(std::io::Read::read(&mut too_late, &mut [0]).map_err(|e| e.kind()), Err(WouldBlock));
    rig.start();
    let (mut client, end) = rig.open_by_host(1);
    rig.send_data(&end, 0, b"again");
    assert_eq!(read(&mut client), b"again");
}
