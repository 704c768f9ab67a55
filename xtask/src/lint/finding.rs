//! What a lint found.

use std::fmt;
use std::path::{Path, PathBuf};

/// One violation of a bound.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Finding {
    /// The file, relative to the repository.
    pub(super) file: PathBuf,
    /// The line, counted from 1.
    line: usize,
    /// What is wrong, and the bound: `test name has 64 characters; at most 60`.
    pub(super) what: String,
    /// More lines, printed indented below it.
    pub(super) details: Vec<String>,
}

impl Finding {
    pub(super) fn new(file: &Path, line: usize, what: String) -> Finding {
        Finding { file: file.to_owned(), line, what, details: Vec::new() }
    }
}

impl fmt::Display for Finding {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.what)?;
        for detail in &self.details {
            write!(f, "\n    {detail}")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_finding_is_a_clickable_line_with_its_details_below() {
        let mut finding = Finding::new(Path::new("a/b.rs"), 7, "too long; at most 1".to_owned());
        assert_eq!(finding.to_string(), "a/b.rs:7: too long; at most 1");
        finding.details.push("why".to_owned());
        assert_eq!(finding.to_string(), "a/b.rs:7: too long; at most 1\n    why");
    }
}
