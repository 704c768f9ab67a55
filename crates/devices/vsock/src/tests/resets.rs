//! Pause, restore, and resets of all connections.

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::guest::{End, MS, Rig, is_at_end, read};
use crate::packet::{Op, SHUTDOWN_BOTH};
use virtio::testing::{Kind, RUNNING};

const BOTH: [Kind; 2] = [Kind::Mmio, Kind::Pci];

/// How long connection requests wait for the driver to handle a reset.
const REQUEST_DELAY: u64 = 250 * MS;

/// A restored guest that has not handled the transport reset in time, so that it is sent connection
/// requests all the same.
fn restored_without_handling_reset(kind: Kind, new_cid: Option<u32>) -> Rig {
    let mut rig = Rig::new(kind).restored(kind, new_cid);
    rig.guest.worker.advance(REQUEST_DELAY);
    rig
}

/// As above, with a host client whose connection the guest has accepted.
fn restored_with_held_client(kind: Kind) -> (Rig, UnixStream, End) {
    let mut rig = restored_without_handling_reset(kind, None);
    let client = rig.connect(2);
    let end = rig.accept_request(99);
    (rig, client, end)
}

/// The client's `OK` reply for a connection.
fn ok(end: &End) -> String {
    format!("OK {}\n", end.host_port)
}

#[test]
fn clients_wait_until_a_restored_guest_handled_the_reset() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let (mut client, old) = rig.open_by_host(1);
        let mut rig = rig.restored(kind, None);
        assert!(is_at_end(&mut client), "its process is gone");
        assert_eq!(rig.guest.status(), RUNNING);
        let mut new = rig.connect(2);
        assert_eq!(rig.next(), None, "the driver would reset a connection that it accepts now");
        rig.handle_reset();
        let end = rig.take_request(1 << 18);
        assert_eq!(rig.take_event(), None);
        // A packet of an old socket is answered like any for an unknown connection.
        rig.send_data(&old, 0, b"?");
        rig.expect(Op::Rst);
        rig.send(&end, Op::Response, 0);
        assert!(read(&mut new).starts_with(b"OK "));
    }
}

#[test]
fn old_connections_end_by_the_reset_event_and_not_before() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let (_client, old) = rig.open_by_host(1);
        let mut rig = rig.restored(kind, None);
        rig.send_data(&old, 0, b"?");
        assert_eq!(rig.next(), None, "a program that reads would see an orderly end");
        rig.handle_reset();
        rig.send_data(&old, 0, b"?");
        rig.expect(Op::Rst);
    }
}

#[test]
fn a_connection_accepted_with_the_former_cid_is_replaced() {
    let mut rig = restored_without_handling_reset(Kind::Mmio, Some(77));
    let _client = rig.connect(2);
    // The driver still sends with its former CID.
    let first = rig.accept_request(1 << 18);
    rig.handle_reset();
    assert_eq!(rig.expect(Op::Rst).header.src_port.get(), first.host_port);
    assert_ne!(rig.expect(Op::Request).header.src_port.get(), first.host_port);
}

#[test]
fn a_connection_accepted_before_the_reset_is_replaced() {
    for kind in BOTH {
        let mut rig = restored_without_handling_reset(kind, None);
        let mut client = rig.connect(2);
        client.write_all(b"early").unwrap();
        let first = rig.accept_request(1 << 18);
        rig.send_data(&first, 0, b"lost with the first");
        assert_eq!(rig.next(), None, "the guest is sent nothing on it");
        assert_eq!(read(&mut client), b"", "the reset may end it");
        // The driver resets it without a packet, and returns the event's buffer.
        rig.handle_reset();
        assert_eq!(rig.expect(Op::Rst).header.src_port.get(), first.host_port);
        let second = rig.accept_request(1 << 18);
        assert_ne!(second.host_port, first.host_port);
        rig.send_data(&second, 0, b"hello");
        assert_eq!(read(&mut client), format!("{}hello", ok(&second)).as_bytes());
        assert_eq!(rig.expect(Op::Rw).data, b"early");
        assert_eq!(rig.control.stats().conns_killed.get(), 0);
    }
}

#[test]
fn a_held_connection_that_the_guest_shuts_down_is_served() {
    let (mut rig, mut client, end) = restored_with_held_client(Kind::Pci);
    rig.send_data(&end, 0, b"done");
    rig.send(&end, Op::Shutdown, SHUTDOWN_BOTH);
    assert_eq!(read(&mut client), format!("{}done", ok(&end)).as_bytes());
    assert!(is_at_end(&mut client));
    rig.expect_reset();
}

#[test]
fn a_held_client_that_closes_is_reset_in_the_guest() {
    let (mut rig, client, _) = restored_with_held_client(Kind::Mmio);
    drop(client);
    rig.expect(Op::Rst);
    rig.handle_reset();
    assert_eq!(rig.next(), None);
}

#[test]
fn a_restored_guest_can_connect_to_the_host_at_once() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let server = rig.serve(1);
        // It was closing connections when it was saved: some were reset, others still open.
        let mut peers = Vec::new();
        for port in 0..50 {
            let (peer, end) = rig.open_by_guest(&server, 1, 100 + port);
            peers.push(peer);
            if port % 2 == 0 {
                rig.send(&end, Op::Shutdown, SHUTDOWN_BOTH);
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
fn saving_keeps_the_connections_of_the_parent() {
    let mut rig = Rig::new(Kind::Mmio).restored(Kind::Mmio, None);
    rig.handle_reset();
    let (mut client, end) = rig.open_by_host(1);
    let waiting = rig.connect(2);
    rig.expect(Op::Request);
    drop(rig.guest.save());
    // The parent continues, and a child is restored from the state.
    rig.send_data(&end, 0, b"still there");
    assert_eq!(read(&mut client), b"still there");
    client.write_all(b"you, too").unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"you, too");
    drop(waiting);
    rig.expect(Op::Rst);
    let mut child = rig.restored(Kind::Mmio, None);
    child.handle_reset();
    child.send_data(&end, 0, b"a child has no connection");
    assert_eq!(child.expect(Op::Rst).header.src_port.get(), end.host_port);
}

#[test]
fn a_restored_device_does_not_reuse_a_host_port() {
    let mut rig = Rig::new(Kind::Mmio);
    let (_client, old) = rig.open_by_host(1);
    let mut rig = rig.restored(Kind::Mmio, None);
    rig.handle_reset();
    let mut client = rig.connect(1);
    let new = rig.take_request(1 << 18);
    assert_ne!(
        new.host_port, old.host_port,
        "a guest whose program has not closed the old connection refuses its ports"
    );
    // A reset of the old connection does not affect the new one.
    rig.send(&old, Op::Rst, 0);
    rig.send(&new, Op::Response, 0);
    assert!(read(&mut client).starts_with(b"OK "));
}

#[test]
fn an_unhandled_reset_delays_the_first_clients_by_10_s() {
    let (mut rig, mut client, end) = restored_with_held_client(Kind::Mmio);
    rig.send_data(&end, 0, b"hello");
    assert_eq!(read(&mut client), b"");
    rig.guest.worker.advance(10_000 * MS);
    assert_eq!(read(&mut client), format!("{}hello", ok(&end)).as_bytes());
    rig.open_by_host(3);
}

#[test]
fn a_restored_device_can_have_another_cid() {
    let mut rig = Rig::new(Kind::Mmio).restored(Kind::Mmio, Some(77));
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
    assert_eq!(rig.next(), None, "no reset packets, only the event");
    rig.handle_reset();
    rig.open_by_host(6);
}

#[test]
fn a_pause_loses_no_data_and_does_not_count_for_timeouts() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    let mut waiting = rig.connect(2);
    let second = rig.take_request(9);
    rig.guest.worker.pause();
    client.write_all(b"meanwhile").unwrap();
    let _third = rig.connect(3);
    rig.send_data(&end, 0, b"and here");
    assert_eq!(rig.next_without_refill(), None);
    assert_eq!(read(&mut client), b"");
    rig.guest.worker.advance(3_600_000 * MS);
    assert!(!is_at_end(&mut waiting));
    rig.guest.worker.resume();
    assert_eq!(read(&mut client), b"and here");
    let mut ops: Vec<_> = std::iter::from_fn(|| rig.next()).map(|packet| packet.op()).collect();
    ops.sort_by_key(|op| *op as u16);
    assert_eq!(ops, [Op::Request, Op::Rw]);
    rig.send(&second, Op::Response, 0);
    assert!(read(&mut waiting).starts_with(b"OK "));
}

#[test]
fn a_restarted_driver_has_no_connections_but_its_sockets() {
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
