//! A check that CBOR data is well-formed, before a decoder reads it (RFC 8949, appendix C).
//!
//! A decoder trusts the lengths in its input when it allocates. After this check they are true:
//! every item that an array or map announces is there, every string has its length, nesting is
//! bounded, and the item ends where the data ends. So a decoder allocates in proportion to the
//! data.

/// The deepest nesting of arrays, maps and tags. Plain structs need a dozen levels.
const MAX_DEPTH: usize = 64;

/// Where data is not well-formed, and why.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Malformed {
    /// Offset in the data.
    pub(crate) at: usize,
    pub(crate) reason: &'static str,
}

/// What an open container still needs.
enum Open {
    /// This many more items.
    Items(u64),
    /// Items of an array, until a break.
    Sequence,
    /// Pairs of a map, until a break.
    Pairs {
        /// The next item is a value.
        value_due: bool,
    },
    /// Chunks of a string of this major type, until a break.
    Chunks(u8),
}

/// Checks that `data` is exactly one well-formed item.
pub(crate) fn check(data: &[u8]) -> Result<(), Malformed> {
    let mut walk = Walk { data, at: 0 };
    let mut open: Vec<Open> = vec![Open::Items(1)];
    while let Some(top) = open.last_mut() {
        let start = walk.at;
        let malformed = |reason| Err(Malformed { at: start, reason });
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
                    _ => return malformed("a string's chunk is not a string of known length"),
                }
                continue;
            }
        }
        let (major, argument) = walk.head()?;
        let inner = match (major, argument) {
            // Numbers, simple values and floats are only a head.
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
            _ => return malformed("a break or an indefinite length where none can be"),
        };
        if open.len() > MAX_DEPTH {
            return malformed("nested deeper than 64 levels");
        }
        open.push(inner);
    }
    if walk.at == data.len() { Ok(()) } else { Err(Malformed { at: walk.at, reason: "data after the end" }) }
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

    /// Reads an item's major type and its argument, which is none for an indefinite length.
    fn head(&mut self) -> Result<(u8, Option<u64>), Malformed> {
        let start = self.at;
        let first = self.peek().ok_or(Malformed { at: start, reason: "data ends early" })?;
        self.at += 1;
        let (major, info) = (first >> 5, first & 0x1f);
        let len = match info {
            0..=23 => return Ok((major, Some(u64::from(info)))),
            24..=27 => 1usize << (info - 24),
            31 => return Ok((major, None)),
            _ => return Err(Malformed { at: start, reason: "a reserved length" }),
        };
        let bytes = self
            .data
            .get(self.at..self.at + len)
            .ok_or(Malformed { at: start, reason: "data ends early" })?;
        self.at += len;
        Ok((major, Some(bytes.iter().fold(0, |n, b| n << 8 | u64::from(*b)))))
    }

    /// Checks that `items` more items can be there.
    fn fits(&self, items: u64) -> Result<u64, Malformed> {
        // Each item is at least one byte.
        if items > self.left() {
            return Err(Malformed { at: self.at, reason: "more items announced than there are bytes" });
        }
        Ok(items)
    }

    fn skip(&mut self, length: u64) -> Result<(), Malformed> {
        if length > self.left() {
            return Err(Malformed { at: self.at, reason: "a string longer than the data" });
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
    fn encoder_output_is_well_formed() {
        let value =
            crate::Value::serialized(&(1u8, "text", vec![1.5f64], Some(()), i64::MIN, [true])).unwrap();
        let mut data = Vec::new();
        ciborium::into_writer(&value, &mut data).unwrap();
        assert_eq!(check(&data), Ok(()));
    }

    #[test]
    fn indefinite_lengths_end_at_their_break() {
        assert_eq!(check(&[0x9f, 0x01, 0x9f, 0xff, 0xff]), Ok(()));
        assert_eq!(check(&[0xbf, 0x01, 0x02, 0xff]), Ok(()));
        assert_eq!(check(&[0x5f, 0x41, 0xaa, 0x40, 0xff]), Ok(()));
        assert_eq!(reason(&[0xbf, 0x01, 0xff]), "a break or an indefinite length where none can be");
        assert_eq!(reason(&[0x5f, 0x61, 0x61, 0xff]), "a string's chunk is not a string of known length");
    }

    #[test]
    fn false_lengths_are_found_before_any_allocation() {
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
        fn any_well_formed_bytes_decode_or_fail_cleanly(
            data in proptest::collection::vec(any::<u8>(), 0..200)
        ) {
            if check(&data).is_ok() {
                let _ = ciborium::from_reader::<crate::Value, _>(&data[..]);
            }
        }
    }
}
