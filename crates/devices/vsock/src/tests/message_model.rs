//! Messages against a model: all messages arrive complete and in order, at whatever pace they are
//! sent and read.
//!
//! The guest sends like Linux: a message in pieces, as far as it has credit. It sends no credit
//! requests, but waits for updates.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use proptest::prelude::*;
use rustix::net::{Shutdown, shutdown};

use super::guest::{End, Rig};
use super::messages::{client, read, serve, write};
use crate::packet::{END_OF_MESSAGE, Op, SHUTDOWN_BOTH, SHUTDOWN_SEND, SocketKind};
use virtio::testing::Kind;

const ENDS: usize = 2;
/// The longest packet that Linux sends.
const MAX_PACKET: usize = 64 << 10;

/// A step of one side.
#[derive(Debug, Clone)]
enum Act {
    /// A program in the guest sends a message of this length.
    GuestSends(usize, u32),
    /// The guest's program reads all complete messages.
    GuestReads(usize),
    /// The host sends a message of this length, if its socket takes it.
    HostSends(usize, u32),
    /// The host reads this many messages.
    HostReads(usize, u8),
    /// Time passes, in milliseconds.
    Wait(u16),
}

fn len() -> impl Strategy<Value = u32> {
    prop_oneof![3 => 0..20u32, 3 => 0..65_537u32, 1 => Just(65_535u32), 2 => Just(65_536u32)]
}

fn act() -> impl Strategy<Value = Act> {
    let end = || 0..ENDS;
    prop_oneof![
        4 => (end(), len()).prop_map(|(e, n)| Act::GuestSends(e, n)),
        3 => end().prop_map(Act::GuestReads),
        4 => (end(), len()).prop_map(|(e, n)| Act::HostSends(e, n)),
        3 => (end(), any::<u8>()).prop_map(|(e, n)| Act::HostReads(e, n)),
        1 => (0..2000u16).prop_map(Act::Wait),
    ]
}

/// Message `number` in one direction.
fn message(way: u8, number: usize, len: u32) -> Vec<u8> {
    (0..len).map(|at| (at as u8).wrapping_mul(7) ^ (number as u8) ^ way).collect()
}

struct Connection {
    socket: OwnedFd,
    end: End,
    /// Messages of the guest's program that were not sent yet, the first possibly in part.
    outgoing: VecDeque<Vec<u8>>,
    /// Bytes that the guest's driver has sent.
    sent: u32,
    /// `buf_alloc` and `fwd_cnt` of the device's last packet.
    credit: (u32, u32),
    /// Non-empty messages that were sent and not received yet, and the number of all messages.
    to_host: VecDeque<Vec<u8>>,
    to_guest: VecDeque<Vec<u8>>,
    counts: [usize; 2],
    /// The guest's part of an incomplete message, and the bytes that its program has not read.
    piece: Vec<u8>,
    unread: u32,
    ended: u32,
    is_reset: bool,
}

impl Connection {
    fn guest_sends(&mut self, rig: &mut Rig, len: u32) {
        let message = message(0, self.counts[0], len);
        self.counts[0] += 1;
        if len > 0 {
            self.to_host.push_back(message.clone());
        }
        self.outgoing.push_back(message);
        self.send_outgoing(rig);
    }

    /// The driver sends as much as it has credit for.
    fn send_outgoing(&mut self, rig: &mut Rig) {
        while let Some(message) = self.outgoing.front_mut() {
            let free = self.credit.0 - (self.sent - self.credit.1);
            let len = message.len().min(MAX_PACKET).min(free as usize);
            if len == 0 && !message.is_empty() {
                break;
            }
            let rest = message.split_off(len);
            let flags = if rest.is_empty() { END_OF_MESSAGE } else { 0 };
            rig.send_data(&self.end, flags, message);
            self.sent += len as u32;
            *message = rest;
            if flags == END_OF_MESSAGE {
                self.outgoing.pop_front();
            }
        }
    }

    fn guest_reads(&mut self, rig: &mut Rig) {
        if self.unread > 0 {
            self.end.fwd_cnt += std::mem::take(&mut self.unread);
            rig.send(&self.end, Op::CreditUpdate, 0);
        }
    }

    fn host_sends(&mut self, len: u32) {
        let message = message(1, self.counts[1], len);
        if write(&self.socket, &message).is_ok() {
            self.counts[1] += 1;
            if len > 0 {
                self.to_guest.push_back(message);
            }
        }
    }

    /// Reads up to `count` messages. True at the end.
    fn host_reads(&mut self, count: u8) -> bool {
        for _ in 0..count {
            match read(&self.socket) {
                Ok(message) if message.is_empty() => return true,
                Ok(message) => assert!(Some(message) == self.to_host.pop_front()),
                Err(_) => break,
            }
        }
        false
    }

    /// The guest's driver handles a packet.
    fn take(&mut self, rig: &mut Rig, op: Op, flags: u32, data: &[u8]) {
        match op {
            Op::Rw => {
                self.piece.extend(data);
                if flags == END_OF_MESSAGE {
                    let message = std::mem::take(&mut self.piece);
                    self.unread += message.len() as u32;
                    assert!(Some(message) == self.to_guest.pop_front());
                }
                let taken = self.unread as usize + self.piece.len();
                assert!(taken <= self.end.buf_alloc as usize, "{taken} bytes are more than its buffer holds");
            }
            Op::CreditRequest => rig.send(&self.end, Op::CreditUpdate, 0),
            Op::Shutdown => self.ended = flags,
            Op::Rst => self.is_reset = true,
            _ => {}
        }
    }
}

/// The guest's driver takes all packets, and sends what it has credit for.
fn take_packets(rig: &mut Rig, ends: &mut [Connection]) {
    while let Some(packet) = rig.next() {
        let port = packet.header.src_port.get();
        let end = ends
            .iter_mut()
            .find(|end| end.end.host_port == port)
            .expect("the packet is of one of the connections");
        end.credit = (packet.header.buf_alloc.get(), packet.header.fwd_cnt.get());
        end.take(rig, packet.op(), packet.flags(), &packet.data);
        end.send_outgoing(rig);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, ..ProptestConfig::default() })]

    #[test]
    fn all_messages_arrive_complete_and_in_order(
        is_pci: bool,
        buffers in 1u64..64,
        rx_len in 64u32..5000,
        buf_allocs in prop::array::uniform2(65_536u32..300_000),
        acts in prop::collection::vec(act(), 1..60),
    ) {
        let mut rig = Rig::with(if is_pci { Kind::Pci } else { Kind::Mmio }, buffers, rx_len);
        let (server, _file) = serve(&rig, 50);
        let mut ends: Vec<Connection> = Vec::new();
        for buf_alloc in buf_allocs {
            let mut end = End { port: 9, host_port: 50, kind: SocketKind::SeqPacket, buf_alloc, fwd_cnt: 0 };
            let (socket, first) = if ends.is_empty() {
                rig.send(&end, Op::Request, 0);
                let first = rig.expect(Op::Response);
                (server.accept().unwrap(), first)
            } else {
                let socket = client(&rig);
                write(&socket, b"CONNECT 9").unwrap();
                let first = rig.expect(Op::Request);
                end.host_port = first.header.src_port.get();
                rig.send(&end, Op::Response, 0);
                read(&socket).unwrap();
                (socket, first)
            };
            ends.push(Connection {
                socket, end, outgoing: VecDeque::new(), sent: 0,
                credit: (first.header.buf_alloc.get(), first.header.fwd_cnt.get()),
                to_host: VecDeque::new(), to_guest: VecDeque::new(), counts: [0; 2], piece: Vec::new(), unread: 0,
                ended: 0, is_reset: false,
            });
        }
        for act in acts {
            match act {
                Act::GuestSends(e, len) => ends[e].guest_sends(&mut rig, len),
                Act::GuestReads(e) => {
                    take_packets(&mut rig, &mut ends);
                    ends[e].guest_reads(&mut rig);
                }
                Act::HostSends(e, len) => ends[e].host_sends(len),
                Act::HostReads(e, count) => drop(ends[e].host_reads(count)),
                Act::Wait(ms) => rig.guest.worker.advance(u64::from(ms) * 1_000_000),
            }
            rig.guest.worker.run();
        }
        // Then the host half-closes, the guest sends and reads the rest, and the guest closes.
        for end in &ends {
            shutdown(&end.socket, Shutdown::Write).unwrap();
        }
        let mut rounds = 0;
        while ends.iter().any(|end| end.ended != SHUTDOWN_SEND || !end.outgoing.is_empty()) {
            take_packets(&mut rig, &mut ends);
            for end in &mut ends {
                end.guest_reads(&mut rig);
                prop_assert!(!end.host_reads(200));
            }
            rounds += 1;
            prop_assert!(rounds < 10_000, "it does not end");
        }
        for end in &mut ends {
            rig.send(&end.end, Op::Shutdown, SHUTDOWN_BOTH);
            while !end.host_reads(200) {
                rig.guest.worker.run();
                rounds += 1;
                prop_assert!(rounds < 10_000, "it does not end");
            }
        }
        take_packets(&mut rig, &mut ends);
        prop_assert!(ends.iter().all(|end| end.is_reset && end.to_host.is_empty() && end.to_guest.is_empty()));
        prop_assert_eq!(rig.control.stats().conns_removed.get(), ENDS as u64);
        prop_assert_eq!(rig.guest.worker.next_timer(), None);
    }
}
