//! Streams: opening, refusal, data and credit.

use std::io::Write;
use std::os::unix::net::UnixStream;

use super::guest::{CID, End, MS, RX, Rig, allow_connections, is_at_end, read};
use crate::packet::{HOST_CID, Op, SocketKind};
use virtio::testing::Kind;

const BOTH: [Kind; 2] = [Kind::Mmio, Kind::Pci];

#[test]
fn the_driver_reads_its_cid() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let mut cid = [0xff; 8];
        rig.guest.read_config(0, &mut cid);
        assert_eq!(u64::from_le_bytes(cid), CID);
    }
}

#[test]
fn a_host_client_connects_to_a_guest_port() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let mut client = rig.connect(1024);
        let asked = rig.expect(Op::Request).header;
        assert_eq!((asked.src_cid.get(), asked.dst_cid.get()), (HOST_CID, CID));
        assert_eq!((asked.src_port.get(), asked.dst_port.get(), asked.kind.get()), (1 << 30, 1024, 1));
        assert!(asked.buf_alloc.get() > 0);
        assert_eq!(read(&mut client), b"", "no reply before the guest has accepted");
        let end =
            End { port: 1024, host_port: 1 << 30, kind: SocketKind::Stream, buf_alloc: 100, fwd_cnt: 0 };
        rig.send(&end, Op::Response, 0);
        assert_eq!(read(&mut client), b"OK 1073741824\n");
        client.write_all(b"to the guest").unwrap();
        assert_eq!(rig.expect(Op::Rw).data, b"to the guest");
        rig.send_data(&end, 0, b"to the host");
        assert_eq!(read(&mut client), b"to the host");
    }
}

#[test]
fn data_sent_before_the_reply_arrives_after_accepting() {
    let mut rig = Rig::new(Kind::Mmio);
    let mut client = UnixStream::connect(rig.path("")).unwrap();
    client.write_all(b"CONNECT 5\nearly").unwrap();
    client.shutdown(std::net::Shutdown::Write).unwrap();
    let end = rig.take_request(100);
    assert_eq!(rig.next(), None);
    rig.send(&end, Op::Response, 0);
    assert_eq!(rig.expect(Op::Rw).data, b"early");
    assert_eq!(rig.expect(Op::Shutdown).flags(), 2);
}

#[test]
fn the_guest_connects_to_a_host_server() {
    for kind in BOTH {
        let mut rig = Rig::new(kind);
        let server = rig.serve(52);
        let (mut peer, end) = rig.open_by_guest(&server, 52, 4000);
        rig.send_data(&end, 0, b"hello");
        assert_eq!(read(&mut peer), b"hello");
        peer.write_all(b"hello yourself").unwrap();
        let got = rig.expect(Op::Rw);
        assert_eq!(got.data, b"hello yourself");
        assert_eq!((got.header.src_port.get(), got.header.dst_port.get()), (52, 4000));
        assert_eq!(got.header.fwd_cnt.get(), 5);
    }
}

#[test]
fn a_refusal_of_the_guest_closes_the_client_at_once() {
    let mut rig = Rig::new(Kind::Pci);
    let mut client = rig.connect(9);
    let end = rig.take_request(0);
    rig.send(&end, Op::Rst, 0);
    assert!(is_at_end(&mut client));
    assert_eq!(rig.next(), None);
}

#[test]
fn a_port_without_a_server_is_refused_at_once() {
    let mut rig = Rig::new(Kind::Mmio);
    let end = End { port: 1, host_port: 2, kind: SocketKind::Stream, buf_alloc: 1, fwd_cnt: 0 };
    rig.send(&end, Op::Request, 0);
    let reset = rig.expect(Op::Rst).header;
    assert_eq!((reset.src_port.get(), reset.dst_port.get()), (2, 1));
    assert_eq!((reset.src_cid.get(), reset.dst_cid.get()), (HOST_CID, CID));
    drop(rig.serve(2));
    rig.send(&end, Op::Request, 0);
    rig.expect(Op::Rst);
}

#[test]
fn a_server_with_a_full_backlog_is_retried_for_5_s() {
    let mut rig = Rig::new(Kind::Mmio);
    let (listener, _file) = crate::Listener::bind(&rig.path("_8"), SocketKind::Stream).unwrap();
    rustix::net::listen(listener.fd(), 0).unwrap();
    let waits = UnixStream::connect(rig.path("_8")).unwrap();
    let end = End { port: 1, host_port: 8, kind: SocketKind::Stream, buf_alloc: 1, fwd_cnt: 0 };
    rig.send(&end, Op::Request, 0);
    assert_eq!(rig.next(), None);
    rig.guest.worker.advance(50 * MS);
    assert_eq!(rig.next(), None);
    listener.accept().unwrap();
    drop(waits);
    rig.guest.worker.advance(50 * MS);
    rig.expect(Op::Response);

    let second = End { port: 2, ..end };
    rig.send(&second, Op::Request, 0);
    assert_eq!(rig.next(), None);
    rig.guest.worker.advance(6_000 * MS);
    assert_eq!(rig.expect(Op::Rst).header.dst_port.get(), 2);
    let stats = rig.control.stats();
    assert_eq!((stats.conns_refused.get(), stats.conns_killed.get()), (1, 0));
    assert_eq!(rig.guest.worker.next_timer(), None);
}

#[test]
fn connections_to_a_full_backlog_are_served_in_order() {
    let mut rig = Rig::new(Kind::Mmio);
    let (listener, _file) = crate::Listener::bind(&rig.path("_8"), SocketKind::Stream).unwrap();
    rustix::net::listen(listener.fd(), 0).unwrap();
    let waits = UnixStream::connect(rig.path("_8")).unwrap();
    let end = End { port: 1, host_port: 8, kind: SocketKind::Stream, buf_alloc: 1, fwd_cnt: 0 };
    for port in 1..200 {
        rig.send(&End { port, ..end }, Op::Request, 0);
    }
    // One is reset and requested again.
    rig.send(&End { port: 2, ..end }, Op::Rst, 0);
    rig.send(&End { port: 2, ..end }, Op::Request, 0);
    let mut served = vec![listener.accept().unwrap()];
    drop(waits);
    // The backlog has space before the retry. A new connection does not overtake the others.
    rig.send(&End { port: 200, ..end }, Op::Request, 0);
    assert_eq!(rig.next(), None);
    for port in (1..200).filter(|&port| port != 2).chain([2, 200]) {
        rig.guest.worker.advance(10 * MS);
        assert_eq!(rig.expect(Op::Response).header.dst_port.get(), port);
        assert_eq!(rig.next(), None, "the backlog is full again");
        served.push(listener.accept().unwrap());
    }
    assert_eq!(rig.guest.worker.next_timer(), None);
}

#[test]
fn a_long_stream_fills_buffers_in_order() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, _) = rig.open_by_host(7);
    let data: Vec<u8> = (0..100_000u32).map(|i| (i % 251) as u8).collect();
    client.set_nonblocking(false).unwrap();
    client.write_all(&data).unwrap();
    let mut got = Vec::new();
    while let Some(packet) = rig.next() {
        assert_eq!(packet.op(), Op::Rw);
        got.extend(packet.data);
    }
    assert!(got == data, "{} bytes of {}", got.len(), data.len());
}

#[test]
fn pages_that_the_kernel_writes_are_marked_dirty() {
    // Data of 4096 bytes begins 44 bytes into a page, so only `recvmsg` writes to the next page.
    let mut rig = Rig::with(Kind::Mmio, 1, 4096 + 44);
    let (mut client, _) = rig.open_by_host(1);
    rig.next();
    rig.guest.ram.take_monitor_dirty_pages().unwrap();
    client.write_all(&[7; 4096]).unwrap();
    assert_eq!(rig.expect(Op::Rw).data, [7; 4096]);
    let pages = rig.guest.ram.take_monitor_dirty_pages().unwrap();
    let first = RX / 4096;
    assert!(pages.contains(0, first) && pages.contains(0, first + 1) && !pages.contains(0, first + 2));
}

#[test]
fn the_guest_is_sent_no_more_than_its_credit() {
    let mut rig = Rig::new(Kind::Pci);
    let server = rig.serve(1);
    let (mut peer, mut end) = rig.open_by_guest(&server, 1, 1);
    // Its request said 256 KiB. Now it has less.
    end.buf_alloc = 10;
    rig.send(&end, Op::CreditUpdate, 0);
    peer.write_all(b"0123456789abcdefghij").unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"0123456789");
    assert_eq!(rig.next(), None);
    end.fwd_cnt = 4;
    rig.send(&end, Op::CreditUpdate, 0);
    assert_eq!(rig.expect(Op::Rw).data, b"abcd");
    // Without credit for some time, the guest is sent a credit request.
    rig.guest.worker.advance(1_000 * MS);
    rig.expect(Op::CreditRequest);
    end.fwd_cnt = 14;
    rig.send(&end, Op::CreditUpdate, 0);
    assert_eq!(rig.expect(Op::Rw).data, b"efghij");
}

#[test]
fn credit_requests_become_less_frequent() {
    let mut rig = Rig::new(Kind::Mmio);
    let (mut client, mut end) = rig.open_by_host(1);
    end.buf_alloc = 4;
    rig.send(&end, Op::CreditUpdate, 0);
    client.write_all(b"01234567").unwrap();
    assert_eq!(rig.expect(Op::Rw).data, b"0123");
    let requests_in = |rig: &mut Rig, end: &End, seconds: u64| {
        let mut asked = 0;
        for _ in 0..seconds * 10 {
            rig.guest.worker.advance(100 * MS);
            while let Some(packet) = rig.next() {
                assert_eq!(packet.op(), Op::CreditRequest);
                asked += 1;
                rig.send(end, Op::CreditUpdate, 0);
            }
        }
        asked
    };
    let (first, later) = (requests_in(&mut rig, &end, 60), requests_in(&mut rig, &end, 600));
    assert!((4..10).contains(&first) && (5..15).contains(&later), "{first} and {later}");
    // New credit resets the delay.
    end.fwd_cnt = 3;
    rig.send(&end, Op::CreditUpdate, 0);
    assert_eq!(rig.expect(Op::Rw).data, b"456");
    rig.guest.worker.advance(200 * MS);
    rig.expect(Op::CreditRequest);
}

#[test]
fn credit_updates_are_sent_on_request_and_at_half() {
    let mut rig = Rig::new(Kind::Mmio);
    let server = rig.serve(1);
    let (mut peer, end) = rig.open_by_guest(&server, 1, 1);
    rig.send_data(&end, 0, &[7; 1000]);
    assert_eq!(rig.next(), None);
    rig.send(&end, Op::CreditRequest, 0);
    let update = rig.expect(Op::CreditUpdate).header;
    assert_eq!((update.fwd_cnt.get(), update.buf_alloc.get()), (1000, 256 << 10));
    let mut sent = 0;
    while sent < 128 << 10 {
        rig.send_data(&end, 0, &vec![7; 16 << 10]);
        sent += 16 << 10;
        read(&mut peer);
    }
    assert_eq!(rig.expect(Op::CreditUpdate).header.fwd_cnt.get(), 1000 + (128 << 10));
}

#[test]
fn a_guest_with_any_buffer_size_sends_a_mebibyte() {
    for buf_alloc in [1, 128, 16 << 10, 64 << 10, 1 << 20] {
        let mut rig = Rig::new(Kind::Mmio);
        let server = rig.serve(1);
        let (mut peer, end) = rig.open_by_guest(&server, 1, 1);
        // Linux since 2026 also sends no more than its own buffer holds.
        let end = End { buf_alloc, ..end };
        rig.send(&end, Op::CreditUpdate, 0);
        let window = buf_alloc.min(256 << 10);
        let total = if buf_alloc < 1024 { 10 * buf_alloc } else { 1 << 20 };
        let (mut sent, mut known, mut got) = (0, 0, 0);
        while got < total {
            let len = (window - (sent - known)).min(total - sent).min(64 << 10);
            if len > 0 {
                rig.send_data(&end, 0, &vec![7; len as usize]);
                sent += len;
            }
            let read = read(&mut peer).len() as u32;
            got += read;
            let update = rig.next();
            if let Some(update) = &update {
                assert_eq!(update.op(), Op::CreditUpdate);
                known = update.header.fwd_cnt.get();
            }
            assert!(len + read > 0 || update.is_some(), "{buf_alloc}: stuck after {got} bytes");
        }
    }
}

#[test]
fn small_writes_to_a_guest_that_does_not_read_are_merged() {
    let mut rig = Rig::with(Kind::Mmio, 64, 4096 + 44);
    let (mut client, mut end) = rig.open_by_host(1);
    let (mut unread, mut bytes, mut written) = (0u32, 0, 0u32);
    while client.write(b"8 bytes!").is_ok() {
        written += 8;
        while let Some(packet) = rig.next() {
            assert_eq!(packet.op(), Op::Rw);
            (unread, bytes) = (unread + 1, bytes + packet.data.len() as u32);
            assert!(unread * 576 + bytes <= end.buf_alloc, "{unread} packets");
        }
    }
    assert!(unread > 400, "{unread}");
    end.fwd_cnt = bytes;
    rig.send(&end, Op::CreditUpdate, 0);
    let rest = rig.expect(Op::Rw).data.len() as u32;
    assert!(rest > 1000 && bytes + rest <= written, "many writes become one packet: {rest} bytes");
}

#[test]
fn a_greedy_stream_delays_none_of_a_thousand_others() {
    allow_connections(1001);
    let mut rig = Rig::with(Kind::Mmio, 32, 4096 + 44);
    let (mut greedy, its_end) = rig.open_by_host(1);
    let mut others: Vec<_> = (0..1000).map(|_| rig.open_by_host(2).0).collect();
    let piece = vec![1; 60_000];
    let _ = greedy.write(&piece);
    for other in &mut others {
        other.write_all(b"me, too").unwrap();
    }
    let (mut taken, mut served) = (0, 0);
    while served < others.len() {
        // It always has more data, and credit for it.
        let _ = greedy.write(&piece);
        let packet = rig.next().unwrap();
        if packet.header.src_port.get() == its_end.host_port {
            taken += packet.data.len();
            let update = End { fwd_cnt: taken as u32, ..its_end };
            rig.send(&update, Op::CreditUpdate, 0);
        } else {
            served += usize::from(packet.data == b"me, too");
        }
    }
    assert!((1..=3 * (64 << 10)).contains(&taken), "{taken} bytes before the last of the others");
}

#[test]
fn two_streams_take_turns() {
    let mut rig = Rig::with(Kind::Mmio, 32, 4096 + 44);
    let (mut first, a) = rig.open_by_host(1);
    let (mut second, b) = rig.open_by_host(2);
    for client in [&mut first, &mut second] {
        client.set_nonblocking(false).unwrap();
        client.write_all(&vec![1; 180_000]).unwrap();
    }
    let mut got = [0usize, 0];
    while let Some(packet) = rig.next() {
        let which = usize::from(packet.header.src_port.get() != a.host_port);
        got[which] += packet.data.len();
        let ahead = got[0].abs_diff(got[1]);
        assert!(ahead <= 2 * (64 << 10), "one is {ahead} bytes ahead");
    }
    assert_eq!((got, b.port), ([180_000, 180_000], 2));
}
