//! Streams against a model: all data arrives in order, in whatever pieces and at whatever pace it
//! is sent and read.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use proptest::prelude::*;

use super::guest::{End, Rig};
use crate::packet::{Op, SHUTDOWN_BOTH, SHUTDOWN_SEND};
use virtio::testing::Kind;

const STREAMS: usize = 3;

/// A step of one side.
#[derive(Debug, Clone)]
enum Act {
    /// The guest sends this many bytes, limited by its credit.
    GuestSends(usize, u16),
    /// The guest takes packets, and its program reads this many bytes.
    GuestReads(usize, u16),
    /// The host writes this many bytes, limited by its socket.
    HostWrites(usize, u32),
    /// The host reads this many bytes.
    HostReads(usize, u32),
    /// Time passes, in milliseconds.
    Wait(u16),
}

fn act() -> impl Strategy<Value = Act> {
    let stream = || 0..STREAMS;
    prop_oneof![
        4 => (stream(), any::<u16>()).prop_map(|(s, n)| Act::GuestSends(s, n)),
        4 => (stream(), any::<u16>()).prop_map(|(s, n)| Act::GuestReads(s, n)),
        4 => (stream(), 0..200_000u32).prop_map(|(s, n)| Act::HostWrites(s, n)),
        4 => (stream(), 0..200_000u32).prop_map(|(s, n)| Act::HostReads(s, n)),
        1 => (0..2000u16).prop_map(Act::Wait),
    ]
}

/// Byte `at` of stream `number` in one direction.
fn byte(number: usize, way: u64, at: u64) -> u8 {
    let mixed = (at + way * 7919).wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 32;
    (mixed as u8) ^ (number as u8)
}

struct Stream {
    number: usize,
    socket: UnixStream,
    end: End,
    /// Bytes from the guest to the host.
    sent: u64,
    received: u64,
    /// `buf_alloc` and `fwd_cnt` of the device's last packet.
    credit: (u32, u32),
    /// Bytes from the host to the guest.
    written: u64,
    taken: u64,
    /// Bytes that the guest's program has read.
    read: u64,
    /// Flags of the device's last shutdown.
    ended: u32,
    is_reset: bool,
}

impl Stream {
    fn guest_sends(&mut self, rig: &mut Rig, len: usize) {
        let free = self.credit.0.saturating_sub((self.sent as u32).wrapping_sub(self.credit.1));
        let len = len.min(free as usize);
        let data: Vec<u8> = (0..len as u64).map(|i| byte(self.number, 0, self.sent + i)).collect();
        rig.send_data(&self.end, 0, &data);
        self.sent += len as u64;
    }

    fn guest_reads(&mut self, rig: &mut Rig, len: u64) {
        let len = len.min(self.taken - self.read);
        if len > 0 {
            self.read += len;
            self.end.fwd_cnt = self.read as u32;
            rig.send(&self.end, Op::CreditUpdate, 0);
        }
    }

    fn host_writes(&mut self, len: usize) {
        let data: Vec<u8> = (0..len as u64).map(|i| byte(self.number, 1, self.written + i)).collect();
        if let Ok(len) = self.socket.write(&data) {
            self.written += len as u64;
        }
    }

    /// Reads up to `len` bytes. True at the end of the stream.
    fn host_reads(&mut self, len: usize) -> bool {
        let mut data = vec![0; len];
        match self.socket.read(&mut data) {
            Ok(0) => len > 0,
            Ok(len) => {
                for (i, &got) in (0..).zip(&data[..len]) {
                    assert_eq!(got, byte(self.number, 0, self.received + i), "stream {}", self.number);
                }
                self.received += len as u64;
                false
            }
            Err(_) => false,
        }
    }
}

/// The guest's driver takes all packets.
fn take_packets(rig: &mut Rig, streams: &mut [Stream]) {
    while let Some(packet) = rig.next() {
        let port = packet.header.src_port.get();
        let stream = streams
            .iter_mut()
            .find(|s| s.end.host_port == port)
            .expect("the packet is of one of the streams");
        stream.credit = (packet.header.buf_alloc.get(), packet.header.fwd_cnt.get());
        match packet.op() {
            Op::Rw => {
                for (i, &got) in (0..).zip(&packet.data) {
                    assert_eq!(got, byte(stream.number, 1, stream.taken + i), "stream {}", stream.number);
                }
                stream.taken += packet.data.len() as u64;
                let unread = stream.taken - stream.read;
                assert!(
                    unread <= u64::from(stream.end.buf_alloc),
                    "{unread} bytes are more than its buffer holds"
                );
            }
            Op::CreditRequest => rig.send(&stream.end, Op::CreditUpdate, 0),
            Op::Shutdown => stream.ended = packet.flags(),
            Op::Rst => stream.is_reset = true,
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn all_data_and_all_ends_arrive_in_order(
        is_pci: bool,
        buffers in 1u64..64,
        rx_len in 64u32..5000,
        buf_allocs in prop::array::uniform3(1u32..300_000),
        acts in prop::collection::vec(act(), 1..60),
    ) {
        let mut rig = Rig::with(if is_pci { Kind::Pci } else { Kind::Mmio }, buffers, rx_len);
        let server = rig.serve(50);
        let mut streams: Vec<Stream> = (0..STREAMS).map(|number| {
            let (socket, mut end) = if number == 0 {
                let (socket, end) = rig.open_by_guest(&server, 50, 1000);
                (socket, end)
            } else {
                rig.open_by_host(2000 + number as u32)
            };
            end.buf_alloc = buf_allocs[number];
            rig.send(&end, Op::CreditUpdate, 0);
            Stream {
                number, socket, end, sent: 0, received: 0, credit: (0, 0), written: 0, taken: 0, read: 0, ended: 0,
                is_reset: false,
            }
        }).collect();
        for stream in &mut streams {
            rig.send(&stream.end, Op::CreditRequest, 0);
        }
        take_packets(&mut rig, &mut streams);
        for act in acts {
            match act {
                Act::GuestSends(s, len) => streams[s].guest_sends(&mut rig, len.into()),
                Act::GuestReads(s, len) => {
                    take_packets(&mut rig, &mut streams);
                    streams[s].guest_reads(&mut rig, len.into());
                }
                Act::HostWrites(s, len) => streams[s].host_writes(len as usize),
                Act::HostReads(s, len) => drop(streams[s].host_reads(len as usize)),
                Act::Wait(ms) => rig.guest.worker.advance(u64::from(ms) * 1_000_000),
            }
            rig.guest.worker.run();
        }
        // Then the host half-closes, the guest reads the rest, and the guest closes.
        for stream in &streams {
            stream.socket.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut rounds = 0;
        while streams.iter().any(|s| s.ended != SHUTDOWN_SEND || s.taken < s.written) {
            take_packets(&mut rig, &mut streams);
            for stream in &mut streams {
                stream.guest_reads(&mut rig, u64::MAX);
            }
            rounds += 1;
            prop_assert!(rounds < 1_000_000, "it does not end");
        }
        for stream in &mut streams {
            rig.send(&stream.end, Op::Shutdown, SHUTDOWN_BOTH);
            while !stream.host_reads(70_000) {
                rig.guest.worker.run();
                rounds += 1;
                prop_assert!(rounds < 1_000_000, "it does not end");
            }
            prop_assert_eq!(stream.received, stream.sent);
        }
        take_packets(&mut rig, &mut streams);
        prop_assert!(streams.iter().all(|s| s.is_reset && s.taken == s.written));
        prop_assert_eq!(rig.control.stats().conns_removed.get(), STREAMS as u64);
        prop_assert_eq!(rig.guest.worker.next_timer(), None);
    }
}
