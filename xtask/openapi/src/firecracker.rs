//! Compares the description with the facts of Firecracker 1.17 in `tests/data`: every endpoint,
//! field, type, value, default and bound of Firecracker is in ours, or among the [`EXCEPTIONS`].
//!
//! What Firecracker accepts must be accepted: a type, the values of an enumeration, bounds, fields
//! that may be left out. What its answers always have, ours must have.

use std::collections::BTreeSet;

use serde_json::Value;

const FACTS: &str = include_str!("../../../tests/data/firecracker-1.17-api.json");

/// Where ours differs, and why. `*` stands for any text. An exception without a difference fails
/// the test.
const EXCEPTIONS: &[(&str, &str)] = &[
    ("* /balloon*: missing", "there is no balloon device yet"),
    ("* /hotplug/memory: missing", "there is no memory hot-plug yet"),
    ("* /pmem/{id}: missing", "there are no pmem devices yet"),
    ("GET /vm/config answer balloon: no object", "there is no balloon device yet"),
    ("GET /vm/config answer memory-hotplug: no object", "there is no memory hot-plug yet"),
    ("GET /vm/config answer pmem[]: no object", "there are no pmem devices yet"),
    ("*cpu-config reg_modifiers: missing", "it is for aarch64, and every host is x86_64"),
    ("*cpu-config vcpu_features: missing", "it is for aarch64, and every host is x86_64"),
    ("PUT /cpu-config cpuid_modifiers[] flags: at most 7", "KVM has no other flags"),
    ("PUT /drives/{drive_id} path_on_host: required", "there are no vhost-user drives, which have none"),
    ("PUT /drives/{drive_id} io_engine: default", "the default is Async where the host supports it"),
    ("* refill_time: at most 18446744073709", "a longer time would limit nothing: the limit would be lost"),
    ("* /machine-config mem_size_mib: at least 1", "no machine has no memory"),
    ("* /machine-config mem_size_mib: at most 1048576", "no machine of vesta has more than 1 TiB"),
    ("PATCH /machine-config *: default", "a field that is not given stays"),
    ("PUT /logger show_*: default", "a field that is not given stays"),
    (
        "GET /vm/config answer network-interfaces[] host_dev_name: may be absent",
        "other backends than a named tap have none",
    ),
];

#[test]
fn description_has_all_of_firecrackers_api() {
    let facts: Value = serde_json::from_str(FACTS).unwrap();
    let ours = super::document::document().unwrap();
    let mut comparison = Comparison { facts: &facts, ours: &ours, found: BTreeSet::new() };
    for operation in facts["operations"].as_array().unwrap() {
        comparison.operation(operation);
    }
    let found = &comparison.found;
    let explains = |(pattern, _): &(&str, &str), what: &String| is_match(pattern, what);
    let unexplained: Vec<_> =
        found.iter().filter(|what| !EXCEPTIONS.iter().any(|exception| explains(exception, what))).collect();
    let gone: Vec<_> =
        EXCEPTIONS.iter().filter(|exception| !found.iter().any(|what| explains(exception, what))).collect();
    assert!(unexplained.is_empty(), "differences without a reason: {unexplained:#?}");
    assert!(gone.is_empty(), "exceptions that no longer apply: {gone:#?}");
}

fn is_match(pattern: &str, text: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == text,
        Some((before, after)) => text.strip_prefix(before).is_some_and(|rest| {
            rest.char_indices().any(|(at, _)| is_match(after, &rest[at..])) || after.is_empty()
        }),
    }
}

struct Comparison<'a> {
    facts: &'a Value,
    ours: &'a Value,
    found: BTreeSet<String>,
}

/// What a schema describes.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Body,
    Answer,
}

impl Comparison<'_> {
    fn operation(&mut self, fact: &Value) {
        let (method, path) = (fact["method"].as_str().unwrap(), fact["path"].as_str().unwrap());
        let name = format!("{method} {path}");
        let described = self.ours["paths"][path][method.to_lowercase()].clone();
        if described.is_null() {
            self.differ(&name, "missing");
            return;
        }
        let schema_in = |content: &Value| content["content"]["application/json"]["schema"].clone();
        if let Some(schema) = fact["body"].as_str() {
            self.schema(&name, schema, &schema_in(&described["requestBody"]), Side::Body);
        }
        if let Some(schema) = fact["answer"].as_str() {
            let name = format!("{name} answer");
            self.schema(&name, schema, &schema_in(&described["responses"]["200"]), Side::Answer);
        }
    }

    /// Compares an object with one of Firecracker's by name.
    fn schema(&mut self, at: &str, theirs: &str, ours: &Value, side: Side) {
        let ours = self.resolve(ours);
        if theirs == "object" {
            assert_eq!(ours["type"], "object", "{at}");
            return;
        }
        let theirs = self.facts["schemas"][theirs].clone();
        let names = |list: &Value| -> BTreeSet<String> {
            list.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        let (needed, our_needed) = (names(&theirs["required"]), names(&ours["required"]));
        let surplus = match side {
            Side::Body => our_needed.difference(&needed),
            Side::Answer => needed.difference(&our_needed),
        };
        let verdict = if side == Side::Body { "required" } else { "may be absent" };
        surplus.for_each(|field| self.differ(&format!("{at} {field}"), verdict));
        for (name, field) in theirs["fields"].as_object().unwrap() {
            let at = format!("{at} {name}");
            match ours["properties"].get(name) {
                Some(our_field) => self.field(&at, field, our_field, side),
                None => self.differ(&at, "missing"),
            }
        }
    }

    fn field(&mut self, at: &str, theirs: &Value, ours: &Value, side: Side) {
        let resolved = self.resolve(ours);
        if let Some(name) = theirs["schema"].as_str() {
            if resolved["type"] == "object" {
                self.schema(at, name, &resolved, side);
            } else {
                self.differ(at, "no object");
            }
            return;
        }
        let has_type = |one: &Value| {
            resolved["type"] == *one || resolved["type"].as_array().is_some_and(|all| all.contains(one))
        };
        if !has_type(&theirs["type"]) {
            self.differ(at, &format!("type {} instead of {}", resolved["type"], theirs["type"]));
            return;
        }
        if theirs["enum"].is_array() {
            self.values(at, &theirs["enum"], &resolved);
        }
        if let Some(default) = theirs.get("default")
            && ours.get("default") != Some(default)
            && side == Side::Body
        {
            self.differ(at, "default");
        }
        if side == Side::Body && theirs["type"] == "integer" {
            self.bounds(at, theirs, &resolved);
        }
        if theirs["items"].is_object() {
            self.field(&format!("{at}[]"), &theirs["items"], &resolved["items"], side);
        }
    }

    fn values(&mut self, at: &str, theirs: &Value, ours: &Value) {
        for value in theirs.as_array().unwrap() {
            if !ours["enum"].as_array().is_some_and(|all| all.contains(value)) {
                self.differ(at, &format!("not {value}"));
            }
        }
    }

    /// A bound that only the type of our field has is none.
    fn bounds(&mut self, at: &str, theirs: &Value, ours: &Value) {
        let of_type = match ours["format"].as_str() {
            Some("uint8") => u64::from(u8::MAX),
            Some("uint16") => u64::from(u16::MAX),
            Some("uint32") => u64::from(u32::MAX),
            _ => u64::MAX,
        };
        let (min, max) = (ours["minimum"].as_u64().unwrap_or(0), ours["maximum"].as_u64().unwrap_or(of_type));
        if min > theirs["minimum"].as_u64().unwrap_or(0) {
            self.differ(at, &format!("at least {min}"));
        }
        if max < theirs["maximum"].as_u64().unwrap_or(of_type) {
            self.differ(at, &format!("at most {max}"));
        }
    }

    /// The schema that a reference, perhaps one that allows null too, stands for.
    fn resolve(&self, schema: &Value) -> Value {
        let mut choices = schema["anyOf"].as_array().into_iter().flatten();
        let schema = choices.find(|choice| choice["$ref"].is_string()).unwrap_or(schema);
        let name = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next());
        name.map_or(schema, |name| &self.ours["components"]["schemas"][name]).clone()
    }

    fn differ(&mut self, at: &str, how: &str) {
        self.found.insert(format!("{at}: {how}"));
    }
}
