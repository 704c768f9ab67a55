//! Credit (5.10.6.3): how much each side of a connection may send before the other has room for it.
//!
//! Each side counts what it has sent and tells in every header how much room it has in all (`buf_alloc`) and how much of what it got
//! it has handed on (`fwd_cnt`). Counters wrap at 2^32. What the guest says about itself is its own business; what it must not do is
//! send more than it was promised room for, or claim to have handed on what was never sent.

use super::packet::Header;

/// The most bytes that are on their way to the guest, whatever it has room for: counters that wrap tell no more apart.
const MAX_ON_THE_WAY: u32 = 1 << 30;

/// Both sides' accounts of one connection.
#[derive(Debug, Clone)]
pub(super) struct Credit {
    /// What the guest was promised room for.
    promised: u32,
    /// What the guest sent.
    received: u32,
    /// How much of that was handed on.
    forwarded: u32,
    /// `forwarded` as the guest knows it.
    told: u32,
    /// What the guest has room for.
    peer_room: u32,
    /// How much of what it was sent the guest has handed on.
    peer_forwarded: u32,
    /// What the guest was sent.
    sent: u32,
}

/// The guest broke the rules of credit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Violation;

impl Credit {
    /// A new connection, of which nothing was sent yet. The guest has room for nothing until it says otherwise.
    pub(super) fn new(promised: u32) -> Self {
        Credit { promised, received: 0, forwarded: 0, told: 0, peer_room: 0, peer_forwarded: 0, sent: 0 }
    }

    /// What the guest was promised room for.
    pub(super) fn promised(&self) -> u32 {
        self.promised
    }

    /// Takes the guest's account from a header of its.
    pub(super) fn learn(&mut self, header: &Header) -> Result<(), Violation> {
        let forwarded = header.fwd_cnt.get();
        if self.sent.wrapping_sub(forwarded) > u32::MAX / 2 {
            return Err(Violation);
        }
        self.peer_room = header.buf_alloc.get().min(MAX_ON_THE_WAY);
        self.peer_forwarded = forwarded;
        Ok(())
    }

    /// How much the guest may be sent now.
    pub(super) fn sendable(&self) -> u32 {
        self.peer_room.saturating_sub(self.sent.wrapping_sub(self.peer_forwarded))
    }

    /// The guest is sent that much.
    pub(super) fn send(&mut self, len: u32) {
        self.sent = self.sent.wrapping_add(len);
    }

    /// The guest sent that much.
    pub(super) fn receive(&mut self, len: u32) -> Result<(), Violation> {
        let held = self.received.wrapping_sub(self.forwarded);
        if len > self.promised.saturating_sub(held) {
            return Err(Violation);
        }
        self.received = self.received.wrapping_add(len);
        Ok(())
    }

    /// That much of what the guest sent was handed on.
    pub(super) fn forward(&mut self, len: u32) {
        self.forwarded = self.forwarded.wrapping_add(len);
        debug_assert!(self.received.wrapping_sub(self.forwarded) <= self.promised);
    }

    /// Whether the guest should hear what was handed on: it believes that half of its room is taken which is free.
    ///
    /// In the middle of a message, which can be handed on only when it is whole, it hears of less once it believes that half is taken: it may
    /// have no room left for the end of the message.
    pub(super) fn is_update_due(&self, mid_message: bool) -> bool {
        let news = self.forwarded.wrapping_sub(self.told);
        let taken = self.received.wrapping_sub(self.told);
        let half = self.promised / 2;
        news >= half || (mid_message && news > 0 && taken >= half)
    }

    /// Fills in a header that goes to the guest.
    pub(super) fn tell(&mut self, header: &mut Header) {
        header.buf_alloc = self.promised.into();
        header.fwd_cnt = self.forwarded.into();
        self.told = self.forwarded;
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn says(room: u32, forwarded: u32) -> Header {
        Header { buf_alloc: room.into(), fwd_cnt: forwarded.into(), ..Header::default() }
    }

    #[test]
    fn nothing_is_sent_before_the_guest_has_room() {
        let mut credit = Credit::new(100);
        assert_eq!(credit.sendable(), 0);
        credit.learn(&says(10, 0)).unwrap();
        assert_eq!(credit.sendable(), 10);
        credit.send(10);
        assert_eq!(credit.sendable(), 0);
        credit.learn(&says(10, 4)).unwrap();
        assert_eq!(credit.sendable(), 4);
        credit.learn(&says(5, 4)).unwrap();
        assert_eq!(credit.sendable(), 0, "room that shrinks below what is on its way is no room");
    }

    #[test]
    fn handing_on_what_was_never_sent_is_a_violation() {
        let mut credit = Credit::new(100);
        credit.learn(&says(10, 0)).unwrap();
        credit.send(3);
        assert_eq!(credit.learn(&says(10, 4)), Err(Violation));
        assert_eq!(credit.learn(&says(10, 3)), Ok(()));
    }

    #[test]
    fn a_guest_may_have_more_room_than_counters_can_tell() {
        let mut credit = Credit::new(100);
        credit.learn(&says(u32::MAX, 0)).unwrap();
        while credit.sendable() > 0 {
            credit.send(credit.sendable().min(1 << 20));
        }
        assert_eq!(credit.sent, MAX_ON_THE_WAY);
        assert_eq!(credit.learn(&says(u32::MAX, 0)), Ok(()), "what it has not read yet is no violation");
        assert_eq!(credit.learn(&says(u32::MAX, 5)), Ok(()));
        assert_eq!(credit.sendable(), 5);
        assert_eq!(credit.learn(&says(u32::MAX, MAX_ON_THE_WAY + 1)), Err(Violation));
    }

    #[test]
    fn more_than_was_promised_is_a_violation() {
        let mut credit = Credit::new(100);
        credit.receive(60).unwrap();
        assert_eq!(credit.receive(41), Err(Violation));
        assert_eq!(credit.receive(u32::MAX), Err(Violation));
        credit.receive(40).unwrap();
        assert_eq!(credit.receive(1), Err(Violation));
        credit.forward(1);
        credit.receive(1).unwrap();
    }

    #[test]
    fn the_guest_hears_of_room_once_half_of_it_is_news() {
        let mut credit = Credit::new(100);
        credit.receive(80).unwrap();
        credit.forward(49);
        assert!(!credit.is_update_due(false));
        credit.forward(1);
        assert!(credit.is_update_due(false));
        let mut header = Header::default();
        credit.tell(&mut header);
        assert_eq!((header.buf_alloc.get(), header.fwd_cnt.get()), (100, 50));
        assert!(!credit.is_update_due(false));
    }

    #[test]
    fn in_the_middle_of_a_message_the_guest_hears_of_any_room_before_it_has_none() {
        let mut credit = Credit::new(100);
        credit.receive(30).unwrap();
        credit.forward(1);
        assert!(!credit.is_update_due(true), "there is plenty left");
        credit.receive(70).unwrap();
        assert!(credit.is_update_due(true) && !credit.is_update_due(false));
        credit.tell(&mut Header::default());
        assert!(!credit.is_update_due(true), "it has heard that");
    }

    proptest! {
        /// Two sides that keep to what they know of each other, with counters that begin anywhere, never violate and never
        /// get stuck.
        #[test]
        fn two_honest_sides_never_violate_and_never_stall(
            start: u32,
            promised in 1u32..=1 << 18,
            steps in prop::collection::vec((any::<u16>(), any::<u16>()), 1..200),
        ) {
            let mut credit = Credit {
                received: start, forwarded: start, told: start, ..Credit::new(promised)
            };
            // The guest's side: what it sent, and what it knows.
            let (mut sent, mut known) = (start, start);
            for (send, forward) in steps {
                let free = promised - sent.wrapping_sub(known);
                let len = free.min(u32::from(send));
                sent = sent.wrapping_add(len);
                prop_assert_eq!(credit.receive(len), Ok(()));
                let held = credit.received.wrapping_sub(credit.forwarded);
                credit.forward(held.min(u32::from(forward)));
                if credit.is_update_due(false) {
                    let mut header = Header::default();
                    credit.tell(&mut header);
                    known = header.fwd_cnt.get();
                }
            }
            let held = credit.received.wrapping_sub(credit.forwarded);
            credit.forward(held);
            if credit.is_update_due(false) {
                known = credit.forwarded;
            }
            prop_assert!(promised - sent.wrapping_sub(known) > 0, "everything was handed on and the guest has no room");
        }
    }
}
