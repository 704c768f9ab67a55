//! The requests of Firecracker's clients, the responses and the lines of the log that they read,
//! and what they find when the monitor ends.

use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use vesta_tests::elf;
use vesta_tests::guest::{Guest, start, vmm_path};
use vesta_tests::vmm::VmmBuilder;

const TIMEOUT: Duration = Duration::from_secs(30);

#[test]
fn the_name_firecracker_selects_firecrackers_identity() {
    let mut vmm =
        VmmBuilder::new(&vmm_path()).unwrap().with_name("firecracker").arg("--version").spawn().unwrap();
    let (code, output) = vmm.finish(TIMEOUT).unwrap();
    assert_eq!(code, 0);
    assert!(output.starts_with("Firecracker v1.17.0\n"), "{output}");

    let vmm = VmmBuilder::new(&vmm_path()).unwrap().with_name("firecracker").with_api().spawn().unwrap();
    let mut api = vmm.ready_client(TIMEOUT).unwrap();
    let info = api.get("/").unwrap().json().unwrap();
    assert_eq!((&info["app_name"], &info["vmm_version"]), (&json!("Firecracker"), &json!("1.17.0")));
    vmm.wait_for_output("Running Firecracker v1.17", TIMEOUT).unwrap();
}

/// A monitor under the name `firecracker`.
fn firecracker() -> Result<VmmBuilder> {
    Ok(VmmBuilder::new(&vmm_path())?.with_name("/usr/bin/firecracker"))
}

/// A kernel in `dir`.
fn kernel(dir: &Path, kernel: &elf::Elf) -> Result<std::path::PathBuf> {
    let path = dir.join("kernel");
    std::fs::write(&path, kernel.bytes())?;
    Ok(path)
}

/// Waits until `holds`.
fn wait_until(mut holds: impl FnMut() -> Result<bool>) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    while !holds()? {
        ensure!(Instant::now() < deadline, "it takes more than {TIMEOUT:?}");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Checks that `text` has these parts, in this order.
fn ensure_in_order(text: &str, parts: &[&str]) -> Result<()> {
    let mut rest = text;
    for part in parts {
        let Some((_, after)) = rest.split_once(part) else {
            anyhow::bail!("no {part:?} in its place in:\n{text}");
        };
        rest = after;
    }
    Ok(())
}

#[test]
fn a_link_named_firecracker_prints_its_version() -> Result<()> {
    let home = tempfile::tempdir()?;
    let link = home.path().join("firecracker");
    std::os::unix::fs::symlink(vmm_path(), &link)?;
    let (code, output) = VmmBuilder::new(&link)?.arg("--version").spawn()?.finish(TIMEOUT)?;
    ensure!((code, output.as_str()) == (0, "Firecracker v1.17.0\n\n"), "{code} {output}");
    Ok(())
}

#[test]
fn an_orderly_end_has_firecrackers_lines_and_leaves_sockets() -> Result<()> {
    let builder = firecracker()?.with_api().arg("--metadata");
    let metadata = builder.dir().join("metadata");
    std::fs::write(&metadata, r#"{"latest":{}}"#)?;
    let mut config = Guest::bare(&kernel(builder.dir(), &elf::reset_guest())?).config();
    config["vsock"] = json!({"guest_cid": 3, "uds_path": builder.dir().join("v.sock"), "vsock_id": "root"});
    let mut vmm = builder.arg(&metadata).with_config(&config)?.spawn()?;
    let (code, output) = vmm.finish(TIMEOUT)?;
    ensure!(code == 0, "{code} {output}");
    let main = [
        "[anonymous-instance:main] Running Firecracker v1.17.0\n",
        "[anonymous-instance:main] Listening on API socket (\"",
        "[anonymous-instance:main] Successfully added metadata to mmds from file\n",
        "[anonymous-instance:main] Successfully started microvm that was configured from one single json\n",
        "[anonymous-instance:main] Vmm is stopping.\n",
        "[anonymous-instance:main] Firecracker exiting successfully. exit_code=0\n",
    ];
    ensure_in_order(&output, &main)?;
    ensure!(output.contains("[anonymous-instance:fc_api] API server started.\n"), "{output}");
    for socket in ["api.sock", "v.sock"] {
        ensure!(vmm.dir().join(socket).exists(), "{socket} is removed");
    }
    Ok(())
}

#[test]
fn own_name_removes_sockets_at_the_end() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.with_api();
    let mut config = Guest::bare(&kernel(builder.dir(), &elf::reset_guest())?).config();
    config["vsock"] = json!({"guest_cid": 3, "uds_path": builder.dir().join("v.sock")});
    let mut vmm = builder.with_config(&config)?.spawn()?;
    let (code, output) = vmm.finish(TIMEOUT)?;
    ensure!(code == 0 && output.contains("] exiting: exit_code=0\n"), "{code} {output}");
    for socket in ["api.sock", "v.sock"] {
        ensure!(!vmm.dir().join(socket).exists(), "{socket} is left");
    }
    Ok(())
}

/// A configuration as Kata's: zero-length drives, empty limiters, an API beside the file.
#[test]
fn a_start_as_katas_ends_by_sigterm_and_leaves_sockets() -> Result<()> {
    let builder = firecracker()?.with_api();
    let mut config = Guest::bare(&kernel(builder.dir(), &elf::null_guest())?).config();
    let pool = (0..8).map(|number| -> Result<Value> {
        let path = builder.dir().join(format!("drive_{number}"));
        std::fs::write(&path, "")?;
        Ok(json!({"drive_id": format!("drive_{number}"), "path_on_host": path, "is_root_device": false,
                  "is_read_only": false, "rate_limiter": {}}))
    });
    config["drives"] = pool.collect::<Result<Vec<_>>>()?.into();
    let (vsock, log) = (builder.dir().join("kata.hvsock"), builder.dir().join("log"));
    config["vsock"] = json!({"guest_cid": 3, "uds_path": vsock, "vsock_id": "root"});
    config["logger"] = json!({"log_path": log, "level": "Debug"});
    let mut vmm = builder.with_config(&config)?.spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    // The client polls for this.
    wait_until(|| Ok(api.get("/")?.ok()?.json()?["state"] == "Running"))?;
    ensure!(vsock.exists(), "the client changes its mode now");
    vmm.signal(Signal::TERM)?;
    let status = vmm.exit_status(TIMEOUT)?;
    ensure!(status.signal() == Some(15), "{status}");
    ensure!(vsock.exists() && vmm.dir().join("api.sock").exists());
    let log = std::fs::read_to_string(log)?;
    ensure_in_order(
        &log,
        &[
            "Successfully started microvm that was configured from one single json\n",
            "Shutting down VM after intercepting signal 15, code 0.\n",
        ],
    )
}

/// No API, a configuration with a logger, metadata from a file, SIGHUP at the end.
#[test]
fn a_start_as_flintlocks_ends_by_sighup_with_156() -> Result<()> {
    let builder =
        firecracker()?.arg("--id").arg("mvm-1").arg("--boot-timer").arg("--no-api").arg("--metadata");
    let (metadata, log) = (builder.dir().join("metadata"), builder.dir().join("log"));
    std::fs::write(&metadata, r#"{"latest":{}}"#)?;
    let mut config = Guest::bare(&kernel(builder.dir(), &elf::null_guest())?).config();
    config["machine-config"] =
        json!({"vcpu_count": 2, "mem_size_mib": 64, "smt": true, "track_dirty_pages": false});
    config["logger"] =
        json!({"log_path": log, "level": "Debug", "show_level": true, "show_log_origin": true});
    let mut vmm = builder.arg(&metadata).with_config(&config)?.spawn()?;
    let runs = |text: String| text.contains("Guest-boot-time = ") && text.contains("Successfully started");
    wait_until(|| Ok(std::fs::read_to_string(&log).is_ok_and(runs)))?;
    vmm.signal(Signal::HUP)?;
    let (code, _) = vmm.finish(TIMEOUT)?;
    ensure!(code == 156, "{code}");
    let log = std::fs::read_to_string(&log)?;
    ensure!(log.contains("[mvm-1:main:INFO:"), "{log}");
    ensure!(log.contains("Shutting down VM after intercepting signal 1, code 0."), "{log}");
    Ok(())
}

/// Exit statuses under Firecracker's name.
#[test]
fn exit_statuses_are_firecrackers_under_its_name() -> Result<()> {
    let home = tempfile::tempdir()?;
    let file = |name: &str, text: &str| -> Result<String> {
        let path = home.path().join(name);
        std::fs::write(&path, text)?;
        Ok(path.display().to_string())
    };
    let (broken, junk) = (file("broken", "{")?, file("junk", "x")?);
    let incomplete = file("incomplete", r#"{"drives":[],"boot-source":{"kernel_image_path":"/nowhere"}}"#)?;
    let taken = home.path().join("taken.sock");
    let _listener = std::os::unix::net::UnixListener::bind(&taken)?;
    let taken = taken.display().to_string();
    for (line, wanted) in [
        ("--version", 0),
        ("--version -- anything --at-all", 0),
        ("--snapshot-version", 0),
        ("--help", 0),
        ("--level Foo", 152),
        ("--nonsense", 153),
        ("stray", 153),
        ("--id a --id b", 153),
        ("--id", 153),
        ("--api-sock --id", 153),
        ("--id a --no-seccomp=yes", 153),
        ("--no-api", 153),
        (&format!("--seccomp-filter {junk} --no-seccomp"), 153),
        ("--api-sock s --seccomp-filter /nowhere", 1),
        ("--api-sock s --config-file /nowhere", 1),
        (&format!("--api-sock s --config-file {broken}"), 1),
        (&format!("--no-api --config-file {incomplete}"), 1),
        ("--api-sock s --metadata /nowhere", 1),
        (&format!("--api-sock s --metadata {broken}"), 1),
        ("--api-sock s --log-path /nowhere/log", 1),
        (&format!("--api-sock {taken}"), 1),
        ("--describe-snapshot /nowhere", 1),
    ] {
        let builder = line.split(' ').fold(firecracker()?.quiet(), VmmBuilder::arg);
        let (code, output) = builder.spawn()?.finish(TIMEOUT)?;
        ensure!(code == wanted, "{line}: {code}, not {wanted}: {output}");
    }
    Ok(())
}

#[test]
fn fatal_signals_have_firecrackers_statuses_and_lines() -> Result<()> {
    for (signal, code) in [
        (Signal::SYS, 2),
        (Signal::BUS, 149),
        (Signal::SEGV, 150),
        (Signal::XFSZ, 151),
        (Signal::XCPU, 154),
        (Signal::ILL, 157),
    ] {
        let mut vmm = firecracker()?.with_api().spawn()?;
        vmm.ready_client(TIMEOUT)?;
        vmm.signal(signal)?;
        let (found, output) = vmm.finish(TIMEOUT)?;
        let line = format!("Shutting down VM after intercepting signal {}, code 0.\n", signal.as_raw());
        ensure!(found == code && output.contains(&line), "{signal:?}: {found}, not {code}: {output}");
    }
    Ok(())
}

/// Fields of old clients, with the values that they send.
#[test]
fn legacy_fields_of_old_clients_are_accepted() -> Result<()> {
    let vmm = firecracker()?.with_api().arg("--no-seccomp").spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let machine = json!({"vcpu_count": 2, "mem_size_mib": 64, "ht_enabled": true});
    api.put("/machine-config", &machine)?.ok()?;
    ensure!(api.get("/machine-config")?.json()?["smt"] == true);
    for cid in [0, 1, 2, 3] {
        let vsock = json!({"guest_cid": cid, "uds_path": vmm.dir().join("v.sock"), "vsock_id": "agent_api"});
        let answer = api.put("/vsock", &vsock)?;
        ensure!((answer.status, answer.header("deprecation")) == (204, Some("true")), "{cid}: {answer:?}");
    }
    let disk = vmm.dir().join("disk");
    std::fs::write(&disk, "")?;
    for limiter in [json!(null), json!({})] {
        let drive = json!({"drive_id": "1", "path_on_host": disk, "is_root_device": true, "is_read_only": false,
                           "partuuid": null, "rate_limiter": limiter});
        api.put("/drives/1", &drive)?.ok()?;
        let network = json!({"iface_id": "1", "host_dev_name": "vesta-no-such-tap", "guest_mac": null,
                             "rx_rate_limiter": limiter, "tx_rate_limiter": limiter});
        // Only the tap is missing.
        let answer = api.put("/network-interfaces/1", &network)?;
        let fault = answer.fault();
        ensure!(answer.status == 204 || fault.contains("vesta-no-such-tap"), "{limiter}: {fault}");
    }
    let other = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let mut api = other.ready_client(TIMEOUT)?;
    let load = json!({"snapshot_path": "/nowhere/s", "mem_file_path": "/nowhere/m",
                      "enable_diff_snapshots": true, "resume_vm": true});
    let answer = api.put("/snapshot/load", &load)?;
    ensure!(
        answer.header("deprecation") == Some("true") && answer.fault().contains("/nowhere/"),
        "{answer:?}"
    );
    Ok(())
}

#[test]
fn the_go_sdks_order_of_calls_works() {
    let vmm = VmmBuilder::new(&vmm_path())
        .unwrap()
        .with_api()
        .arg("--id")
        .arg("vm-7")
        .arg("--no-seccomp")
        .spawn()
        .unwrap();
    let mut api = vmm.ready_client(TIMEOUT).unwrap();
    let log = vmm.dir().join("log.fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &log, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let reader = std::fs::OpenOptions::new().read(true).write(true).open(&log).unwrap();
    let logger = json!({"log_path": log, "level": "Info", "show_level": true, "show_log_origin": false});
    api.put("/logger", &logger).unwrap().ok().unwrap();
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, elf::null_guest().bytes()).unwrap();
    let template = "None";
    let machine = json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "cpu_template": template});
    let response = api.put("/machine-config", &machine).unwrap();
    assert_eq!((response.status, response.header("deprecation")), (204, Some("true")));
    api.put("/boot-source", &Guest::bare(&kernel).boot_source()).unwrap().ok().unwrap();
    start(&mut api).unwrap();
    assert_eq!(api.get("/").unwrap().json().unwrap()["state"], "Running");
    assert_eq!(api.get("/").unwrap().json().unwrap()["id"], "vm-7");
    let mut first = [0; 200];
    let len = rustix::io::read(&reader, &mut first).unwrap();
    let line = String::from_utf8_lossy(&first[..len]).into_owned();
    assert!(line.contains("[vm-7:fc_api:INFO] The request was executed successfully."), "{line}");
}

#[test]
fn the_whole_configuration_can_be_read_back() {
    let vmm = VmmBuilder::new(&vmm_path()).unwrap().with_api().spawn().unwrap();
    let mut api = vmm.ready_client(TIMEOUT).unwrap();
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, elf::null_guest().bytes()).unwrap();
    let guest = Guest::bare(&kernel).vcpus(2).mem_mib(64).boot_args("quiet");
    guest.put(&mut api).unwrap();
    for _ in 0..2 {
        let config = api.get("/vm/config").unwrap().json().unwrap();
        assert_eq!(config["boot-source"], guest.boot_source());
        assert_eq!(
            (&config["machine-config"]["vcpu_count"], &config["machine-config"]["mem_size_mib"]),
            (&json!(2), &json!(64))
        );
        if config["boot-source"].is_object()
            && api.get("/").unwrap().json().unwrap()["state"] == "Not started"
        {
            start(&mut api).unwrap();
        }
    }
    assert_eq!(api.get("/version").unwrap().json().unwrap(), json!({"firecracker_version": "1.17.0"}));
    api.put("/actions", &json!({"action_type": "FlushMetrics"})).unwrap().ok().unwrap();
}

#[test]
fn a_stalled_client_delays_no_other_client() {
    use std::io::Write;
    let vmm = VmmBuilder::new(&vmm_path()).unwrap().with_api().spawn().unwrap();
    let mut api = vmm.ready_client(TIMEOUT).unwrap();
    let mut stalled = api.connect().unwrap();
    stalled.write_all(b"PUT /boot-source HTTP/1.1\r\nContent-Length: 100\r\n\r\n{").unwrap();
    for _ in 0..10 {
        api.get("/").unwrap().ok().unwrap();
    }
}
