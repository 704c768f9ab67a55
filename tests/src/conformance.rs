//! Requests generated from the facts of Firecracker's API description
//! (`tests/data/firecracker-1.17-api.json`): its operations, and bodies that break one rule each.

use std::collections::BTreeMap;

use anyhow::{Context, Result};
use serde::Deserialize;
use serde_json::{Value, json};

/// The facts of an API description.
#[derive(Debug, Deserialize)]
pub struct Description {
    /// Every method of every path.
    pub operations: Vec<Operation>,
    /// The objects of bodies and answers, by name.
    pub schemas: BTreeMap<String, Schema>,
}

/// A method of a path.
#[derive(Debug, Deserialize)]
pub struct Operation {
    /// The HTTP method.
    pub method: String,
    /// The path, with parameters in braces.
    pub path: String,
    /// The schema of the body.
    pub body: Option<String>,
    /// The schema of the answer.
    pub answer: Option<String>,
}

/// A JSON object.
#[derive(Debug, Deserialize)]
pub struct Schema {
    /// Names of fields that must be there.
    pub required: Vec<String>,
    /// The fields, by name.
    pub fields: BTreeMap<String, Field>,
}

/// A field of an object, or an item of an array.
#[derive(Debug, Deserialize)]
pub struct Field {
    /// `integer`, `string`, `boolean`, `array` or `object`; absent for an object with a schema.
    #[serde(rename = "type")]
    pub kind: Option<String>,
    /// The schema of an object.
    pub schema: Option<String>,
    /// All values, if they are listed.
    #[serde(rename = "enum")]
    pub values: Option<Vec<Value>>,
    /// Smallest number.
    pub minimum: Option<i64>,
    /// Largest number.
    pub maximum: Option<i64>,
    /// The items of an array.
    pub items: Option<Box<Field>>,
}

/// A body that breaks one rule.
#[derive(Debug)]
pub struct BadBody {
    /// The schema and the field of the rule, as in `TokenBucket.size`.
    pub field: String,
    /// The field's name, which the refusal must contain.
    pub name: String,
    /// What is wrong: `type`, `minimum`, `maximum`, `value`, `missing` or `unknown`.
    pub rule: &'static str,
    /// The body.
    pub body: String,
}

impl Description {
    /// Firecracker 1.17.
    pub fn firecracker() -> Result<Description> {
        serde_json::from_str(include_str!("../data/firecracker-1.17-api.json")).context("the API description")
    }

    /// Every body that differs from `valid` in one rule of `schema`, or of an object within.
    pub fn bad_bodies(&self, schema: &str, valid: &Value) -> Vec<BadBody> {
        let mut found = Vec::new();
        self.break_object(schema, valid, valid, &mut Vec::new(), &mut found);
        found
    }

    /// Breaks the rules of the object at `path` in `whole`.
    fn break_object(
        &self,
        schema: &str,
        object: &Value,
        whole: &Value,
        path: &mut Vec<String>,
        found: &mut Vec<BadBody>,
    ) {
        let rules = &self.schemas[schema];
        let mut push = |name: &str, rule, path: &[String], value: Option<Value>| {
            let mut body = whole.clone();
            replace(&mut body, path, value);
            let field = format!("{schema}.{name}");
            found.push(BadBody { field, name: name.to_owned(), rule, body: body.to_string() });
        };
        for (name, field) in &rules.fields {
            path.push(name.clone());
            for value in field.wrong_types() {
                push(name, "type", path, Some(value));
            }
            if let Some(minimum) = field.minimum.filter(|minimum| *minimum > 0) {
                push(name, "minimum", path, Some(json!(minimum - 1)));
            }
            if let Some(maximum) = field.maximum {
                push(name, "maximum", path, Some(json!(maximum + 1)));
            }
            if field.values.is_some() {
                push(name, "value", path, Some(json!("no such value")));
            }
            if rules.required.contains(name) {
                push(name, "missing", path, None);
            }
            path.pop();
        }
        path.push("no_such_field".to_owned());
        push("no_such_field", "unknown", path, Some(json!(1)));
        path.pop();
        for (name, field) in &rules.fields {
            let (inner, at) = match (&field.schema, &field.items) {
                (Some(schema), _) => (Some(schema), None),
                (_, Some(items)) => (items.schema.as_ref(), Some("0")),
                _ => (None, None),
            };
            let value = object.get(name).and_then(|value| at.map_or(Some(value), |_| value.get(0)));
            if let (Some(inner), Some(value)) = (inner, value) {
                path.push(name.clone());
                path.extend(at.map(str::to_owned));
                self.break_object(inner, value, whole, path, found);
                path.truncate(path.len() - 1 - at.iter().len());
            }
        }
    }

    /// What is wrong with `value` as an answer with this schema. Null stands for an unset field.
    pub fn faults_of_answer(&self, schema: &str, value: &Value) -> Vec<String> {
        let rules = &self.schemas[schema];
        let Some(object) = value.as_object() else { return vec![format!("{schema} is {value}")] };
        let missing = rules.required.iter().filter(|name| !object.contains_key(*name));
        let mut faults: Vec<_> = missing.map(|name| format!("{schema}.{name} is missing")).collect();
        for (name, field) in &rules.fields {
            match object.get(name) {
                None | Some(Value::Null) => {}
                Some(value) => match (&field.schema, &field.items) {
                    (Some(inner), _) => faults.extend(self.faults_of_answer(inner, value)),
                    _ if !field.has_type(value) => faults.push(format!("{schema}.{name} is {value}")),
                    (_, Some(items)) => {
                        let inner = items.schema.iter();
                        let items = value.as_array().into_iter().flatten();
                        let pairs = inner.flat_map(|inner| items.clone().map(move |item| (inner, item)));
                        faults.extend(pairs.flat_map(|(inner, item)| self.faults_of_answer(inner, item)));
                    }
                    _ => {}
                },
            }
        }
        faults
    }
}

impl Field {
    /// Values of other types than this field's.
    fn wrong_types(&self) -> Vec<Value> {
        match self.kind.as_deref() {
            Some("integer") => vec![json!("text"), json!(1.5), json!(-1), json!([1]), json!({"a": 1})],
            Some("boolean") => vec![json!("true"), json!(1), json!([true])],
            Some("string") => vec![json!(5), json!(true), json!(["text"]), json!({"a": "text"})],
            Some("array") => vec![json!("text"), json!(5), json!({"a": 1})],
            _ => vec![json!("text"), json!(5), json!(true)],
        }
    }

    fn has_type(&self, value: &Value) -> bool {
        match self.kind.as_deref() {
            Some("integer") => value.is_u64() || value.is_i64(),
            Some("boolean") => value.is_boolean(),
            Some("string") => value.is_string(),
            Some("array") => value.is_array(),
            _ => value.is_object(),
        }
    }
}

/// Replaces the value at `path`, or removes it.
fn replace(body: &mut Value, path: &[String], value: Option<Value>) {
    let [inner @ .., last] = path else { return };
    let mut at = body;
    for name in inner {
        at = match at {
            Value::Array(items) => &mut items[name.parse::<usize>().unwrap_or_default()],
            object => &mut object[name.as_str()],
        };
    }
    if let Some(object) = at.as_object_mut() {
        match value {
            Some(value) => object.insert(last.clone(), value),
            None => object.remove(last),
        };
    }
}
