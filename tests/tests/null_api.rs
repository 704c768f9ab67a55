//! The HTTP API as its clients see it, with the real binary.

use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::read_response;
use vesta_tests::elf::null_guest;
use vesta_tests::guest::{Guest, TIMEOUT, start, vmm_path, vmm_with_api};
use vesta_tests::vmm::VmmBuilder;

#[test]
fn get_root_describes_the_instance() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&["--id", "test-1"])?;
    let response = api.get("/")?;
    assert_eq!(response.status, 200);
    let info = response.json()?;
    assert_eq!((info["id"].as_str(), info["state"].as_str()), (Some("test-1"), Some("Not started")));
    ensure!(info["vmm_version"].is_string() && info["app_name"].is_string(), "{info}");
    Ok(())
}

#[test]
fn the_version_is_known_to_firecrackers_clients() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    let version = api.get("/version")?.ok()?.json()?;
    let text = version["firecracker_version"].as_str().context("it has a firecracker_version")?;
    ensure!(text.trim_start_matches('v').starts_with("1.17."), "{text}");
    Ok(())
}

#[test]
fn machine_config_has_its_defaults() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    let config = api.get("/machine-config")?.ok()?.json()?;
    let expected = json!({
        "vcpu_count": 1, "mem_size_mib": 128, "smt": false, "track_dirty_pages": false, "huge_pages": "None"
    });
    assert_eq!(config, expected);
    Ok(())
}

#[test]
fn machine_config_keeps_put_and_patched_values() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    assert_eq!(api.put("/machine-config", &json!({"vcpu_count": 2, "mem_size_mib": 256}))?.status, 204);
    assert_eq!(api.patch("/machine-config", &json!({"mem_size_mib": 512}))?.status, 204);
    let config = api.get("/machine-config")?.json()?;
    assert_eq!((config["vcpu_count"].as_u64(), config["mem_size_mib"].as_u64()), (Some(2), Some(512)));
    let whole = api.get("/vm/config")?.ok()?.json()?;
    assert_eq!(whole["machine-config"], config);
    Ok(())
}

#[test]
fn responses_have_the_form_that_clients_parse() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    let done = api.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 128}))?;
    assert_eq!((done.status, done.body.as_str(), done.header("content-length")), (204, "", None));
    let reply = api.get("/machine-config")?;
    assert_eq!(reply.header("content-type"), Some("application/json"));
    assert_eq!(reply.header("connection"), Some("keep-alive"));
    ensure!(reply.header("server").is_some(), "no Server in {:?}", reply.headers);
    Ok(())
}

#[test]
fn an_unknown_path_is_refused_by_name() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    let response = api.get("/nowhere")?;
    assert_eq!(response.status, 400);
    ensure!(response.fault().contains("nowhere"), "{}", response.body);
    // The same connection stays usable.
    api.get("/")?.ok()?;
    Ok(())
}

#[test]
fn invalid_json_is_refused_with_line_and_column() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    let response = api.request("PUT", "/machine-config", Some("{\"vcpu_count\": }"))?;
    assert_eq!(response.status, 400);
    ensure!(response.fault().contains("line 1 column"), "{}", response.body);
    api.get("/")?.ok()?;
    Ok(())
}

#[test]
fn a_put_without_a_body_is_refused() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    assert_eq!(api.request("PUT", "/machine-config", None)?.status, 400);
    Ok(())
}

#[test]
fn invalid_http_gets_an_error_and_affects_no_other_client() -> Result<()> {
    let (_vmm, mut api) = vmm_with_api(&[])?;
    for nonsense in [&b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n"[..], b"GET\r\n\r\n", b"BREW / HTTP/1.1\r\n\r\n"]
    {
        let mut connection = api.connect()?;
        connection.write_all(nonsense)?;
        assert_eq!(read_response(&mut connection)?.status, 400, "{nonsense:?}");
    }
    api.get("/")?.ok()?;
    Ok(())
}

#[test]
fn a_too_long_body_is_refused_with_the_bound() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--http-api-max-payload-size", "300"])?;
    let response =
        api.request("PUT", "/machine-config", Some(&format!("{{\"x\": \"{}\"}}", "x".repeat(400))))?;
    assert_eq!(response.status, 400);
    ensure!(response.body.contains("300"), "{}", response.body);
    // Its connection may be closed; other clients are served.
    vmm.client().get("/")?.ok()?;
    Ok(())
}

#[test]
fn a_request_can_arrive_in_pieces() -> Result<()> {
    let (_vmm, api) = vmm_with_api(&[])?;
    let mut connection = api.connect()?;
    for piece in ["GET /machine-", "config HTTP/1.1\r\nHo", "st: x\r\n", "\r\n"] {
        connection.write_all(piece.as_bytes())?;
        connection.flush()?;
    }
    assert_eq!(read_response(&mut connection)?.status, 200);
    Ok(())
}

#[test]
fn the_log_goes_to_the_configured_file() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    let log = vmm.dir().join("log");
    api.put("/logger", &json!({"log_path": log, "level": "Debug"}))?.ok()?;
    api.get("/")?.ok()?;
    api.put("/machine-config", &json!({"vcpu_count": 0, "mem_size_mib": 128}))?;
    ensure!(!std::fs::read_to_string(&log)?.is_empty(), "the log is empty");
    Ok(())
}

#[test]
fn the_name_firecracker_selects_firecrackers_identity() -> Result<()> {
    let mut vmm = VmmBuilder::new(&vmm_path())?.with_name("firecracker").arg("--version").spawn()?;
    let (code, output) = vmm.finish(TIMEOUT)?;
    assert_eq!(code, 0);
    ensure!(output.starts_with("Firecracker v1.17.0"), "{output}");
    Ok(())
}

#[test]
fn version_and_help_need_no_guest() -> Result<()> {
    for flag in ["--version", "--help"] {
        let (code, output) = VmmBuilder::new(&vmm_path())?.arg(flag).spawn()?.finish(TIMEOUT)?;
        assert_eq!(code, 0, "{flag}");
        ensure!(!output.trim().is_empty(), "{flag} prints nothing");
    }
    Ok(())
}

/// The null guest's kernel in `dir`.
fn kernel(dir: &Path) -> Result<PathBuf> {
    let kernel = dir.join("kernel");
    std::fs::write(&kernel, null_guest().bytes())?;
    Ok(kernel)
}

/// Starts a monitor with this configuration file; its guest runs.
fn starts_from_file(config: impl FnOnce(&Path) -> Result<Value>) -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api").arg("--boot-timer");
    let config = config(builder.dir())?;
    let vmm = builder.with_config(&config)?.spawn()?;
    vmm.wait_for_output("Guest-boot-time =", TIMEOUT).map(drop)
}

#[test]
fn a_file_with_empty_sections_starts() -> Result<()> {
    starts_from_file(|dir| {
        let mut config = Guest::bare(&kernel(dir)?).config();
        for (section, empty) in [
            ("balloon", json!(null)),
            ("cpu-config", json!(null)),
            ("memory-hotplug", json!(null)),
            ("metrics", json!(null)),
            ("pmem", json!([])),
        ] {
            config[section] = empty;
        }
        Ok(config)
    })
}

#[test]
fn the_returned_configuration_is_accepted_again() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    let disk = vmm.dir().join("disk");
    std::fs::write(&disk, [0; 4096])?;
    let drive = json!({"drive_id": "d", "is_root_device": false, "is_read_only": true, "path_on_host": disk});
    api.put("/drives/d", &drive)?.ok()?;
    api.put("/entropy", &json!({}))?.ok()?;
    Guest::bare(&kernel(vmm.dir())?).put(&mut api)?;
    let shown = api.get("/vm/config")?.ok()?.json()?;
    let engine = &shown["drives"][0]["io_engine"];
    ensure!(["Sync", "Async"].contains(&engine.as_str().unwrap_or_default()), "{shown}");
    api.put("/drives/d", &shown["drives"][0])?.ok()?;
    start(&mut api)?;
    let running = api.get("/vm/config")?.ok()?.json()?;
    assert_eq!(running, shown);
    starts_from_file(|_| Ok(running))
}
