//! How connections end: by half-closes, full closes, lost peers and timeouts.

use std::io::Write;
use std::net::Shutdown;
use std::os::unix::net::UnixStream;

use zerocopy::IntoBytes;

use super::guest::{End, MS, Rig, is_at_end, read};
use crate::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_RECEIVE, SHUTDOWN_SEND, SocketKind};
use virtio::testing::Kind;

#[test]
fn a_half_closed_client_still_receives_data() {
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
fn a_half_closed_guest_still_receives_data() {
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
fn a_guest_receive_shutdown_makes_host_writes_fail() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    rig.send(&end, Op::Shutdown, SHUTDOWN_RECEIVE);
    let error = client.write_all(b"x").unwrap_err();
    assert_eq!(error.kind(), std::io::ErrorKind::BrokenPipe);
    rig.send_data(&end, 0, b"still here");
    assert_eq!(read(&mut client), b"still here");
}

#[test]
fn a_host_receive_shutdown_is_sent_to_the_guest() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    client.shutdown(Shutdown::Read).unwrap();
    rig.send_data(&end, 0, b"in vain");
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_RECEIVE);
    client.write_all(b"but listen").unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"but listen");
}

#[test]
fn a_closed_connection_is_removed_when_the_guest_resets_it() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, end) = rig.open_by_host(1);
    client.write_all(b"bye").unwrap();
    drop(client);
    assert_eq!(rig.expect(Op::Rw).data, b"bye");
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH);
    // The guest may send data before it receives the shutdown.
    rig.send_data(&end, 0, b"too late");
    assert_eq!(rig.next(), None);
    rig.send(&end, Op::Rst, 0);
    assert_eq!(rig.next(), None);
    let stats = rig.control.stats();
    assert_eq!((stats.conns_removed.get(), stats.conns_killed.get()), (1, 0));
    assert_eq!(rig.guest.worker.next_timer(), None);
}

#[test]
fn a_guest_that_ignores_a_full_shutdown_is_sent_a_reset() {
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
fn a_half_closed_host_that_closes_is_shut_down_fully() {
    let mut rig = Rig::new(Kind::Pci);
    let (client, _) = rig.open_by_host(1);
    client.shutdown(Shutdown::Write).unwrap();
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_SEND);
    drop(client);
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH);
}

#[test]
fn data_sent_before_a_guest_close_reaches_a_slow_host() {
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
fn a_lingering_connection_is_removed_after_a_minute() {
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
fn a_host_that_dies_ends_only_its_own_stream() {
    let mut rig = Rig::new(Kind::Mmio);
    let (dying, a) = rig.open_by_host(1);
    let (mut other, b) = rig.open_by_host(2);
    for _ in 0..4 {
        rig.send_data(&a, 0, &vec![1; 60_000]);
    }
    drop(dying);
    let mut packets = 0;
    while let Some(packet) = rig.next() {
        // A credit update, a shutdown or a reset of that stream.
        assert_eq!(packet.header.dst_port.get(), 1);
        packets += 1;
    }
    assert!(packets > 0);
    rig.send_data(&b, 0, b"still here");
    assert_eq!(read(&mut other), b"still here");
}

#[test]
fn a_guest_that_receives_no_more_is_sent_the_hosts_close() {
    for guest_is_first in [true, false] {
        let mut rig = Rig::new(Kind::Mmio);
        let (mut client, end) = rig.open_by_host(1);
        // Data without credit does not hold the shutdown back.
        rig.send(&End { buf_alloc: 0, ..end }, Op::CreditUpdate, 0);
        client.write_all(b"not wanted").unwrap();
        rig.guest.worker.run();
        if guest_is_first {
            rig.send(&end, Op::Shutdown, SHUTDOWN_RECEIVE);
            assert_eq!(rig.next(), None);
            drop(client);
        } else {
            drop(client);
            rig.guest.worker.run();
            rig.send(&End { buf_alloc: 0, ..end }, Op::Shutdown, SHUTDOWN_RECEIVE);
        }
        assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH, "{guest_is_first}");
    }
}

#[test]
fn a_hangup_of_a_previous_connection_is_ignored() {
    let mut rig = Rig::new(Kind::Mmio);
    let (old, end) = rig.open_by_host(1);
    // In one wake-up: the guest resets the old connection, a client connects, a kick makes the
    // device accept it into the same slot, and then the hangup event of the old socket is handled.
    rig.post(Rig::header(&end, Op::Rst, 0, 0).as_bytes(), &[]);
    rig.publish_tx();
    let mut new = UnixStream::connect(rig.path("")).unwrap();
    rig.signal(0);
    drop(old);
    rig.guest.worker.run();
    assert_eq!(rig.control.stats().conns_removed.get(), 1);
    new.write_all(b"CONNECT 2\n").unwrap();
    assert_eq!(rig.expect(Op::Request).header.dst_port.get(), 2);
}

#[test]
fn a_client_without_a_connect_line_is_closed_after_30_s() {
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
    // The slow one, too: its socket is reset, as its data was not read.
    assert_eq!(rig.control.stats().conns_removed.get(), 2);
    assert_eq!(rig.next(), None, "the guest was not sent their requests");
}

#[test]
fn clients_that_close_early_leave_nothing() {
    let mut rig = Rig::new(Kind::Mmio);
    for _ in 0..10 {
        drop(UnixStream::connect(rig.path("")).unwrap());
        let mut half = UnixStream::connect(rig.path("")).unwrap();
        half.write_all(b"CONNECT").unwrap();
    }
    assert_eq!(rig.next(), None);
    let stats = rig.control.stats();
    assert_eq!((stats.conns_added.get(), stats.conns_removed.get()), (20, 20));
    // One that closes before the guest answers.
    let client = rig.connect(1);
    rig.expect(Op::Request);
    drop(client);
    rig.expect(Op::Rst);
    assert_eq!(rig.guest.worker.next_timer(), None);
}

#[test]
fn a_request_without_response_times_out_after_10_s() {
    let mut rig = Rig::new(Kind::Mmio);
    let mut client = rig.connect(1);
    rig.expect(Op::Request);
    rig.guest.worker.advance(9_900 * MS);
    assert!(!is_at_end(&mut client));
    rig.guest.worker.advance(200 * MS);
    assert!(is_at_end(&mut client));
    rig.expect(Op::Rst);
}

#[test]
fn an_invalid_connect_line_closes_the_client_at_once() {
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
fn the_guest_may_reuse_its_port() {
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
    // If the old one was not closed, both are reset.
    let (mut peer, end) = rig.open_by_guest(&server, 6, 77);
    rig.send(&end, Op::Request, 0);
    rig.expect(Op::Rst);
    assert!(is_at_end(&mut peer));
    let again = End { kind: SocketKind::Stream, ..end };
    rig.send(&again, Op::Request, 0);
    rig.expect(Op::Response);
}
