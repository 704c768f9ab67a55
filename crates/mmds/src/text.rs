//! EC2's text form of a JSON value.
//!
//! An object is the list of its keys, one a line, with a slash behind those of objects; a string is itself. Nothing
//! else has a text form: whoever wants numbers seen writes them as strings, as EC2 does.

use serde_json::Value;

/// The text form of `value`, if it has one.
pub(crate) fn of(value: &Value) -> Option<String> {
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
    fn an_object_is_the_list_of_its_keys() {
        let value = json!({"user-data":"x","meta-data":{"ami-id":"y"},"list":[{}],"empty":{}});
        assert_eq!(of(&value).unwrap(), "empty/\nlist\nmeta-data/\nuser-data");
        assert_eq!(of(&json!({})).unwrap(), "");
    }

    #[test]
    fn a_string_is_itself() {
        assert_eq!(of(&json!("two\n\"lines\"\u{e9}")).unwrap(), "two\n\"lines\"\u{e9}");
    }

    #[test]
    fn nothing_else_has_a_text_form() {
        for value in [json!(1), json!(1.5), json!(true), json!(null), json!(["a"])] {
            assert_eq!(of(&value), None, "{value}");
        }
    }
}
