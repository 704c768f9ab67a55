//! Data that the guest has sent on one connection and that the host socket has not taken yet.
//!
//! # Invariants
//!
//! - On a stream it is bytes. On a `SOCK_SEQPACKET` connection it is complete messages, followed by
//!   the first `partial` bytes of an incomplete one.
//! - Memory is bounded by the guest's credit. A `SOCK_SEQPACKET` connection takes at most as much
//!   again for the lengths of its messages: a length takes no more bytes than its message.

use std::collections::VecDeque;
use std::io::IoSlice;

/// Bytes of capacity that an empty queue keeps at most.
const KEPT_CAPACITY: usize = 4096;

/// Bits of a length in each byte of its encoding. The highest bit of a byte says that more follow.
const BITS: u32 = 7;

/// Data that the guest has sent and that the host socket has not taken yet.
#[derive(Debug)]
pub(crate) struct TxBuf {
    bytes: VecDeque<u8>,
    /// The encoded lengths of complete messages, the lowest bits of each first.
    lengths: VecDeque<u8>,
    /// Bytes of the incomplete message.
    partial: u32,
    /// Maximum of `bytes`.
    limit: usize,
}

impl TxBuf {
    /// An empty buffer for up to `limit` bytes.
    pub(crate) fn new(limit: u32) -> Self {
        TxBuf { bytes: VecDeque::new(), lengths: VecDeque::new(), partial: 0, limit: limit as usize }
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Whether there is a part of an incomplete message.
    pub(crate) fn has_partial(&self) -> bool {
        self.partial > 0
    }

    /// Whether there is a complete message.
    pub(crate) fn has_message(&self) -> bool {
        !self.lengths.is_empty()
    }

    /// Appends stream data.
    pub(crate) fn add(&mut self, data: &[u8]) {
        extend(&mut self.bytes, data, self.limit);
    }

    /// Appends a part of a message.
    pub(crate) fn add_piece(&mut self, data: &[u8], is_last: bool) {
        self.add(data);
        self.partial += data.len() as u32;
        // Dropped if empty: on a Unix socket an empty message looks like the end.
        if is_last && self.partial > 0 {
            let mut left = std::mem::take(&mut self.partial);
            while left >> BITS > 0 {
                extend(&mut self.lengths, &[left as u8 | 1 << BITS], self.limit);
                left >>= BITS;
            }
            extend(&mut self.lengths, &[left as u8], self.limit);
        }
    }

    /// Length of the first complete message.
    pub(crate) fn first_message(&self) -> Option<usize> {
        let mut len = 0;
        for (at, byte) in (0..).zip(&self.lengths) {
            len |= usize::from(byte & !(1 << BITS)) << (at * BITS);
            if byte >> BITS == 0 {
                return Some(len);
            }
        }
        None
    }

    /// Bytes in the buffer.
    pub(crate) fn len(&self) -> usize {
        self.bytes.len()
    }

    /// The first `len` bytes.
    pub(crate) fn first(&self, len: usize) -> [IoSlice<'_>; 2] {
        let (first, second) = self.bytes.as_slices();
        let first = &first[..first.len().min(len)];
        let second = &second[..len - first.len()];
        [IoSlice::new(first), IoSlice::new(second)]
    }

    /// Removes the first `len` bytes of a stream.
    pub(crate) fn remove(&mut self, len: usize) {
        self.bytes.drain(..len);
        self.shrink();
    }

    /// Removes the first complete message.
    pub(crate) fn remove_message(&mut self) {
        let len = self.first_message().unwrap_or(0);
        while self.lengths.pop_front().is_some_and(|byte| byte >> BITS > 0) {}
        self.remove(len);
    }

    /// Removes the incomplete message. Returns how many bytes it had.
    pub(crate) fn remove_partial(&mut self) -> u32 {
        let partial = std::mem::take(&mut self.partial);
        self.bytes.truncate(self.bytes.len() - partial as usize);
        self.shrink();
        partial
    }

    /// Removes everything. Returns how many bytes that was.
    pub(crate) fn clear(&mut self) -> u32 {
        let len = self.bytes.len() as u32;
        *self = TxBuf::new(self.limit as u32);
        len
    }

    fn shrink(&mut self) {
        for queue in [&mut self.bytes, &mut self.lengths] {
            if queue.is_empty() && queue.capacity() > KEPT_CAPACITY {
                *queue = VecDeque::new();
            }
        }
    }

    /// Bytes of memory that are allocated.
    #[cfg(test)]
    fn memory(&self) -> usize {
        self.bytes.capacity() + self.lengths.capacity()
    }
}

/// Appends to a queue of at most `limit` bytes, without allocating more than that.
fn extend(queue: &mut VecDeque<u8>, data: &[u8], limit: usize) {
    let needed = queue.len() + data.len();
    if needed > queue.capacity() {
        let wanted = (2 * queue.capacity()).min(limit).max(needed);
        queue.reserve_exact(wanted - queue.len());
    }
    queue.extend(data);
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const LIMIT: u32 = 64 << 10;

    fn first(tx_buf: &TxBuf) -> Option<Vec<u8>> {
        let len = tx_buf.first_message()?;
        Some(tx_buf.first(len).iter().flat_map(|slice| slice.to_vec()).collect())
    }

    #[test]
    fn memory_is_bounded_for_all_message_lengths() {
        for len in [1, 2, 127, 128, 1000, 16_384, LIMIT] {
            let mut tx_buf = TxBuf::new(LIMIT);
            for _ in 0..LIMIT / len {
                tx_buf.add_piece(&vec![7; len as usize], true);
            }
            assert!(tx_buf.memory() <= 2 * LIMIT as usize, "{} for messages of {len}", tx_buf.memory());
            while tx_buf.has_message() {
                tx_buf.remove_message();
            }
            assert!(tx_buf.is_empty() && tx_buf.memory() <= 2 * KEPT_CAPACITY);
        }
        let mut stream = TxBuf::new(LIMIT);
        for _ in 0..LIMIT / 100 {
            stream.add(&[7; 100]);
        }
        assert!(stream.memory() <= LIMIT as usize);
    }

    #[test]
    fn an_incomplete_message_can_be_removed_alone() {
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
        fn messages_are_returned_as_they_were_added(lens in prop::collection::vec(0usize..40_000, 0..20), taken in 0usize..20) {
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
