//! Makes samples of saved microVMs (`crates/control/tests/samples`), which every later version must
//! read:
//!
//! ```text
//! VESTA_VMM=target/debug/vesta-vmm cargo run -p vesta-tests --bin snapshot-sample -- crates/control/tests/samples NAME
//! ```
//!
//! This writes `NAME-mmio.state` and `NAME-pci.state`. A sample is never replaced: a new format, or
//! a new device, has a new name.

use std::fs::{self, File};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::json;
use vesta_tests::counting::{kernel, wait_for_bytes};
use vesta_tests::guest::{TIMEOUT, Transport, start, vmm_path};
use vesta_tests::vmm::VmmBuilder;

fn main() -> Result<()> {
    let mut args = std::env::args_os().skip(1);
    let (dir, name) = args.next().zip(args.next()).context("usage: snapshot-sample DIRECTORY NAME")?;
    for (transport, ending) in [(Transport::Mmio, "mmio"), (Transport::Pci, "pci")] {
        let path = PathBuf::from(&dir).join(format!("{}-{ending}.state", name.display()));
        sample(transport, &path)?;
        println!("{}: {} bytes", path.display(), fs::metadata(&path)?.len());
    }
    Ok(())
}

/// Makes one sample. Paths in it are relative, so that it names no directory of this machine.
fn sample(transport: Transport, path: &Path) -> Result<()> {
    let mut builder = VmmBuilder::new(&vmm_path())?.with_api().arg("--id").arg("sample");
    for arg in transport.args() {
        builder = builder.arg(arg);
    }
    let vmm = builder.quiet().spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    fs::write(vmm.dir().join("kernel"), kernel().bytes())?;
    File::create(vmm.dir().join("disk"))?.set_len(1 << 20)?;
    let limiter = json!({"bandwidth": {"size": 1 << 20, "refill_time": 100}});
    for (path, body) in [
        ("/machine-config", json!({"vcpu_count": 2, "mem_size_mib": 16})),
        ("/boot-source", json!({"kernel_image_path": "kernel", "boot_args": "quiet"})),
        ("/serial", json!({"serial_out_path": "serial"})),
        (
            "/drives/root",
            json!({"drive_id": "root", "is_root_device": true, "path_on_host": "disk",
            "overlay": {"path": "overlay"}, "rate_limiter": limiter}),
        ),
        (
            "/drives/data",
            json!({"drive_id": "data", "is_root_device": false, "path_on_host": "disk",
            "is_read_only": true}),
        ),
        ("/entropy", json!({"rate_limiter": limiter})),
    ] {
        api.put(path, &body)?.ok()?;
    }
    start(&mut api)?;
    wait_for_bytes(&vmm.dir().join("serial"), 10)?;
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    api.put("/snapshot/create", &json!({"snapshot_path": "state", "mem_file_path": "memory"}))?.ok()?;
    fs::copy(vmm.dir().join("state"), path).with_context(|| path.display().to_string())?;
    Ok(())
}
