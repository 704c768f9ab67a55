//! Drives a microVM with the crate firecracker-rs-sdk, as its users do: spawns the monitor, boots
//! a guest, pauses, saves and resumes it, restores it in a second monitor, and ends both.
//!
//! ```console
//! $ vesta-rs-sdk-client firecracker vmlinux initramfs dir
//! ```
//!
//! The guest prints `GUEST n` on its serial port for as long as it runs. Each step prints a line.

#![forbid(unsafe_code)]

use std::error::Error;
use std::fs;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::{Duration, Instant};

use firecracker_rs_sdk::firecracker::FirecrackerOption;
use firecracker_rs_sdk::instance::Instance;
use firecracker_rs_sdk::models::{
    ActionType, BackendType, BootSource, Drive, EntropyDevice, InstanceState, LogLevel, Logger,
    MachineConfiguration, MemoryBackend, Metrics, PartialDrive, SnapshotCreateParams, SnapshotLoadParams,
    SnapshotType, Vsock,
};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// Longest wait for the guest, on a busy emulated host.
const TIMEOUT: Duration = Duration::from_secs(120);

fn main() -> Result<()> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [vmm, kernel, initrd, dir] = args.as_slice() else {
        return Err("usage: vesta-rs-sdk-client VMM KERNEL INITRD DIR".into());
    };

    let mut first = spawn(vmm, dir, "first")?;
    configure(&mut first, kernel, initrd, dir)?;
    first.start()?;
    expect_state(&mut first, InstanceState::Running)?;
    wait_for(&dir.join("first.out"), "GUEST 1")?;
    step("started");
    first.patch_guest_drive_by_id(&PartialDrive {
        drive_id: "data".into(),
        path_on_host: Some(dir.join("data")),
        rate_limiter: None,
    })?;
    first.create_sync_action(ActionType::FlushMetrics)?;
    wait_for(&dir.join("metrics"), "\"vcpu\"")?;
    first.pause()?;
    expect_state(&mut first, InstanceState::Paused)?;
    step("paused");
    first.create_snapshot(&SnapshotCreateParams {
        mem_file_path: dir.join("memory"),
        snapshot_path: dir.join("state"),
        snapshot_type: Some(SnapshotType::Full),
        version: None,
    })?;
    step("saved");
    first.resume()?;
    first.get_export_vm_config()?;
    first.stop()?;
    end(first)?;
    step("ended");

    let mut second = spawn(vmm, dir, "second")?;
    // The saved microVM's sockets are still there: nobody removes them after Firecracker.
    let _ = fs::remove_file(dir.join("vsock"));
    second.load_snapshot(&SnapshotLoadParams {
        enable_diff_snapshots: None,
        mem_file_path: None,
        mem_backend: Some(MemoryBackend {
            backend_type: BackendType::File,
            backend_path: dir.join("memory"),
        }),
        resume_vm: Some(true),
        snapshot_path: dir.join("state"),
    })?;
    expect_state(&mut second, InstanceState::Running)?;
    wait_for(&dir.join("second.out"), "GUEST")?;
    step("restored");
    end(second)
}

fn step(what: &str) {
    println!("STEP {what}");
}

/// Starts a monitor, whose standard output goes to a file.
fn spawn(vmm: &Path, dir: &Path, name: &str) -> Result<Instance> {
    fs::write(dir.join(format!("{name}.in")), "")?;
    let mut instance = FirecrackerOption::new(vmm)
        .api_sock(dir.join(format!("{name}.sock")))
        .id(name)
        .no_seccomp()
        .stdin(dir.join(format!("{name}.in")))
        .stdout(dir.join(format!("{name}.out")))
        .build()?;
    instance.start_vmm()?;
    expect_state(&mut instance, InstanceState::NotStarted)?;
    let version = instance.get_firecracker_version()?;
    println!("{version:?}");
    Ok(instance)
}

fn configure(instance: &mut Instance, kernel: &Path, initrd: &Path, dir: &Path) -> Result<()> {
    // Firecracker before 1.14 does not create it.
    fs::write(dir.join("log"), "")?;
    instance.put_logger(&Logger {
        level: Some(LogLevel::Debug),
        log_path: dir.join("log"),
        show_level: Some(true),
        show_log_origin: Some(true),
        module: None,
    })?;
    fs::write(dir.join("metrics"), "")?;
    instance.put_metrics(&Metrics { metrics_path: dir.join("metrics") })?;
    let machine = MachineConfiguration {
        cpu_template: None,
        smt: Some(false),
        mem_size_mib: 128,
        track_dirty_pages: Some(false),
        vcpu_count: 1,
        huge_pages: None,
    };
    instance.put_machine_configuration(&machine)?;
    if instance.get_machine_configuration()?.mem_size_mib != 128 {
        return Err("the memory is not what was set".into());
    }
    instance.put_guest_boot_source(&BootSource {
        boot_args: Some("console=ttyS0 quiet panic=-1 reboot=k".into()),
        initrd_path: Some(initrd.to_owned()),
        kernel_image_path: kernel.to_owned(),
    })?;
    fs::write(dir.join("data"), vec![0; 1 << 20])?;
    instance.put_guest_drive_by_id(&Drive {
        drive_id: "data".into(),
        partuuid: None,
        is_root_device: false,
        cache_type: None,
        is_read_only: false,
        path_on_host: dir.join("data"),
        rate_limiter: None,
        io_engine: None,
        socket: None,
    })?;
    instance.put_entropy_device(&EntropyDevice { rate_limiter: None })?;
    instance.put_guest_vsock(&Vsock { guest_cid: 3, uds_path: dir.join("vsock"), vsock_id: None })?;
    Ok(())
}

fn expect_state(instance: &mut Instance, expected: InstanceState) -> Result<()> {
    let info = instance.describe_instance()?;
    if info.state != expected {
        return Err(format!("the state is {info:?}; expected {expected:?}").into());
    }
    Ok(())
}

/// Waits until a file has this text.
fn wait_for(file: &Path, text: &str) -> Result<()> {
    let begin = Instant::now();
    loop {
        let content = fs::read(file).unwrap_or_default();
        if String::from_utf8_lossy(&content).contains(text) {
            return Ok(());
        }
        if begin.elapsed() > TIMEOUT {
            return Err(format!("{} has no {text}", file.display()).into());
        }
        thread::sleep(Duration::from_millis(10));
    }
}

/// Ends the monitor as the SDK does, by SIGTERM when the value is dropped, and waits for that.
fn end(instance: Instance) -> Result<()> {
    let pid = instance.firecracker_pid().ok_or("the monitor has no process id")?;
    drop(instance);
    let begin = Instant::now();
    // It stays a zombie, because the SDK does not wait for it.
    while fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z ")) {
        if begin.elapsed() > TIMEOUT {
            return Err("the monitor has not ended".into());
        }
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
