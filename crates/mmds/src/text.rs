//! EC2's text format of a JSON value.
//!
//! An object is the list of its keys, one a line, with a slash after the key of an object. A string
//! is itself. Other values have no text format: numbers must be strings, as on EC2.

use serde_json::Value;

/// The text format of `value`, if it has one.
pub(crate) fn format(value: &Value) -> Option<String> {
    match value {
        Value::Object(map) => {
            let lines = map.iter().map(|(key, value)| match value {
                Value::Object(_) => format!("{key}/"),
                _ => key.clone(),
            });
            Some(lines.collect::<Vec<_>>().join("\n"))
        }
        Value::String(text) => Some(text.clone()),
        _ => None,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn object_is_the_list_of_its_keys() {
        let value = json!({"user-data":"x","meta-data":{"ami-id":"y"},"list":[{}],"empty":{}});
        assert_eq!(format(&value).unwrap(), "empty/\nlist\nmeta-data/\nuser-data");
        assert_eq!(format(&json!({})).unwrap(), "");
    }

    #[test]
    fn string_is_itself() {
        assert_eq!(format(&json!("two\n\"lines\"\u{e9}")).unwrap(), "two\n\"lines\"\u{e9}");
    }

    #[test]
    fn other_values_have_no_text_format() {
        for value in [json!(1), json!(1.5), json!(true), json!(null), json!(["a"])] {
            assert_eq!(format(&value), None, "{value}");
        }
    }
}
