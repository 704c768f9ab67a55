//! Longer runs of tests that repeat something: `cargo xtask soak`.

use std::num::NonZeroU32;

/// How many times as long a run is: set by `cargo xtask soak`.
pub const SOAK: &str = "VESTA_SOAK";

/// How many times as long this run is than `cargo xtask test`: 1 there.
pub fn factor() -> u32 {
    parse(std::env::var(SOAK).ok().as_deref())
}

/// How often a test repeats what it does `rounds` times in `cargo xtask test`.
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
    fn without_the_variable_a_run_is_as_long_as_ever() {
        assert_eq!(parse(None), 1);
        assert_eq!(parse(Some("20")), 20);
    }

    #[test]
    #[should_panic(expected = "VESTA_SOAK is 0")]
    fn no_rounds_at_all_are_refused() {
        parse(Some("0"));
    }
}
