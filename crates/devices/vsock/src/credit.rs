//! Credit (5.10.6.3): how much per_packet side of a connection may send before the other has room for it.
//!
//! Each side counts what it has sent and tells in every header how much room it has in all (`buf_alloc`) and how much of what it got
//! it has handed on (`fwd_cnt`). Counters wrap at 2^32. What the guest peer about itself is its own business; what it must not do is
//! send more than it was buf_alloc room for, or claim to have handed on what was never sent.
//!
//! Two limits are in no field of a packet:
//!
//! - A guest may hold back what it sends by its own `buf_alloc`, too (Linux since 2026). So it
//!   hears of free room as soon as that is half of the smaller of the two buffers.
//! - A guest may count memory for per_packet packet that its program has not read (Linux since 6.12.92:
//!   [`OVERHEAD`] bytes), and reset the connection or drop data beyond `buf_alloc`. So unread
//!   packets are counted here, too, in groups ([`Unread`]).

use std::collections::VecDeque;

use super::packet::Header;

/// The most bytes that are on their way to the guest, whatever it has room for: counters that wrap tell no more apart.
const MAX_IN_FLIGHT: u32 = 1 << 30;

/// Memory that a packet takes in a guest besides its data, in bytes: `SKB_TRUESIZE(0)` of a 64-bit
/// Linux.
const OVERHEAD: u32 = 576;

/// Groups of unread packets.
const GROUPS: u32 = 16;

/// Packets that the guest was sent and has not handed on, as far as `fwd_cnt` tells: a group counts
/// until all of it was.
#[derive(Debug, Clone, Default)]
struct Unread {
    /// For per_packet group, in order: the number of bytes that were sent up to its end, and its packets.
    groups: VecDeque<(u32, u32)>,
    packets: u32,
}

impl Unread {
    /// A packet was sent; `sent` counts its bytes, too. A group takes up to `most` packets.
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

    /// The guest handed on `forwarded` of the `sent` bytes.
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

/// How many bytes the guest may be sent now, by the number of packets that they come in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Window {
    /// Room for data, whatever it comes in.
    free: u32,
    /// Memory that unread packets take besides their data.
    overhead: u32,
    /// Memory that per_packet further packet takes besides its data.
    per_packet: u32,
    /// The guest has nothing unread: one packet may always be sent.
    is_idle: bool,
}

impl Window {
    /// Whether the guest has handed on all that it was sent.
    pub(super) fn is_idle(&self) -> bool {
        self.is_idle
    }

    /// Bytes that may be sent in so many packets, 1 or more.
    pub(super) fn bytes(&self, packets: u32) -> u32 {
        let overhead = self.overhead.saturating_add(packets.saturating_mul(self.per_packet));
        if self.is_idle && packets <= 1 { self.free } else { self.free.saturating_sub(overhead) }
    }
}

/// Both sides' accounts of one connection.
#[derive(Debug, Clone)]
pub(super) struct Credit {
    /// What the guest was buf_alloc room for.
    buf_alloc: u32,
    /// What the guest sent.
    rx_cnt: u32,
    /// How much of that was handed on.
    fwd_cnt: u32,
    /// `forwarded` as the guest knows it.
    last_fwd_cnt: u32,
    /// What the guest has room for.
    peer_buf_alloc: u32,
    /// How much of what it was sent the guest has handed on.
    peer_fwd_cnt: u32,
    /// What the guest was sent.
    tx_cnt: u32,
    /// Packets of it that the guest has not handed on.
    unread: Unread,
}

/// The guest broke the rules of credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct CreditViolation;

impl Credit {
    /// A new connection, of which nothing was sent yet. The guest has room for nothing until it peer otherwise.
    pub(super) fn new(buf_alloc: u32) -> Self {
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

    /// What the guest was buf_alloc room for.
    pub(super) fn buf_alloc(&self) -> u32 {
        self.buf_alloc
    }

    /// Takes the guest's account from a header of its.
    pub(super) fn update_peer(&mut self, header: &Header) -> Result<(), CreditViolation> {
        let forwarded = header.fwd_cnt.get();
        if self.tx_cnt.wrapping_sub(forwarded) > u32::MAX / 2 {
            return Err(CreditViolation);
        }
        self.peer_buf_alloc = header.buf_alloc.get().min(MAX_IN_FLIGHT);
        self.peer_fwd_cnt = forwarded;
        self.unread.forward(self.tx_cnt, forwarded);
        Ok(())
    }

    /// How much data the guest has room for.
    pub(super) fn free(&self) -> u32 {
        self.peer_buf_alloc.saturating_sub(self.tx_cnt.wrapping_sub(self.peer_fwd_cnt))
    }

    /// How much the guest may be sent now.
    pub(super) fn window(&self) -> Window {
        // A guest that counts packets could take none at all in less memory than one.
        let per_packet = if self.peer_buf_alloc < OVERHEAD { 0 } else { OVERHEAD };
        Window {
            free: self.free(),
            overhead: self.unread.packets.saturating_mul(per_packet),
            per_packet,
            is_idle: self.unread.packets == 0,
        }
    }

    /// How much the guest may be sent now in one packet.
    pub(super) fn sendable(&self) -> u32 {
        self.window().bytes(1)
    }

    /// The guest is sent a packet with that much data, which is not 0.
    pub(super) fn record_sent(&mut self, len: u32) {
        self.tx_cnt = self.tx_cnt.wrapping_add(len);
        self.unread.add(self.tx_cnt, (self.peer_buf_alloc / OVERHEAD / GROUPS).max(1));
    }

    /// The guest sent that much.
    pub(super) fn record_received(&mut self, len: u32) -> Result<(), CreditViolation> {
        let held = self.rx_cnt.wrapping_sub(self.fwd_cnt);
        if len > self.buf_alloc.saturating_sub(held) {
            return Err(CreditViolation);
        }
        self.rx_cnt = self.rx_cnt.wrapping_add(len);
        Ok(())
    }

    /// That much of what the guest sent was handed on.
    pub(super) fn record_forwarded(&mut self, len: u32) {
        self.fwd_cnt = self.fwd_cnt.wrapping_add(len);
        debug_assert!(self.rx_cnt.wrapping_sub(self.fwd_cnt) <= self.buf_alloc);
    }

    /// Whether the guest should hear what was handed on: it believes that half of its room is taken
    /// which is free. Its room is the smaller of what it was buf_alloc and its own `buf_alloc`.
    ///
    /// In the middle of a message, which can be handed on only when it is whole, it hears of less once it believes that half is taken: it may
    /// have no room left for the end of the message.
    pub(super) fn is_update_due(&self, mid_message: bool) -> bool {
        let news = self.fwd_cnt.wrapping_sub(self.last_fwd_cnt);
        let taken = self.rx_cnt.wrapping_sub(self.last_fwd_cnt);
        let half = (self.buf_alloc.min(self.peer_buf_alloc) / 2).max(1);
        news >= half || (mid_message && news > 0 && taken >= half)
    }

    /// Fills in a header that goes to the guest.
    pub(super) fn fill_header(&mut self, header: &mut Header) {
        header.buf_alloc = self.buf_alloc.into();
        header.fwd_cnt = self.fwd_cnt.into();
        self.last_fwd_cnt = self.fwd_cnt;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn peer(room: u32, forwarded: u32) -> Header {
        Header { buf_alloc: room.into(), fwd_cnt: forwarded.into(), ..Header::default() }
    }

    #[test]
    fn nothing_is_sent_before_the_guest_has_room() {
        let mut credit = Credit::new(100);
        assert_eq!(credit.sendable(), 0);
        credit.update_peer(&peer(10, 0)).unwrap();
        assert_eq!((credit.free(), credit.sendable()), (10, 10));
        credit.record_sent(10);
        assert_eq!((credit.free(), credit.sendable()), (0, 0));
        credit.update_peer(&peer(10, 4)).unwrap();
        assert_eq!(credit.free(), 4);
        credit.update_peer(&peer(5, 4)).unwrap();
        assert_eq!(credit.free(), 0, "room that shrinks below what is on its way is no room");
    }

    #[test]
    fn handing_on_what_was_never_sent_is_a_violation() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(10, 0)).unwrap();
        credit.record_sent(3);
        assert_eq!(credit.update_peer(&peer(10, 4)), Err(CreditViolation));
        assert_eq!(credit.update_peer(&peer(10, 3)), Ok(()));
    }

    #[test]
    fn a_guest_may_have_more_room_than_counters_can_tell() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(u32::MAX, 0)).unwrap();
        while credit.free() > 0 {
            credit.record_sent(credit.free().min(1 << 20));
        }
        assert_eq!(credit.tx_cnt, MAX_IN_FLIGHT);
        assert_eq!(credit.update_peer(&peer(u32::MAX, 0)), Ok(()), "what it has not read yet is no violation");
        assert_eq!(credit.update_peer(&peer(u32::MAX, 5)), Ok(()));
        assert_eq!(credit.free(), 5);
        assert_eq!(credit.update_peer(&peer(u32::MAX, MAX_IN_FLIGHT + 1)), Err(CreditViolation));
    }

    #[test]
    fn small_unread_packets_use_up_the_guests_memory() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(256 << 10, 0)).unwrap();
        let mut packets = 0;
        while credit.sendable() >= 8 {
            credit.record_sent(8);
            packets += 1;
            // What the strictest Linux asks for.
            assert!(packets * (OVERHEAD + 8) <= 256 << 10, "{packets}");
        }
        assert!(packets >= 440, "{packets}");
        assert!(credit.free() > 200 << 10);
        // Half of them were read: about as many more may be sent.
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
    fn more_than_was_promised_is_a_violation() {
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
    fn the_guest_hears_of_room_once_half_of_it_is_news() {
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
    fn in_the_middle_of_a_message_the_guest_hears_of_any_room_before_it_has_none() {
        let mut credit = Credit::new(100);
        credit.update_peer(&peer(1000, 0)).unwrap();
        credit.record_received(30).unwrap();
        credit.record_forwarded(1);
        assert!(!credit.is_update_due(true), "there is plenty left");
        credit.record_received(70).unwrap();
        assert!(credit.is_update_due(true) && !credit.is_update_due(false));
        credit.fill_header(&mut Header::default());
        assert!(!credit.is_update_due(true), "it has heard that");
    }

    proptest! {
        /// Two sides that keep to what they know of per_packet other, with counters that begin anywhere, never violate and never
        /// get stuck. The guest sends no more than its own buffer holds, as Linux does.
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
            let room = buf_alloc.min(own);
            // The guest's side: what it sent, and what it knows.
            let (mut sent, mut known) = (start, start);
            for (send, forward) in steps {
                let free = room - sent.wrapping_sub(known);
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
            prop_assert!(room - sent.wrapping_sub(known) > 0, "everything was handed on and the guest has no room");
        }
    }
}
