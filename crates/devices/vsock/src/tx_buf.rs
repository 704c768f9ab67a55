//! What the guest sent on one connection and the host socket has not taken yet.
//!
//! # Invariants
//!
//! - On a stream it is bytes. On a socket of messages it is messages that are whole, then the first `partial` bytes of one that is not.
//! - Memory is bounded: as many bytes as the guest was promised room for, and on a socket of messages, whose lengths have to be known, as many
//!   once more. A length takes no more bytes than its message.

use std::collections::VecDeque;
use std::io::IoSlice;

/// What was emptied keeps at most so much memory.
const KEPT_CAPACITY: usize = 4096;

/// Bits of a length that one byte has; the highest says that more follow.
const BITS: u32 = 7;

#[derive(Debug)]
pub(super) struct TxBuf {
    bytes: VecDeque<u8>,
    /// The lengths of messages that are whole, the lowest bits of each first.
    lengths: VecDeque<u8>,
    partial: u32,
    /// Bytes that there are at most.
    most: usize,
}

impl TxBuf {
    /// Nothing so far, and at most so many bytes.
    pub(super) fn new(most: u32) -> Self {
        TxBuf { bytes: VecDeque::new(), lengths: VecDeque::new(), partial: 0, most: most as usize }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether a message has begun that is not whole.
    pub(super) fn has_partial(&self) -> bool {
        self.partial > 0
    }

    /// Whether there is a message to write.
    pub(super) fn has_message(&self) -> bool {
        !self.lengths.is_empty()
    }

    /// Adds a piece of a stream.
    pub(super) fn add(&mut self, data: &[u8]) {
        extend(&mut self.bytes, data, self.most);
    }

    /// Adds a piece of a message, which may be its last.
    pub(super) fn add_piece(&mut self, data: &[u8], is_last: bool) {
        self.add(data);
        self.partial += data.len() as u32;
        // An empty message cannot be told from the end of a Unix socket.
        if is_last && self.partial > 0 {
            let mut left = std::mem::take(&mut self.partial);
            while left >> BITS > 0 {
                extend(&mut self.lengths, &[left as u8 | 1 << BITS], self.most);
                left >>= BITS;
            }
            extend(&mut self.lengths, &[left as u8], self.most);
        }
    }

    /// Length of the first message.
    pub(super) fn first_message(&self) -> Option<usize> {
        let mut len = 0;
        for (at, byte) in (0..).zip(&self.lengths) {
            len |= usize::from(byte & !(1 << BITS)) << (at * BITS);
            if byte >> BITS == 0 {
                return Some(len);
            }
        }
        None
    }

    /// Length of all that there is.
    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The first `len` bytes.
    pub(super) fn first(&self, len: usize) -> [IoSlice<'_>; 2] {
        let (first, second) = self.bytes.as_slices();
        let first = &first[..first.len().min(len)];
        let second = &second[..len - first.len()];
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// Forgets the first `len` bytes of a stream.
    pub(super) fn remove(&mut self, len: usize) {
        self.bytes.drain(..len);
        self.shrink();
    }

    /// Forgets the first message.
    pub(super) fn remove_message(&mut self) {
        let len = self.first_message().unwrap_or(0);
        while self.lengths.pop_front().is_some_and(|byte| byte >> BITS > 0) {}
        self.remove(len);
    }

    /// Forgets the message that is not whole; how many bytes of it there were.
    pub(super) fn remove_partial(&mut self) -> u32 {
        let partial = std::mem::take(&mut self.partial);
        self.bytes.truncate(self.bytes.len() - partial as usize);
        self.shrink();
        partial
    }

    /// Forgets everything; how many bytes it was.
    pub(super) fn clear(&mut self) -> u32 {
        let len = self.bytes.len() as u32;
        *self = TxBuf::new(self.most as u32);
        len
    }

    fn shrink(&mut self) {
        for queue in [&mut self.bytes, &mut self.lengths] {
            if queue.is_empty() && queue.capacity() > KEPT_CAPACITY {
                *queue = VecDeque::new();
            }
        }
    }

    /// Bytes of memory that it has.
    #[cfg(test)]
    fn memory(&self) -> usize {
        self.bytes.capacity() + self.lengths.capacity()
    }
}

/// Adds to a queue that has at most `most` bytes, and takes no more memory than that.
fn extend(queue: &mut VecDeque<u8>, data: &[u8], most: usize) {
    let needed = queue.len() + data.len();
    if needed > queue.capacity() {
        let wanted = (2 * queue.capacity()).min(most).max(needed);
        queue.reserve_exact(wanted - queue.len());
    }
    queue.extend(data);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const MOST: u32 = 64 << 10;

    fn first(tx_buf: &TxBuf) -> Option<Vec<u8>> {
        let len = tx_buf.first_message()?;
        Some(tx_buf.first(len).iter().flat_map(|slice| slice.to_vec()).collect())
    }

    #[test]
    fn memory_is_bounded_whatever_the_messages_are_like() {
        for len in [1, 2, 127, 128, 1000, 16_384, MOST] {
            let mut tx_buf = TxBuf::new(MOST);
            for _ in 0..MOST / len {
                tx_buf.add_piece(&vec![7; len as usize], true);
            }
            assert!(tx_buf.memory() <= 2 * MOST as usize, "{} for messages of {len}", tx_buf.memory());
            while tx_buf.has_message() {
                tx_buf.remove_message();
            }
            assert!(tx_buf.is_empty() && tx_buf.memory() <= 2 * KEPT_CAPACITY);
        }
        let mut stream = TxBuf::new(MOST);
        for _ in 0..MOST / 100 {
            stream.add(&[7; 100]);
        }
        assert!(stream.memory() <= MOST as usize);
    }

    #[test]
    fn a_message_that_never_becomes_whole_can_be_forgotten_alone() {
        let mut tx_buf = TxBuf::new(100);
        tx_buf.add_piece(b"whole", true);
        tx_buf.add_piece(b"not ", false);
        assert!(tx_buf.has_partial());
        assert_eq!((tx_buf.remove_partial(), tx_buf.remove_partial()), (4, 0));
        assert_eq!((first(&tx_buf), tx_buf.len()), (Some(b"whole".to_vec()), 5));
        tx_buf.add_piece(b"x", false);
        assert_eq!((tx_buf.clear(), tx_buf.has_message(), tx_buf.has_partial()), (6, false, false));
    }

    proptest! {
        #[test]
        fn messages_come_out_as_they_went_in(lens in prop::collection::vec(0usize..40_000, 0..20), taken in 0usize..20) {
            let mut tx_buf = TxBuf::new(u32::MAX);
            let message = |i: usize| vec![i as u8; lens[i]];
            for (i, len) in lens.iter().enumerate() {
                let (one, other) = (len / 3, len - len / 3);
                tx_buf.add_piece(&message(i)[..one], false);
                tx_buf.add_piece(&message(i)[one..][..other], true);
                if i == taken && tx_buf.has_message() {
                    tx_buf.remove_message();
                }
            }
            let mut expected: Vec<_> = (0..lens.len()).filter(|&i| lens[i] > 0).map(message).collect();
            if taken < lens.len() && lens[..=taken].iter().any(|&len| len > 0) {
                expected.remove(0);
            }
            for message in expected {
                prop_assert_eq!(first(&tx_buf), Some(message));
                tx_buf.remove_message();
            }
            prop_assert!(tx_buf.is_empty() && !tx_buf.has_message());
        }
    }
}
