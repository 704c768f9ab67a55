//! The description of the API (`docs/api/openapi.yaml`): it is valid OpenAPI, and every answer of a
//! monitor is as it says.
//!
//! schemathesis makes requests from the description: the examples, values at and beyond each bound,
//! and random ones from a fixed seed. `tests/schemathesis/hooks.py` has what it needs to know about
//! a monitor.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::elf::null_guest;
use vesta_tests::guest::{Guest, TIMEOUT, env, ignore, start, vmm_path};
use vesta_tests::process::die_with_parent;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// What every answer is held to. Not `unsupported_method`: as Firecracker, a monitor answers 400
/// where that check wants 405. Not `positive_data_acceptance`: a valid request may come at a wrong
/// time, or name a file that does not exist.
const CHECKS: &str = "not_a_server_error,status_code_conformance,content_type_conformance,\
    response_headers_conformance,response_schema_conformance,negative_data_rejection,\
    valid_bodies_are_read";

/// A disk in the monitor's directory.
const DISK: &str = "disk";

/// Which requests: the examples, and values at and beyond each bound.
const BOUNDS: &str = "examples,coverage";
/// The same, and random ones.
const BOUNDS_AND_RANDOM: &str = "examples,coverage,fuzzing";
/// How many random requests for each operation.
const RANDOM_REQUESTS: &str = "3";

#[test]
fn the_description_is_valid_openapi_and_is_served() -> Result<()> {
    let vmm = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let served = vmm.ready_client(TIMEOUT)?.get("/openapi.json")?.ok()?;
    ensure!(served.header("content-type") == Some("application/json"), "{:?}", served.headers);
    let directory = repository().join("docs/api");
    ensure!(
        served.body == std::fs::read_to_string(directory.join("openapi.json"))?,
        "another file is served"
    );
    let same =
        "import json, sys, yaml; assert yaml.safe_load(open(sys.argv[1])) == json.load(open(sys.argv[2]))";
    let files = [directory.join("openapi.yaml"), directory.join("openapi.json")];
    output(python()?.args(["-c", same]).args(&files))?;
    output(python()?.args(["-m", "openapi_spec_validator"]).args(&files)).map(drop)
}

#[test]
fn answers_before_the_start_are_as_described() -> Result<()> {
    let vmm = monitor()?.spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    hold_answers_to_the_description(
        &vmm,
        BOUNDS_AND_RANDOM,
        &[
            "PUT /machine-config 204",
            "PUT /cpu-config 204",
            "GET /metrics 200",
            "PUT /metrics 204",
            "PATCH /machine-config 204",
            "PUT /logger 204",
            "PUT /serial 204",
            "PUT /entropy 204",
            "PUT /vsock 204",
            "GET /mmds 200",
            "PUT /mmds 204",
            "PATCH /mmds 204",
            "GET /vm/config 200",
            "PUT /drives/{drive_id} 204",
            "PATCH /vm 400",
        ],
    )?;
    assert_eq!(api.get("/")?.ok()?.json()?["state"], "Not started");
    Ok(())
}

#[test]
fn answers_of_a_started_guest_are_as_described() -> Result<()> {
    let vmm = monitor()?.spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, null_guest().bytes())?;
    // The path is that of the requests: below the overlay of a fork, the disk cannot change.
    let drive = json!({"drive_id": "data", "is_root_device": false, "path_on_host": DISK});
    api.put("/drives/data", &drive)?.ok()?;
    api.put("/entropy", &json!({}))?.ok()?;
    api.put("/vsock", &json!({"guest_cid": 3, "uds_path": "v.sock"}))?.ok()?;
    Guest::bare(&kernel).mem_mib(16).put(&mut api)?;
    start(&mut api)?;
    hold_answers_to_the_description(
        &vmm,
        BOUNDS,
        &[
            "GET / 200",
            "PATCH /vm 204",
            "PUT /actions 204",
            "PATCH /drives/{drive_id} 204",
            "PUT /snapshot/create 200",
            "PUT /snapshot/create 204",
            "GET /snapshot/job 200",
            "DELETE /snapshot/job 204",
            "PUT /fork 200",
            "PUT /machine-config 400",
        ],
    )?;
    // The monitor still carries commands out.
    for state in ["Paused", "Resumed"] {
        api.patch("/vm", &json!({ "state": state }))?.ok()?;
    }
    assert_eq!(api.get("/")?.ok()?.json()?["state"], "Running");
    Ok(())
}

/// A monitor that takes as large bodies as the description allows, with a disk in its directory.
fn monitor() -> Result<VmmBuilder> {
    let builder = VmmBuilder::new(&vmm_path())?.with_api();
    std::fs::write(builder.dir().join(DISK), [0; 4096])?;
    Ok(builder.arg("--http-api-max-payload-size").arg("16000000").arg("--mmds-size-limit").arg("51200"))
}

/// Runs schemathesis against a monitor. Each of these answers must be among those that it got:
/// otherwise the requests do not reach what they are to test.
fn hold_answers_to_the_description(vmm: &Vmm, phases: &str, expected: &[&str]) -> Result<()> {
    let description = vmm.dir().join("strict.json");
    std::fs::write(&description, strict_description()?.to_string())?;
    let program = "import sys; from schemathesis.cli import schemathesis; sys.exit(schemathesis())";
    let mut command = python()?;
    command.args(["-c", program, "run"]).arg(&description).args(["--url", "http://localhost"]);
    command.args(["--phases", phases, "--max-examples", RANDOM_REQUESTS, "--seed", "1"]);
    // A stream, which has no end: `null_events` reads it.
    command.args(["--exclude-path", "/events"]);
    command.args(["--checks", CHECKS, "--generation-database", "none", "--warnings", "off", "--no-color"]);
    command.env("SCHEMATHESIS_HOOKS", "hooks");
    command.env("PYTHONDONTWRITEBYTECODE", "1");
    command.env("VESTA_API_SOCKET", vmm.dir().join("api.sock"));
    command.env("VESTA_DRIVE_ID", "data").env("VESTA_IFACE_ID", "eth0").env("VESTA_DISK", DISK);
    let statuses = vmm.dir().join("statuses");
    output(command.env("VESTA_STATUSES", &statuses).current_dir(vmm.dir()))?;
    let statuses: BTreeSet<_> = std::fs::read_to_string(&statuses)?.lines().map(str::to_owned).collect();
    let missing: Vec<_> = expected.iter().filter(|answer| !statuses.contains(**answer)).collect();
    ensure!(missing.is_empty(), "no request got {missing:?}; those that came: {statuses:#?}");
    Ok(())
}

/// The description, but objects have no other fields than those described. A client must accept
/// more; this monitor must not send them.
fn strict_description() -> Result<Value> {
    fn close(value: &mut Value) {
        match value {
            Value::Array(list) => list.iter_mut().for_each(close),
            Value::Object(object) => {
                object.values_mut().for_each(close);
                if object.get("type") == Some(&json!("object")) && object.contains_key("properties") {
                    object.entry("additionalProperties").or_insert(json!(false));
                }
            }
            _ => {}
        }
    }
    let mut description =
        serde_json::from_slice(&std::fs::read(repository().join("docs/api/openapi.json"))?)?;
    close(&mut description);
    Ok(description)
}

/// Python with schemathesis.
fn python() -> Result<Command> {
    let Some(packages) = std::env::var_os(env::SCHEMATHESIS) else {
        ignore("schemathesis would take minutes on an emulated host");
    };
    let hooks = repository().join("tests/schemathesis");
    let mut command = Command::new("python3");
    command.env("PYTHONPATH", std::env::join_paths([PathBuf::from(packages), hooks])?);
    die_with_parent(&mut command);
    Ok(command)
}

/// Runs a program; an error if it fails, with what it printed.
fn output(command: &mut Command) -> Result<String> {
    let output = command.output().with_context(|| format!("{command:?}"))?;
    let text = [output.stdout, output.stderr].concat();
    let text = String::from_utf8_lossy(&text).into_owned();
    println!("{text}");
    ensure!(output.status.success(), "{}: {}", command.get_program().display(), output.status);
    Ok(text)
}

fn repository() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("tests is a directory of the repository")
}
