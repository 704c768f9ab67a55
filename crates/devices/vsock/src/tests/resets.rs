//! Pausing, restoring, and resets of all connections.

use std::io::Write;

use super::guest::{End, MS, Rig, is_at_end, read};
use crate::packet::{Op, SocketKind};
use virtio::testing::{Kind, RUNNING};

/// When the guest is asked for connections although it has not handled a reset.
const ENTRY: u64 = 250 * MS;

#[test]
fn a_restored_guest_is_asked_when_it_has_handled_the_reset() {
    for kind in [Kind::Mmio, Kind::Pci] {
        let mut rig = Rig::new(kind);
        let (mut client, old) = rig.open_by_host(1);
        let mut rig = rig.restored(kind, None);
        assert!(is_at_end(&mut client), "its process is gone");
        assert_eq!(rig.guest.status(), RUNNING);
        let mut new = rig.dial(2);
        assert_eq!(rig.next(), None, "a connection that it accepts now is reset");
        assert_eq!(rig.take_event(), Some([0; 4]));
        rig.give_event_buffer();
        let asked = rig.expect(Op::Request).header;
        assert_eq!(rig.take_event(), None);
        // What a socket of before still sends is answered as anything unknown.
        rig.send_data(&old, 0, b"?");
        rig.expect(Op::Rst);
        let end = End { port: 2, host_port: asked.src_port.get(), ..old };
        rig.send(&end, Op::Response, 0);
        assert!(read(&mut new).starts_with(b"OK "));
    }
}

#[test]
fn old_connections_end_by_the_reset_event_and_not_before() {
    for kind in [Kind::Mmio, Kind::Pci] {
        let mut rig = Rig::new(kind);
        let (_client, old) = rig.open_by_host(1);
        let mut rig = rig.restored(kind, None);
        rig.send_data(&old, 0, b"?");
        assert_eq!(rig.next(), None, "a program that reads would see an orderly end");
        assert_eq!(rig.take_event(), Some([0; 4]));
        rig.give_event_buffer();
        rig.send_data(&old, 0, b"?");
        rig.expect(Op::Rst);
    }
}

#[test]
fn an_acceptance_with_the_former_cid_is_replaced() {
    let rig = Rig::new(Kind::Mmio);
    let mut rig = rig.restored(Kind::Mmio, Some(77));
    rig.guest.worker.advance(ENTRY);
    let _client = rig.dial(2);
    let host_port = rig.expect(Op::Request).header.src_port.get();
    // The driver sends with the CID that it had.
    let first = End { port: 2, host_port, kind: SocketKind::Stream, room: 1 << 18, forwarded: 0 };
    rig.send(&first, Op::Response, 0);
    assert_eq!(rig.take_event(), Some([0; 4]));
    rig.give_event_buffer();
    assert_eq!(rig.expect(Op::Rst).header.src_port.get(), host_port);
    assert_ne!(rig.expect(Op::Request).header.src_port.get(), host_port);
}

#[test]
fn a_connection_accepted_before_the_reset_event_is_replaced() {
    for kind in [Kind::Mmio, Kind::Pci] {
        let rig = Rig::new(kind);
        let mut rig = rig.restored(kind, None);
        rig.guest.worker.advance(ENTRY);
        let mut client = rig.dial(2);
        client.write_all(b"early").unwrap();
        let asked = rig.expect(Op::Request).header;
        let first = End {
            port: 2,
            host_port: asked.src_port.get(),
            kind: SocketKind::Stream,
            room: 1 << 18,
            forwarded: 0,
        };
        rig.send(&first, Op::Response, 0);
        rig.send_data(&first, 0, b"lost with the first");
        assert_eq!(rig.next(), None, "the guest gets nothing on it");
        assert_eq!(read(&mut client), b"", "the reset may end it");
        // The driver resets it, tells nobody, and gives the event's buffer back.
        assert_eq!(rig.take_event(), Some([0; 4]));
        rig.give_event_buffer();
        assert_eq!(rig.expect(Op::Rst).header.src_port.get(), first.host_port);
        let asked = rig.expect(Op::Request).header;
        let second = End { host_port: asked.src_port.get(), ..first };
        assert_ne!(second.host_port, first.host_port);
        rig.send(&second, Op::Response, 0);
        rig.send_data(&second, 0, b"hello");
        let answer = format!("OK {}\nhello", second.host_port);
        assert_eq!(read(&mut client), answer.as_bytes());
        assert_eq!(rig.expect(Op::Rw).data, b"early");
        assert_eq!(rig.control.stats().conns_killed.get(), 0);
    }
}

#[test]
fn a_guest_that_ends_a_held_connection_itself_has_it_served() {
    let rig = Rig::new(Kind::Pci);
    let mut rig = rig.restored(Kind::Pci, None);
    rig.guest.worker.advance(ENTRY);
    let mut client = rig.dial(2);
    let asked = rig.expect(Op::Request).header;
    let end =
        End { port: 2, host_port: asked.src_port.get(), kind: SocketKind::Stream, room: 99, forwarded: 0 };
    rig.send(&end, Op::Response, 0);
    rig.send_data(&end, 0, b"done");
    rig.send(&end, Op::Shutdown, 3);
    assert_eq!(read(&mut client), format!("OK {}\ndone", end.host_port).as_bytes());
    assert!(is_at_end(&mut client));
    rig.expect_reset();
}

#[test]
fn a_held_client_that_leaves_is_forgotten_by_the_guest() {
    let rig = Rig::new(Kind::Mmio);
    let mut rig = rig.restored(Kind::Mmio, None);
    rig.guest.worker.advance(ENTRY);
    let client = rig.dial(2);
    let asked = rig.expect(Op::Request).header;
    let end =
        End { port: 2, host_port: asked.src_port.get(), kind: SocketKind::Stream, room: 99, forwarded: 0 };
    rig.send(&end, Op::Response, 0);
    drop(client);
    rig.expect(Op::Rst);
    rig.take_event();
    rig.give_event_buffer();
    assert_eq!(rig.next(), None);
}

#[test]
fn a_restored_guest_connects_to_the_host_at_once() {
    for kind in [Kind::Mmio, Kind::Pci] {
        let mut rig = Rig::new(kind);
        let server = rig.serve(1);
        // It was closing connections when it was saved: some half closed, some not heard of again.
        let mut peers = Vec::new();
        for port in 0..50 {
            let (peer, end) = rig.open_by_guest(&server, 1, 100 + port);
            peers.push(peer);
            if port % 2 == 0 {
                rig.send(&end, Op::Shutdown, 3);
                rig.expect(Op::Rst);
            }
        }
        let mut rig = rig.restored(kind, None);
        let server = rig.serve(1);
        let (mut peer, end) = rig.open_by_guest(&server, 1, 100);
        rig.send_data(&end, 0, b"hello");
        assert_eq!(read(&mut peer), b"hello");
    }
}

#[test]
fn a_restored_guest_that_is_saved_again_keeps_its_connections() {
    let rig = Rig::new(Kind::Mmio);
    let mut rig = rig.restored(Kind::Mmio, None);
    rig.take_event();
    rig.give_event_buffer();
    let (mut client, end) = rig.open_by_host(1);
    let held = rig.dial(2);
    rig.expect(Op::Request);
    drop(rig.guest.save());
    // The parent goes on; a child is made of the state.
    rig.send_data(&end, 0, b"still there");
    assert_eq!(read(&mut client), b"still there");
    client.write_all(b"you, too").unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"you, too");
    drop(held);
    let mut child = rig.restored(Kind::Mmio, None);
    assert_eq!(child.take_event(), Some([0; 4]));
    child.send_data(&end, 0, b"a child has no connection");
    child.expect(Op::Rst);
}

#[test]
fn the_first_client_after_a_restore_has_another_port_than_any_before_it() {
    let mut rig = Rig::new(Kind::Mmio);
    let (_client, old) = rig.open_by_host(1);
    let mut rig = rig.restored(Kind::Mmio, None);
    assert_eq!(rig.take_event(), Some([0; 4]));
    rig.give_event_buffer();
    let mut new = rig.dial(1);
    let asked = rig.expect(Op::Request).header;
    assert_ne!(
        asked.src_port.get(),
        old.host_port,
        "a guest whose program has not closed the old one refuses it"
    );
    // What it says of the old one is not about the new one.
    rig.send(&old, Op::Rst, 0);
    rig.send(&End { host_port: asked.src_port.get(), ..old }, Op::Response, 0);
    assert!(read(&mut new).starts_with(b"OK "));
}

#[test]
fn a_driver_that_never_handles_the_reset_delays_its_first_clients() {
    let rig = Rig::new(Kind::Mmio);
    let mut rig = rig.restored(Kind::Mmio, None);
    rig.guest.worker.advance(ENTRY);
    let mut client = rig.dial(2);
    let asked = rig.expect(Op::Request).header;
    let end =
        End { port: 2, host_port: asked.src_port.get(), kind: SocketKind::Stream, room: 99, forwarded: 0 };
    rig.send(&end, Op::Response, 0);
    rig.send_data(&end, 0, b"hello");
    assert_eq!(read(&mut client), b"");
    rig.guest.worker.advance(10_000 * MS);
    assert_eq!(read(&mut client), format!("OK {}\nhello", end.host_port).as_bytes());
    rig.open_by_host(3);
}

#[test]
fn a_restored_device_can_have_another_cid() {
    let rig = Rig::new(Kind::Mmio);
    let mut rig = rig.restored(Kind::Mmio, Some(77));
    let mut cid = [0; 8];
    rig.guest.read_config(0, &mut cid);
    assert_eq!(u64::from_le_bytes(cid), 77);
}

#[test]
fn all_connections_of_a_running_device_can_be_reset() {
    let mut rig = Rig::new(Kind::Pci);
    let server = rig.serve(1);
    let (mut a, _) = rig.open_by_host(5);
    let (mut b, _) = rig.open_by_guest(&server, 1, 2);
    rig.control.reset_connections();
    rig.guest.worker.run();
    assert!(is_at_end(&mut a) && is_at_end(&mut b));
    assert_eq!(rig.take_event(), Some([0; 4]));
    assert_eq!(rig.next(), None, "it is told by the event alone");
    rig.give_event_buffer();
    rig.open_by_host(6);
}

#[test]
fn nothing_is_lost_in_a_pause_and_its_time_does_not_count() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    let mut waiting = rig.dial(2);
    let asked = rig.expect(Op::Request).header;
    rig.guest.worker.pause();
    client.write_all(b"meanwhile").unwrap();
    let _third = rig.dial(3);
    rig.post_data(&end, b"and here");
    assert_eq!(rig.next_without_refill(), None);
    assert_eq!(read(&mut client), b"");
    rig.guest.worker.advance(3_600_000 * MS);
    assert!(!is_at_end(&mut waiting));
    rig.guest.worker.resume();
    assert_eq!(read(&mut client), b"and here");
    let mut ops: Vec<_> = std::iter::from_fn(|| rig.next()).map(|packet| packet.op()).collect();
    ops.sort_by_key(|op| *op as u16);
    assert_eq!(ops, [Op::Request, Op::Rw]);
    let end =
        End { port: 2, host_port: asked.src_port.get(), kind: SocketKind::Stream, room: 9, forwarded: 0 };
    rig.send(&end, Op::Response, 0);
    assert!(read(&mut waiting).starts_with(b"OK "));
}

#[test]
fn a_driver_that_starts_anew_has_no_connections_and_the_sockets_are_still_there() {
    let mut rig = Rig::new(Kind::Pci);
    let (mut client, _) = rig.open_by_host(1);
    rig.start();
    assert!(is_at_end(&mut client));
    let server = rig.serve(1);
    let (mut peer, end) = rig.open_by_guest(&server, 1, 2);
    rig.send_data(&end, 0, b"x");
    assert_eq!(read(&mut peer), b"x");
    rig.open_by_host(1);
}
