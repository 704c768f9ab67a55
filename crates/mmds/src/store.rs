//! The contents of the metadata service: one JSON object of bounded size. The user replaces it or
//! merges patches into it. The guest reads values by path.

use std::borrow::Cow;

use serde_json::Value;

use crate::text;

/// The contents of the metadata service.
#[derive(Debug, Clone)]
pub struct Store {
    /// Null until the user first sets the contents, then an object.
    contents: Value,
    /// Most bytes of the contents as JSON without spaces.
    limit: usize,
}

/// Why a change is refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum StoreError {
    /// A patch before the contents were set.
    #[error("mmds: the data store is not initialized; send PUT /mmds before PATCH /mmds")]
    NotInitialized,
    /// Contents that are not a JSON object.
    #[error("mmds: the contents are {0}; they must be a JSON object")]
    NotAnObject(&'static str),
    /// Contents over the limit.
    #[error("mmds: the contents would be {size} bytes long as JSON; at most {limit}")]
    TooLarge {
        /// New length in bytes.
        size: usize,
        /// Most bytes allowed.
        limit: usize,
    },
}

/// Format of a value in a response.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// JSON; every value has this format.
    Json,
    /// EC2's text: the keys of an object, or a string as it is.
    Text,
}

/// Why a value cannot be read.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ReadError {
    /// There is no value at the path.
    Missing,
    /// The value has no text format.
    NoTextFormat,
}

impl Store {
    /// An empty store for contents of at most `limit` bytes, written as JSON without spaces.
    pub fn new(limit: usize) -> Store {
        Store { contents: Value::Null, limit }
    }

    /// Returns the contents; an empty object if they were not set.
    pub fn get(&self) -> Value {
        if self.contents.is_null() { Value::Object(serde_json::Map::new()) } else { self.contents.clone() }
    }

    /// Replaces the contents.
    pub fn put(&mut self, contents: Value) -> Result<(), StoreError> {
        if !contents.is_object() {
            return Err(StoreError::NotAnObject(kind(&contents)));
        }
        let size = json_len(&contents);
        if size > self.limit {
            return Err(StoreError::TooLarge { size, limit: self.limit });
        }
        self.contents = contents;
        Ok(())
    }

    /// Merges a JSON merge patch (RFC 7396) into the contents.
    pub fn patch(&mut self, patch: Value) -> Result<(), StoreError> {
        if self.contents.is_null() {
            return Err(StoreError::NotInitialized);
        }
        if !patch.is_object() {
            return Err(StoreError::NotAnObject(kind(&patch)));
        }
        let mut merged = self.contents.clone();
        merge(&mut merged, patch);
        self.put(merged)
    }

    /// Returns the value at `path`, the path of an HTTP request without its query.
    pub fn read(&self, path: &str, format: Format) -> Result<String, ReadError> {
        let mut value = &self.contents;
        for segment in segments(path) {
            value = child(value, segment).ok_or(ReadError::Missing)?;
        }
        match (value, format) {
            // The contents were not set.
            (Value::Null, _) if self.contents.is_null() => Err(ReadError::Missing),
            (_, Format::Json) => Ok(value.to_string()),
            (_, Format::Text) => text::format(value).ok_or(ReadError::NoTextFormat),
        }
    }
}

/// The segments of a path, without empty ones: `//a/` is `/a`.
pub(crate) fn segments(path: &str) -> impl Iterator<Item = &str> {
    path.split('/').filter(|segment| !segment.is_empty())
}

/// The child of `value` that `segment` names. A key may be given as it is, with the escapes of a
/// JSON pointer (RFC 6901), or percent-encoded.
fn child<'a>(value: &'a Value, segment: &str) -> Option<&'a Value> {
    match value {
        Value::Object(map) => map
            .get(segment)
            .or_else(|| map.get(&*unescape_pointer(segment)?))
            .or_else(|| map.get(&unescape_percent(segment)?)),
        Value::Array(items) => {
            // As in a JSON pointer: decimal, without sign or leading zeros.
            let plain =
                segment.bytes().all(|b| b.is_ascii_digit()) && (segment == "0" || !segment.starts_with('0'));
            plain.then(|| items.get(segment.parse::<usize>().ok()?)).flatten()
        }
        _ => None,
    }
}

fn unescape_pointer(segment: &str) -> Option<Cow<'_, str>> {
    segment.contains('~').then(|| Cow::Owned(segment.replace("~1", "/").replace("~0", "~")))
}

fn unescape_percent(segment: &str) -> Option<String> {
    if !segment.contains('%') {
        return None;
    }
    let mut bytes = Vec::with_capacity(segment.len());
    let mut rest = segment.as_bytes();
    while let [first, tail @ ..] = rest {
        let (byte, tail) = match (first, tail) {
            (b'%', [high, low, tail @ ..]) => (16 * hex(*high)? + hex(*low)?, tail),
            (b'%', _) => return None,
            (plain, tail) => (*plain, tail),
        };
        bytes.push(byte);
        rest = tail;
    }
    String::from_utf8(bytes).ok()
}

fn hex(digit: u8) -> Option<u8> {
    char::from(digit).to_digit(16).map(|digit| digit as u8)
}

/// Merges `patch` into `target` (RFC 7396, section 2). The recursion is as deep as the patch, whose
/// depth the JSON parser bounds.
fn merge(target: &mut Value, patch: Value) {
    let Value::Object(patch) = patch else {
        *target = patch;
        return;
    };
    if !target.is_object() {
        *target = Value::Object(serde_json::Map::new());
    }
    let Value::Object(target) = target else { return };
    for (key, value) in patch {
        if value.is_null() {
            target.remove(&key);
        } else {
            merge(target.entry(key).or_insert(Value::Null), value);
        }
    }
}

/// Length of `value` as JSON without spaces.
fn json_len(value: &Value) -> usize {
    struct Count(usize);
    impl std::io::Write for Count {
        fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
            self.0 += bytes.len();
            Ok(bytes.len())
        }
        fn flush(&mut self) -> std::io::Result<()> {
            Ok(())
        }
    }
    let mut count = Count(0);
    serde_json::to_writer(&mut count, value).expect("a JSON value has text keys, and counting does not fail");
    count.0
}

fn kind(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "a boolean",
        Value::Number(_) => "a number",
        Value::String(_) => "a string",
        Value::Array(_) => "an array",
        Value::Object(_) => "an object",
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    fn store(contents: Value) -> Store {
        let mut store = Store::new(51200);
        store.put(contents).unwrap();
        store
    }

    fn merged(mut target: Value, patch: Value) -> Value {
        merge(&mut target, patch);
        target
    }

    #[test]
    fn merge_matches_the_examples_of_the_rfc() {
        // RFC 7396, appendix A.
        for (target, patch, result) in [
            (json!({"a":"b"}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"b"}), json!({"b":"c"}), json!({"a":"b","b":"c"})),
            (json!({"a":"b"}), json!({"a":null}), json!({})),
            (json!({"a":"b","b":"c"}), json!({"a":null}), json!({"b":"c"})),
            (json!({"a":["b"]}), json!({"a":"c"}), json!({"a":"c"})),
            (json!({"a":"c"}), json!({"a":["b"]}), json!({"a":["b"]})),
            (json!({"a":{"b":"c"}}), json!({"a":{"b":"d","c":null}}), json!({"a":{"b":"d"}})),
            (json!({"a":[{"b":"c"}]}), json!({"a":[1]}), json!({"a":[1]})),
            (json!(["a", "b"]), json!(["c", "d"]), json!(["c", "d"])),
            (json!({"a":"b"}), json!(["c"]), json!(["c"])),
            (json!({"a":"foo"}), json!(null), json!(null)),
            (json!({"a":"foo"}), json!("bar"), json!("bar")),
            (json!({"e":null}), json!({"a":1}), json!({"e":null,"a":1})),
            (json!([1, 2]), json!({"a":"b","c":null}), json!({"a":"b"})),
            (json!({}), json!({"a":{"bb":{"ccc":null}}}), json!({"a":{"bb":{}}})),
        ] {
            assert_eq!(merged(target.clone(), patch.clone()), result, "{target} + {patch}");
        }
        // Section 3.
        let target = json!({"title":"Goodbye!","author":{"givenName":"John","familyName":"Doe"},
            "tags":["example","sample"],"content":"This will be unchanged"});
        let patch = json!({"title":"Hello!","phoneNumber":"+01-123-456-7890","author":{"familyName":null},
            "tags":["example"]});
        let result = json!({"title":"Hello!","author":{"givenName":"John"},"tags":["example"],
            "content":"This will be unchanged","phoneNumber":"+01-123-456-7890"});
        assert_eq!(merged(target, patch), result);
    }

    #[test]
    fn unset_store_is_an_empty_object_and_refuses_patches() {
        let mut store = Store::new(100);
        assert_eq!(store.get(), json!({}));
        assert_eq!(store.patch(json!({"a":1})), Err(StoreError::NotInitialized));
        assert_eq!(store.read("/", Format::Json), Err(ReadError::Missing));
        store.put(json!({})).unwrap();
        store.patch(json!({"a":1})).unwrap();
        assert_eq!(store.get(), json!({"a":1}));
    }

    #[test]
    fn contents_must_be_an_object() {
        let mut store = store(json!({"a":1}));
        for other in [json!(null), json!(1), json!([1]), json!("a"), json!(true)] {
            assert!(matches!(store.put(other.clone()), Err(StoreError::NotAnObject(_))));
            assert!(matches!(store.patch(other), Err(StoreError::NotAnObject(_))));
        }
        assert_eq!(store.get(), json!({"a":1}));
    }

    #[test]
    fn change_over_the_limit_changes_nothing() {
        let mut store = Store::new(r#"{"a":"123"}"#.len());
        store.put(json!({"a":"123"})).unwrap();
        let error = StoreError::TooLarge { size: 12, limit: 11 };
        assert_eq!(store.put(json!({"a":"1234"})), Err(error));
        assert_eq!(store.patch(json!({"a":"1234"})), Err(error));
        assert_eq!(store.get(), json!({"a":"123"}));
        store.patch(json!({"a":null,"b":"123"})).unwrap();
    }

    #[test]
    fn paths_lead_through_objects_and_arrays() {
        let store =
            store(json!({"a":{"b":["x",{"c":"d"}]},"s/t":"slash","sp ace":"space","%20":"raw","~":"tilde"}));
        for (path, found) in [
            ("/a/b/0", Some("x")),
            ("//a///b/1/c/", Some("d")),
            ("/a/b/2", None),
            ("/a/b/00", None),
            ("/a/b/+1", None),
            ("/a/b/0/0", None),
            ("/a/nothing", None),
            ("/s~1t", Some("slash")),
            ("/s%2Ft", Some("slash")),
            ("/sp%20ace", Some("space")),
            ("/%20", Some("raw")),
            ("/~0", Some("tilde")),
            ("/%7e", Some("tilde")),
            ("/%7", None),
            ("/%zz", None),
        ] {
            assert_eq!(store.read(path, Format::Text).ok().as_deref(), found, "{path}");
        }
        assert_eq!(store.read("/a/b", Format::Json).unwrap(), r#"["x",{"c":"d"}]"#);
    }

    #[test]
    fn null_is_a_json_value_without_text_format() {
        let store = store(json!({"n":null}));
        assert_eq!(store.read("/n", Format::Json).unwrap(), "null");
        assert_eq!(store.read("/n", Format::Text), Err(ReadError::NoTextFormat));
    }

    fn json() -> impl Strategy<Value = Value> {
        let leaf = prop_oneof![
            Just(Value::Null),
            any::<bool>().prop_map(Value::from),
            any::<i32>().prop_map(Value::from),
            "[a-c/~% ]{0,4}".prop_map(Value::from),
        ];
        leaf.prop_recursive(4, 24, 4, |inner| {
            prop_oneof![
                prop::collection::vec(inner.clone(), 0..4).prop_map(Value::from),
                prop::collection::btree_map("[a-c/~% ]{0,3}", inner, 0..4)
                    .prop_map(|map| Value::Object(map.into_iter().collect())),
            ]
        })
    }

    fn object() -> impl Strategy<Value = Value> {
        prop::collection::btree_map("[a-c]{0,2}", json(), 0..4)
            .prop_map(|map| Value::Object(map.into_iter().collect()))
    }

    /// Every path to a value that is not an object, with the value: a model of merging.
    fn leaves(value: &Value, path: &mut Vec<String>, out: &mut Vec<(Vec<String>, Value)>) {
        let Value::Object(map) = value else {
            out.push((path.clone(), value.clone()));
            return;
        };
        for (key, value) in map {
            path.push(key.clone());
            leaves(value, path, out);
            path.pop();
        }
    }

    proptest! {
        /// Paths in the patch have its values; paths that it does not touch keep theirs.
        #[test]
        fn patch_sets_its_paths_and_keeps_the_others(before in object(), patch in object()) {
            let after = merged(before.clone(), patch.clone());
            let pointer = |path: &[String]| -> String {
                path.iter().flat_map(|part| ["/".to_owned(), part.replace('~', "~0").replace('/', "~1")]).collect()
            };
            let (mut set, mut kept) = (Vec::new(), Vec::new());
            leaves(&patch, &mut Vec::new(), &mut set);
            leaves(&before, &mut Vec::new(), &mut kept);
            for (path, value) in &set {
                let now = after.pointer(&pointer(path));
                prop_assert_eq!(now, Some(value).filter(|value| !value.is_null()), "{:?}", path);
            }
            for (path, value) in &kept {
                // A patch touches a path if it has a value at it or above it.
                let touched = (0..=path.len()).any(|len| {
                    let at = patch.pointer(&pointer(&path[..len]));
                    at.is_some_and(|at| !at.is_object() || len == path.len())
                });
                if !touched {
                    prop_assert_eq!(after.pointer(&pointer(path)), Some(value), "{:?}", path);
                }
            }
        }

        /// A sequence of changes has the same result as on a plain value with a limit.
        #[test]
        fn store_matches_a_plain_value_with_a_limit(
            limit in 2..200_usize, changes in prop::collection::vec((any::<bool>(), object()), 0..8),
        ) {
            let (mut store, mut model) = (Store::new(limit), None);
            for (replace, value) in changes {
                let wanted = match (&model, replace) {
                    (_, true) => Some(value.clone()),
                    (Some(old), false) => Some(merged(Value::clone(old), value.clone())),
                    (None, false) => None,
                };
                let done = if replace { store.put(value) } else { store.patch(value) };
                let fits = wanted.filter(|wanted| wanted.to_string().len() <= limit);
                prop_assert_eq!(done.is_ok(), fits.is_some());
                model = fits.or(model);
                prop_assert_eq!(store.get(), model.clone().unwrap_or(json!({})));
            }
        }

        #[test]
        fn paths_match_json_pointers(contents in object(), path in "[a-c0-2/~%]{0,12}") {
            let store = store(contents.clone());
            let segments: String = segments(&path).flat_map(|part| ["/", part]).collect();
            let found = store.read(&path, Format::Json).ok();
            if !path.contains(['%', '~']) {
                prop_assert_eq!(found, contents.pointer(&segments).map(Value::to_string));
            }
        }
    }
}
