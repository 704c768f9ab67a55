//! `SOCK_SEQPACKET` connections.

use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, shutdown, socket_with,
};

use super::guest::{End, Rig};
use crate::packet::{END_OF_MESSAGE, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND, SocketKind};
use crate::{Listener, SocketFile};
use virtio::testing::Kind;

pub(super) fn client(rig: &Rig) -> OwnedFd {
    let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
    let client = socket_with(AddressFamily::UNIX, SocketType::SEQPACKET, flags, None).unwrap();
    connect(&client, &SocketAddrUnix::new(rig.path(".seq")).unwrap()).unwrap();
    client
}

pub(super) fn write(to: &OwnedFd, message: &[u8]) -> Result<(), Errno> {
    send(to, message, SendFlags::NOSIGNAL).map(|len| assert_eq!(len, message.len()))
}

pub(super) fn read(from: &OwnedFd) -> Result<Vec<u8>, Errno> {
    let mut message = vec![0; 128 << 10];
    let (len, _) = recv(from, &mut message[..], RecvFlags::empty())?;
    message.truncate(len);
    Ok(message)
}

fn open(rig: &mut Rig) -> (OwnedFd, End) {
    let client = client(rig);
    write(&client, b"CONNECT 5").unwrap();
    let end = rig.accept_request(1 << 18);
    assert_eq!(end.kind, SocketKind::SeqPacket);
    assert_eq!(read(&client).unwrap(), format!("OK {}\n", end.host_port).as_bytes());
    (client, end)
}

pub(super) fn serve(rig: &Rig, port: u32) -> (Listener, SocketFile) {
    Listener::bind(&rig.path(&format!("_{port}")), SocketKind::SeqPacket).unwrap()
}

#[test]
fn messages_keep_their_boundaries_in_both_directions() {
    let mut rig = Rig::new(Kind::Mmio);
    let (client, end) = open(&mut rig);
    for message in [&b"one"[..], b"and two"] {
        write(&client, message).unwrap();
    }
    for message in [&b"one"[..], b"and two"] {
        let got = rig.expect(Op::Rw);
        assert_eq!((got.data.as_slice(), got.flags()), (message, END_OF_MESSAGE));
    }
    rig.send_data(&end, 0, b"a message ");
    assert_eq!(read(&client).unwrap_err(), Errno::AGAIN, "it is incomplete");
    rig.send_data(&end, END_OF_MESSAGE, b"in pieces");
    rig.send_data(&end, END_OF_MESSAGE, b"another");
    assert_eq!(read(&client).unwrap(), b"a message in pieces");
    assert_eq!(read(&client).unwrap(), b"another");
}

#[test]
fn messages_wait_for_a_guest_with_too_many_unread_packets() {
    const MESSAGES: u32 = 3000;
    let mut rig = Rig::new(Kind::Mmio);
    let (client, mut end) = open(&mut rig);
    let message = |number: u32| format!("{number:08}").into_bytes();
    let (mut written, mut read) = (0, 0);
    while read < MESSAGES {
        let mut unread = 0;
        // The client writes as much as it can, and the guest's program reads nothing.
        while let Some(packet) = {
            while written < MESSAGES && write(&client, &message(written)).is_ok() {
                written += 1;
            }
            rig.next().filter(|packet| packet.op() == Op::Rw)
        } {
            assert_eq!(packet.data, message(read + unread));
            unread += 1;
            assert!(
                unread * (576 + 8) <= end.buf_alloc,
                "Linux resets the connection at {unread} unread messages"
            );
        }
        assert!(unread > 0, "stuck after {read} messages");
        read += unread;
        end.fwd_cnt += 8 * unread;
        rig.send(&end, Op::CreditUpdate, 0);
    }
}

#[test]
fn a_message_as_long_as_the_guests_buffer_arrives() {
    let mut rig = Rig::new(Kind::Pci);
    let (client, mut end) = open(&mut rig);
    end.buf_alloc = 16 << 10;
    rig.send(&end, Op::CreditUpdate, 0);
    for len in [100, 16 << 10, 100] {
        write(&client, &vec![7; len]).unwrap();
    }
    for len in [100, 16 << 10, 100] {
        let mut got = 0;
        while got < len {
            let packet = rig.expect(Op::Rw);
            got += packet.data.len();
            assert_eq!(packet.flags() == END_OF_MESSAGE, got == len);
        }
        assert_eq!(rig.next(), None, "the next message waits until this one is read");
        end.fwd_cnt += len as u32;
        rig.send(&end, Op::CreditUpdate, 0);
    }
}

#[test]
fn the_guest_connects_to_servers_of_its_socket_type() {
    let mut rig = Rig::new(Kind::Pci);
    let (server, _file) = serve(&rig, 7);
    let end = End { port: 1, host_port: 7, kind: SocketKind::SeqPacket, buf_alloc: 1 << 18, fwd_cnt: 0 };
    rig.send(&end, Op::Request, 0);
    rig.expect(Op::Response);
    let peer = server.accept().unwrap();
    rig.send_data(&end, END_OF_MESSAGE, b"hello");
    assert_eq!(read(&peer).unwrap(), b"hello");
    let _streams = rig.serve(8);
    rig.send(&End { host_port: 8, ..end }, Op::Request, 0);
    rig.expect(Op::Rst);
    rig.send(&End { kind: SocketKind::Stream, port: 2, ..end }, Op::Request, 0);
    rig.expect(Op::Rst);
}

#[test]
fn long_messages_are_split_and_too_long_ones_refused() {
    let mut rig = Rig::new(Kind::Mmio);
    let (client, mut end) = open(&mut rig);
    end.buf_alloc = 50_000;
    rig.send(&end, Op::CreditUpdate, 0);
    let message: Vec<u8> = (0..65536u32).map(|i| (i % 253) as u8).collect();
    write(&client, &message).unwrap();
    let mut got: Vec<u8> = Vec::new();
    loop {
        let Some(piece) = rig.next() else {
            end.fwd_cnt = got.len() as u32;
            rig.send(&end, Op::CreditUpdate, 0);
            continue;
        };
        got.extend(piece.data.iter());
        if piece.flags() == END_OF_MESSAGE {
            break;
        }
    }
    assert!(got == message);
    write(&client, &vec![0; 65537]).unwrap();
    rig.expect(Op::Rst);
    assert_ne!(read(&client), Err(Errno::AGAIN), "it is closed");
}

#[test]
fn messages_for_a_slow_host_are_buffered_in_order() {
    let mut rig = Rig::new(Kind::Mmio);
    let (client, end) = open(&mut rig);
    let mut sent = 0u32;
    // Until the guest has used all its credit.
    loop {
        rig.send(&end, Op::CreditRequest, 0);
        let update = std::iter::from_fn(|| rig.next()).last().unwrap().header;
        if sent * 1000 - update.fwd_cnt.get() + 1000 > update.buf_alloc.get() {
            break;
        }
        rig.send_data(&end, END_OF_MESSAGE, &[(sent % 256) as u8; 1000]);
        sent += 1;
    }
    assert!(sent > 65, "{sent}");
    for number in 0..sent {
        let message = loop {
            match read(&client) {
                Ok(message) => break message,
                Err(_) => rig.guest.worker.run(),
            }
        };
        assert_eq!(message, [(number % 256) as u8; 1000], "message {number}");
        rig.guest.worker.run();
    }
}

#[test]
fn empty_messages_are_dropped() {
    let mut rig = Rig::new(Kind::Mmio);
    let (client, end) = open(&mut rig);
    rig.send_data(&end, END_OF_MESSAGE, b"");
    rig.send_data(&end, END_OF_MESSAGE, b"x");
    assert_eq!(read(&client).unwrap(), b"x");
    write(&client, b"").unwrap();
    write(&client, b"y").unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"y");
    drop(client);
    assert_eq!(rig.expect(Op::Shutdown).flags(), SHUTDOWN_BOTH);
}

#[test]
fn credit_is_updated_in_the_middle_of_a_message() {
    let mut rig = Rig::new(Kind::Mmio);
    let (client, end) = open(&mut rig);
    rig.send_data(&end, END_OF_MESSAGE, b"x");
    // As long as its whole credit. It sends what it has credit for, and waits.
    let message = vec![7; 65536];
    rig.send_data(&end, 0, &message[..65535]);
    let update = rig.expect(Op::CreditUpdate).header;
    assert_eq!((update.buf_alloc.get(), update.fwd_cnt.get()), (65536, 1));
    rig.send_data(&end, END_OF_MESSAGE, &message[65535..]);
    assert_eq!(read(&client).unwrap(), b"x");
    assert!(read(&client).unwrap() == message);
}

#[test]
fn messages_after_an_empty_one_arrive_after_a_close() {
    for both in [false, true] {
        let mut rig = Rig::new(Kind::Mmio);
        let (client, _) = open(&mut rig);
        for message in [&b""[..], b"first", b"", b"", b"second", b""] {
            write(&client, message).unwrap();
        }
        let _still_there = if both {
            drop(client);
            None
        } else {
            shutdown(&client, Shutdown::Write).unwrap();
            Some(client)
        };
        assert_eq!(rig.expect(Op::Rw).data, b"first");
        assert_eq!(rig.expect(Op::Rw).data, b"second");
        assert_eq!(rig.expect(Op::Shutdown).flags(), if both { SHUTDOWN_BOTH } else { SHUTDOWN_SEND });
    }
}

#[test]
fn an_incomplete_message_does_not_delay_the_end() {
    for flags in [SHUTDOWN_SEND, SHUTDOWN_BOTH] {
        let mut rig = Rig::new(Kind::Mmio);
        let (client, end) = open(&mut rig);
        rig.send_data(&end, END_OF_MESSAGE, b"whole");
        rig.send_data(&end, 0, b"and not");
        rig.send(&end, Op::Shutdown, flags);
        assert_eq!(read(&client).unwrap(), b"whole");
        assert_eq!(read(&client).unwrap(), b"", "the end");
        let is_over = rig.control.stats().conns_removed.get() == 1;
        assert_eq!(is_over, flags == SHUTDOWN_BOTH);
    }
}

#[test]
fn a_connect_request_is_one_message() {
    for (message, is_good) in
        [(&b"CONNECT 1\n"[..], true), (b"CONNECT 1", true), (b"CONNECT 1\nx", false), (&[b'x'; 60], false)]
    {
        let mut rig = Rig::new(Kind::Mmio);
        let client = client(&rig);
        write(&client, message).unwrap();
        assert_eq!(rig.next().is_some(), is_good, "{message:?}");
        assert_eq!(read(&client) == Err(Errno::AGAIN), is_good);
    }
}
