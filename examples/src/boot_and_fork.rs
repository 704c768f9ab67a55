//! Boots a microVM over the API, forks it while it runs, and ends both.
//!
//! ```console
//! $ boot-and-fork target/x86_64-unknown-linux-gnu/release/vesta-vmm vmlinux initramfs.cpio
//! ```
//!
//! It uses `vesta-client`, whose requests and answers have types. Copy it to start from here.

#![forbid(unsafe_code)]

use std::error::Error;
use std::path::{Path, PathBuf};
use std::process::{Child as Process, Command};
use std::time::Duration;

use vesta_client::{BootSource, Child, ChildOutcome, Client, Fork, MachineConfig};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How long the monitor may take until it serves its API.
const START_TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [vmm, kernel, initrd] = args.as_slice() else {
        return Err("usage: boot-and-fork VMM KERNEL INITRD".into());
    };
    let dir = std::env::temp_dir().join(format!("vesta-example-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let result = boot_and_fork(vmm, kernel, initrd, &dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn boot_and_fork(vmm: &Path, kernel: &Path, initrd: &Path, dir: &Path) -> Result<()> {
    let socket = dir.join("parent.sock");
    let mut parent = Command::new(vmm).arg("--api-sock").arg(&socket).spawn()?;
    let result = drive(&socket, kernel, initrd, dir);
    end(&mut parent)?;
    result
}

fn drive(socket: &Path, kernel: &Path, initrd: &Path, dir: &Path) -> Result<()> {
    let mut parent = Client::new(socket);
    parent.wait_until_ready(START_TIMEOUT)?;
    parent.put_machine_config(&MachineConfig {
        vcpu_count: 1,
        mem_size_mib: 128,
        ..MachineConfig::default()
    })?;
    parent.put_boot_source(&BootSource {
        initrd_path: Some(initrd.to_owned()),
        boot_args: Some("console=ttyS0 reboot=k panic=1".to_owned()),
        ..BootSource::new(kernel)
    })?;
    parent.start()?;
    println!("parent: {:?}", parent.instance()?.state);

    let socket = dir.join("child.sock");
    let child = Child { api_socket: Some(socket.clone()), ..Child::new("child".parse()?) };
    let outcome = parent.fork(&Fork { children: vec![child], drives: vec![] })?;
    println!("forked: the parent was paused for {} us", outcome.pause_us);
    for child in outcome.children {
        let (pid, ready_us) = match child {
            ChildOutcome::Started { pid, ready_us, .. } => (pid, ready_us),
            ChildOutcome::Failed { id, error } => return Err(format!("child {id}: {error}").into()),
        };
        let info = Client::new(&socket).wait_until_ready(START_TIMEOUT)?;
        println!("child: {} {:?}, ready after {ready_us} us", info.id, info.state);
        // A child is a process of its own, which outlives its parent: SIGTERM ends it in order.
        Command::new("kill").arg(pid.to_string()).status()?;
    }
    Ok(())
}

/// Ends the monitor as a supervisor would: by SIGTERM, after which it closes its files in order.
fn end(vmm: &mut Process) -> Result<()> {
    Command::new("kill").arg(vmm.id().to_string()).status()?;
    vmm.wait()?;
    Ok(())
}
