//! [`write`]: JSON values as YAML that people read.

use std::fmt::Write;

use serde_json::{Map, Value};

/// Longest line of a text.
const COLUMNS: usize = 100;

/// Keys that come first, in this order. The others follow by name.
const FIRST: [&str; 15] = [
    "openapi",
    "info",
    "servers",
    "paths",
    "title",
    "get",
    "put",
    "patch",
    "delete",
    "operationId",
    "summary",
    "$ref",
    "type",
    "description",
    "properties",
];

/// The value as a YAML document.
pub(crate) fn write(value: &Value) -> String {
    let mut out = String::new();
    put(&mut out, value, 0);
    out
}

/// Appends a value that begins on a line of its own, indented by `depth` columns.
fn put(out: &mut String, value: &Value, depth: usize) {
    match value {
        Value::Object(object) => {
            for (key, value) in sorted(object) {
                indent(out, depth);
                *out += &scalar(key);
                put_after(out, ":", value, depth);
            }
        }
        Value::Array(list) => {
            for item in list {
                indent(out, depth);
                match item {
                    Value::Object(object) if !object.is_empty() => {
                        let mut inner = String::new();
                        put(&mut inner, item, depth + 2);
                        // The dash takes the place of the first line's indent.
                        *out += "- ";
                        *out += inner.trim_start();
                    }
                    _ => put_after(out, "-", item, depth),
                }
            }
        }
        _ => put_after(out, "", value, depth),
    }
}

/// Appends a value after a key or a dash.
fn put_after(out: &mut String, mark: &str, value: &Value, depth: usize) {
    *out += mark;
    match value {
        Value::Object(object) if !object.is_empty() => {
            out.push('\n');
            put(out, value, depth + 2);
        }
        Value::Array(list) if list.iter().any(|item| item.is_object() || item.is_array()) => {
            out.push('\n');
            put(out, value, depth + 2);
        }
        Value::Array(list) => {
            let items: Vec<String> = list.iter().map(inline).collect();
            let _ = writeln!(out, " [{}]", items.join(", "));
        }
        Value::String(text) if text.contains('\n') || out_of_line(out, text) => folded(out, text, depth + 2),
        _ => {
            let _ = writeln!(out, " {}", inline(value));
        }
    }
}

/// Whether a text does not fit on the rest of the last line.
fn out_of_line(out: &str, text: &str) -> bool {
    let used = out.len() - out.rfind('\n').map_or(0, |at| at + 1);
    text.contains(' ') && used + text.len() + 3 > COLUMNS
}

/// Appends a text as a folded block: its lines are joined, and an empty line is a line feed.
fn folded(out: &mut String, text: &str, depth: usize) {
    *out += " >-\n";
    for (at, paragraph) in text.split("\n\n").enumerate() {
        if at > 0 {
            *out += "\n\n";
        }
        let mut column = 0;
        for word in paragraph.split(' ') {
            if column > 0 && column + 1 + word.len() > COLUMNS {
                out.push('\n');
                column = 0;
            }
            if column == 0 {
                indent(out, depth);
                column = depth;
            } else {
                out.push(' ');
                column += 1;
            }
            *out += word;
            column += word.len();
        }
        out.push('\n');
    }
}

/// A value on one line.
fn inline(value: &Value) -> String {
    match value {
        Value::String(text) => scalar(text),
        other => other.to_string(),
    }
}

/// A text without quotes if YAML then reads the same text, else in JSON's quotes, which YAML knows.
fn scalar(text: &str) -> String {
    let plain = |c: char| c.is_ascii_alphanumeric() || "_-./ $".contains(c);
    let first_is_letter = text.starts_with(|c: char| c.is_ascii_alphabetic() || c == '/' || c == '$');
    let has_meaning = ["true", "false", "yes", "no", "on", "off", "null", "y", "n"];
    let is_word = has_meaning.iter().any(|word| text.eq_ignore_ascii_case(word));
    if first_is_letter && !text.ends_with(' ') && text.chars().all(plain) && !is_word {
        text.to_owned()
    } else {
        Value::from(text).to_string()
    }
}

fn sorted(object: &Map<String, Value>) -> Vec<(&String, &Value)> {
    let place = |key: &String| FIRST.iter().position(|first| first == key).unwrap_or(FIRST.len());
    let mut entries: Vec<_> = object.iter().collect();
    entries.sort_by_key(|(key, _)| (place(key), (*key).clone()));
    entries
}

fn indent(out: &mut String, depth: usize) {
    out.extend(std::iter::repeat_n(' ', depth));
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn values_become_blocks_and_short_lists() {
        let value = json!({"b": [1, "x"], "type": "no", "a": {"c": [{"d": {}, "e": null}]}, "f": "a: b"});
        let expected = "type: \"no\"\na:\n  c:\n    - d: {}\n      e: null\nb: [1, x]\nf: \"a: b\"\n";
        assert_eq!(write(&value), expected);
    }

    #[test]
    fn long_texts_and_paragraphs_are_folded() {
        let long = "word ".repeat(30);
        let text = write(&json!({ "a": long.trim_end(), "b": "one\n\ntwo" }));
        assert!(text.lines().all(|line| line.len() <= COLUMNS), "{text}");
        assert!(
            text.starts_with("a: >-\n  word word") && text.ends_with("b: >-\n  one\n\n\n  two\n"),
            "{text}"
        );
    }
}
