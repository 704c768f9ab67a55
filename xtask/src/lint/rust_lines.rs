//! Which lines of a Rust file have code, and where a line's comment begins.

/// One line of a Rust file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Line<'a> {
    pub(super) text: &'a str,
    /// Whether it has anything but blanks and comments.
    pub(super) code: bool,
    /// The byte at which a comment begins or continues.
    pub(super) comment: Option<usize>,
}

/// What the scanner is inside of at the end of a line.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Inside {
    Code,
    /// Block comments nest.
    BlockComment(usize),
    String,
    /// The number of `#` that close it.
    RawString(usize),
}

/// Splits a file into lines. The text must be valid Rust.
pub(super) fn lines(text: &str) -> Vec<Line<'_>> {
    let mut inside = Inside::Code;
    text.lines().map(|line| scan(line, &mut inside)).collect()
}

fn scan<'a>(text: &'a str, inside: &mut Inside) -> Line<'a> {
    let mut line = Line { text, code: false, comment: None };
    let bytes = text.as_bytes();
    let mut at = 0;
    if matches!(inside, Inside::BlockComment(_)) {
        line.comment = Some(0);
    }
    while at < bytes.len() {
        let rest = &text[at..];
        at += match *inside {
            Inside::BlockComment(depth) => {
                if rest.starts_with("*/") {
                    *inside = if depth == 1 { Inside::Code } else { Inside::BlockComment(depth - 1) };
                    2
                } else if rest.starts_with("/*") {
                    *inside = Inside::BlockComment(depth + 1);
                    2
                } else {
                    width(rest)
                }
            }
            Inside::String => {
                line.code = true;
                if rest.starts_with('"') {
                    *inside = Inside::Code;
                }
                // An escaped quote does not end it.
                rest.strip_prefix('\\').map_or_else(|| width(rest), |escaped| 1 + width(escaped))
            }
            Inside::RawString(hashes) => {
                line.code = true;
                let end = rest.strip_prefix('"').is_some_and(|after| leading_hashes(after) >= hashes);
                if end {
                    *inside = Inside::Code;
                }
                if end { 1 + hashes } else { width(rest) }
            }
            Inside::Code if rest.starts_with("//") => {
                line.comment.get_or_insert(at);
                return line;
            }
            Inside::Code if rest.starts_with("/*") => {
                line.comment.get_or_insert(at);
                *inside = Inside::BlockComment(1);
                2
            }
            Inside::Code => {
                line.code |= !rest.starts_with(char::is_whitespace);
                token(rest, inside)
            }
        };
    }
    line
}

/// The length of the token at the start of `rest`, as far as it matters for what is a comment.
fn token(rest: &str, inside: &mut Inside) -> usize {
    if rest.starts_with('"') {
        *inside = Inside::String;
        return 1;
    }
    if let Some(after) = rest.strip_prefix('\'') {
        return 1 + character(after);
    }
    let word = rest.len() - rest.trim_start_matches(|c: char| c.is_alphanumeric() || c == '_').len();
    if matches!(&rest[..word], "r" | "br" | "cr") {
        let hashes = leading_hashes(&rest[word..]);
        if rest[word + hashes..].starts_with('"') {
            *inside = Inside::RawString(hashes);
            return word + hashes + 1;
        }
    }
    if word > 0 { word } else { width(rest) }
}

/// The length of the rest of a character literal, after its first quote; 0 for a lifetime.
fn character(after: &str) -> usize {
    let mut chars = after.char_indices();
    match (chars.next(), chars.next()) {
        // The escaped character may be a quote itself: '\''.
        (Some((_, '\\')), Some((at, escaped))) => {
            let from = at + escaped.len_utf8();
            after[from..].find('\'').map_or(from, |quote| from + quote + 1)
        }
        (Some(_), Some((at, '\''))) => at + 1,
        _ => 0,
    }
}

fn leading_hashes(text: &str) -> usize {
    text.len() - text.trim_start_matches('#').len()
}

fn width(text: &str) -> usize {
    text.chars().next().map_or(0, char::len_utf8)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// `c` for a line with code, `/` for one with a comment, `b` for both, `.` for neither.
    fn kinds(text: &str) -> String {
        let kind = |line: &Line<'_>| match (line.code, line.comment) {
            (true, None) => 'c',
            (false, Some(_)) => '/',
            (true, Some(_)) => 'b',
            (false, None) => '.',
        };
        lines(text).iter().map(kind).collect()
    }

    #[test]
    fn comments_are_distinguished_from_code() {
        assert_eq!(kinds("//! a\n\nfn f() {\n    // b\n    g(); // c\n}"), "/.c/bc");
        assert_eq!(kinds("/* a\n\n /* b */ c\n */ fn f() {}\nfn g() {}"), "///bc");
    }

    #[test]
    fn slashes_in_literals_are_no_comments() {
        assert_eq!(kinds("let a = \"// \\\" //\";"), "c");
        assert_eq!(kinds("let a = \"\n// x\n\n\"; // y"), "cc.b");
        assert_eq!(kinds("let a = r#\"\n\" // x\n\"#;"), "ccc");
        assert_eq!(kinds("let a = br\"\\\"; // x"), "b");
        assert_eq!(kinds("let (a, b) = ('\"', '\\''); // x"), "b");
        assert_eq!(kinds("fn f<'a>(a: &'a str) {} // x \""), "b");
        assert_eq!(kinds("let r#type = 1; // x"), "b");
    }

    #[test]
    fn a_comment_begins_where_its_slashes_are() {
        assert_eq!(lines("  a(); /// b")[0].comment, Some(7));
    }
}
