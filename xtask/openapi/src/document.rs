//! [`document`]: the whole description as a JSON value.

use anyhow::{Context, Result, ensure};
use serde_json::{Map, Value, json};

use crate::operations::{Answer, OPERATIONS, Operation};
use crate::schemas::Schemas;

/// What a reader of the description sees first.
const ABOUT: &str = "The API of `vesta-vmm`, over a Unix socket (`--api-sock`): Firecracker's API, with \
    extensions, which have `x-vesta-extension`.\n\nA request that is refused changes nothing. A field that \
    is null counts as not given where the schema allows null. Clients must accept fields that answers do not \
    have yet.";

/// The description.
pub(crate) fn document() -> Result<Value> {
    let mut schemas = Schemas::new();
    let mut paths = Map::new();
    for operation in OPERATIONS {
        let described = describe(operation, &mut schemas)
            .with_context(|| format!("{} {}", operation.method, operation.path))?;
        let path = paths.entry(operation.path).or_insert_with(|| path_item(operation.path));
        let method = operation.method.to_lowercase();
        ensure!(path.get(&method).is_none(), "{method} {}: listed twice", operation.path);
        path[method] = described;
    }
    let fault = schemas.answer(schema_of::<config::Fault>)?;
    let http_error = schemas.answer(schema_of::<config::HttpError>)?;
    let id = schemas.request(schema_of::<config::ResourceId>)?;
    let components = schemas.components()?;
    let mut paths = Value::Object(paths);
    for path in paths.as_object_mut().into_iter().flat_map(Map::values_mut) {
        for operation in path.as_object_mut().into_iter().flat_map(Map::values_mut) {
            if let Some(answers) = operation.get_mut("responses") {
                components.finish(answers);
            }
        }
    }
    Ok(json!({
        "openapi": "3.1.0",
        "info": {
            "title": "vesta",
            "version": env!("CARGO_PKG_VERSION"),
            "description": ABOUT,
            "license": { "name": "Apache-2.0", "identifier": "Apache-2.0" },
        },
        "servers": [{ "url": "http://localhost", "description": "The Unix socket; the name does not matter." }],
        "paths": paths,
        "components": {
            "schemas": components.schemas,
            "parameters": {
                "drive_id": parameter("drive_id", "Id of the drive.", &id),
                "iface_id": parameter("iface_id", "Id of the network interface.", &id),
            },
            "headers": {
                "Deprecation": {
                    "description": "The request used something that is deprecated.",
                    "schema": { "type": "string", "const": "true" },
                },
            },
            "responses": {
                "Refused": {
                    "description": "The request was refused, and nothing was changed.",
                    "content": { "application/json": { "schema": { "anyOf": [fault, http_error] } } },
                },
                "TooManyConnections": {
                    "description": "Too many connections are open. This one closes.",
                    "content": { "application/json": { "schema": http_error } },
                },
            },
        },
    }))
}

fn schema_of<T: schemars::JsonSchema>(generator: &mut schemars::SchemaGenerator) -> schemars::Schema {
    generator.subschema_for::<T>()
}

/// What all methods of a path share.
fn path_item(path: &str) -> Value {
    let names = path.split('/').filter_map(|segment| segment.strip_prefix('{')?.strip_suffix('}'));
    let parameters: Vec<Value> =
        names.map(|name| json!({ "$ref": format!("#/components/parameters/{name}") })).collect();
    if parameters.is_empty() { json!({}) } else { json!({ "parameters": parameters }) }
}

fn parameter(name: &str, description: &str, schema: &Value) -> Value {
    json!({ "name": name, "in": "path", "required": true, "description": description, "schema": schema })
}

fn describe(operation: &Operation, schemas: &mut Schemas) -> Result<Value> {
    let mut responses = Map::new();
    for answer in operation.answers {
        responses.insert(answer.status.to_owned(), respond(answer, operation.deprecation, schemas)?);
    }
    responses.insert("400".to_owned(), json!({ "$ref": "#/components/responses/Refused" }));
    responses.insert("503".to_owned(), json!({ "$ref": "#/components/responses/TooManyConnections" }));
    let sentences = [operation.when.sentence(), operation.more];
    let description: Vec<&str> = sentences.into_iter().filter(|sentence| !sentence.is_empty()).collect();
    let mut described = json!({
        "operationId": operation.id,
        "summary": operation.summary,
        "responses": responses,
    });
    if !description.is_empty() {
        described["description"] = description.join(" ").into();
    }
    if let Some(body) = &operation.body {
        let example: Value = serde_json::from_str(body.example).context("the example")?;
        let schema = schemas.request(body.schema)?;
        described["requestBody"] = json!({
            "required": true,
            "content": { "application/json": { "schema": schema, "example": example } },
        });
    }
    if operation.extension {
        described["x-vesta-extension"] = true.into();
    }
    Ok(described)
}

fn respond(answer: &Answer, deprecation: bool, schemas: &mut Schemas) -> Result<Value> {
    let mut response = json!({ "description": answer.description });
    if let Some(schema) = answer.schema {
        response["content"] = json!({ answer.media_type: { "schema": schemas.answer(schema)? } });
    }
    if deprecation {
        response["headers"] = json!({ "Deprecation": { "$ref": "#/components/headers/Deprecation" } });
    }
    Ok(response)
}
