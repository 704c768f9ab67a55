//! `lint::file_size`: a source file has at most [`BOUND`] lines of code.
//!
//! A line of code is neither blank nor a comment, and not in a `#[cfg(test)] mod … { … }` of the
//! file. A file of tests counts as a file too.

use std::ops::RangeInclusive;

use anyhow::{Result, anyhow};
use proc_macro2::{Delimiter, TokenStream, TokenTree};

use super::finding::Finding;
use super::rust_lines;
use super::sources::Sources;
use super::test_cfg;

/// The most lines of code that a file may have.
const BOUND: usize = 600;

/// Checks all Rust files.
pub(super) fn check(sources: &Sources) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for source in sources.rust() {
        let (file, text) = source?;
        let count = code_lines(&text).map_err(|error| anyhow!("{}: {error}", file.display()))?;
        if count > BOUND {
            findings.push(Finding::new(file, 1, format!("file has {count} lines of code; at most {BOUND}")));
        }
    }
    Ok(findings)
}

fn code_lines(text: &str) -> Result<usize, proc_macro2::LexError> {
    let tests = test_modules(text.parse()?);
    let is_test = |number| tests.iter().any(|lines| lines.contains(&number));
    let lines = rust_lines::lines(text);
    Ok(lines.iter().enumerate().filter(|(index, line)| line.code && !is_test(index + 1)).count())
}

/// The lines of the modules with a body that only test builds have, from attribute to brace.
fn test_modules(tokens: TokenStream) -> Vec<RangeInclusive<usize>> {
    let mut found = Vec::new();
    // The line of the first attribute of the next item, and whether one of them is `cfg(test)`.
    let mut first: Option<usize> = None;
    let mut test_only = false;
    let mut module = false;
    for token in tokens {
        let line = token.span().start().line;
        match token {
            TokenTree::Punct(punct) if punct.as_char() == '#' => {
                first.get_or_insert(line);
            }
            TokenTree::Group(group) if group.delimiter() == Delimiter::Bracket => {
                test_only |= test_cfg::is_test_only_tokens(group.stream());
            }
            TokenTree::Group(group) if group.delimiter() == Delimiter::Brace => {
                if module && test_only {
                    let end = group.span_close().end().line;
                    found.push(first.unwrap_or(line)..=end);
                } else if module {
                    found.extend(test_modules(group.stream()));
                }
                (first, test_only, module) = (None, false, false);
            }
            TokenTree::Punct(punct) if punct.as_char() == ';' => {
                (first, test_only, module) = (None, false, false);
            }
            TokenTree::Ident(word) if word == "mod" => module = true,
            _ => {}
        }
    }
    found
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blanks_comments_and_test_modules_do_not_count() {
        let text = "\
//! Doc.

use a::b; // 1

#[cfg(test)]
use c::d;

mod inner {
    fn f() {}

    #[cfg(test)]
    mod tests {
        fn g() {}
    }
}

fn f() { /* x */
}

/// Doc.
#[cfg(test)]
#[allow(unused)]
mod tests {
    fn g() {}
}
";
        assert_eq!(code_lines(text).unwrap(), 8);
    }

    #[test]
    fn a_string_over_many_lines_is_code() {
        assert_eq!(code_lines("const A: &str = \"\na\n// b\n\";").unwrap(), 4);
    }
}
