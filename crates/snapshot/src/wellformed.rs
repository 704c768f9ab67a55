//! One walk over CBOR data before a decoder sees it.
//!
//! A decoder believes the lengths in its input when it allocates. After this walk they are true: every item that an array
//! or map announces is there, every string is as long as it says, nesting is bounded, and the item ends where the data
//! ends. So what a decoder allocates is in proportion to the data (RFC 8949, appendix C, is the walk that this is).

/// Deepest nesting of arrays, maps and tags. Plain structs need a dozen levels.
const MAX_DEPTH: usize = 64;

/// Where data is broken, and how.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Broken {
    /// Offset in the data.
    pub(crate) at: usize,
    pub(crate) reason: &'static str,
}

/// What an open container still expects.
enum Open {
    /// This many items.
    Items(u64),
    /// Items until a break; for a map, whether a value is due.
    Sequence,
    Pairs {
        value_due: bool,
    },
    /// Chunks of this major type until a break.
    Chunks(u8),
}

/// Checks that `data` is exactly one well-formed item.
pub(crate) fn check(data: &[u8]) -> Result<(), Broken> {
    let mut walk = Walk { data, at: 0 };
    let mut open: Vec<Open> = vec![Open::Items(1)];
    while let Some(top) = open.last_mut() {
        let start = walk.at;
        let broken = |reason| Err(Broken { at: start, reason });
        match top {
            Open::Items(0) => {
                open.pop();
                continue;
            }
            Open::Items(left) => *left -= 1,
            Open::Sequence | Open::Pairs { value_due: false } | Open::Chunks(_)
                if walk.peek() == Some(0xff) =>
            {
                walk.at += 1;
                open.pop();
                continue;
            }
            Open::Sequence => {}
            Open::Pairs { value_due } => *value_due = !*value_due,
            Open::Chunks(major) => {
                let (found, length) = walk.head()?;
                match length {
                    Some(length) if found == *major => walk.skip(length)?,
                    _ => return broken("a string's chunk is not a string of known length"),
                }
                continue;
            }
        }
        let (major, argument) = walk.head()?;
        let inner = match (major, argument) {
            // Numbers, simple values and floats carry no more than their head.
            (0 | 1 | 7, Some(_)) => continue,
            (2 | 3, Some(length)) => {
                walk.skip(length)?;
                continue;
            }
            (2 | 3, None) => Open::Chunks(major),
            (4, Some(items)) => Open::Items(walk.fits(items)?),
            (5, Some(pairs)) => Open::Items(walk.fits(pairs.saturating_mul(2))?),
            (4, None) => Open::Sequence,
            (5, None) => Open::Pairs { value_due: false },
            (6, Some(_)) => Open::Items(1),
            _ => return broken("a break or an indefinite length where none can be"),
        };
        if open.len() > MAX_DEPTH {
            return broken("nested deeper than 64 levels");
        }
        open.push(inner);
    }
    if walk.at == data.len() { Ok(()) } else { Err(Broken { at: walk.at, reason: "data after the end" }) }
}

struct Walk<'a> {
    data: &'a [u8],
    at: usize,
}

impl Walk<'_> {
    fn peek(&self) -> Option<u8> {
        self.data.get(self.at).copied()
    }

    fn left(&self) -> u64 {
        (self.data.len() - self.at) as u64
    }

    /// An item's major type and its argument; none for an indefinite length.
    fn head(&mut self) -> Result<(u8, Option<u64>), Broken> {
        let start = self.at;
        let first = self.peek().ok_or(Broken { at: start, reason: "data ends early" })?;
        self.at += 1;
        let (major, info) = (first >> 5, first & 0x1f);
        let len = match info {
            0..=23 => return Ok((major, Some(u64::from(info)))),
            24..=27 => 1usize << (info - 24),
            31 => return Ok((major, None)),
            _ => return Err(Broken { at: start, reason: "a reserved length" }),
        };
        let bytes =
            self.data.get(self.at..self.at + len).ok_or(Broken { at: start, reason: "data ends early" })?;
        self.at += len;
        Ok((major, Some(bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b)))))
    }

    fn fits(&self, items: u64) -> Result<u64, Broken> {
        // Each item is at least one byte.
        if items > self.left() {
            return Err(Broken { at: self.at, reason: "more items announced than there are bytes" });
        }
        Ok(items)
    }

    fn skip(&mut self, length: u64) -> Result<(), Broken> {
        if length > self.left() {
            return Err(Broken { at: self.at, reason: "a string longer than the data" });
        }
        self.at += length as usize;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn reason(data: &[u8]) -> &'static str {
        check(data).unwrap_err().reason
    }

    #[test]
    fn what_an_encoder_writes_is_well_formed() {
        let value =
            crate::Value::serialized(&(1u8, "text", vec![1.5f64], Some(()), i64::MIN, [true])).unwrap();
        let mut data = Vec::new();
        ciborium::into_writer(&value, &mut data).unwrap();
        assert_eq!(check(&data), Ok(()));
    }

    #[test]
    fn indefinite_lengths_are_followed_to_their_break() {
        assert_eq!(check(&[0x9f, 0x01, 0x9f, 0xff, 0xff]), Ok(()));
        assert_eq!(check(&[0xbf, 0x01, 0x02, 0xff]), Ok(()));
        assert_eq!(check(&[0x5f, 0x41, 0xaa, 0x40, 0xff]), Ok(()));
        assert_eq!(reason(&[0xbf, 0x01, 0xff]), "a break or an indefinite length where none can be");
        assert_eq!(reason(&[0x5f, 0x61, 0x61, 0xff]), "a string's chunk is not a string of known length");
    }

    #[test]
    fn lengths_that_lie_are_found_before_anyone_allocates() {
        assert_eq!(
            reason(&[0x9b, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff, 0xff]),
            "more items announced than there are bytes"
        );
        assert_eq!(reason(&[0xa2, 0x01, 0x02]), "more items announced than there are bytes");
        assert_eq!(reason(&[0x5a, 0xff, 0xff, 0xff, 0xff]), "a string longer than the data");
        assert_eq!(reason(&[0x1b, 0x00]), "data ends early");
        assert_eq!(reason(&[]), "data ends early");
        assert_eq!(reason(&[0x01, 0x01]), "data after the end");
    }

    #[test]
    fn nesting_is_bounded() {
        assert_eq!(reason(&[0x81; 10_000]), "nested deeper than 64 levels");
        assert_eq!(reason(&[0xc1; 10_000]), "nested deeper than 64 levels");
    }

    proptest! {
        #[test]
        fn any_bytes_end_in_an_answer_and_well_formed_ones_decode_or_fail_cleanly(
            data in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            if check(&data).is_ok() {
                let _ = ciborium::from_reader::<crate::Value, _>(&data[..]);
            }
        }
    }
}
