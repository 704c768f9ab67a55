//! `cargo xtask lint`: the bounds of this repository's sources, checked without compiling them.
//!
//! Each lint reads the files that git knows or would add, and returns what exceeds a bound as
//! `file:line: what; bound`. `cargo xtask test --lint` runs each as a test.

mod columns;
mod file_size;
mod finding;
mod module_cycles;
mod rust_lines;
mod sources;
mod test_cfg;
mod test_names;

use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, bail};
use lexopt::prelude::*;

use self::finding::Finding;
pub(crate) use self::sources::Sources;

/// A lint: its name, and the check of some files.
pub(crate) struct Lint {
    pub(crate) name: &'static str,
    pub(crate) check: fn(&Sources) -> Result<Vec<Finding>>,
}

/// The lints that only read sources.
pub(crate) const LINTS: [Lint; 4] = [
    Lint { name: "columns", check: columns::check },
    Lint { name: "test_names", check: test_names::check },
    Lint { name: "file_size", check: file_size::check },
    Lint { name: "module_cycles", check: module_cycles::check },
];

/// `cargo xtask lint [NAME] [PATH...]`: prints the findings, in the repository of the working
/// directory.
pub(crate) fn command(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let mut name = None;
    let mut paths = Vec::new();
    while let Some(arg) = parser.next()? {
        match arg {
            Value(value) => {
                let lint = value.to_str().map(|value| value.replace('-', "_"));
                let lint = LINTS.iter().find(|known| Some(known.name) == lint.as_deref());
                match lint {
                    Some(lint) if name.is_none() && paths.is_empty() => name = Some(lint.name),
                    _ => paths.push(PathBuf::from(value)),
                }
            }
            _ => return Err(arg.unexpected().into()),
        }
    }
    let directory = std::env::current_dir()?;
    if let Some(missing) = paths.iter().find(|path| !path.exists()) {
        let names: Vec<&str> = LINTS.iter().map(|lint| lint.name).collect();
        bail!("lint {}: neither a lint nor a path; lints are {}", missing.display(), names.join(", "));
    }
    let sources = Sources::find(&directory, &paths)?;
    let mut count = 0;
    for lint in LINTS.iter().filter(|lint| name.is_none_or(|name| lint.name == name)) {
        count += report(lint, &sources)?;
    }
    Ok(if count == 0 { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

/// Runs a lint and prints its findings; returns their number.
pub(crate) fn report(lint: &Lint, sources: &Sources) -> Result<usize> {
    let mut findings = (lint.check)(sources)?;
    findings.sort();
    for finding in &findings {
        println!("{finding}");
    }
    println!("lint::{}: {} findings in {} files", lint.name, findings.len(), sources.files().len());
    Ok(findings.len())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A pattern that matches nothing would make a lint pass on a broken checkout.
    #[test]
    fn this_repository_has_sources() {
        let sources = Sources::find(crate::process::root(), &[]).unwrap();
        assert!(sources.rust().count() > 100, "{} files", sources.files().len());
    }
}
