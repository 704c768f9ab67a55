//! How often tests repeat something: more in `cargo xtask soak`.

use std::num::NonZeroU32;

/// The factor for repetitions, which `cargo xtask soak` sets.
pub const SOAK: &str = "VESTA_SOAK";

/// The factor for repetitions; 1 in `cargo xtask test`.
pub fn factor() -> u32 {
    parse(std::env::var(SOAK).ok().as_deref())
}

/// The number of repetitions, for a test that has `rounds` in `cargo xtask test`.
pub fn rounds(rounds: u64) -> u64 {
    rounds.saturating_mul(factor().into())
}

fn parse(text: Option<&str>) -> u32 {
    text.map_or(1, |text| {
        let factor: Result<NonZeroU32, _> = text.parse();
        factor.unwrap_or_else(|error| panic!("{SOAK} is {text}: {error}")).get()
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_factor_defaults_to_one() {
        assert_eq!(parse(None), 1);
        assert_eq!(parse(Some("20")), 20);
    }

    #[test]
    #[should_panic(expected = "VESTA_SOAK is 0")]
    fn a_factor_of_zero_is_refused() {
        parse(Some("0"));
    }
}
