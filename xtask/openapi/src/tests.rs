//! Tests of the description: its files are current, its texts are for users, and its bounds are
//! those that the structs check.

use config::{
    Action, BootSource, ConfigError, CpuConfig, Drive, Entropy, Fork, Logger, MachineConfig, Metrics,
    MmdsConfig, NetworkInterface, Serial, SnapshotCreate, SnapshotLoad, Vm, Vsock,
};
use serde_json::{Map, Value, json};

use super::*;
use crate::operations::OPERATIONS;

/// Reads and checks a body as the API does.
type Accept = fn(&Value) -> Result<(), String>;

/// What reads the body of each operation that has one.
fn accept(operation: &str) -> Accept {
    match operation {
        "putMachineConfiguration" => |body| checked(body, MachineConfig::check),
        "patchMachineConfiguration" => {
            |body| checked(body, |update| MachineConfig::default().updated(update).map(drop))
        }
        "putCpuConfiguration" => |body| checked(body, CpuConfig::check),
        "putMetrics" => |body| checked(body, Metrics::check),
        "putGuestBootSource" => |body| checked(body, BootSource::check),
        "putLogger" => |body| checked(body, |_: &Logger| Ok(())),
        "putSerialDevice" => |body| checked(body, Serial::check),
        "putGuestDriveByID" => |body| checked(body, Drive::check),
        "patchGuestDriveByID" => |body| {
            let drive = json!({"drive_id": "data", "is_root_device": false, "path_on_host": "d"});
            let drive: Drive = serde_json::from_value(drive).unwrap();
            checked(body, |update| drive.updated(update).map(drop))
        },
        "putGuestNetworkInterfaceByID" => |body| checked(body, NetworkInterface::check),
        "patchGuestNetworkInterfaceByID" => |body| {
            let interface = json!({"iface_id": "eth0", "host_dev_name": "tap0"});
            let interface: NetworkInterface = serde_json::from_value(interface).unwrap();
            checked(body, |update| interface.updated(update).map(drop))
        },
        "putEntropyDevice" => |body| checked(body, Entropy::check),
        "putGuestVsock" => |body| checked(body, Vsock::check),
        "putMmdsConfig" => |body| checked(body, MmdsConfig::check),
        "createSyncAction" => |body| checked(body, |_: &Action| Ok(())),
        "patchVm" => |body| checked(body, |_: &Vm| Ok(())),
        "createSnapshot" => |body| checked(body, SnapshotCreate::check),
        "loadSnapshot" => |body| checked(body, SnapshotLoad::check),
        "forkMicroVm" => |body| checked(body, Fork::check),
        "putMmds" | "patchMmds" => {
            |body| body.is_object().then_some(()).ok_or_else(|| "not an object".to_owned())
        }
        other => panic!("{other}: say here what reads its body"),
    }
}

fn checked<T: serde::de::DeserializeOwned>(
    body: &Value,
    check: impl Fn(&T) -> Result<(), ConfigError>,
) -> Result<(), String> {
    let value: T = serde_json::from_value(body.clone()).map_err(|error| error.to_string())?;
    check(&value).map_err(|error| error.to_string())
}

#[test]
fn committed_files_are_current() {
    check_files().unwrap();
}

#[test]
fn operation_ids_and_examples_are_sound() {
    let ids: std::collections::BTreeSet<_> = OPERATIONS.iter().map(|operation| operation.id).collect();
    assert_eq!(ids.len(), OPERATIONS.len(), "two operations have one id");
    for operation in OPERATIONS {
        if let Some(body) = &operation.body {
            let example = serde_json::from_str(body.example).unwrap();
            accept(operation.id)(&example).unwrap_or_else(|error| panic!("{}: {error}", operation.id));
        }
    }
}

#[test]
fn every_description_is_a_sentence_for_users() {
    fn walk(at: &str, value: &Value) {
        let Some(object) = value.as_object() else {
            value.as_array().into_iter().flatten().for_each(|item| walk(at, item));
            return;
        };
        if let Some(Value::String(text)) = object.get("description") {
            let begins = text.starts_with(|c: char| c.is_uppercase() || c == '`') || text.starts_with("vCPU");
            assert!(begins && text.ends_with('.'), "{at}: {text:?} is no sentence");
            for rust in ["::", "[`", "()", "Option<", "serde"] {
                assert!(!text.contains(rust), "{at}: {text:?} is for programmers of the monitor");
            }
        }
        if let Some(Value::Object(fields)) = object.get("properties") {
            for (name, field) in fields {
                assert!(field["description"].is_string(), "{at}.{name} has no description");
                walk(&format!("{at}.{name}"), field);
            }
        }
        for (key, inner) in
            object.iter().filter(|(key, _)| !["properties", "example"].contains(&key.as_str()))
        {
            walk(&format!("{at}/{key}"), inner);
        }
    }
    walk("", &document::document().unwrap());
}

/// A bound of one field: the field's place in a body, the keyword, and values at and beyond it.
struct Bound {
    place: Vec<String>,
    keyword: &'static str,
    at: Value,
    beyond: Value,
}

#[test]
fn bounds_are_those_of_the_checks() {
    let document = document::document().unwrap();
    let mut count = 0;
    for operation in OPERATIONS {
        let Some(body) = &operation.body else { continue };
        let described = &document["paths"][operation.path][operation.method.to_lowercase()];
        let schema = &described["requestBody"]["content"]["application/json"]["schema"];
        let example: Value = serde_json::from_str(body.example).unwrap();
        for bound in bounds(&document, schema, &example, &[]) {
            let name = format!("{} {} {}", operation.id, bound.place.join("."), bound.keyword);
            let with = |value: &Value| {
                let mut body = example.clone();
                set(&document, schema, &mut body, &bound.place, value);
                (accept(operation.id)(&body), body.to_string().chars().take(300).collect::<String>())
            };
            let (at, body) = with(&bound.at);
            assert_eq!(at, Ok(()), "{name}: {body}");
            let (beyond, body) = with(&bound.beyond);
            assert!(beyond.is_err(), "{name}: accepts more than described: {body}");
            count += 1;
        }
    }
    assert!(count > 60, "only {count} bounds");
}

/// The bounds of all fields below a schema, of which there is an example, perhaps null.
fn bounds(document: &Value, schema: &Value, example: &Value, place: &[String]) -> Vec<Bound> {
    let schema = resolve(document, schema);
    let mut found = Vec::new();
    let mut add = |keyword, at: Value, beyond: Value| {
        found.push(Bound { place: place.to_vec(), keyword, at, beyond });
    };
    for (keyword, step) in [("minimum", -1), ("maximum", 1)] {
        if let Some(bound) = schema[keyword].as_number().and_then(serde_json::Number::as_i128) {
            add(keyword, number(bound), number(bound + step));
        }
    }
    let text = |length: u64| Value::from("x".repeat(length as usize));
    if let Some(min) = schema["minLength"].as_u64() {
        add("minLength", text(min), text(min - 1));
    }
    if let Some(max) = schema["maxLength"].as_u64() {
        add("maxLength", text(max), text(max + 1));
    }
    let list = |length: u64| {
        let item = |number: u64| {
            let mut item = sample(document, &schema["items"]);
            // Texts have patterns, which those of the example match.
            match &mut item {
                Value::Object(item) => item.iter_mut().for_each(|(name, field)| {
                    example[0].get(name).iter().for_each(|given| (*given).clone_into(field));
                }),
                item => example.get(0).iter().for_each(|given| (*given).clone_into(item)),
            }
            if let Some(id) = item.get_mut("id") {
                *id = format!("id-{number}").into();
            }
            item
        };
        Value::from((0..length).map(item).collect::<Vec<_>>())
    };
    if let Some(min) = schema["minItems"].as_u64() {
        add("minItems", list(min), list(min - 1));
    }
    if let Some(max) = schema["maxItems"].as_u64() {
        add("maxItems", list(max), list(max + 1));
    }
    if let Value::Object(fields) = &schema["properties"] {
        for (name, field) in fields {
            let place = [place, std::slice::from_ref(name)].concat();
            found.extend(bounds(document, field, &example[name], &place));
        }
    }
    if schema["items"].is_object() {
        let place = [place, &["0".to_owned()]].concat();
        found.extend(bounds(document, &schema["items"], &example[0], &place));
    }
    // A descriptor is not checked before it is used.
    found.retain(|bound| !bound.place.contains(&"fds".to_owned()));
    found
}

fn number(value: i128) -> Value {
    serde_json::Number::from_i128(value).map_or_else(|| json!(1e30), Value::Number)
}

/// The schema that a reference, perhaps one that allows null too, stands for.
fn resolve<'a>(document: &'a Value, schema: &'a Value) -> &'a Value {
    let choice = schema["anyOf"].as_array().into_iter().flatten().find(|choice| choice["$ref"].is_string());
    let schema = choice.unwrap_or(schema);
    let Some(name) = schema["$ref"].as_str().and_then(|reference| reference.rsplit('/').next()) else {
        return schema;
    };
    &document["components"]["schemas"][name]
}

/// The smallest value of a schema.
fn sample(document: &Value, schema: &Value) -> Value {
    let schema = resolve(document, schema);
    if let Some(values) = schema["enum"].as_array() {
        return values[0].clone();
    }
    match schema["type"].as_str().or_else(|| schema["type"][0].as_str()) {
        Some("object") => {
            let required = schema["required"].as_array().into_iter().flatten().filter_map(Value::as_str);
            let field = |name: &str| (name.to_owned(), sample(document, &schema["properties"][name]));
            Value::Object(required.map(field).collect::<Map<_, _>>())
        }
        Some("integer") => schema["minimum"].clone(),
        Some("boolean") => false.into(),
        Some("array") => json!([]),
        _ => "a".into(),
    }
}

/// Sets a field of a body, with the fields around it that it needs.
fn set(document: &Value, schema: &Value, body: &mut Value, place: &[String], value: &Value) {
    let schema = resolve(document, schema);
    let Some((name, rest)) = place.split_first() else {
        *body = value.clone();
        return;
    };
    if schema["items"].is_object() {
        if body.as_array().is_none_or(Vec::is_empty) {
            *body = json!([sample(document, &schema["items"])]);
        }
        return set(document, &schema["items"], &mut body[0], rest, value);
    }
    let field = &schema["properties"][name];
    if body[name].is_null() && !rest.is_empty() {
        body[name] = sample(document, field);
    }
    set(document, field, &mut body[name], rest, value);
    // A thread needs a queue, and a queue that is a power of two is at both ends of its bounds.
    if name == "io_threads" && value.as_u64() <= schema["properties"]["num_queues"]["maximum"].as_u64() {
        body["num_queues"] = value.clone();
    }
    // One may replace the other, and not both can be given.
    if name == "ht_enabled" {
        body.as_object_mut().unwrap().remove("smt");
    }
}
