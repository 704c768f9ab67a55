//! What each client of Firecracker does, call by call: arguments, files, requests in their order
//! and form, what it reads of the responses, and how it ends the monitor. The monitor runs under
//! the name that they expect.

use std::fs::{self, File, OpenOptions, Permissions};
use std::io::{Read, Write};
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Map, Value, json};
use vesta_tests::api::{ApiClient, Response};
use vesta_tests::elf;
use vesta_tests::guest::{TIMEOUT, vmm_path};
use vesta_tests::host_net::HostNet;
use vesta_tests::snapshots::Files;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// firecracker-go-sdk's time limit of a call.
const GO_SDK_LIMIT: Duration = Duration::from_millis(500);

/// The monitor under the name `firecracker`, in a directory with a guest's kernel and disk.
fn firecracker() -> Result<VmmBuilder> {
    let builder = VmmBuilder::new(&vmm_path())?.with_name("firecracker");
    fs::write(builder.dir().join("vmlinux"), elf::null_guest().bytes())?;
    fs::write(builder.dir().join("rootfs.ext4"), [0; 4096])?;
    Ok(builder)
}

/// A client that polls `GET path` until there is an answer.
fn poll(vmm: &Vmm, path: &str) -> Result<ApiClient> {
    let mut api = vmm.client();
    api.wait_ready(TIMEOUT)?;
    api.get(path)?.ok()?;
    Ok(api)
}

/// Sends these requests, each of which must succeed without an answer.
fn put_all(api: &mut ApiClient, requests: &[(&str, Value)]) -> Result<()> {
    for (path, body) in requests {
        let response = api.put(path, body).and_then(Response::ok).with_context(|| format!("PUT {path}"))?;
        ensure!((response.status, response.body.as_str()) == (204, ""), "PUT {path}: {response:?}");
    }
    Ok(())
}

fn instance_start(api: &mut ApiClient) -> Result<()> {
    put_all(api, &[("/actions", json!({"action_type": "InstanceStart"}))])
}

fn state(api: &mut ApiClient) -> Result<Value> {
    Ok(api.get("/")?.ok()?.json()?["state"].clone())
}

/// A FIFO as the Go SDK makes it: made first, and opened for reading without waiting for a writer.
fn fifo(path: &Path) -> Result<File> {
    rustix::fs::mkfifoat(rustix::fs::CWD, path, rustix::fs::Mode::from_raw_mode(0o600))?;
    let nonblocking = rustix::fs::OFlags::NONBLOCK.bits().cast_signed();
    Ok(OpenOptions::new().read(true).custom_flags(nonblocking).open(path)?)
}

/// The first line that arrives in a FIFO.
fn first_line(mut fifo: File) -> Result<String> {
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    let mut line = Vec::new();
    while !line.ends_with(b"\n") {
        let limit = Timespec::try_from(TIMEOUT)?;
        ensure!(poll(&mut [PollFd::new(&fifo, PollFlags::IN)], Some(&limit))? > 0, "nothing arrived");
        let mut byte = [0];
        ensure!(fifo.read(&mut byte)? == 1, "the writer has closed the FIFO");
        line.push(byte[0]);
    }
    Ok(String::from_utf8(line)?)
}

/// Checks a line of metrics as Kata's runtime reads it: groups of numbers that fit in a `uint64`,
/// or of such groups.
fn check_metrics(line: &str) -> Result<()> {
    fn counters(name: &str, group: &Value) -> Result<()> {
        let group = group.as_object().with_context(|| format!("metrics: {name} is {group}"))?;
        for (key, value) in group {
            if value.is_object() {
                counters(&format!("{name}.{key}"), value)?;
            } else {
                value.as_u64().with_context(|| format!("metrics: {name}.{key} is {value}"))?;
            }
        }
        Ok(())
    }
    let metrics: Map<String, Value> = serde_json::from_str(line).with_context(|| line.to_owned())?;
    for group in [
        "api_server",
        "block",
        "get_api_requests",
        "i8042",
        "latencies_us",
        "logger",
        "mmds",
        "net",
        "patch_api_requests",
        "put_api_requests",
        "seccomp",
        "signals",
        "uart",
        "vcpu",
        "vmm",
        "vsock",
    ] {
        let value = metrics.get(group).with_context(|| format!("metrics have no group {group}: {line}"))?;
        counters(group, value)?;
    }
    Ok(())
}

fn drive(id: &str, path: impl AsRef<Path>, is_root_device: bool) -> Value {
    let path = path.as_ref();
    json!({"drive_id": id, "is_root_device": is_root_device, "is_read_only": false, "path_on_host": path})
}

/// Asks for a connection to a port of the guest, as every client does once it runs. The guest here
/// has no driver that would answer: `vsock` tests have one.
fn dial_guest(uds: &Path, port: u32) -> Result<()> {
    let mut socket = UnixStream::connect(uds).with_context(|| uds.display().to_string())?;
    Ok(writeln!(socket, "CONNECT {port}")?)
}

/// The Go SDK's order of calls to a new microVM with a network.
fn go_sdk_boot(vmm: &Vmm, metrics: bool) -> Result<(ApiClient, Option<File>)> {
    let mut api = poll(vmm, "/machine-config")?;
    let dir = vmm.dir();
    let _log = fifo(&dir.join("log.fifo"))?;
    let mut calls = vec![(
        "/logger",
        json!({"log_path": dir.join("log.fifo"), "level": "Debug", "show_level": true,
               "show_log_origin": false}),
    )];
    let mut metrics_fifo = None;
    if metrics {
        metrics_fifo = Some(fifo(&dir.join("metrics.fifo"))?);
        calls.push(("/metrics", json!({"metrics_path": dir.join("metrics.fifo")})));
    }
    calls.push(("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false})));
    let machine_config = calls.len() - 1;
    let begin = Instant::now();
    put_all(&mut api, &calls)?;
    let got = api.get("/machine-config")?.ok()?.json()?;
    ensure!(got["vcpu_count"] == calls[machine_config].1["vcpu_count"], "{got}");
    let args = "console=ttyS0 reboot=k panic=1 pci=off";
    put_all(
        &mut api,
        &[
            ("/boot-source", json!({"kernel_image_path": dir.join("vmlinux"), "boot_args": args})),
            ("/drives/1", drive("1", dir.join("rootfs.ext4"), true)),
            (
                "/network-interfaces/1",
                json!({"iface_id": "1", "guest_mac": "02:fc:00:00:00:05", "host_dev_name": "tap0"}),
            ),
            ("/vsock", json!({"vsock_id": "1", "guest_cid": 3, "uds_path": dir.join("vsock")})),
            ("/mmds/config", json!({"version": "V1", "network_interfaces": ["1"]})),
            ("/mmds", json!({"latest": {"meta-data": {"id": "vm"}}})),
        ],
    )?;
    instance_start(&mut api)?;
    // Not an assertion on speed: the SDK gives up on a call that takes longer.
    if begin.elapsed() > GO_SDK_LIMIT {
        eprintln!("the calls took {:?}", begin.elapsed());
    }
    ensure!(state(&mut api)? == "Running");
    Ok((api, metrics_fifo))
}

fn end_by(vmm: &mut Vmm, signal: Signal) -> Result<()> {
    vmm.signal(signal)?;
    vmm.exit_status(TIMEOUT).map(drop)
}

/// A monitor as firecracker-go-sdk starts it, on a host with the network that CNI made.
fn go_sdk() -> Result<(HostNet, Vmm)> {
    let host = HostNet::new()?;
    host.ip("tuntap add dev tap0 mode tap vnet_hdr")?;
    let vmm = firecracker()?.with_api().arg("--id").arg("vm-7").arg("--no-seccomp").spawn()?;
    Ok((host, vmm))
}

#[test]
fn go_sdk_boots_a_microvm_and_stops_it() -> Result<()> {
    let (_host, mut vmm) = go_sdk()?;
    let (mut api, _) = go_sdk_boot(&vmm, false)?;
    dial_guest(&vmm.dir().join("vsock"), 10789)?;
    put_all(&mut api, &[("/actions", json!({"action_type": "SendCtrlAltDel"}))])?;
    end_by(&mut vmm, Signal::TERM)
}

#[test]
fn go_sdk_reads_metrics_from_a_fifo() -> Result<()> {
    let (_host, mut vmm) = go_sdk()?;
    let (mut api, metrics) = go_sdk_boot(&vmm, true)?;
    put_all(&mut api, &[("/actions", json!({"action_type": "FlushMetrics"}))])?;
    check_metrics(&first_line(metrics.context("a FIFO")?)?)?;
    end_by(&mut vmm, Signal::INT)
}

#[test]
fn go_sdk_restores_a_snapshot_after_a_put_of_vsock() -> Result<()> {
    let saved = tempfile::tempdir()?;
    let files = Files::new(saved.path(), "vm");
    let (_host, mut vmm) = go_sdk()?;
    let (mut api, _) = go_sdk_boot(&vmm, false)?;
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    put_all(&mut api, &[("/snapshot/create", files.create("Full"))])?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    end_by(&mut vmm, Signal::TERM)?;
    // The SDK leaves the files of the saved microVM where they are.
    let uds = vmm.dir().join("vsock");
    if uds.exists() {
        fs::remove_file(&uds)?;
    }

    for load in [
        json!({"snapshot_path": files.state, "mem_file_path": files.memory,
               "enable_diff_snapshots": true, "resume_vm": true}),
        json!({"snapshot_path": files.state, "enable_diff_snapshots": false, "resume_vm": true,
               "mem_backend": {"backend_type": "File", "backend_path": files.memory}}),
    ] {
        let mut restored = firecracker()?.with_api().arg("--id").arg("vm-8").arg("--no-seccomp").spawn()?;
        let mut api = poll(&restored, "/machine-config")?;
        let _log = fifo(&restored.dir().join("log.fifo"))?;
        put_all(
            &mut api,
            &[
                (
                    "/logger",
                    json!({"log_path": restored.dir().join("log.fifo"), "level": "Debug",
                                   "show_level": true, "show_log_origin": false}),
                ),
                ("/vsock", json!({"vsock_id": "1", "guest_cid": 3, "uds_path": uds})),
                ("/snapshot/load", load),
            ],
        )?;
        ensure!(state(&mut api)? == "Running");
        end_by(&mut restored, Signal::TERM)?;
        if uds.exists() {
            fs::remove_file(&uds)?;
        }
    }
    Ok(())
}

#[test]
fn firectl_puts_the_root_drive_last_and_metadata_late() -> Result<()> {
    let host = HostNet::new()?;
    host.ip("tuntap add dev tap0 mode tap vnet_hdr")?;
    let mut vmm = firecracker()?.with_api().spawn()?;
    let mut api = poll(&vmm, "/machine-config")?;
    let dir = vmm.dir();
    fs::write(dir.join("data.img"), [0; 4096])?;
    let args = "ro console=ttyS0 noapic reboot=k panic=1 pci=off nomodules";
    put_all(
        &mut api,
        &[
            ("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 512, "smt": true})),
            ("/boot-source", json!({"kernel_image_path": dir.join("vmlinux"), "boot_args": args})),
            ("/drives/2", drive("2", dir.join("data.img"), false)),
            ("/drives/1", drive("1", dir.join("rootfs.ext4"), true)),
            (
                "/network-interfaces/1",
                json!({"iface_id": "1", "guest_mac": "02:fc:00:00:00:01", "host_dev_name": "tap0"}),
            ),
            ("/mmds/config", json!({"network_interfaces": ["1"]})),
        ],
    )?;
    instance_start(&mut api)?;
    put_all(&mut api, &[("/mmds", json!({"latest": {"user-data": 1}}))])?;
    let config = api.get("/vm/config")?.ok()?.json()?;
    let roots: Vec<_> = config["drives"].as_array().context("drives")?.iter().collect();
    assert!(roots.iter().any(|drive| drive["drive_id"] == "1" && drive["is_root_device"] == true));
    end_by(&mut vmm, Signal::TERM)
}

#[test]
fn ignite_sends_the_name_that_smt_had_before_0_25() -> Result<()> {
    let mut vmm = firecracker()?.with_api().spawn()?;
    let mut api = poll(&vmm, "/machine-config")?;
    let dir = vmm.dir();
    let _log = fifo(&dir.join("log.fifo"))?;
    let _metrics = fifo(&dir.join("metrics.fifo"))?;
    let args = "console=ttyS0 reboot=k panic=1 pci=off ip=dhcp";
    let calls = [
        (
            "/logger",
            json!({"log_path": dir.join("log.fifo"), "level": "Info", "show_level": true,
                   "show_log_origin": false}),
        ),
        ("/metrics", json!({"metrics_path": dir.join("metrics.fifo")})),
        ("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 512, "ht_enabled": true})),
        ("/boot-source", json!({"kernel_image_path": dir.join("vmlinux"), "boot_args": args})),
        ("/drives/1", drive("1", dir.join("rootfs.ext4"), true)),
    ];
    put_all(&mut api, &calls)?;
    assert_eq!(api.get("/machine-config")?.ok()?.json()?["smt"], true);
    instance_start(&mut api)?;
    // It asks, waits, asks once more, and then ends the process.
    for _ in 0..2 {
        put_all(&mut api, &[("/actions", json!({"action_type": "SendCtrlAltDel"}))])?;
    }
    end_by(&mut vmm, Signal::TERM)
}

#[test]
fn flintlock_runs_without_api_and_stops_by_sighup() -> Result<()> {
    let builder = firecracker()?;
    let dir = builder.dir().to_owned();
    for (name, mmds) in [("one", json!({"version": "V1"})), ("two", Value::Null)] {
        let metrics = dir.join(format!("{name}.metrics"));
        fs::write(&metrics, "")?;
        let config = json!({
            "boot-source": {
                "kernel_image_path": dir.join("vmlinux"),
                "boot_args": "console=ttyS0 reboot=k panic=1 pci=off i8042.noaux i8042.nomux i8042.nopnp \
                              i8042.dumbkbd ds=nocloud-net;s=http://169.254.169.254/latest/",
            },
            "drives": [{"drive_id": "root", "path_on_host": dir.join("rootfs.ext4"),
                        "is_root_device": true, "is_read_only": false, "cache_type": "Unsafe"}],
            "logger": {"log_path": dir.join(format!("{name}.log")), "level": "Debug", "show_level": true,
                       "show_log_origin": true},
            "machine-config": {"vcpu_count": 1, "mem_size_mib": 128, "smt": true,
                               "track_dirty_pages": false},
            "metrics": {"metrics_path": metrics},
            "mmds-config": mmds,
            "network-interfaces": [],
        });
        fs::write(dir.join(format!("{name}.log")), "")?;
        fs::write(dir.join("metadata.json"), r#"{"latest":{"meta-data":"","user-data":""}}"#)?;
        fs::write(dir.join("config.json"), config.to_string())?;
        let mut vmm = VmmBuilder::new(&vmm_path())?
            .with_name("firecracker")
            .arg("--id")
            .arg(format!("flintlock-{name}"))
            .arg("--boot-timer")
            .arg("--no-api")
            .arg("--config-file")
            .arg(dir.join("config.json"))
            .arg("--metadata")
            .arg(dir.join("metadata.json"))
            .spawn()?;
        wait_for_text(&dir.join(format!("{name}.log")), "Guest-boot-time")?;
        end_by(&mut vmm, Signal::HUP)?;
        let text = fs::read_to_string(&metrics)?;
        check_metrics(text.lines().next_back().context("no line of metrics")?)?;
    }
    Ok(())
}

/// Waits until a file has this text.
fn wait_for_text(file: &Path, text: &str) -> Result<()> {
    let begin = Instant::now();
    while !fs::read_to_string(file)?.contains(text) {
        ensure!(begin.elapsed() < TIMEOUT, "{} has no {text}: {}", file.display(), fs::read_to_string(file)?);
        // Nothing notifies of a line in a file.
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// Files of length 0 for drives that are given a disk later.
fn empty_files(dir: &Path, names: impl Iterator<Item = String>) -> Result<Vec<PathBuf>> {
    names
        .map(|name| {
            let path = dir.join(name);
            fs::write(&path, "")?;
            Ok(path)
        })
        .collect()
}

#[test]
fn kata_reads_the_version_from_the_second_word() -> Result<()> {
    let (code, output) = firecracker()?.arg("--version").spawn()?.finish(TIMEOUT)?;
    assert_eq!(code, 0);
    let version = output.lines().next().and_then(|line| line.split(' ').nth(1)).context("two words")?;
    let numbers = version.strip_prefix('v').context("v")?.split('.').map(str::parse::<u32>);
    let numbers = numbers.collect::<Result<Vec<_>, _>>()?;
    assert!(numbers.len() == 3 && numbers >= vec![0, 21, 1], "{version}");
    Ok(())
}

#[test]
fn kata_in_go_gives_disks_to_empty_drives() -> Result<()> {
    let host = HostNet::new()?;
    host.ip("tuntap add dev tap0_kata mode tap vnet_hdr")?;
    let builder = firecracker()?;
    let dir = builder.dir().to_owned();
    let pool = empty_files(&dir, (0..8).map(|number| format!("drive_{number}")))?;
    let mut drives = vec![json!({"drive_id": "rootfs", "path_on_host": dir.join("rootfs.ext4"),
                                 "is_root_device": false, "is_read_only": true})];
    drives.extend(pool.iter().enumerate().map(|(number, path)| {
        json!({"drive_id": format!("drive_{number}"), "path_on_host": path,
               "is_root_device": false, "is_read_only": false})
    }));
    fs::write(dir.join("logs"), "")?;
    let metrics = fifo(&dir.join("metrics.fifo"))?;
    let config = json!({
        "boot-source": {
            "kernel_image_path": dir.join("vmlinux"),
            "boot_args": "pci=off reboot=k panic=1 iommu=off net.ifnames=0 random.trust_cpu=on acpi=off \
                          root=/dev/vda1",
        },
        "machine-config": {"vcpu_count": 2, "mem_size_mib": 256, "smt": false},
        "vsock": {"guest_cid": 3, "uds_path": dir.join("kata.hvsock"), "vsock_id": "root"},
        "logger": {"level": "Error", "log_path": dir.join("logs")},
        "metrics": {"metrics_path": dir.join("metrics.fifo")},
        "drives": drives,
        "network-interfaces": [{"iface_id": "eth0", "guest_mac": "02:fc:00:00:00:01",
                                "host_dev_name": "tap0_kata", "rx_rate_limiter": {}, "tx_rate_limiter": {}}],
    });
    let mut vmm = builder.with_api().with_config(&config)?.spawn()?;
    let mut api = poll(&vmm, "/")?;
    let begin = Instant::now();
    while state(&mut api)? != "Running" {
        ensure!(begin.elapsed() < TIMEOUT, "it does not run");
        std::thread::sleep(Duration::from_millis(10));
    }
    fs::set_permissions(dir.join("kata.hvsock"), Permissions::from_mode(0o640))?;
    let vcpus: Vec<u32> = vmm
        .threads()?
        .iter()
        .filter_map(|thread| thread.name.strip_prefix("fc_vcpu")?.trim().parse().ok())
        .collect();
    assert_eq!(vcpus, [0, 1]);
    fs::write(dir.join("container"), vec![0; 1 << 16])?;
    for path in [dir.join("container"), pool[7].clone()] {
        let update = json!({"drive_id": "drive_7", "path_on_host": path});
        assert_eq!(api.patch("/drives/drive_7", &update)?.ok()?.status, 204);
    }
    put_all(&mut api, &[("/actions", json!({"action_type": "FlushMetrics"}))])?;
    check_metrics(&first_line(metrics)?)?;
    end_by(&mut vmm, Signal::TERM)
}

#[test]
fn kata_in_rust_puts_vsock_twice_and_kills_the_process() -> Result<()> {
    let host = HostNet::new()?;
    host.ip("tuntap add dev tap0_kata mode tap vnet_hdr")?;
    let builder = firecracker()?;
    let dir = builder.dir().to_owned();
    fs::create_dir(dir.join("run"))?;
    let socket = PathBuf::from(format!("{}/run//fc.sock", dir.display()));
    let mut vmm = builder.arg("--api-sock").arg(&socket).arg("--no-seccomp").spawn()?;
    let mut api = ApiClient::new(&socket);
    api.wait_ready(TIMEOUT)?;
    put_all(
        &mut api,
        &[
            ("/boot-source", json!({"kernel_image_path": dir.join("vmlinux"), "boot_args": "acpi=off"})),
            ("/machine-config", json!({"vcpu_count": 1, "mem_size_mib": 256})),
            ("/drives/rootfs", drive("rootfs", dir.join("rootfs.ext4"), false)),
        ],
    )?;
    for path in empty_files(&dir, (1..6).map(|number| format!("drive{number}")))? {
        let id = path.file_name().and_then(|name| name.to_str()).context("a name")?.to_owned();
        put_all(&mut api, &[(&format!("/drives/{id}"), drive(&id, &path, false))])?;
    }
    let uds = dir.join("kata.hvsock");
    let vsock = json!({"guest_cid": 3, "uds_path": uds, "vsock_id": "root"});
    put_all(&mut api, &[("/vsock", vsock.clone()), ("/vsock", vsock)])?;
    let network = json!({"iface_id": "eth0", "guest_mac": null, "host_dev_name": "tap0_kata"});
    put_all(&mut api, &[("/network-interfaces/eth0", network)])?;
    instance_start(&mut api)?;
    fs::write(dir.join("container"), vec![0; 1 << 16])?;
    for limiter in [json!({"bandwidth": {"size": 1 << 20, "refill_time": 100}}), Value::Null] {
        let update =
            json!({"drive_id": "drive1", "path_on_host": dir.join("container"), "rate_limiter": limiter});
        assert_eq!(api.patch("/drives/drive1", &update)?.ok()?.status, 204);
    }
    dial_guest(&uds, 1024)?;
    vmm.signal(Signal::KILL)?;
    // It notices the end by the end of standard error.
    vmm.stderr.wait_for_end(TIMEOUT)?;
    vmm.exit_status(TIMEOUT).map(drop)
}

#[test]
fn firecracker_containerd_uses_relative_paths_and_stub_drives() -> Result<()> {
    let host = HostNet::new()?;
    host.ip("tuntap add dev tap0 mode tap vnet_hdr")?;
    let builder = firecracker()?.arg("--api-sock").arg("firecracker.sock").arg("--id").arg("vm-9");
    let dir = builder.dir().to_owned();
    let mut vmm = builder.spawn()?;
    let mut api = ApiClient::new(&dir.join("firecracker.sock"));
    api.wait_ready(TIMEOUT)?;
    let stubs: Vec<String> = (0..4).map(|number| format!("ctrstub{number}")).collect();
    for stub in &stubs {
        let mut content = b"\xd9\x0eMFC-STUB".to_vec();
        content.extend(stub.bytes());
        content.resize(512, 0);
        fs::write(dir.join(stub), content)?;
    }
    // T2 is sent on Intel hosts only: one that it does not fit would refuse it at the start.
    put_all(&mut api, &[("/machine-config", machine("T2"))])?;
    let args = "console=ttyS0 noapic reboot=k panic=1 pci=off nomodules rw";
    put_all(
        &mut api,
        &[
            ("/machine-config", machine("None")),
            ("/boot-source", json!({"kernel_image_path": "vmlinux", "boot_args": args})),
            ("/drives/root_drive", drive("root_drive", "rootfs.ext4", true)),
        ],
    )?;
    for stub in &stubs {
        put_all(&mut api, &[(&format!("/drives/{stub}"), drive(stub, stub, false))])?;
    }
    let vsock = json!({"vsock_id": "agent_api", "guest_cid": 0, "uds_path": "firecracker.vsock"});
    let network = json!({"iface_id": "1", "host_dev_name": "tap0"});
    let mmds = json!({"version": "V1", "network_interfaces": ["1"]});
    put_all(&mut api, &[("/network-interfaces/1", network), ("/vsock", vsock), ("/mmds/config", mmds)])?;
    instance_start(&mut api)?;
    fs::write(dir.join("layer"), vec![0; 1 << 16])?;
    let update = json!({"drive_id": "ctrstub0", "path_on_host": "layer"});
    assert_eq!(api.patch("/drives/ctrstub0", &update)?.ok()?.status, 204);
    for state in ["Paused", "Resumed"] {
        assert_eq!(api.patch("/vm", &json!({"state": state}))?.ok()?.status, 204);
    }
    put_all(&mut api, &[("/mmds", json!({"a": 1}))])?;
    assert_eq!(api.patch("/mmds", &json!({"b": 2}))?.ok()?.status, 204);
    assert_eq!(api.get("/mmds")?.ok()?.json()?, json!({"a": 1, "b": 2}));
    dial_guest(&dir.join("firecracker.vsock"), 10789)?;
    end_by(&mut vmm, Signal::TERM)
}

fn machine(template: &str) -> Value {
    json!({"vcpu_count": 1, "mem_size_mib": 128, "smt": false, "cpu_template": template})
}
