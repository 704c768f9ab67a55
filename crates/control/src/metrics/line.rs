//! Lines of metrics: one JSON object per line, with Firecracker's names in its order.

use std::collections::BTreeMap;
use std::fmt::Write;

use super::deltas::{LineGroup, LineValue};

/// What a line begins with, besides the time.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct LineHead(String);

impl LineHead {
    /// The microVM's id, if lines have it, and properties, if there are any.
    pub(crate) fn new(id: Option<&str>, properties: &BTreeMap<String, String>) -> Self {
        // Writing to a string does not fail, here and below.
        let mut head = String::new();
        if let Some(id) = id {
            let _ = write!(head, "\"id\":{},", quoted(id));
        }
        if !properties.is_empty() {
            let texts: Vec<_> =
                properties.iter().map(|(key, text)| format!("{}:{}", quoted(key), quoted(text))).collect();
            let _ = write!(head, "\"properties\":{{{}}},", texts.join(","));
        }
        LineHead(head)
    }

    /// The JSON: empty, or members that each end with a comma.
    pub(crate) fn as_bytes(&self) -> &[u8] {
        self.0.as_bytes()
    }
}

/// The line of these groups at a time in milliseconds since 1970, with its line feed.
pub(crate) fn render(utc_ms: u64, head: &LineHead, groups: &[LineGroup]) -> String {
    let mut line = format!("{{\"utc_timestamp_ms\":{utc_ms},{}", head.0);
    for (at, group) in groups.iter().enumerate() {
        if at > 0 {
            line.push(',');
        }
        line.push_str(&quoted(&group.key));
        line.push_str(":{");
        for (at, (name, value)) in group.fields.iter().enumerate() {
            if at > 0 {
                line.push(',');
            }
            // Names are static and need no quoting.
            let _ = match value {
                LineValue::Number(number) => write!(line, "\"{name}\":{number}"),
                LineValue::Micros { min, max, sum } => {
                    write!(line, "\"{name}\":{{\"min_us\":{min},\"max_us\":{max},\"sum_us\":{sum}}}")
                }
            };
        }
        line.push('}');
    }
    line.push_str("}\n");
    line
}

/// A JSON string.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

#[cfg(test)]
mod tests {
    use serde_json::{Value, json};

    use super::*;

    #[test]
    fn line_is_one_json_object_whatever_ids_and_properties_are() {
        let hostile = "a\"b\\\n\u{1}é";
        let properties = [(hostile.to_owned(), hostile.to_owned())].into();
        let head = LineHead::new(Some("vm-1"), &properties);
        let groups = [LineGroup {
            key: format!("block_{hostile}"),
            fields: vec![
                ("read_count", LineValue::Number(u64::MAX)),
                ("read_agg", LineValue::Micros { min: 1, max: 2, sum: 3 }),
            ],
        }];
        let line = render(7, &head, &groups);
        assert_eq!(line.matches('\n').count(), 1);
        assert!(line.ends_with("}\n"));
        let value: Value = serde_json::from_str(&line).unwrap();
        assert_eq!(
            value,
            json!({
                "utc_timestamp_ms": 7,
                "id": "vm-1",
                "properties": { hostile: hostile },
                format!("block_{hostile}"):
                    { "read_count": u64::MAX, "read_agg": { "min_us": 1, "max_us": 2, "sum_us": 3 } },
            })
        );
    }

    #[test]
    fn head_is_empty_without_id_and_properties() {
        assert!(LineHead::new(None, &BTreeMap::new()).as_bytes().is_empty());
        let line = render(0, &LineHead::default(), &[]);
        assert!(line.starts_with("{\"utc_timestamp_ms\":0,"), "{line}");
    }
}
