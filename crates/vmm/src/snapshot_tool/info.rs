//! [`Info`]: what `vesta-vmm snapshot info` shows.

use std::fmt;
use std::path::Path;
use std::time::{Duration, SystemTime};

use config::{Drive, HugePages};
use control::snapshot::{KIND, SavedConfig};
use machine::MachineState;
use memory::image::{ImageFile, ImageInfo, ImageKind, examine};
use serde_json::{Value, json};
use snapshot::{Description, Snapshot};

use super::error::ToolError;

/// The contents of a state file, as far as this version can decode them.
#[derive(Debug)]
pub(super) struct Info {
    file: Description,
    /// `None` for files of another kind.
    microvm: Option<MicroVm>,
}

/// A saved microVM.
#[derive(Debug)]
struct MicroVm {
    config: SavedConfig,
    image: ImageInfo,
    /// `None` if it is of another architecture.
    machine: Option<MachineState>,
    memory: Option<ImageFile>,
}

impl Info {
    /// Reads a state file. Of a memory file, reads only its size and holes.
    pub(super) fn read(state: &Path, memory: Option<&Path>) -> Result<Self, ToolError> {
        let snapshot = Snapshot::open(state)?;
        let file = snapshot.describe();
        if file.header.kind != KIND {
            return Ok(Info { file, microvm: None });
        }
        let image: ImageInfo = snapshot.get()?;
        let here = file.header.architecture == std::env::consts::ARCH;
        let microvm = MicroVm {
            config: snapshot.get()?,
            machine: here.then(|| snapshot.get()).transpose()?,
            memory: memory.map(|memory| examine(memory, &image)).transpose()?,
            image,
        };
        Ok(Info { file, microvm: Some(microvm) })
    }

    /// As JSON.
    pub(super) fn json(&self) -> Value {
        let mut value = json!(self.file);
        if let Some(microvm) = &self.microvm {
            value["microvm"] = microvm.json();
        }
        value
    }
}

impl MicroVm {
    fn json(&self) -> Value {
        let MicroVm { config, image, machine, memory } = self;
        let file = memory.as_ref().map(|file: &ImageFile| {
            let ImageFile { path, size, data_bytes, partial, redo } = file;
            let path = path.display().to_string();
            let redo = redo.as_ref().map(|redo| redo.display().to_string());
            json!({ "path": path, "size": size, "data_bytes": data_bytes, "partial": partial, "redo": redo })
        });
        json!({
            "id": config.id,
            "pci": config.pci,
            "config": config.config,
            "memory": {
                "kind": image.kind,
                "id": image.id,
                "huge_pages": image.huge_pages,
                "ram_size": image.layout.ram_size(),
                "file_size": image.layout.file_size(),
                "regions": image.layout,
                "file": file,
            },
            "machine": machine.as_ref().map(|machine| json!({
                "vcpus": machine.vcpus.len(),
                "tsc_khz": machine.vcpus.first().and_then(|vcpu| vcpu.tsc_khz),
                "devices": machine.devices.devices.iter().map(|device| &device.name).collect::<Vec<_>>(),
            })),
        })
    }
}

impl fmt::Display for Info {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}", self.file)?;
        let created =
            SystemTime::UNIX_EPOCH.checked_add(Duration::from_millis(self.file.header.created_at_ms));
        if let Some(created) = created.filter(|_| self.file.header.created_at_ms < LAST_YEAR_MS) {
            writeln!(f, "time            {}", humantime::format_rfc3339_seconds(created))?;
        }
        let data: u64 = self.file.sections.iter().map(|section| section.size).sum();
        writeln!(f, "data            {data} bytes")?;
        self.microvm.as_ref().map_or(Ok(()), |microvm| write!(f, "{microvm}"))
    }
}

/// The end of the year 9999, the last that RFC 3339 can write.
const LAST_YEAR_MS: u64 = 253_402_300_800_000;

impl fmt::Display for MicroVm {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let MicroVm { config: SavedConfig { config, pci, id, fresh_overlays }, image, machine, memory } =
            self;
        let mib = |bytes: u64| bytes >> 20;
        writeln!(f, "id              {id}")?;
        write!(f, "vCPUs           {}", config.machine_config.vcpu_count)?;
        match machine.as_ref().and_then(|machine| machine.vcpus.first()?.tsc_khz) {
            Some(khz) => writeln!(f, ", time stamp counter {khz} kHz")?,
            None => writeln!(f)?,
        }
        let pages = match image.huge_pages {
            HugePages::None => "ordinary",
            HugePages::Transparent => "transparent huge",
            HugePages::Hugetlbfs2M => "2 MiB",
        };
        let kind = match image.kind {
            ImageKind::Full => "Full",
            ImageKind::Diff => "Diff",
        };
        writeln!(f, "memory          {} MiB, {kind}, {pages} pages", mib(image.layout.ram_size()))?;
        writeln!(f, "memory file     {} bytes, id {}", image.layout.file_size(), image.id)?;
        for region in image.layout.regions() {
            let end = region.guest_addr + region.size;
            writeln!(f, "region          {:#x} to {end:#x} at {:#x}", region.guest_addr, region.offset)?;
        }
        if let Some(ImageFile { path, size, data_bytes, partial, redo }) = memory {
            let partial = if *partial { ", a Diff to be merged" } else { "" };
            writeln!(
                f,
                "found           {}: {size} bytes, {data_bytes} without holes{partial}",
                path.display()
            )?;
            if let Some(redo) = redo {
                writeln!(f, "redo log        {}: the next load puts it in", redo.display())?;
            }
        }
        writeln!(f, "transport       virtio-{}", if *pci { "pci" } else { "mmio" })?;
        config.drives.iter().try_for_each(|drive| show_drive(f, drive, fresh_overlays))?;
        let devices = machine.iter().flat_map(|machine| &machine.devices.devices);
        devices.into_iter().try_for_each(|device| writeln!(f, "device          {}", device.name))
    }
}

fn show_drive(f: &mut fmt::Formatter<'_>, drive: &Drive, fresh: &[String]) -> fmt::Result {
    write!(f, "drive           {}", drive.drive_id)?;
    if let Some(path) = &drive.path_on_host {
        write!(f, ": {}", path.display())?;
    }
    if drive.is_root_device {
        write!(f, ", root")?;
    }
    if drive.is_read_only {
        write!(f, ", read-only")?;
    }
    if let Some(overlay) = &drive.overlay {
        for layer in &overlay.layers {
            write!(f, ", layer {}", layer.display())?;
        }
        write!(f, ", writes go to {}", overlay.path.display())?;
        if fresh.contains(&drive.drive_id) {
            write!(f, " or, at later loads, to the next number that is free")?;
        }
    }
    writeln!(f)
}
