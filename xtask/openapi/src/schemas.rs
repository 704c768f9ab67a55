//! [`Schemas`]: the schemas of bodies and answers, as clients and their generators read them best.
//!
//! A struct has one schema for requests and one for answers. They differ where a field may be left
//! out or be null on the way in, and is always there on the way out. Where they do, the latter has
//! the name of the former with `Response` at its end.

use std::collections::BTreeSet;

use anyhow::Result;
use schemars::SchemaGenerator;
use schemars::generate::SchemaSettings;
use serde_json::{Map, Value, json};

use crate::operations::SchemaOf;
use crate::text;

/// Where references point to.
const COMPONENTS: &str = "/components/schemas";

/// The schemas of one description.
pub(crate) struct Schemas {
    requests: SchemaGenerator,
    answers: SchemaGenerator,
}

/// The schemas that others refer to, and how to finish those that refer to them.
pub(crate) struct Components {
    pub(crate) schemas: Map<String, Value>,
    /// The names for which requests and answers have different schemas.
    different: BTreeSet<String>,
}

impl Schemas {
    pub(crate) fn new() -> Schemas {
        let settings = || SchemaSettings::draft2020_12().with(|s| s.definitions_path = COMPONENTS.into());
        Schemas {
            requests: settings().for_deserialize().into_generator(),
            answers: settings().for_serialize().into_generator(),
        }
    }

    /// The schema of a body.
    pub(crate) fn request(&mut self, schema: SchemaOf) -> Result<Value> {
        tidy(schema(&mut self.requests).to_value(), Side::Request)
    }

    /// The schema of an answer. [`Components::finish`] completes it.
    pub(crate) fn answer(&mut self, schema: SchemaOf) -> Result<Value> {
        tidy(schema(&mut self.answers).to_value(), Side::Answer)
    }

    /// The schemas that those so far refer to.
    pub(crate) fn components(mut self) -> Result<Components> {
        let mut schemas = Map::new();
        for (name, schema) in self.requests.take_definitions(true) {
            schemas.insert(name, tidy(schema, Side::Request)?);
        }
        let mut answers = Map::new();
        for (name, schema) in self.answers.take_definitions(true) {
            answers.insert(name, tidy(schema, Side::Answer)?);
        }
        let different = different(&schemas, &answers);
        let mut components = Components { schemas, different };
        for (name, mut schema) in answers {
            components.finish(&mut schema);
            components.schemas.insert(components.name(&name), schema);
        }
        Ok(components)
    }
}

impl Components {
    /// Has an answer's schema refer to answers.
    pub(crate) fn finish(&self, schema: &mut Value) {
        for_each_object(schema, &mut |object| {
            if let Some(Value::String(reference)) = object.get_mut("$ref")
                && let Some((path, name)) = reference.rsplit_once('/')
            {
                *reference = format!("{path}/{}", self.name(name));
            }
        });
    }

    fn name(&self, name: &str) -> String {
        if self.different.contains(name) { format!("{name}Response") } else { name.to_owned() }
    }
}

/// The names that requests and answers share and whose schemas differ, also in what they refer to.
fn different(requests: &Map<String, Value>, answers: &Map<String, Value>) -> BTreeSet<String> {
    let shared = || requests.iter().filter_map(|(name, schema)| Some((name, schema, answers.get(name)?)));
    let differs = |(name, one, other): (&String, &Value, &Value)| (one != other).then(|| name.clone());
    let mut different: BTreeSet<String> = shared().filter_map(differs).collect();
    loop {
        let refers = |schema: &Value| {
            let text = schema.to_string();
            different.iter().any(|name| text.contains(&format!("{COMPONENTS}/{name}\"")))
        };
        let more: BTreeSet<String> =
            shared().filter(|(_, schema, _)| refers(schema)).map(|(name, ..)| name.clone()).collect();
        let before = different.len();
        different.extend(more);
        if different.len() == before {
            return different;
        }
    }
}

/// What a schema describes.
#[derive(Clone, Copy, PartialEq)]
enum Side {
    Request,
    Answer,
}

/// Brings a schema of `schemars` into its final form.
fn tidy(mut schema: Value, side: Side) -> Result<Value> {
    let mut result = Ok(());
    for_each_object(&mut schema, &mut |object| {
        if let Err(error) = tidy_object(object, side) {
            result = Err(error);
        }
    });
    result.map(|()| schema)
}

fn tidy_object(object: &mut Map<String, Value>, side: Side) -> Result<()> {
    merge_variants(object);
    if let Some(Value::String(doc)) = object.get_mut("description") {
        *doc = text::description(doc)?;
    }
    // Null as a default says no more than that the field is not required.
    if object.get("default") == Some(&Value::Null) {
        object.remove("default");
    }
    bound_integer(object);
    drop_unused_defaults(object);
    match side {
        Side::Request => add_alias(object),
        Side::Answer => open_up(object),
    }
    Ok(())
}

/// Replaces a choice of single texts by an enumeration, which all generators of clients know.
fn merge_variants(object: &mut Map<String, Value>) {
    let Some(Value::Array(variants)) = object.get("oneOf") else { return };
    let mut names = Vec::new();
    let mut lines = Vec::new();
    for variant in variants {
        let Some(name) = variant.get("const").and_then(Value::as_str) else { return };
        names.push(Value::from(name));
        if let Some(doc) = variant.get("description").and_then(Value::as_str) {
            lines.push(format!("`{name}`: {doc}"));
        }
    }
    object.remove("oneOf");
    object.insert("type".into(), "string".into());
    object.insert("enum".into(), names.into());
    let doc = object.get("description").and_then(Value::as_str).map(str::to_owned);
    let paragraphs: Vec<String> = doc.into_iter().chain(lines).collect();
    object.insert("description".into(), paragraphs.join("\n\n").into());
}

/// States the bounds that an integer has by its type.
fn bound_integer(object: &mut Map<String, Value>) {
    let (min, max): (Value, Value) = match object.get("format").and_then(Value::as_str) {
        Some("uint32") => (0.into(), u32::MAX.into()),
        Some("uint64") => (0.into(), u64::MAX.into()),
        Some("int32") => (i32::MIN.into(), i32::MAX.into()),
        _ => return,
    };
    object.entry("minimum").or_insert(min);
    object.entry("maximum").or_insert(max);
}

/// A field that must be there has no default.
fn drop_unused_defaults(object: &mut Map<String, Value>) {
    let required = object.get("required").and_then(Value::as_array).cloned().unwrap_or_default();
    let Some(Value::Object(properties)) = object.get_mut("properties") else { return };
    for name in required.iter().filter_map(Value::as_str) {
        if let Some(Value::Object(field)) = properties.get_mut(name) {
            field.remove("default");
        }
    }
}

/// Adds the other name that a field has in requests.
fn add_alias(object: &mut Map<String, Value>) {
    let Some(Value::Object(properties)) = object.get_mut("properties") else { return };
    let alias_of = |property: &mut Value| property.as_object_mut()?.remove("x-alias");
    let found = properties.iter_mut().find_map(|(name, field)| Some((name.clone(), alias_of(field)?)));
    let Some((name, Value::String(alias))) = found else { return };
    let mut field = properties[&name].clone();
    // Generated clients send defaults.
    if let Some(field) = field.as_object_mut() {
        field.remove("default");
    }
    field["description"] = format!("Old name of `{name}`. Only one of both may be given.").into();
    field["deprecated"] = true.into();
    properties.insert(alias.clone(), field);
    object.insert("not".into(), json!({ "required": [name, alias] }));
}

/// An answer may have more fields one day. A field that it may lack is not null when it is there.
fn open_up(object: &mut Map<String, Value>) {
    for only_in_requests in ["additionalProperties", "minProperties", "x-alias"] {
        if object.get(only_in_requests) != Some(&Value::Bool(true)) {
            object.remove(only_in_requests);
        }
    }
    let required = object.get("required").cloned().unwrap_or_default();
    let is_required = |name: &String| required.as_array().is_some_and(|list| list.iter().any(|n| n == name));
    let Some(Value::Object(properties)) = object.get_mut("properties") else { return };
    for (_, property) in properties.iter_mut().filter(|(name, _)| !is_required(name)) {
        remove_null(property);
    }
}

/// Removes null from what a schema allows.
fn remove_null(schema: &mut Value) {
    let Some(object) = schema.as_object_mut() else { return };
    if let Some(Value::Array(types)) = object.get("type") {
        let types: Vec<_> = types.iter().filter(|one| *one != "null").cloned().collect();
        object.insert("type".into(), if let [one] = &types[..] { one.clone() } else { types.into() });
    }
    if let Some(Value::Array(choices)) = object.get("anyOf") {
        let choices: Vec<_> = choices.iter().filter(|one| one["type"] != "null").cloned().collect();
        if let [Value::Object(one)] = &choices[..] {
            let one = one.clone();
            object.remove("anyOf");
            object.extend(one);
        } else {
            object.insert("anyOf".into(), choices.into());
        }
    }
}

/// Calls `act` for each object in a schema, from the inside out. Names of fields are no objects of
/// the schema, so what is below `properties` counts only from the next level on.
fn for_each_object(value: &mut Value, act: &mut impl FnMut(&mut Map<String, Value>)) {
    match value {
        Value::Array(list) => list.iter_mut().for_each(|item| for_each_object(item, act)),
        Value::Object(object) => {
            for (key, inner) in object.iter_mut() {
                match (key.as_str(), inner) {
                    ("properties", Value::Object(fields)) => {
                        fields.values_mut().for_each(|field| for_each_object(field, act));
                    }
                    ("default" | "const" | "enum", _) => {}
                    (_, inner) => for_each_object(inner, act),
                }
            }
            act(object);
        }
        _ => {}
    }
}
