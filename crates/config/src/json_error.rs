//! [`describe`]: the text of a JSON error, with the field that it is about.
//!
//! `serde_json` gives the line and column of an error, but not the field of a value that has the
//! wrong type. The field is found by reading the text once more, up to that place.
//!
//! Called by the API for request bodies, and by the binary for the configuration file.

/// Describes `error`, which `serde_json` gave for `text`: `drives[0].rate_limiter: invalid type:
/// ...`. Errors outside of any field have no prefix.
pub fn describe(text: &[u8], error: &serde_json::Error) -> String {
    let reason = named_bounds(error.to_string());
    match field_at(text, error.line(), error.column()) {
        field if field.is_empty() => reason,
        field => format!("{field}: {reason}"),
    }
}

/// Replaces the name of an integer type by its bounds.
fn named_bounds(reason: String) -> String {
    const TYPES: [(&str, u64); 4] = [
        ("expected u8 ", u8::MAX as u64),
        ("expected u16 ", u16::MAX as u64),
        ("expected u32 ", u32::MAX as u64),
        ("expected u64 ", u64::MAX),
    ];
    let found = TYPES.iter().find(|(name, _)| reason.contains(name));
    match found {
        Some((name, max)) => reason.replace(name, &format!("expected a whole number from 0 to {max} ")),
        None => reason,
    }
}

/// What contains the place that is read.
enum Level {
    Object { key: Option<String> },
    Array { index: usize },
}

/// The path of the field in which this place is. Line and column begin at 1; the column is that of
/// the last byte that was read. Empty outside of any field.
fn field_at(text: &[u8], line: usize, column: usize) -> String {
    let line_start: usize =
        text.split_inclusive(|byte| *byte == b'\n').take(line.saturating_sub(1)).map(<[u8]>::len).sum();
    let text = &text[..text.len().min(line_start.saturating_add(column))];
    let mut levels: Vec<Level> = Vec::new();
    let mut last_string = None;
    let mut at = 0;
    while let Some(byte) = text.get(at) {
        at += 1;
        match byte {
            b'"' => {
                let end = string_end(text, at);
                // A key with an escape is shown as it is written.
                last_string = Some(String::from_utf8_lossy(&text[at..end]).into_owned());
                at = end + 1;
            }
            b':' => {
                if let Some(Level::Object { key }) = levels.last_mut() {
                    *key = last_string.take();
                }
            }
            b',' => match levels.last_mut() {
                Some(Level::Object { key }) => *key = None,
                Some(Level::Array { index }) => *index += 1,
                None => {}
            },
            b'{' => levels.push(Level::Object { key: None }),
            b'[' => levels.push(Level::Array { index: 0 }),
            b'}' | b']' => drop(levels.pop()),
            _ => {}
        }
    }
    path(&levels)
}

/// The offset of the quote that ends the string whose first byte is at `at`, or the end of `text`.
fn string_end(text: &[u8], mut at: usize) -> usize {
    while let Some(byte) = text.get(at) {
        match byte {
            b'"' => return at,
            b'\\' => at += 2,
            _ => at += 1,
        }
    }
    text.len()
}

/// `a.b[2].c`. It ends with `mmds`: what is in the metadata of a fork's child may be secret, and
/// errors are logged.
fn path(levels: &[Level]) -> String {
    let mut path = String::new();
    for level in levels {
        match level {
            Level::Object { key: Some(key) } => {
                if !path.is_empty() {
                    path.push('.');
                }
                path.push_str(key);
                if key == "mmds" {
                    break;
                }
            }
            Level::Object { key: None } => {}
            Level::Array { index } => path.extend(["[", &index.to_string(), "]"]),
        }
    }
    path
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::{Drive, MachineConfig, NetworkInterface, VmConfig};

    fn refused<T: serde::de::DeserializeOwned>(text: &str) -> String {
        let Err(error) = serde_json::from_str::<T>(text) else { panic!("it is accepted: {text}") };
        describe(text.as_bytes(), &error)
    }

    #[test]
    fn value_of_wrong_type_is_named_by_its_field() {
        let text = refused::<MachineConfig>(r#"{"mem_size_mib":1,"vcpu_count":"2"}"#);
        assert!(text.starts_with("vcpu_count: invalid type: string \"2\""), "{text}");
        let text = refused::<MachineConfig>("{\n \"vcpu_count\": 2,\n \"mem_size_mib\": true\n}");
        assert!(text.starts_with("mem_size_mib: invalid type: boolean"), "{text}");
        let text = refused::<MachineConfig>(r#"{"vcpu_count":[1],"mem_size_mib":1}"#);
        assert!(text.starts_with("vcpu_count"), "{text}");
    }

    #[test]
    fn number_beyond_its_type_is_named_with_the_bounds() {
        let text = refused::<MachineConfig>(r#"{"vcpu_count":300,"mem_size_mib":1}"#);
        assert!(text.contains("vcpu_count: invalid value: integer `300`"), "{text}");
        assert!(text.contains("a whole number from 0 to 255 at line 1"), "{text}");
    }

    #[test]
    fn nested_field_has_the_names_of_what_contains_it() {
        let text =
            r#"{"drive_id":"a","is_root_device":false,"rate_limiter":{"ops":{"size":"1","refill_time":1}}}"#;
        let text = refused::<Drive>(text);
        assert!(text.starts_with("rate_limiter.ops.size: "), "{text}");
        let text = refused::<VmConfig>(
            r#"{"boot-source":{"kernel_image_path":"k"},"drives":[],"network-interfaces":[{"iface_id":"a","host_dev_name":"t"},{"iface_id":7}]}"#,
        );
        assert!(text.starts_with("network-interfaces[1]"), "{text}");
    }

    #[test]
    fn missing_and_unknown_fields_are_named_once() {
        let text = refused::<MachineConfig>(r#"{"vcpu_count":2}"#);
        assert!(text.starts_with("missing field `mem_size_mib`"), "{text}");
        let text = refused::<MachineConfig>(r#"{"vcpu_count":2,"colour":1,"mem_size_mib":1}"#);
        assert!(text.starts_with("unknown field `colour`"), "{text}");
    }

    #[test]
    fn metadata_is_not_named() {
        let text = refused::<crate::Fork>(r#"{"children":[{"id":"a","mmds":{"secret":{"a" 1}}}]}"#);
        assert!(text.starts_with("children[0].mmds: ") && !text.contains("secret"), "{text}");
    }

    #[test]
    fn text_that_is_no_object_has_no_field() {
        for text in ["", "null", "{", "[", "\"\\", "{\"a"] {
            let described = refused::<NetworkInterface>(text);
            assert!(!described.starts_with(':'), "{text}: {described}");
        }
    }

    proptest! {
        #[test]
        fn no_text_causes_a_panic(text in prop::collection::vec(any::<u8>(), 0..64), line in 0_usize..9, column: usize) {
            field_at(&text, line, column);
        }

        #[test]
        fn no_json_like_text_causes_a_panic(text in "[\\[\\]{},:\"\\\\a1\n]{0,40}") {
            if let Err(error) = serde_json::from_str::<VmConfig>(&text) {
                describe(text.as_bytes(), &error);
            }
        }
    }
}
