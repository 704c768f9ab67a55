//! How connections end: in halves, in good order, by deaths and by deadlines.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use zerocopy::IntoBytes;

use super::guest::{End, MS, Rig, is_at_end, read};
use crate::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SocketKind};
use virtio::testing::Kind;

#[test]
fn a_client_that_ends_its_half_still_hears_the_guest() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    client.write_all(b"last words").unwrap();
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"last words");
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_SEND);
    rig.send_data(&end, 0, b"answer");
    assert_eq!(read(&mut client), b"answer");
    rig.send(&end, Op::Shutdown, SHUTDOWN_BOTH);
    rig.expect(Op::Rst);
    assert!(is_at_end(&mut client));
}

#[test]
fn a_guest_that_ends_its_half_still_hears_the_host() {
    let mut rig = Rig::new(Kind::Pci);
    let (mut client, end) = rig.open_by_host(1);
    rig.send_data(&end, 0, b"last words");
    rig.send(&end, Op::Shutdown, SHUTDOWN_SEND);
    assert_eq!(read(&mut client), b"last words");
    assert!(is_at_end(&mut client));
    client.write_all(b"answer").unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"answer");
    drop(client);
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH);
}

#[test]
fn a_guest_that_wants_no_more_makes_the_hosts_writes_fail() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    rig.send(&end, Op::Shutdown, SHUTDOWN_RECEIVE);
    let error = client.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    rig.send_data(&end, 0, b"still here");
    assert_eq!(read(&mut client), b"still here");
}

#[test]
fn a_host_that_wants_no_more_is_told_to_the_guest() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    client.shutdown(Shutdown::Read).unwrap();
    rig.send_data(&end, 0, b"in vain");
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_RECEIVE);
    client.write_all(b"but listen").unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"but listen");
}

#[test]
fn a_host_that_closes_is_forgotten_when_the_guest_has_taken_note() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(rig.expect(Op::Rw).data, b"bye");
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH);
    // What the guest sends before it hears of it is not wrong.
    rig.send_data(&end, 0, b"too late");
    assert_eq!(rig.next(), None);
    rig.send(&end, Op::Rst, 0);
    assert_eq!(rig.next(), None);
    let stats = rig.control.stats();
    assert_eq!((stats.conns_removed.get(), stats.conns_killed.get()), (1, 0));
    assert_eq!(rig.guest.worker.next_timer(), None);
}

#[test]
fn a_guest_that_takes_no_note_is_told_once_more_after_a_while() {
    let mut rig = Rig::new(Kind::Mmio);
    let (client, end) = rig.open_by_host(1);
    drop(client);
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH);
    rig.guest.worker.advance(9_000 * MS);
    assert_eq!(rig.next(), None);
    rig.guest.worker.advance(1_000 * MS);
    rig.expect(Op::Rst);
    rig.send_data(&end, 0, b"?");
    rig.expect(Op::Rst);
}

#[test]
fn a_half_closed_host_that_goes_away_is_told_to_the_guest() {
    let mut rig = Rig::new(Kind::Pci);
    let (client, _) = rig.open_by_host(1);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_SEND);
    drop(client);
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH);
}

#[test]
fn what_the_guest_sent_before_it_closed_reaches_a_slow_host() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    let mut sent = 0;
    // More than the socket holds, less than the credit.
    for _ in 0..4 {
        rig.send_data(&end, 0, &vec![9; 60_000]);
        sent += 60_000;
    }
    rig.send(&end, Op::Shutdown, SHUTDOWN_BOTH);
    rig.expect_reset();
    let mut got = 0;
    while !is_at_end(&mut client) {
        got += 1 + read(&mut client).len();
        rig.guest.worker.run();
    }
    assert_eq!(got, sent);
    assert_eq!(rig.guest.worker.next_timer(), None);
}

#[test]
fn a_host_that_never_takes_the_rest_is_given_up_after_a_minute() {
    let mut rig = Rig::new(Kind::Mmio);
    let (client, end) = rig.open_by_host(1);
    for _ in 0..4 {
        rig.send_data(&end, 0, &vec![9; 60_000]);
    }
    rig.send(&end, Op::Shutdown, SHUTDOWN_BOTH);
    rig.expect_reset();
    assert_eq!(rig.control.stats().conns_removed.get(), 0);
    rig.guest.worker.advance(60_000 * MS);
    assert_eq!(rig.control.stats().conns_removed.get(), 1);
    drop(client);
}

#[test]
fn a_host_that_dies_in_the_middle_ends_its_own_stream_only() {
    let mut rig = Rig::new(Kind::Mmio);
    let (dying, a) = rig.open_by_host(1);
    let (mut other, b) = rig.open_by_host(2);
    for _ in 0..4 {
        rig.send_data(&a, 0, &vec![1; 60_000]);
    }
    drop(dying);
    let mut told = 0;
    while let Some(packet) = rig.next() {
        // That there is room again, that nobody listens, or a reset: of that stream.
        assert_eq!(packet.header.dst_port.get(), 1);
        told += 1;
    }
    assert!(told > 0);
    rig.send_data(&b, 0, b"still here");
    assert_eq!(read(&mut other), b"still here");
}

#[test]
fn a_guest_that_wants_no_more_hears_that_the_host_is_gone() {
    for guest_is_first in [true, false] {
        let mut rig = Rig::new(Kind::Mmio);
        let (mut client, end) = rig.open_by_host(1);
        // What it has no room for does not keep it from hearing of it.
        rig.send(&End { room: 0, ..end }, Op::CreditUpdate, 0);
        client.write_all(b"not wanted").unwrap();
        rig.guest.worker.run();
        if guest_is_first {
            rig.send(&end, Op::Shutdown, SHUTDOWN_RECEIVE);
            assert_eq!(rig.next(), None);
            drop(client);
        } else {
            drop(client);
            rig.guest.worker.run();
            rig.send(&End { room: 0, ..end }, Op::Shutdown, SHUTDOWN_RECEIVE);
        }
        assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH, "{guest_is_first}");
    }
}

#[test]
fn a_client_is_not_taken_for_one_that_hung_up_before_it() {
    let mut rig = Rig::new(Kind::Mmio);
    let (old, end) = rig.open_by_host(1);
    // In one wake-up: the guest resets the old connection, a client comes, something makes the device work again, and only then comes
    // what happened to the old one.
    rig.post(Rig::header(&end, Op::Rst, 0, 0).as_bytes(), &[]);
    rig.publish_tx();
    let mut new = UnixStream::connect(rig.path("")).unwrap();
    rig.guest.kick(0);
    drop(old);
    rig.guest.worker.run();
    assert_eq!(rig.control.stats().conns_removed.get(), 1);
    new.write_all(b"CONNECT 2\n").unwrap();
    assert_eq!(rig.expect(Op::Request).header.dst_port.get(), 2);
}

#[test]
fn a_client_that_never_says_where_it_wants_to_go_is_closed_after_a_while() {
    let mut rig = Rig::new(Kind::Mmio);
    let mut silent = UnixStream::connect(rig.path("")).unwrap();
    let mut slow = UnixStream::connect(rig.path("")).unwrap();
    for stream in [&mut silent, &mut slow] {
        stream.set_nonblocking(true).unwrap();
    }
    slow.write_all(b"CONN").unwrap();
    rig.guest.worker.run();
    rig.guest.worker.advance(29_000 * MS);
    assert!(!is_at_end(&mut silent) && !is_at_end(&mut slow));
    rig.guest.worker.advance(1_000 * MS);
    assert!(is_at_end(&mut silent));
    // It wrote what nobody read: a reset for it.
    assert_eq!(rig.control.stats().conns_removed.get(), 2);
    assert_eq!(rig.next(), None, "the guest never knew of them");
}

#[test]
fn clients_that_go_before_they_were_served_leave_nothing() {
    let mut rig = Rig::new(Kind::Mmio);
    for _ in 0..10 {
        drop(UnixStream::connect(rig.path("")).unwrap());
        let mut half = UnixStream::connect(rig.path("")).unwrap();
        half.write_all(b"CONNECT").unwrap();
    }
    assert_eq!(rig.next(), None);
    let stats = rig.control.stats();
    assert_eq!((stats.conns_added.get(), stats.conns_removed.get()), (20, 20));
    // One that goes while the guest thinks.
    let client = rig.dial(1);
    rig.expect(Op::Request);
    drop(client);
    rig.expect(Op::Rst);
    assert_eq!(rig.guest.worker.next_timer(), None);
}

#[test]
fn a_guest_that_does_not_answer_a_client_is_given_up() {
    let mut rig = Rig::new(Kind::Mmio);
    let mut client = rig.dial(1);
    rig.expect(Op::Request);
    rig.guest.worker.advance(9_900 * MS);
    assert!(!is_at_end(&mut client));
    rig.guest.worker.advance(200 * MS);
    assert!(is_at_end(&mut client));
    rig.expect(Op::Rst);
}

#[test]
fn a_bad_greeting_closes_the_client_at_once() {
    let mut rig = Rig::new(Kind::Pci);
    for text in [&b"GET / HTTP/1.0\r\n\r\n"[..], b"CONNECT \n", &[0; 100]] {
        let mut client = UnixStream::connect(rig.path("")).unwrap();
        client.set_nonblocking(true).unwrap();
        client.write_all(text).unwrap();
        assert_eq!(rig.next(), None);
        let read = std::io::Read::read(&mut client, &mut [0; 8]);
        assert!(
            !matches!(read, Err(ref error) if error.kind() == std::io::ErrorKind::WouldBlock),
            "{read:?}"
        );
    }
}

#[test]
fn the_guest_may_use_its_port_again() {
    let mut rig = Rig::new(Kind::Mmio);
    let server = rig.serve(6);
    for round in 0..3 {
        let (mut peer, end) = rig.open_by_guest(&server, 6, 77);
        rig.send_data(&end, 0, &[round]);
        assert_eq!(read(&mut peer), [round]);
        rig.send(&end, Op::Shutdown, SHUTDOWN_BOTH);
        rig.expect(Op::Rst);
        assert!(is_at_end(&mut peer));
    }
    // Without an end of the old one: both are over.
    let (mut peer, end) = rig.open_by_guest(&server, 6, 77);
    rig.send(&end, Op::Request, 0);
    rig.expect(Op::Rst);
    assert!(is_at_end(&mut peer));
    let again = End { kind: SocketKind::Stream, ..end };
    rig.send(&again, Op::Request, 0);
    rig.expect(Op::Response);
}
