//! The functions of a program, as `nm` lists them.

use std::collections::{BTreeMap, HashSet};
use std::path::Path;
use std::process::Command;

use anyhow::{Context, Result, bail};

use crate::process::output;

/// The types of symbols that are functions: local or global, weak, and chosen at run time.
const FUNCTIONS: [&str; 5] = ["t", "T", "w", "W", "i"];

/// The names of functions by address. Several may have the same one.
#[derive(Debug)]
pub(super) struct Symbols(BTreeMap<u64, Vec<String>>);

impl Symbols {
    /// The functions of the program at this path.
    pub(super) fn of(program: &Path) -> Result<Symbols> {
        let listing = output(Command::new("nm").arg("--defined-only").arg(program))
            .context("nm (Debian's package binutils)")?;
        let symbols = Symbols::parse(&listing)?;
        if symbols.0.is_empty() {
            bail!("{} has no symbols", program.display());
        }
        Ok(symbols)
    }

    fn parse(listing: &str) -> Result<Symbols> {
        let mut symbols: BTreeMap<u64, Vec<String>> = BTreeMap::new();
        for line in listing.lines() {
            let fields: Vec<&str> = line.split_whitespace().collect();
            let [address, kind, name] = fields[..] else { continue };
            if FUNCTIONS.contains(&kind) {
                let address = u64::from_str_radix(address, 16).with_context(|| line.to_owned())?;
                symbols.entry(address).or_default().push(name.to_owned());
            }
        }
        Ok(Symbols(symbols))
    }

    /// The names of the functions at these addresses, each once, in the order of the addresses.
    pub(super) fn in_order(&self, addresses: &[u64]) -> Vec<&str> {
        let mut seen = HashSet::new();
        let functions = addresses.iter().filter_map(|address| self.0.range(..=address).next_back());
        functions
            .filter(|(start, _)| seen.insert(**start))
            .flat_map(|(_, names)| names.iter().map(String::as_str))
            .collect()
    }

    /// How many of these names are functions of the program.
    pub(super) fn count<'a>(&self, names: impl IntoIterator<Item = &'a str>) -> usize {
        let all: HashSet<&str> = self.0.values().flatten().map(String::as_str).collect();
        names.into_iter().filter(|name| all.contains(name)).count()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LISTING: &str = "\
0000000000000040 T main
0000000000000010 t helper
0000000000000010 W same_code
0000000000001000 d data
                 w not_defined
";

    #[test]
    fn names_are_in_the_order_of_first_use() {
        let symbols = Symbols::parse(LISTING).unwrap();
        assert_eq!(symbols.in_order(&[0x8, 0x40, 0x44, 0x3f, 0x10]), ["main", "helper", "same_code"]);
    }

    #[test]
    fn only_functions_of_the_program_count() {
        let symbols = Symbols::parse(LISTING).unwrap();
        assert_eq!(symbols.count(["main", "same_code", "data", "not_defined", "gone"]), 2);
    }
}
