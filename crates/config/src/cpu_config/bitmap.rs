//! [`Bitmap`]: which bits of a register a template sets, clears and keeps.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Deserializer, Serialize, Serializer};

/// Longest text of a bitmap, in bytes: 64 bits, each with a separator, and the prefix.
const MAX_TEXT: usize = 256;

/// New bits for a register of `BITS` bits.
///
/// As text: `0`, `1` or `x` (keep) for each bit, the highest first. The prefix `0b` is optional,
/// and `_` may stand anywhere after it. Higher bits that are missing are kept.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Bitmap<const BITS: u32> {
    mask: u64,
    value: u64,
}

/// A text that is no bitmap.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum BitmapError {
    /// A character other than `0`, `1`, `x` and `_`.
    #[error("bitmap is {text:?}: {character:?} is no bit; it must have 0b and then 0, 1, x and _ only")]
    Character {
        /// The text given, cut after [`MAX_TEXT`] bytes.
        text: String,
        /// The character.
        character: char,
    },
    /// More bits than the register has.
    #[error("bitmap is {text:?}: it has more than {max} bits")]
    TooLong {
        /// The text given, cut after [`MAX_TEXT`] bytes.
        text: String,
        /// Bits of the register.
        max: u32,
    },
}

impl<const BITS: u32> Bitmap<BITS> {
    const ALL: u64 = u64::MAX >> (64 - BITS);

    /// A bitmap that gives the bits of `mask` the values of `value`. Bits beyond the register are
    /// ignored.
    pub const fn new(mask: u64, value: u64) -> Self {
        let mask = mask & Self::ALL;
        Bitmap { mask, value: value & mask }
    }

    /// A bitmap that sets the whole register to `value`.
    pub const fn exactly(value: u64) -> Self {
        Self::new(u64::MAX, value)
    }

    /// The bits that change.
    pub const fn mask(self) -> u64 {
        self.mask
    }

    /// Their values. Other bits are 0.
    pub const fn value(self) -> u64 {
        self.value
    }

    /// The register with its new bits.
    pub const fn apply(self, register: u64) -> u64 {
        register & !self.mask | self.value
    }
}

impl Bitmap<32> {
    /// The register of 32 bits with its new bits.
    pub fn apply_to(self, register: u32) -> u32 {
        // The mask has no bit beyond 32, so the upper half stays 0.
        self.apply(register.into()) as u32
    }
}

impl<const BITS: u32> FromStr for Bitmap<BITS> {
    type Err = BitmapError;

    fn from_str(text: &str) -> Result<Self, BitmapError> {
        let shown = || text.chars().take(MAX_TEXT).collect::<String>();
        let (mut mask, mut value, mut bit) = (0, 0, 0);
        for character in text.strip_prefix("0b").unwrap_or(text).chars().rev() {
            let (changes, set) = match character {
                '_' => continue,
                'x' => (0, 0),
                '0' => (1, 0),
                '1' => (1, 1),
                _ => return Err(BitmapError::Character { text: shown(), character }),
            };
            if bit == BITS {
                return Err(BitmapError::TooLong { text: shown(), max: BITS });
            }
            mask |= changes << bit;
            value |= set << bit;
            bit += 1;
        }
        Ok(Bitmap { mask, value })
    }
}

/// All bits of the register, with the prefix.
impl<const BITS: u32> fmt::Display for Bitmap<BITS> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("0b")?;
        (0..BITS).rev().try_for_each(|bit| {
            f.write_str(match (self.mask >> bit & 1, self.value >> bit & 1) {
                (0, _) => "x",
                (_, 0) => "0",
                (..) => "1",
            })
        })
    }
}

impl<const BITS: u32> Serialize for Bitmap<BITS> {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serializer.collect_str(self)
    }
}

impl<'de, const BITS: u32> Deserialize<'de> for Bitmap<BITS> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        String::deserialize(deserializer)?.parse().map_err(serde::de::Error::custom)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn short_bitmaps_keep_the_higher_bits() {
        for (text, mask, value) in [
            ("0b101", 0b111, 0b101),
            ("10x", 0b110, 0b100),
            ("0b1_x_", 0b10, 0b10),
            ("", 0, 0),
            ("0b", 0, 0),
            ("0b1xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx", 1 << 31, 1 << 31),
        ] {
            assert_eq!(text.parse(), Ok(Bitmap::<32>::new(mask, value)), "{text}");
        }
    }

    #[test]
    fn invalid_bitmaps_are_refused_with_the_bound() {
        let error = |text: &str| text.parse::<Bitmap<32>>().unwrap_err().to_string();
        assert!(error("0b12").contains("'2' is no bit"));
        assert!(error("0B1").contains("'B'"));
        assert!(error(&"x".repeat(33)).contains("more than 32 bits"));
        assert!(format!("0b{}", "x".repeat(65)).parse::<Bitmap<64>>().is_err());
        assert!("1".repeat(64).parse::<Bitmap<64>>().is_ok());
        assert!(error(&"é".repeat(100_000)).len() < 1000, "the text is cut");
    }

    proptest! {
        #[test]
        fn bitmap_text_is_inverted_by_parsing(mask: u64, value: u64, register: u64) {
            let wide = Bitmap::<64>::new(mask, value);
            prop_assert_eq!(wide.to_string().parse(), Ok(wide));
            prop_assert_eq!(wide.to_string().len(), 66);
            let narrow = Bitmap::<32>::new(mask, value);
            prop_assert_eq!(narrow.to_string().parse(), Ok(narrow));
            // Bit by bit, as the text says.
            let text = wide.to_string();
            let bits = text.bytes().skip(2).rev().enumerate();
            let expected = bits.fold(0, |new, (at, bit)| new | match bit {
                b'x' => register & 1 << at,
                b'0' => 0,
                _ => 1 << at,
            });
            prop_assert_eq!(wide.apply(register), expected);
            prop_assert_eq!(narrow.apply_to(register as u32), wide.apply(register) as u32);
        }

        #[test]
        fn separators_change_no_bitmap(text in "[01x]{0,32}", at in 0..32_usize) {
            let mut separated = text.clone();
            separated.insert(at.min(text.len()), '_');
            let parsed = |text: &str| format!("0b{text}").parse::<Bitmap<32>>();
            prop_assert_eq!(parsed(&separated), parsed(&text));
        }

        #[test]
        fn parsing_a_bitmap_never_panics(text in "\\PC*") {
            let _ = text.parse::<Bitmap<32>>();
        }
    }
}
