//! The tables of docs/compatibility.md against Firecracker's API description, the description that
//! the monitor serves, and the running monitor.

use std::collections::{BTreeMap, BTreeSet};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::conformance::Description;
use vesta_tests::guest::{TIMEOUT, vmm_path, vmm_with_api};
use vesta_tests::vmm::VmmBuilder;

const PAGE: &str = include_str!("../../docs/compatibility.md");
const METRICS: &str = include_str!("../data/firecracker-metrics.txt");
/// The monitor's exit codes are an enumeration there.
const EXIT_CODES: &str = include_str!("../../crates/vmm/src/exit.rs");

/// Operations of Firecracker that its description does not have.
const UNDESCRIBED: [&str; 3] =
    ["DELETE /drives/{drive_id}", "DELETE /network-interfaces/{iface_id}", "DELETE /pmem/{id}"];
/// Schemas of bodies for aarch64, which have no rows.
const OTHER_ARCHITECTURES: [&str; 2] = ["ArmRegisterModifier", "VcpuFeatures"];

/// The first table under a heading: the name in the first column, and the other columns.
fn table(heading: &str) -> BTreeMap<&'static str, Vec<&'static str>> {
    let (_, section) = PAGE.split_once(&format!("\n## {heading}\n")).expect("the page has the heading");
    let section = section.split("\n## ").next().unwrap_or_default();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `")?.split_once("` |"));
    rows.map(|(name, rest)| (name, rest.split('|').map(str::trim).collect())).collect()
}

/// The names whose row has one of these states.
fn with_state(table: &BTreeMap<&'static str, Vec<&'static str>>, states: &[&str]) -> BTreeSet<&'static str> {
    table.iter().filter(|(_, columns)| states.contains(&columns[0])).map(|(name, _)| *name).collect()
}

/// The schemas of the bodies that are supported: their operation is, or they are in such a body.
fn supported_bodies(api: &Description, operations: &BTreeSet<&str>) -> BTreeSet<String> {
    let supported = api
        .operations
        .iter()
        .filter(|operation| operations.contains(format!("{} {}", operation.method, operation.path).as_str()));
    let mut found = BTreeSet::new();
    let mut left: Vec<String> = supported.filter_map(|operation| operation.body.clone()).collect();
    while let Some(name) = left.pop() {
        if OTHER_ARCHITECTURES.contains(&name.as_str()) || !found.insert(name.clone()) {
            continue;
        }
        for field in api.schemas[&name].fields.values() {
            let items = field.items.as_ref().and_then(|items| items.schema.clone());
            left.extend(field.schema.clone().into_iter().chain(items));
        }
    }
    found
}

#[test]
fn table_of_operations_is_whole_and_true() -> Result<()> {
    let api = Description::firecracker()?;
    let rows = table("Operations");
    let described = api.operations.iter().map(|operation| format!("{} {}", operation.method, operation.path));
    let all: BTreeSet<_> = described.chain(UNDESCRIBED.map(str::to_owned)).collect();
    assert_eq!(rows.keys().map(ToString::to_string).collect::<BTreeSet<_>>(), all);

    let (_vmm, mut client) = vmm_with_api(&[])?;
    let ours = client.get("/openapi.json")?.ok()?.json()?;
    for (name, columns) in &rows {
        let (method, path) = name.split_once(' ').context("a method and a path")?;
        let there = ours["paths"][path].get(method.to_lowercase()).is_some();
        assert_eq!(there, ["yes", "differs"].contains(&columns[0]), "{name}");
        if columns[0] == "planned" {
            let path = path.replace(['{', '}'], "");
            let body = if ["PUT", "PATCH"].contains(&method) { Some("{}") } else { None };
            let response = client.request(method, &path, body)?;
            assert_eq!(response.status, 400, "{name}");
            ensure!(response.fault().contains("does not support"), "{name}: {}", response.body);
        }
    }
    Ok(())
}

#[test]
fn table_of_fields_is_whole_and_true() -> Result<()> {
    let api = Description::firecracker()?;
    let rows = table("Fields of bodies");
    let operations = with_state(&table("Operations"), &["yes", "differs"]);
    let schemas = supported_bodies(&api, &operations);
    let fields = schemas
        .iter()
        .flat_map(|schema| api.schemas[schema].fields.keys().map(move |field| format!("{schema}.{field}")));
    assert_eq!(
        rows.keys().map(ToString::to_string).collect::<BTreeSet<_>>(),
        fields.collect::<BTreeSet<_>>()
    );

    let (_vmm, mut client) = vmm_with_api(&[])?;
    let ours = client.get("/openapi.json")?.ok()?.json()?;
    let mut there = fields_of_bodies(&api, &ours, &operations);
    // Known, and refused whatever its value.
    for field in with_state(&rows, &["planned"]) {
        there.remove(field);
    }
    let claimed = with_state(&rows, &["yes", "differs"]).into_iter().map(str::to_owned);
    assert_eq!(claimed.collect::<BTreeSet<_>>(), there);
    Ok(())
}

/// The fields of Firecracker's bodies that are in ours.
fn fields_of_bodies(api: &Description, ours: &Value, operations: &BTreeSet<&str>) -> BTreeSet<String> {
    let mut found = BTreeSet::new();
    for operation in &api.operations {
        let name = format!("{} {}", operation.method, operation.path);
        if let (Some(schema), true) = (&operation.body, operations.contains(name.as_str())) {
            let method = operation.method.to_lowercase();
            let body = &ours["paths"][&operation.path][method]["requestBody"];
            walk(api, schema, &body["content"]["application/json"]["schema"], ours, &mut found);
        }
    }
    found
}

/// Adds the fields of `schema` that `here`, our schema in its place, has, and of what is in it.
fn walk(api: &Description, schema: &str, here: &Value, ours: &Value, found: &mut BTreeSet<String>) {
    let here = resolved(here, ours);
    for (name, field) in &api.schemas[schema].fields {
        let Some(own) = here["properties"].get(name) else { continue };
        found.insert(format!("{schema}.{name}"));
        let items = field.items.as_ref().and_then(|items| items.schema.as_ref());
        if let Some(inner) = &field.schema {
            walk(api, inner, own, ours, found);
        } else if let Some(inner) = items {
            walk(api, inner, &resolved(own, ours)["items"], ours, found);
        }
    }
}

/// The schema that a reference or an optional schema stands for.
fn resolved<'a>(schema: &'a Value, ours: &'a Value) -> &'a Value {
    if let Some(path) = schema["$ref"].as_str() {
        return ours.pointer(path.trim_start_matches('#')).unwrap_or(schema);
    }
    let alternatives = schema["anyOf"].as_array().or(schema["oneOf"].as_array());
    match alternatives.and_then(|all| all.iter().find(|one| one["type"] != "null")) {
        Some(one) => resolved(one, ours),
        None => schema,
    }
}

#[test]
fn table_of_sections_is_whole_and_true() -> Result<()> {
    let api = Description::firecracker()?;
    let rows = table("Sections of the configuration file");
    let all: BTreeSet<_> = api.schemas["FullVmConfiguration"].fields.keys().map(String::as_str).collect();
    assert_eq!(rows.keys().copied().collect::<BTreeSet<_>>(), all);
    for name in with_state(&rows, &["planned"]) {
        let mut config = json!({"boot-source": {"kernel_image_path": "none"}});
        config[name] = json!([{"a": 1}]);
        let mut vmm = VmmBuilder::new(&vmm_path())?.arg("--no-api").with_config(&config)?.spawn()?;
        let (_, output) = vmm.finish(TIMEOUT)?;
        ensure!(output.contains(name) && output.contains("does not support"), "{name}: {output}");
    }
    Ok(())
}

#[test]
fn table_of_flags_is_true() -> Result<()> {
    let mut vmm = VmmBuilder::new(&vmm_path())?.arg("--help").spawn()?;
    let (_, help) = vmm.finish(TIMEOUT)?;
    let words: BTreeSet<_> = help.split([' ', '\n', ',']).collect();
    let rows = table("Flags of `firecracker`");
    ensure!(rows.len() == 24, "{} flags", rows.len());
    for (flag, columns) in &rows {
        assert_eq!(words.contains(flag), ["yes", "differs"].contains(&columns[0]), "{flag}");
    }
    Ok(())
}

#[test]
fn table_of_exit_codes_is_true() {
    let rows = table("Exit codes");
    let codes: BTreeSet<_> = rows.keys().map(ToString::to_string).collect();
    let of_firecracker = [0, 1, 2].into_iter().chain(148..=157).map(|code| code.to_string());
    assert_eq!(codes, of_firecracker.collect());
    let ours = EXIT_CODES.lines().filter_map(|line| line.trim().strip_suffix(',')?.split_once(" = "));
    let ours: BTreeSet<_> = ours.map(|(_, code)| code).filter(|code| codes.contains(*code)).collect();
    assert_eq!(with_state(&rows, &["yes"]), ours);
}

#[test]
fn table_of_metrics_is_whole() {
    let mut fields: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for line in METRICS.lines().filter(|line| !line.starts_with('#')) {
        let mut names = line.split('.');
        let (Some(group), Some(field)) = (names.next(), names.next()) else { continue };
        fields.entry(group).or_default().insert(field);
    }
    let counted: BTreeMap<_, _> =
        fields.iter().map(|(group, fields)| (*group, fields.len().to_string())).collect();
    let rows = table("Metrics");
    let claimed: BTreeMap<_, _> =
        rows.iter().map(|(group, columns)| (*group, columns[1].to_owned())).collect();
    assert_eq!(claimed, counted);
    for (group, columns) in rows {
        let (_, zero) = columns[2].split_once("always 0: ").unwrap_or_default();
        for field in zero.split(", ").map(|name| name.trim_matches('`')).filter(|name| !name.is_empty()) {
            assert!(fields[group].contains(field), "{group}.{field}");
        }
    }
}
