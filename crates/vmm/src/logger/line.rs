//! One line of the log as text.

use std::fmt::Write as _;
use std::time::SystemTime;

use log::Level;

/// Longest line in bytes, with its line feed. A pipe takes or refuses a write of this length as a
/// whole (`PIPE_BUF`).
const LONGEST: usize = 4096;
/// What stands for the rest of a text that is too long.
const CUT: &str = "...";

/// What is in brackets before the text.
#[derive(Debug)]
pub(super) struct Prefix<'a> {
    pub(super) id: &'a str,
    pub(super) level: Option<Level>,
    /// File and line in the source.
    pub(super) origin: Option<(&'a str, u32)>,
}

/// Replaces the contents of `line`. Control characters in `text` are escaped, so that it stays one
/// line, and a text that is too long is cut.
pub(super) fn put(line: &mut String, prefix: &Prefix<'_>, now: SystemTime, text: &str) {
    line.clear();
    // Writing to a string cannot fail.
    let _ = write!(line, "{}", humantime::format_rfc3339_nanos(now));
    // The zone: it is always UTC.
    let _ = line.pop();
    let thread = std::thread::current();
    let _ = write!(line, " [{}:{}", prefix.id, thread.name().unwrap_or("main"));
    if let Some(level) = prefix.level {
        let _ = write!(line, ":{level}");
    }
    if let Some((file, number)) = prefix.origin {
        let _ = write!(line, ":{file}:{number}");
    }
    line.push_str("] ");
    if text.contains(char::is_control) {
        text.chars()
            .for_each(|c| if c.is_control() { line.extend(c.escape_default()) } else { line.push(c) });
    } else {
        line.push_str(text);
    }
    if line.len() >= LONGEST {
        line.truncate(line.floor_char_boundary(LONGEST - 1 - CUT.len()));
        line.push_str(CUT);
    }
    line.push('\n');
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn line(level: Option<Level>, origin: Option<(&str, u32)>, text: &str) -> String {
        let now = SystemTime::UNIX_EPOCH + Duration::new(1_767_225_600, 5);
        let mut line = "before".to_owned();
        put(&mut line, &Prefix { id: "vm-1", level, origin }, now, text);
        line.replace(std::thread::current().name().unwrap_or("main"), "T")
    }

    #[test]
    fn lines_have_the_format_that_tools_read() {
        let (warn, at) = (Some(Level::Warn), Some(("a.rs", 7)));
        assert_eq!(line(None, None, "text"), "2026-01-01T00:00:00.000000005 [vm-1:T] text\n");
        assert_eq!(line(warn, None, "text"), "2026-01-01T00:00:00.000000005 [vm-1:T:WARN] text\n");
        assert_eq!(line(warn, at, "text"), "2026-01-01T00:00:00.000000005 [vm-1:T:WARN:a.rs:7] text\n");
    }

    #[test]
    fn control_characters_make_no_second_line() {
        let line = line(None, None, "a\nb\u{1b}[31m\0é");
        assert!(line.ends_with("] a\\nb\\u{1b}[31m\\u{0}é\n"), "{line}");
    }

    #[test]
    fn long_text_is_cut_at_a_character() {
        for start in ["", "a"] {
            let line = line(None, None, &format!("{start}{}", "é".repeat(3000)));
            assert!(line.len() <= LONGEST && line.len() > LONGEST - 100, "{}", line.len());
            assert!(line.ends_with("é...\n"), "{line}");
        }
    }
}
