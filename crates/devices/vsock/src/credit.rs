//! Credit (5.10.6.3): how many bytes each side of a connection may send before the other side has
//! forwarded them.
//!
//! Each side counts the bytes that it has sent. In every header it states the size of its receive
//! buffer (`buf_alloc`) and how many bytes it has received and forwarded (`fwd_cnt`). Counters wrap
//! at 2^32. The guest may state any buffer size. It must not send more than the device's buffer
//! holds, or claim to have forwarded bytes that it was not sent: both are a [`CreditViolation`].
//!
//! Two limits are in no field of a packet:
//!
//! - A guest may also limit what it sends by its own `buf_alloc` (Linux since 2026). So it is sent
//!   a credit update as soon as half of the smaller of the two buffers has become free.
//! - A guest may count memory for each packet that its program has not read (Linux since 6.12.92:
//!   [`OVERHEAD`] bytes), and reset the connection or drop data beyond `buf_alloc`. So unread
//!   packets are counted here, too, in groups ([`Unread`]).

use std::collections::VecDeque;

use crate::packet::Header;

/// Maximum number of unforwarded bytes to the guest, whatever its `buf_alloc`. Wrapping counters
/// cannot distinguish much more.
const MAX_IN_FLIGHT: u32 = 1 << 30;

/// Memory in bytes that a packet takes in a guest besides its data: `SKB_TRUESIZE(0)` of a 64-bit
/// Linux.
const OVERHEAD: u32 = 576;

/// Maximum number of groups of unread packets.
const GROUPS: u32 = 16;

/// Packets that the guest was sent and has not forwarded, according to its `fwd_cnt`. All packets
/// of a group count until all of its bytes were forwarded.
#[derive(Debug, Clone, Default)]
struct Unread {
    /// For each group, in order: `tx_cnt` at its end, and its number of packets.
    groups: VecDeque<(u32, u32)>,
    /// Packets in all groups.
    packets: u32,
}

impl Unread {
    /// Counts a packet. `sent` is `tx_cnt`, including its bytes. A group takes up to `most`
    /// packets, but the last possible group takes any number.
    fn add(&mut self, sent: u32, most: u32) {
        let is_full = self.groups.len() == GROUPS as usize;
        match self.groups.back_mut() {
            Some((end, packets)) if *packets < most || is_full => {
                *end = sent;
                *packets = packets.saturating_add(1);
            }
            _ => self.groups.push_back((sent, 1)),
        }
        self.packets = self.packets.saturating_add(1);
    }

    /// The guest has forwarded `forwarded` of the `sent` bytes.
    fn forward(&mut self, sent: u32, forwarded: u32) {
        let left = sent.wrapping_sub(forwarded);
        while let Some(&(end, packets)) = self.groups.front()
            && sent.wrapping_sub(end) >= left
        {
            self.groups.pop_front();
            self.packets -= packets.min(self.packets);
        }
    }
}

/// How many bytes may be sent to the guest now, depending on the number of packets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Window {
    /// Free bytes of the guest's buffer, without overhead.
    free: u32,
    /// Overhead of all unread packets, in bytes.
    overhead: u32,
    /// Overhead of each further packet, in bytes.
    per_packet: u32,
    /// The guest has no unread packet. Then overhead does not limit the next one.
    is_idle: bool,
}

impl Window {
    /// Whether the guest has forwarded everything that it was sent.
    pub(crate) fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// Bytes that may be sent in this number of packets, at least 1.
    pub(crate) fn bytes(&self, packets: u32) -> u32 {
        let overhead = self.overhead.saturating_add(packets.saturating_mul(self.per_packet));
        if self.is_idle && packets <= 1 { self.free } else { self.free.saturating_sub(overhead) }
    }
}

/// The credit of both sides of one connection. The fields have Linux's names, from the device's
/// point of view.
#[derive(Debug, Clone)]
pub(crate) struct Credit {
    /// Size of the device's receive buffer.
    buf_alloc: u32,
    /// Bytes that the guest has sent.
    rx_cnt: u32,
    /// How many of them were forwarded to the host socket.
    fwd_cnt: u32,
    /// `fwd_cnt` in the last header to the guest.
    last_fwd_cnt: u32,
    /// Size of the guest's receive buffer, at most [`MAX_IN_FLIGHT`].
    peer_buf_alloc: u32,
    /// How many of the bytes that it was sent the guest has forwarded.
    peer_fwd_cnt: u32,
    /// Bytes that the guest was sent.
    tx_cnt: u32,
    /// Packets that the guest has not forwarded.
    unread: Unread,
}

/// The guest has violated the rules of credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct CreditViolation;

impl Credit {
    /// The credit of a new connection. Nothing may be sent before the guest's first header.
    pub(crate) fn new(buf_alloc: u32) -> Self {
        Credit {
            buf_alloc,
            rx_cnt: 0,
            fwd_cnt: 0,
            last_fwd_cnt: 0,
            peer_buf_alloc: 0,
            peer_fwd_cnt: 0,
            tx_cnt: 0,
            unread: Unread::default(),
        }
    }

    /// Size of the device's receive buffer in bytes.
    pub(crate) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Takes over `buf_alloc` and `fwd_cnt` from a header of the guest.
    pub(crate) fn update_peer(&mut self, header: &Header) -> Result<(), CreditViolation> {
        let forwarded = header.fwd_cnt.get();
        if self.tx_cnt.wrapping_sub(forwarded) > u32::MAX / 2 {
            return Err(CreditViolation);
        }
        self.peer_buf_alloc = header.buf_alloc.get().min(MAX_IN_FLIGHT);
        self.peer_fwd_cnt = forwarded;
        self.unread.forward(self.tx_cnt, forwarded);
        Ok(())
    }

    /// Free bytes of the guest's buffer, without packet overhead.
    pub(crate) fn free(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    /// How many bytes the guest may be sent now.
    pub(crate) fn window(&self) -> Window {
        // With a smaller buffer a guest that counts overhead could not take any packet.
        let per_packet = if self.peer_buf_alloc < OVERHEAD { 0 } else { OVERHEAD };
        Window {
            free: self.free(),
            overhead: self.unread.packets.saturating_mul(per_packet),
            per_packet,
            is_idle: self.unread.packets == 0,
        }
    }

    /// Bytes that the guest may be sent now in one packet.
    pub(crate) fn sendable(&self) -> u32 {
        self.window().bytes(1)
    }

    /// Counts a packet to the guest with `len` bytes of data, at least 1.
    pub(crate) fn record_sent(&mut self, len: u32) {
        self.tx_cnt = self.tx_cnt.wrapping_add(len);
        self.unread.add(self.tx_cnt, (self.peer_buf_alloc / OVERHEAD / GROUPS).max(1));
    }

    /// Counts `len` bytes from the guest.
    pub(crate) fn record_received(&mut self, len: u32) -> Result<(), CreditViolation> {
        let held = self.rx_cnt.wrapping_sub(self.fwd_cnt);
        if len > self.buf_alloc.saturating_sub(held) {
            return Err(CreditViolation);
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(len);
        Ok(())
    }

    /// `len` of the bytes from the guest were forwarded to the host socket, or dropped.
    pub(crate) fn record_forwarded(&mut self, len: u32) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len);
        debug_assert!(self.rx_cnt.wrapping_sub(self.fwd_cnt) <= self.buf_alloc);
    }

    /// Whether the guest should be sent a credit update: at least half of its window has become
    /// free since the last header. The window is the smaller of the two sides' `buf_alloc`.
    ///
    /// In the middle of a message any free byte is reported once the guest counts half of the
    /// window as used. A message is forwarded only when it is complete, so otherwise the guest
    /// could be left without credit for the end of the message.
    pub(crate) fn is_update_due(&self, mid_message: bool) -> bool {
        let freed = self.fwd_cnt.wrapping_sub(self.last_fwd_cnt);
        let used = self.rx_cnt.wrapping_sub(self.last_fwd_cnt);
        let half = (self.buf_alloc.min(self.peer_buf_alloc) / 2).max(1);
        freed >= half || (mid_message && freed > 0 && used >= half)
    }

    /// Sets `buf_alloc` and `fwd_cnt` of a header to the guest.
    pub(crate) fn fill_header(&mut self, header: &mut Header) {
        header.buf_alloc = self.buf_alloc.into();
        header.fwd_cnt = self.fwd_cnt.into();
        self.last_fwd_cnt = self.fwd_cnt;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(buf_alloc: u32, fwd_cnt: u32) -> Header {
        Header { buf_alloc: buf_alloc.into(), fwd_cnt: fwd_cnt.into(), ..Header::default() }
    }

    #[test]
    fn nothing_is_sent_without_credit() {
        let mut credit = Credit::new(100);
        assert_eq!(credit.sendable(), 0);
        credit.update_peer(&peer(10, 0)).unwrap();
        assert_eq!((credit.free(), credit.sendable()), (10, 10));
        credit.record_sent(10);
        assert_eq!((credit.free(), credit.sendable()), (0, 0));
        credit.update_peer(&peer(10, 4)).unwrap();
        assert_eq!(credit.free(), 4);
        credit.update_peer(&peer(5, 4)).unwrap();
        assert_eq!(credit.free(), 0, "a buffer smaller than what is in flight is full");
    }

    #[test]
    fn forwarding_unsent_bytes_is_a_violation() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(10, 0)).unwrap();
        credit.record_sent(3);
        assert_eq!(credit.update_peer(&peer(10, 4)), Err(CreditViolation));
        assert_eq!(credit.update_peer(&peer(10, 3)), Ok(()));
    }

    #[test]
    fn a_buffer_beyond_the_counters_range_is_capped() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(u32::MAX, 0)).unwrap();
        while credit.free() > 0 {
            credit.record_sent(credit.free().min(1 << 20));
        }
        assert_eq!(credit.tx_cnt, MAX_IN_FLIGHT);
        assert_eq!(credit.update_peer(&peer(u32::MAX, 0)), Ok(()), "unread data is no violation");
        assert_eq!(credit.update_peer(&peer(u32::MAX, 5)), Ok(()));
        assert_eq!(credit.free(), 5);
        assert_eq!(credit.update_peer(&peer(u32::MAX, MAX_IN_FLIGHT + 1)), Err(CreditViolation));
    }

    #[test]
    fn small_unread_packets_use_up_credit() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(256 << 10, 0)).unwrap();
        let mut packets = 0;
        while credit.sendable() >= 8 {
            credit.record_sent(8);
            packets += 1;
            // The limit of the strictest Linux.
            assert!(packets * (OVERHEAD + 8) <= 256 << 10, "{packets}");
        }
        assert!(packets >= 440, "{packets}");
        assert!(credit.free() > 200 << 10);
        // Half of them were read: about that many more may be sent.
        credit.update_peer(&peer(256 << 10, packets / 2 * 8)).unwrap();
        let mut more = 0;
        while credit.sendable() >= 8 {
            credit.record_sent(8);
            more += 1;
        }
        assert!((packets / 2 - packets / GROUPS - 1..=packets / 2 + 1).contains(&more), "{more}");
        credit.update_peer(&peer(256 << 10, credit.tx_cnt)).unwrap();
        assert_eq!(credit.unread.packets, 0);
    }

    #[test]
    fn a_guest_with_a_tiny_buffer_gets_one_packet_at_a_time() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(1000, 0)).unwrap();
        for sent in [500, 1000, 1500] {
            assert_eq!(credit.sendable(), 1000);
            credit.record_sent(500);
            assert_eq!(credit.sendable(), 0);
            credit.update_peer(&peer(1000, sent)).unwrap();
        }
    }

    #[test]
    fn more_than_buf_alloc_is_a_violation() {
        let mut credit = Credit::new(100);
        credit.record_received(60).unwrap();
        assert_eq!(credit.record_received(41), Err(CreditViolation));
        assert_eq!(credit.record_received(u32::MAX), Err(CreditViolation));
        credit.record_received(40).unwrap();
        assert_eq!(credit.record_received(1), Err(CreditViolation));
        credit.record_forwarded(1);
        credit.record_received(1).unwrap();
    }

    #[test]
    fn an_update_is_due_when_half_the_window_is_freed() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(1000, 0)).unwrap();
        credit.record_received(80).unwrap();
        credit.record_forwarded(49);
        assert!(!credit.is_update_due(false));
        credit.record_forwarded(1);
        assert!(credit.is_update_due(false));
        let mut header = Header::default();
        credit.fill_header(&mut header);
        assert_eq!((header.buf_alloc.get(), header.fwd_cnt.get()), (100, 50));
        assert!(!credit.is_update_due(false));
    }

    #[test]
    fn mid_message_any_freed_byte_is_reported() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(1000, 0)).unwrap();
        credit.record_received(30).unwrap();
        credit.record_forwarded(1);
        assert!(!credit.is_update_due(true), "half the window is left");
        credit.record_received(70).unwrap();
        assert!(credit.is_update_due(true) && !credit.is_update_due(false));
        credit.fill_header(&mut Header::default());
        assert!(!credit.is_update_due(true), "it was reported");
    }

    proptest! {
        /// Two sides that keep to each other's credit never violate it and never get stuck.
        /// Counters start anywhere. The guest sends no more than its own buffer holds, as Linux
        /// does.
        #[test]
        fn two_honest_sides_never_violate_and_never_stall(
            start: u32,
            buf_alloc in 1u32..=1 << 18,
            own in prop_oneof![1u32..=1 << 18, Just(u32::MAX)],
            steps in prop::collection::vec((any::<u16>(), any::<u16>()), 1..200),
        ) {
            let mut credit = Credit {
                rx_cnt: start, fwd_cnt: start, last_fwd_cnt: start, ..Credit::new(buf_alloc)
            };
            credit.update_peer(&peer(own, 0)).unwrap();
            let window = buf_alloc.min(own);
            // The guest's side: `tx_cnt`, and the last `fwd_cnt` that it was sent.
            let (mut sent, mut known) = (start, start);
            for (send, forward) in steps {
                let free = window - sent.wrapping_sub(known);
                let len = free.min(u32::from(send));
                sent = sent.wrapping_add(len);
                prop_assert_eq!(credit.record_received(len), Ok(()));
                let held = credit.rx_cnt.wrapping_sub(credit.fwd_cnt);
                credit.record_forwarded(held.min(u32::from(forward)));
                if credit.is_update_due(false) {
                    let mut header = Header::default();
                    credit.fill_header(&mut header);
                    known = header.fwd_cnt.get();
                }
            }
            let held = credit.rx_cnt.wrapping_sub(credit.fwd_cnt);
            credit.record_forwarded(held);
            if credit.is_update_due(false) {
                known = credit.fwd_cnt;
            }
            prop_assert!(window - sent.wrapping_sub(known) > 0, "everything was forwarded and the guest has no credit");
        }
    }
}
