//! Pausing, restoring, and resets of all connections.

use std::io::Write;

use super::guest::{End, MS, Rig, is_at_end, read};
use crate::testing::{Kind, RUNNING};
use crate::vsock::packet::{Op, SocketKind};

#[test]
fn a_restored_driver_is_told_and_host_clients_wait_until_it_has_taken_note() {
    for kind in [Kind::Mmio, Kind::Pci] {
        let mut rig = Rig::new(kind);
        let (mut client, old) = rig.open_by_host(1);
        let mut rig = rig.restored(kind, None);
        assert!(is_at_end(&mut client), "its process is gone");
        assert_eq!(rig.guest.status(), RUNNING);
        let mut new = rig.dial(2);
        assert_eq!(rig.next(), None);
        assert_eq!(rig.take_event(), Some([0; 4]));
        assert_eq!(rig.next(), None);
        rig.give_event_buffer();
        assert_eq!(rig.take_event(), None);
        let asked = rig.expect(Op::Request).header;
        // What a socket of before still sends is answered as anything unknown.
        rig.send_data(&old, 0, b"?");
        rig.expect(Op::Rst);
        let end = End { port: 2, host_port: asked.src_port.get(), ..old };
        rig.send(&end, Op::Response, 0);
        assert!(read(&mut new).starts_with(b"OK "));
    }
}

#[test]
fn the_first_client_after_a_restore_has_another_port_than_any_before_it() {
    let mut rig = Rig::new(Kind::Mmio);
    let (_client, old) = rig.open_by_host(1);
    let mut rig = rig.restored(Kind::Mmio, None);
    let mut new = rig.dial(1);
    assert_eq!(rig.take_event(), Some([0; 4]));
    rig.give_event_buffer();
    rig.guest.worker.run();
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
fn a_restored_driver_that_takes_no_note_keeps_clients_waiting_for_a_moment_only() {
    let rig = Rig::new(Kind::Mmio);
    let mut rig = rig.restored(Kind::Mmio, None);
    let _client = rig.dial(2);
    assert_eq!(rig.next(), None);
    rig.guest.worker.advance(10_000 * MS);
    rig.expect(Op::Request);
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
