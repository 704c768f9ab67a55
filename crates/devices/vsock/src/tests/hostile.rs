//! Guests that break the rules, and hosts that never read.

use std::io::ErrorKind::WouldBlock;
use std::io::Write;
use std::os::unix::net::UnixStream;

use zerocopy::IntoBytes;

use super::guest::{CID, End, Rig, allow_connections, is_at_end, read};
use crate::MAX_CONNECTIONS;
use crate::packet::{HOST_CID, Header, Op, SocketKind};
use virtio::testing::{Kind, RUNNING};

#[test]
fn more_data_than_was_promised_room_for_resets_the_connection() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    let mut sent = 0;
    // The socket takes some of it; what is kept is bounded by the credit.
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
fn credit_for_what_was_never_sent_resets_the_connection() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, mut end) = rig.open_by_host(1);
    end.forwarded = 1;
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
fn packets_that_make_no_sense_are_answered_with_a_reset_or_dropped() {
    let mut rig = Rig::new(Kind::Mmio);
    let end = End { port: 1, host_port: 2, kind: SocketKind::Stream, room: 0, forwarded: 0 };
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
fn a_packet_that_is_shorter_than_it_says_resets_its_connection() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    rig.send_raw(Rig::header(&end, Op::Rw, 0, 1000).as_bytes(), b"short");
    rig.expect(Op::Rst);
    assert!(is_at_end(&mut client));
}

#[test]
fn operations_out_of_turn_reset_their_connection() {
    for op in [Op::Response, Op::Rw] {
        let mut rig = Rig::new(Kind::Mmio);
        let mut client = rig.dial(1);
        let asked = rig.expect(Op::Request).header;
        let end =
            End { port: 1, host_port: asked.src_port.get(), kind: SocketKind::Stream, room: 9, forwarded: 0 };
        if op == Op::Response {
            rig.send(&end, Op::Response, 0);
            read(&mut client);
        }
        rig.send(&end, op, 0);
        rig.expect(Op::Rst);
        assert!(is_at_end(&mut client));
    }
    // Data after the end of data.
    let mut rig = Rig::new(Kind::Mmio);
    let (_client, end) = rig.open_by_host(1);
    rig.send(&end, Op::Shutdown, 2);
    rig.send_data(&end, 0, b"x");
    rig.expect(Op::Rst);
    // A message on a stream.
    let (_client, end) = rig.open_by_host(1);
    rig.send_data(&End { kind: SocketKind::SeqPacket, ..end }, 1, b"x");
    rig.expect(Op::Rst);
}

#[test]
fn replies_wait_for_buffers_and_the_guests_packets_do_not() {
    let mut rig = Rig::with(Kind::Mmio, 1, 100);
    let server = rig.serve(1);
    let (mut peer, end) = rig.open_by_guest(&server, 1, 1);
    // The only buffer is given back from here on only when asked for.
    let nobody = End { port: 9, host_port: 9, ..end };
    for _ in 0..200 {
        rig.send(&nobody, Op::Rw, 0);
    }
    rig.send_data(&end, 0, b"goes on");
    assert_eq!(read(&mut peer), b"goes on");
    let resets = std::iter::from_fn(|| rig.next()).filter(|packet| packet.op() == Op::Rst).count();
    assert_eq!(resets, 200);
}

#[test]
fn buffers_without_room_are_thrown_away_and_data_waits_for_better_ones() {
    let mut rig = Rig::with(Kind::Mmio, 4, 45);
    let (mut client, _) = rig.open_by_host(1);
    client.write_all(b"abc").unwrap();
    for byte in b"abc" {
        assert_eq!(rig.expect(Op::Rw).data, [*byte], "one byte is room");
    }
    let mut rig = Rig::with(Kind::Mmio, 4, 44);
    let (mut client, _) = rig.open_by_host(1);
    client.write_all(b"abc").unwrap();
    rig.guest.worker.run();
    assert_eq!(rig.guest.status(), RUNNING);
    // All but the one that the request came in.
    assert_eq!(rig.control.stats().malformed_count.get(), 3);
}

#[test]
fn a_driver_that_refills_bad_buffers_while_they_are_thrown_away_gets_a_turn_and_no_more() {
    // A reset for it, whose buffer may be any; and data, which is read into several.
    for with_data in [false, true] {
        let mut rig = Rig::with(Kind::Mmio, 1, 100);
        let (mut client, end) = rig.open_by_host(1);
        let tiny = rig.give_tiny_buffers();
        let mut before = 0;
        // Whether the driver is quick enough depends on where it runs: one of these times it is.
        for _ in 0..100 {
            if with_data {
                client.write_all(b"x").unwrap();
            } else {
                rig.post(Rig::header(&End { port: 9, ..end }, Op::Rw, 0, 0).as_bytes(), &[]);
                rig.publish_tx();
            }
            rig.guest.worker.step();
            let thrown_away = rig.control.stats().malformed_count.get();
            // One turn for an event, and one for what comes of it.
            assert!(thrown_away - before <= 2 * 1024, "{} in one step", thrown_away - before);
            before = thrown_away;
        }
        assert!(before > 0);
        drop(tiny);
        rig.guest.worker.run();
        assert_eq!(rig.guest.status(), RUNNING);
    }
}

#[test]
fn there_is_room_for_so_many_clients_and_the_next_is_closed_at_once() {
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
    // The guest is refused, too.
    let server = rig.serve(1);
    let end = End { port: 1, host_port: 1, kind: SocketKind::Stream, room: 9, forwarded: 0 };
    rig.send(&end, Op::Request, 0);
    rig.expect(Op::Rst);
    // One that goes makes room.
    clients.pop();
    rig.open_by_guest(&server, 1, 1);
}

#[test]
fn a_broken_queue_ends_all_connections_and_a_reset_makes_the_device_whole() {
    let mut rig = Rig::new(Kind::Pci);
    let (mut client, _) = rig.open_by_host(1);
    rig.break_tx();
    assert!(is_at_end(&mut client));
    assert_ne!(rig.guest.status(), RUNNING);
    let mut too_late = rig.dial(1);
    rig.guest.worker.run();
    assert_ne!(std::io::Read::read(&mut too_late, &mut [0]).map_err(|e| e.kind()), Err(WouldBlock));
    rig.start();
    let (mut client, end) = rig.open_by_host(1);
    rig.send_data(&end, 0, b"again");
    assert_eq!(read(&mut client), b"again");
}
