//! `PUT /snapshot/load`.
//!
//! What waits for the host (files, networks, a page server, KVM) is a [task](crate::task):
//! questions are answered meanwhile. A load that is cancelled leaves a process that is ready for
//! another one.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::disk::FileLocks;
use config::{
    DriveOverride, FullVmConfig, MemoryBackendType, SnapshotLoad, apply_network_overrides, check_drives,
};
use machine::chipset::ClockAfter;
use machine::{Paused, Restore, layout};
use memory::GuestRam;
use memory::image;
use memory::page_server::PageServer;

use super::saved::Saved;
use crate::CommandError;
use crate::backends::Backends;
use crate::boot::serial_setup;
use crate::drives::Drives;
use crate::events::{Event, StartedBy};
use crate::host::Host;
use crate::microvm::MicroVm;
use crate::networks::{Networks, open_existing};
use crate::overlays::files::NewFiles;
use crate::prefetch::WorkingSetTask;
use crate::settings::Settings;
use crate::task::{SnapshotPaths, Tasks};
use crate::token::Token;
use crate::vsock::VsockSockets;

/// How long a page server may take to answer each of its first page faults.
const PAGE_SERVER_TIMEOUT: Duration = Duration::from_secs(10);

/// Restores a saved microVM, in a process that has none.
pub(crate) fn load<H: Host>(
    vm: &mut MicroVm,
    tasks: &mut Tasks<H>,
    load: &SnapshotLoad,
) -> Result<(), CommandError> {
    let paths = paths_of(load);
    let (of_task, here) = (load.clone(), vm.backends.settings.clone());
    let locks = vm.backends.drives.locks();
    let opened = tasks.run(vm, Some(&paths), move |token| Opened::open(&of_task, &here, &locks, token))??;
    // In this order, so that the files are dropped after the disks.
    let Opened { saved, files, mut backends, ram, page_server, mut working_set } = opened;
    let serial = serial_setup(vm, &mut tasks.host, &backends.settings)?;
    let events = vm.lifecycle.events().map_err(CommandError::snapshot)?;
    // The sockets of an earlier PUT /vsock, if there was one.
    let configured_here = vm.backends.settings.vsock.is_some() && load.vsock_override.is_none();
    backends.vsock = if configured_here {
        vm.backends.vsock.take()
    } else {
        VsockSockets::create(backends.settings.vsock.as_ref())?
    };
    let metadata = vm.metadata.with_config(backends.settings.mmds_config.as_ref());
    // Where the guest found its devices, whatever the command line says.
    let pci = saved.config.pci;
    let devices = backends.device_setup(metadata.service(&vm.instance.identity().id), pci);
    let machine_config = backends.settings.machine_config.clone();
    let cpu_config = backends.settings.cpu_config.clone();
    let clock = if load.clock_realtime { ClockAfter::CatchesUp } else { ClockAfter::Continues };
    let restored = tasks.run(vm, Some(&paths), move |token| {
        token.check()?;
        Paused::restore(Restore {
            config: &machine_config,
            cpu_config: cpu_config.as_ref(),
            state: &saved.machine,
            ram,
            page_server,
            serial,
            devices,
            clock,
            events,
            stop: Some(token.as_fd()),
        })
        .map_err(|error| CommandError::Restore(error.into()))
    });
    let machine = match restored.map_err(CommandError::from).flatten() {
        Ok(machine) => machine,
        Err(error) => {
            if configured_here {
                vm.backends.vsock = backends.vsock;
            }
            return Err(error);
        }
    };
    backends.networks.release();
    vm.backends = backends;
    vm.backends.drives.report_failures(vm.lifecycle.notices());
    files.keep(|path| vm.backends.drives.uses_overlay(path));
    if load.resume_vm {
        working_set.iter_mut().for_each(WorkingSetTask::guest_runs);
    }
    (vm.metadata, vm.working_set) = (metadata, working_set);
    vm.platform.pci = pci;
    tasks.host.guest_starts(vm.serial_output.is_none());
    vm.metrics.guest_starts(machine.stats());
    vm.lifecycle.start(machine, load.resume_vm).map_err(CommandError::snapshot)?;
    let by = StartedBy::Restore(load.snapshot_path.clone());
    vm.events.publish(&Event::Started { by, phase: vm.lifecycle.phase() });
    log::info!("the microVM of {} is restored", load.snapshot_path.display());
    Ok(())
}

/// The files that clients see in `GET /snapshot/job` during a load.
fn paths_of(load: &SnapshotLoad) -> SnapshotPaths {
    let (_, memory) = load.memory();
    SnapshotPaths { snapshot_path: load.snapshot_path.clone(), mem_file_path: memory.to_owned() }
}

/// A saved microVM with everything open that it needs, before it has a machine. Dropping it closes
/// all of it, and removes the overlays that were created for it.
struct Opened {
    saved: Saved,
    /// Without the sockets of the vsock device.
    backends: Backends,
    // After the disks, so that these are closed when the files are removed.
    files: NewFiles,
    ram: GuestRam,
    page_server: Option<PageServer>,
    working_set: Option<WorkingSetTask>,
}

impl Opened {
    /// Reads the state file, and opens what it and `load` name. `here` are the settings of this
    /// process.
    fn open(
        load: &SnapshotLoad,
        here: &Settings,
        locks: &FileLocks,
        token: &Token,
    ) -> Result<Self, CommandError> {
        let saved = Saved::load(&load.snapshot_path).map_err(CommandError::snapshot)?;
        token.check()?;
        let mut config = saved.config(load, here)?;
        // Before the disks, so that it is dropped after them.
        let mut files = NewFiles::default();
        saved.create_fresh_overlays(load, &mut config, &mut files)?;
        let (settings, drives, networks) = Settings::split(config);
        let drives = Drives::open(drives, locks, false)?;
        let opened = open_existing(&networks)?;
        let networks = Networks::with_backends(networks, opened);
        token.check()?;
        let (ram, page_server) = saved.memory(load, &settings, token)?;
        let working_set = match load.memory() {
            (MemoryBackendType::File, path) if load.prefetch => {
                let path = snapshot::find(path, saved.image.id);
                Some(WorkingSetTask::start(&ram, &path, &saved.image))
            }
            _ => None,
        };
        token.check()?;
        let backends = Backends { settings, drives, networks, vsock: None };
        Ok(Opened { saved, backends, files, ram, page_server, working_set })
    }
}

impl Saved {
    /// The configuration of the restored microVM: the saved one, with the overrides of `load` and
    /// with the log, serial port and vsock device of this process.
    fn config(&self, load: &SnapshotLoad, here: &Settings) -> Result<FullVmConfig, CommandError> {
        let mut config = self.config.config.clone();
        config.logger.clone_from(&here.logger);
        config.serial.clone_from(&here.serial);
        config.machine_config.track_dirty_pages = load.track_dirty_pages;
        config.machine_config.huge_pages = load.huge_pages.resolve(self.image.huge_pages);
        config.machine_config.check()?;
        for DriveOverride { drive_id, path_on_host, overlay } in &load.drives {
            let drive = config.drives.iter_mut().find(|drive| drive.drive_id == *drive_id);
            let drive = drive.ok_or_else(|| {
                CommandError::NotInSnapshot(format!("drives: the saved microVM has no drive {drive_id}"))
            })?;
            if let Some(path) = path_on_host {
                drive.path_on_host = Some(path.clone());
            }
            if let Some(overlay) = overlay {
                let mut overlay = overlay.clone();
                if overlay.layers.is_empty() && path_on_host.is_none() && self.is_fresh(drive_id) {
                    // The saved layers hold contents of the disk itself.
                    overlay.layers = drive.overlay.take().map(|saved| saved.layers).unwrap_or_default();
                }
                drive.overlay = Some(overlay);
            }
        }
        check_drives(&config.drives)?;
        self.check_overlays(load, &config)?;
        config.vsock = match (&config.vsock, &load.vsock_override, &here.vsock) {
            (Some(saved), Some(by), _) => Some(saved.overridden(by)),
            // PUT /vsock before a load says where the device's sockets are.
            (Some(_), None, Some(here)) => Some(here.clone()),
            (saved, None, None) => saved.clone(),
            (None, ..) => {
                let error = "vsock: the saved microVM has no such device".to_owned();
                return Err(CommandError::NotInSnapshot(error));
            }
        };
        // The saved microVM may be a fork's child without sockets. An override must be a path.
        load.vsock_override.as_ref().and(config.vsock.as_ref()).map_or(Ok(()), config::Vsock::check)?;
        apply_network_overrides(&mut config.network_interfaces, &load.network_overrides)?;
        Ok(config)
    }

    /// Whether the load creates the overlay of a drive.
    fn is_fresh(&self, drive_id: &str) -> bool {
        self.config.fresh_overlays.iter().any(|fresh| fresh == drive_id)
    }

    /// Creates the files of the overlays that belong to this load, each with the first free number.
    /// An overlay of an earlier load has that guest's writes, which do not fit the saved memory.
    fn create_fresh_overlays(
        &self,
        load: &SnapshotLoad,
        config: &mut FullVmConfig,
        files: &mut NewFiles,
    ) -> Result<(), CommandError> {
        let named: BTreeSet<_> =
            load.drives.iter().filter_map(|by| Some(by.overlay.as_ref()?.path.clone())).collect();
        for drive in config.drives.iter_mut().filter(|drive| self.is_fresh(&drive.drive_id)) {
            let Some(overlay) = &mut drive.overlay else { continue };
            let given = load.drives.iter().any(|by| by.drive_id == drive.drive_id && by.overlay.is_some());
            overlay.path = if given {
                files.given(&drive.drive_id, &overlay.path)?
            } else {
                files.numbered(&drive.drive_id, without_number(&overlay.path).as_ref(), &named)?
            };
        }
        Ok(())
    }

    /// Checks that the overlays with the guest's writes exist. An empty one would be another disk.
    fn check_overlays(&self, load: &SnapshotLoad, config: &FullVmConfig) -> Result<(), CommandError> {
        for drive in &config.drives {
            let Some(overlay) = &drive.overlay else { continue };
            let id = &drive.drive_id;
            let given = load.drives.iter().any(|by| by.drive_id == *id && by.overlay.is_some());
            if given || self.is_fresh(id) {
                continue;
            }
            if !std::fs::metadata(&overlay.path).is_ok_and(|file| file.len() > 0) {
                let source = format!("its overlay {} is missing or empty", overlay.path.display());
                return Err(CommandError::drive(id, source));
            }
        }
        Ok(())
    }

    /// Maps the guest's memory. With a page server, connects to it.
    fn memory(
        &self,
        load: &SnapshotLoad,
        settings: &Settings,
        token: &Token,
    ) -> Result<(GuestRam, Option<PageServer>), CommandError> {
        let (regions, track) = (&self.image.layout, load.track_dirty_pages);
        let huge_pages = settings.machine_config.huge_pages;
        match load.memory() {
            (MemoryBackendType::File, path) => {
                image::recover(path, Some(self.image.id), token).map_err(CommandError::snapshot)?;
                let path = snapshot::find(path, self.image.id);
                let ram = GuestRam::from_file_with(regions, &path, huge_pages, track, token)
                    .map_err(CommandError::snapshot)?;
                Ok((ram, None))
            }
            (MemoryBackendType::Uffd, socket) => {
                let (ram, server) = GuestRam::from_page_server(regions, socket, huge_pages, track)
                    .map_err(CommandError::snapshot)?;
                // The pages that this thread writes to tell the guest that it was cloned. It must
                // not wait for them later.
                let here = [layout::VM_GENERATION_ID, layout::VMCLOCK];
                server.probe(&here, PAGE_SERVER_TIMEOUT, token).map_err(CommandError::snapshot)?;
                Ok((ram, Some(server)))
            }
        }
    }
}

/// `STEM` of `STEM.NUMBER`.
fn without_number(path: &Path) -> PathBuf {
    let number = path.extension().and_then(|number| number.to_str());
    match number {
        Some(number) if number.bytes().all(|digit| digit.is_ascii_digit()) => path.with_extension(""),
        _ => path.to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_a_number_at_the_end_of_a_name_is_removed() {
        for (path, stem) in
            [("d/disk.img.s.state.12", "d/disk.img.s.state"), ("d/disk.img", "d/disk.img"), ("disk", "disk")]
        {
            assert_eq!(without_number(Path::new(path)), Path::new(stem));
        }
    }
}
