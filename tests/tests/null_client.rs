//! `vesta-client` with the real monitor: what the client writes the monitor reads, and vice versa.

use std::fs;
use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::json;
use vesta_client::{
    BootSource, Child, ChildOutcome, ChildState, Client, Drive, DriveUpdate, Entropy, Error, Fork,
    FullVmConfig, InstanceState, LogLevel, Logger, MachineConfig, MachineConfigUpdate, Metrics, RateLimiter,
    Serial, SnapshotCreate, SnapshotJobState, SnapshotLoad, TokenBucket, Vsock, VsockOverride,
};
use vesta_tests::elf;
use vesta_tests::guest::{TIMEOUT, vmm_path};
use vesta_tests::process::Orphans;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// A monitor, and a client of it that keeps its connection.
fn monitor() -> Result<(Vmm, Client)> {
    let vmm = VmmBuilder::new(&vmm_path())?.with_api().arg("--id").arg("vm-1").spawn()?;
    let mut client = Client::new(vmm.dir().join("api.sock"));
    let info = client.wait_until_ready(TIMEOUT)?;
    ensure!((info.id.as_str(), info.state) == ("vm-1", InstanceState::NotStarted), "{info:?}");
    Ok((vmm, client))
}

fn file(dir: &Path, name: &str, content: &[u8]) -> Result<std::path::PathBuf> {
    let path = dir.join(name);
    fs::write(&path, content)?;
    Ok(path)
}

/// Configures a guest of a few instructions with a device of each kind that needs no privilege.
fn configure(client: &mut Client, dir: &Path) -> Result<()> {
    client.put_logger(&Logger { level: Some(LogLevel::Debug), ..Logger::default() })?;
    client.put_metrics(&Metrics { metrics_path: dir.join("metrics"), ..Metrics::default() })?;
    client.put_machine_config(&MachineConfig { vcpu_count: 2, ..MachineConfig::default() })?;
    client.patch_machine_config(&MachineConfigUpdate { mem_size_mib: Some(64), ..Default::default() })?;
    let kernel = file(dir, "kernel", &elf::null_guest().bytes())?;
    client.put_boot_source(&BootSource { boot_args: Some("quiet".into()), ..BootSource::new(kernel) })?;
    client.put_serial(&Serial { serial_out_path: Some(dir.join("serial")), ..Serial::default() })?;
    let bucket = TokenBucket { size: 1 << 20, one_time_burst: Some(7), refill_time: 100 };
    let limiter = RateLimiter { bandwidth: Some(bucket), ops: None };
    client.put_drive(&Drive {
        is_root_device: true,
        is_read_only: true,
        rate_limiter: Some(limiter),
        ..Drive::new("rootfs", file(dir, "disk", &[0; 4096])?)
    })?;
    client.put_entropy(&Entropy { rate_limiter: Some(limiter) })?;
    client.put_vsock(&Vsock::new(3, dir.join("vsock")))?;
    Ok(())
}

#[test]
fn every_part_of_the_configuration_is_read_back() -> Result<()> {
    let (vmm, mut client) = monitor()?;
    configure(&mut client, vmm.dir())?;
    assert_eq!(client.machine_config()?.mem_size_mib, 64);
    assert_eq!(client.version()?, "1.17.0");
    client.put_mmds(&json!({"a": {"b": 1}, "c": 2}))?;
    client.patch_mmds(&json!({"c": null}))?;
    assert_eq!(client.mmds()?, json!({"a": {"b": 1}}));

    let config: FullVmConfig = client.vm_config()?;
    let drive = &config.drives[0];
    assert_eq!((drive.drive_id.as_str(), drive.is_root_device, drive.is_read_only), ("rootfs", true, true));
    assert_eq!(drive.rate_limiter, config.entropy.as_ref().and_then(|entropy| entropy.rate_limiter));
    assert_eq!(config.vsock, Some(Vsock::new(3, vmm.dir().join("vsock"))));
    assert_eq!(config.machine_config.vcpu_count, 2);

    // What was read is a configuration file.
    drop(vmm);
    let dir = tempfile::tempdir()?;
    configure_from_file(&config, dir.path())
}

/// Starts a monitor from `config`, with its files in `dir`.
fn configure_from_file(config: &FullVmConfig, dir: &Path) -> Result<()> {
    let mut config = config.clone();
    config.boot_source = Some(BootSource::new(file(dir, "kernel", &elf::null_guest().bytes())?));
    config.drives[0].path_on_host = Some(file(dir, "disk", &[0; 4096])?);
    config.vsock = Some(Vsock::new(3, dir.join("vsock")));
    config.serial = None;
    config.metrics = None;
    let vmm =
        VmmBuilder::new(&vmm_path())?.with_api().with_config(&serde_json::to_value(&config)?)?.spawn()?;
    let mut client = Client::new(vmm.dir().join("api.sock"));
    client.wait_until_ready(TIMEOUT)?;
    let begin = Instant::now();
    // The API answers before the guest runs.
    while client.instance()?.state != InstanceState::Running {
        ensure!(begin.elapsed() < TIMEOUT, "the guest does not run");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[test]
fn refusal_has_status_and_reason_and_keeps_the_connection() -> Result<()> {
    let (vmm, mut client) = monitor()?;
    let refused = |error: Error, parts: [&str; 3]| {
        assert_eq!(error.status(), Some(400));
        for part in parts {
            assert!(error.to_string().contains(part), "{part}: {error}");
        }
    };
    let odd = MachineConfig { vcpu_count: 129, ..MachineConfig::default() };
    refused(client.put_machine_config(&odd).unwrap_err(), ["PUT /machine-config", "vcpu_count", "129"]);
    let missing = Drive::new("rootfs", vmm.dir().join("missing"));
    refused(client.put_drive(&missing).unwrap_err(), ["PUT /drives/rootfs", "missing", "No such file"]);
    refused(client.pause().unwrap_err(), ["PATCH /vm", "status 400", ""]);
    let error = client.get::<serde_json::Value>("/nothing").unwrap_err();
    refused(error, ["GET /nothing", "", ""]);
    let too_large = json!({"a": "x".repeat(52_000)});
    assert_eq!(client.put_mmds(&too_large).unwrap_err().status(), Some(400));
    assert_eq!(client.instance()?.state, InstanceState::NotStarted);
    Ok(())
}

#[test]
fn a_guest_is_paused_saved_restored_and_forked() -> Result<()> {
    let (vmm, mut client) = monitor()?;
    configure(&mut client, vmm.dir())?;
    client.start()?;
    assert_eq!(client.instance()?.state, InstanceState::Running);
    client.flush_metrics()?;
    assert!(fs::read_to_string(vmm.dir().join("metrics"))?.contains("\"vcpu\""));
    assert!(client.metrics()?.contains("# TYPE"), "it is Prometheus text");
    assert!(client.openapi()?["paths"]["/fork"].is_object());
    client.patch_drive(&DriveUpdate {
        path_on_host: Some(file(vmm.dir(), "larger", &[0; 8192])?),
        ..DriveUpdate::new("rootfs")
    })?;
    client.pause()?;
    client.pause()?;
    assert_eq!(client.instance()?.state, InstanceState::Paused);
    let saved = (vmm.dir().join("state"), vmm.dir().join("memory"));
    assert_eq!(client.create_snapshot(&SnapshotCreate::new(&saved.0, &saved.1))?, None);
    client.resume()?;

    let live = SnapshotCreate {
        live: true,
        ..SnapshotCreate::new(vmm.dir().join("live.state"), vmm.dir().join("live.memory"))
    };
    let job = client.create_snapshot(&live)?.context("a live snapshot is a job")?;
    assert_eq!(job.mem_file_path, live.mem_file_path);
    while client.snapshot_job()?.state == SnapshotJobState::Running {
        // There is no notification.
        std::thread::sleep(Duration::from_millis(1));
    }
    let job = client.snapshot_job()?;
    assert_eq!(
        (job.state, job.error.as_deref(), job.bytes_done),
        (SnapshotJobState::Done, None, job.bytes_total)
    );

    let socket = vmm.dir().join("child.sock");
    let child = Child { api_socket: Some(socket.clone()), resume: false, ..Child::new("child".parse()?) };
    let outcome = client.fork(&Fork { children: vec![child], drives: vec![] })?;
    let child = outcome.children.into_iter().next().context("one child")?;
    let ChildOutcome::Started { pid, state, api_socket, .. } = child else { bail!("{child:?}") };
    let orphan = Orphans::of(&[u64::from(pid)]);
    assert_eq!((state, api_socket.as_ref()), (ChildState::Paused, Some(&socket)));
    let mut of_child = Client::new(&socket);
    let info = of_child.wait_until_ready(TIMEOUT)?;
    assert_eq!((info.id.as_str(), info.state), ("child", InstanceState::Paused));
    of_child.resume()?;
    orphan.kill(TIMEOUT)?;

    let (_restored, mut client) = monitor()?;
    let sockets = VsockOverride {
        uds_path: vmm.dir().join("restored.vsock"),
        seqpacket_uds_path: None,
        guest_cid: None,
    };
    client.load_snapshot(&SnapshotLoad {
        resume_vm: true,
        vsock_override: Some(sockets),
        ..SnapshotLoad::from_files(saved.0, saved.1)
    })?;
    assert_eq!(client.instance()?.state, InstanceState::Running);
    Ok(())
}
