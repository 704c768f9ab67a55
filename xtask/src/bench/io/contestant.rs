//! The contestants of `bench io`, and how each is started.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use serde::{Deserialize, Serialize};
use serde_json::json;
use vesta_tests::guest::start;
use vesta_tests::vmm::{Vmm, VmmBuilder};

use super::super::monitor::Monitor;
use super::super::qemu;
use super::disks::{Disk, SLOW};
use super::setup::{Setup, TIMEOUT};

/// `io_engine` of a drive.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) enum Engine {
    #[default]
    Async,
    Sync,
}

/// The configuration of the drives of a monitor with Firecracker's API.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Drive {
    pub(super) engine: Engine,
    /// `cache_type` is `Writeback`: the guest can flush.
    pub(super) writeback: bool,
    pub(super) overlay: bool,
}

/// One row of the tables: a monitor with one configuration of its disks.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Contestant {
    pub(super) name: String,
    path: PathBuf,
    kind: Kind,
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
enum Kind {
    /// The load generator on the host, without a guest.
    Raw,
    /// A monitor with Firecracker's API.
    Api { drive: Drive, pci: bool, peer: bool },
    /// QEMU's `microvm`, with `io_uring` and an iothread.
    Qemu,
}

impl Contestant {
    pub(super) fn raw(load: &Path) -> Contestant {
        Contestant { name: RAW.to_owned(), path: load.to_owned(), kind: Kind::Raw }
    }

    pub(super) fn api(monitor: &Monitor, drive: Drive, pci: bool) -> Contestant {
        let more = [(drive.writeback, ", Writeback"), (drive.overlay, ", overlay"), (pci, ", PCI")]
            .map(|(with, text)| if with { text } else { "" });
        let name = format!("{}, {:?}{}", monitor.name, drive.engine, more.concat());
        let kind = Kind::Api { drive, pci, peer: monitor.peer };
        Contestant { name, path: monitor.path.clone(), kind }
    }

    pub(super) fn qemu(path: &Path) -> Contestant {
        Contestant { name: QEMU.to_owned(), path: path.to_owned(), kind: Kind::Qemu }
    }

    /// Whether a failure leaves it out instead of ending the benchmark.
    pub(super) fn is_peer(&self) -> bool {
        matches!(self.kind, Kind::Api { peer: true, .. })
    }

    /// Whether it is measured on that disk. Overlays are files whatever their base is, so they are
    /// measured on one disk only.
    pub(super) fn uses(&self, disk: &Disk) -> bool {
        disk.label != SLOW || !matches!(self.kind, Kind::Api { drive: Drive { overlay: true, .. }, .. })
    }

    /// Starts it with the disks. The load generator starts by itself.
    pub(super) fn start(&self, setup: &Setup<'_>) -> Result<Vmm> {
        let builder = VmmBuilder::new(&self.path)?.quiet();
        match self.kind {
            Kind::Raw => setup.load_args.iter().fold(builder, VmmBuilder::arg).spawn(),
            Kind::Api { .. } => self.start_api(builder, setup),
            Kind::Qemu => start_qemu(builder, setup),
        }
    }

    fn start_api(&self, builder: VmmBuilder, setup: &Setup<'_>) -> Result<Vmm> {
        let Kind::Api { drive, pci, .. } = self.kind else { bail!("{} has no API", self.name) };
        let builder = builder.with_api();
        let vmm = if pci { builder.arg("--enable-pci") } else { builder }.spawn()?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        setup.guest.put(&mut api)?;
        for disk in setup.disks.list().iter().filter(|disk| self.uses(disk)) {
            let mut body = json!({
                "drive_id": disk.label,
                "path_on_host": disk.path,
                "is_root_device": false,
                "is_read_only": false,
                "io_engine": format!("{:?}", drive.engine),
                "cache_type": if drive.writeback { "Writeback" } else { "Unsafe" },
            });
            if drive.overlay {
                let path = setup.disks.dir().join("overlay");
                // The overlay of the round before.
                let _ = std::fs::remove_file(&path);
                body["overlay"] = json!({ "path": path });
            }
            api.put(&format!("/drives/{}", disk.label), &body)?.ok()?;
        }
        start(&mut api)?;
        Ok(vmm)
    }
}

/// The name of the monitor that ratios are relative to.
pub(super) const QEMU: &str = "QEMU microvm";
/// The name of the measurement on the host.
pub(super) const RAW: &str = "no guest";

fn start_qemu(builder: VmmBuilder, setup: &Setup<'_>) -> Result<Vmm> {
    let mut args = vec!["-object".to_owned(), "iothread,id=io0".to_owned()];
    let mut add = |name: &str, value: String| args.extend([name.to_owned(), value]);
    for disk in setup.disks.list() {
        let driver = if disk.path.starts_with("/dev") { "host_device" } else { "file" };
        let (label, path) = (&disk.label, disk.path.display());
        let node = format!(
            "driver={driver},node-name={label},filename={path},aio=io_uring,cache.direct=off,auto-read-only=off"
        );
        add("-blockdev", node);
        add("-device", format!("virtio-blk-device,drive={label},iothread=io0"));
    }
    args.iter().fold(qemu::microvm(builder, &setup.guest), VmmBuilder::arg).spawn()
}
