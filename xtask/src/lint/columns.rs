//! `lint::columns`: comments and Markdown are at most [`BOUND`] columns wide.
//!
//! Left out are lines that cannot be broken: tables, code blocks, link definitions, and lines of a
//! single word or link.

use std::path::Path;

use anyhow::Result;

use super::finding::Finding;
use super::rust_lines;
use super::sources::Sources;

/// The most columns that a line may have.
const BOUND: usize = 100;

/// Checks all files that have comments, and Markdown.
pub(super) fn check(sources: &Sources) -> Result<Vec<Finding>> {
    let mut findings = Vec::new();
    for file in sources.files() {
        // Only files without an extension are known by their first line.
        if file.extension().is_some() && Syntax::of(file, "").is_none() {
            continue;
        }
        let text = sources.read(file)?;
        let Some(syntax) = Syntax::of(file, &text) else { continue };
        for (line, columns) in wide(syntax, &text) {
            let kind = if syntax == Syntax::Markdown { "line" } else { "comment" };
            let what = format!("{kind} is {columns} columns wide; at most {BOUND}");
            findings.push(Finding::new(file, line, what));
        }
    }
    Ok(findings)
}

/// How a file writes prose.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Syntax {
    Rust,
    /// Comments begin with `#`.
    Hash,
    Markdown,
}

impl Syntax {
    fn of(file: &Path, text: &str) -> Option<Syntax> {
        match file.extension().and_then(|name| name.to_str()) {
            Some("rs") => Some(Syntax::Rust),
            Some("md") => Some(Syntax::Markdown),
            Some("toml" | "sh" | "py" | "yml" | "yaml") => Some(Syntax::Hash),
            _ if text.starts_with("#!") => Some(Syntax::Hash),
            _ => None,
        }
    }
}

/// The lines that are too wide, counted from 1, with their columns.
fn wide(syntax: Syntax, text: &str) -> Vec<(usize, usize)> {
    let mut prose = Prose::default();
    let mut wide = Vec::new();
    let mut look = |number: usize, line: &str, comment: Option<&str>| {
        let Some(comment) = comment else {
            prose = Prose::default();
            return;
        };
        let breakable = prose.is_breakable(comment);
        let columns = line.chars().count();
        if breakable && columns > BOUND {
            wide.push((number, columns));
        }
    };
    match syntax {
        Syntax::Markdown => {
            for (index, line) in text.lines().enumerate() {
                look(index + 1, line, Some(line));
            }
        }
        Syntax::Hash => {
            for (index, line) in text.lines().enumerate() {
                let comment = line.trim_start().strip_prefix('#');
                look(index + 1, line, comment);
            }
        }
        Syntax::Rust => {
            for (index, line) in rust_lines::lines(text).into_iter().enumerate() {
                let comment = line.comment.map(|at| line.text[at..].trim_start_matches(['/', '!', '*']));
                look(index + 1, line.text, comment);
            }
        }
    }
    wide
}

/// Where a run of lines of prose has come to.
#[derive(Default)]
struct Prose {
    /// The fence of the code block that is open.
    fence: Option<String>,
}

impl Prose {
    /// Takes the next line; returns whether it could be broken in two.
    fn is_breakable(&mut self, line: &str) -> bool {
        let line = line.trim();
        let mark = line.chars().next().unwrap_or_default();
        let length = line.chars().take_while(|&c| c == mark).count();
        if let Some(fence) = &self.fence {
            if line.starts_with(fence) && line.len() == length {
                self.fence = None;
            }
            return false;
        }
        if length >= 3 && (mark == '`' || mark == '~') {
            self.fence = Some(line[..length].to_owned());
            return false;
        }
        let table = mark == '|';
        let definition = mark == '[' && line.split_once(']').is_some_and(|(_, after)| after.starts_with(':'));
        !table && !definition && words(line) > 1
    }
}

/// The number of parts between which a line can be broken: words, and links as a whole. The mark of
/// a list, a quotation or a heading belongs to the word after it.
fn words(line: &str) -> usize {
    let number = |word: &str| word.strip_suffix('.').is_some_and(|number| number.parse::<u32>().is_ok());
    let mut text = line;
    while let Some((word, after)) = text.split_once(' ') {
        if !(matches!(word, "-" | "*" | "+" | ">") || number(word) || word.trim_matches('#').is_empty()) {
            break;
        }
        text = after.trim_start();
    }
    let mut count = 0;
    let mut in_word = false;
    let mut chars = text.char_indices();
    while let Some((at, c)) = chars.next() {
        if c.is_whitespace() {
            in_word = false;
            continue;
        }
        count += usize::from(!in_word);
        in_word = true;
        if c == '['
            && let Some(length) = link(&text[at..])
        {
            while chars.as_str().len() > text.len() - at - length {
                chars.next();
            }
        }
    }
    count
}

/// The length in bytes of the link `[text](target)` at the start of `text`.
fn link(text: &str) -> Option<usize> {
    let middle = text.find("](")?;
    let end = middle + text[middle..].find(')')?;
    // A bracket of something else, with a link after it.
    (!text[1..middle].contains(" [")).then_some(end + 1)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn long(words: usize) -> String {
        vec!["word"; words].join(" ")
    }

    #[test]
    fn the_hundredth_column_is_the_last() {
        let line = format!("// {}", "ab ".repeat(32));
        let fits = format!("{line}c");
        assert_eq!(fits.chars().count(), 100);
        assert_eq!(wide(Syntax::Rust, &fits), []);
        assert_eq!(wide(Syntax::Rust, &format!("{fits}d")), [(1, 101)]);
        // Columns are characters, not bytes.
        assert_eq!(wide(Syntax::Rust, &format!("{line}é")), []);
    }

    #[test]
    fn comments_of_each_syntax_are_measured() {
        let text = long(30);
        for mark in ["//", "///", "//!", "    //", "f(); //"] {
            assert_eq!(wide(Syntax::Rust, &format!("{mark} {text}")).len(), 1, "{mark}");
        }
        assert_eq!(wide(Syntax::Hash, &format!("x = \"{text}\"\n  # {text}")), [(2, 153)]);
        assert_eq!(wide(Syntax::Markdown, &format!("- {text}")), [(1, 151)]);
        let code = format!("let a = \"// {text}\";");
        assert_eq!(wide(Syntax::Rust, &code), []);
    }

    #[test]
    fn what_cannot_be_broken_is_left_out() {
        let word = "x".repeat(120);
        for line in [
            format!("| {} |", long(30)),
            word.clone(),
            format!("- {word}"),
            format!("1. [{}]({word})", long(3)),
            format!("[`a`]: {word}"),
        ] {
            assert_eq!(wide(Syntax::Markdown, &line), [], "{line}");
            assert_eq!(wide(Syntax::Rust, &format!("/// {line}")), [], "{line}");
        }
        assert_eq!(wide(Syntax::Markdown, &format!("see [a]({word})")).len(), 1);
        assert_eq!(wide(Syntax::Markdown, &format!("[a]({word}) b")).len(), 1);
    }

    #[test]
    fn code_blocks_are_left_out_up_to_their_end() {
        let text = long(30);
        let block = format!("```text\n{text}\n```\n{text}");
        assert_eq!(wide(Syntax::Markdown, &block), [(4, 149)]);
        let comment = block.lines().map(|line| format!("/// {line}")).collect::<Vec<_>>().join("\n");
        assert_eq!(wide(Syntax::Rust, &comment), [(4, 153)]);
        // A block that is left open ends with its comment.
        let open = format!("/// ```\nfn f() {{}}\n/// {text}");
        assert_eq!(wide(Syntax::Rust, &open), [(3, 153)]);
    }

    #[test]
    fn files_are_known_by_name_or_first_line() {
        assert_eq!(Syntax::of(Path::new("a/run"), "#!/bin/sh\n"), Some(Syntax::Hash));
        assert_eq!(Syntax::of(Path::new("deny.toml"), ""), Some(Syntax::Hash));
        assert_eq!(Syntax::of(Path::new("Cargo.lock"), "# x\n"), None);
    }
}
