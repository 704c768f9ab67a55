//! `PUT /snapshot/load`.
//!
//! What waits for the host (files, networks, a page server, KVM) is a [task](crate::task):
//! questions are answered meanwhile, and a load that is cancelled leaves a process that is ready
//! for another.

use std::collections::BTreeSet;
use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use block::disk::{Disk, FileLocks};
use config::{
    DriveOverride, FullVmConfig, MemoryBackendType, SnapshotLoad, apply_network_overrides, check_drives,
};
use machine::chipset::ClockAfter;
use machine::{Paused, Restore, layout};
use memory::GuestRam;
use memory::image;
use memory::page_server::PageServer;
use net::NetBackend;

use super::Saved;
use super::ahead::Ahead;
use crate::CommandError;
use crate::controller::{Controller, Host, Loaded, State, open_disks, open_networks};
use crate::fork::files::NewFiles;
use crate::task::{self, Token};
use crate::vsock::VsockSockets;

/// How long a page server may take to answer each of its first page faults.
const PAGE_SERVER_PATIENCE: Duration = Duration::from_secs(10);

impl<H: Host> Controller<H> {
    /// Goes on with a microVM that was saved.
    pub(crate) fn load_snapshot(&mut self, load: &SnapshotLoad) -> Result<(), CommandError> {
        if let Some(command) = self.boot_command {
            return Err(CommandError::new(format_args!(
                "PUT /snapshot/load: {command} has configured a microVM to boot; load the snapshot in a new process"
            )));
        }
        let (of_task, here) = (load.clone(), self.config.clone());
        let locks = self.disk_locks.clone();
        let opened =
            self.task(Some(&job_of(load)), move |token| Opened::open(&of_task, &here, &locks, token))??;
        let Opened { saved, config, files, disks, networks, ram, page_server, mut ahead } = opened;
        let serial = self.serial_for(&config)?;
        let events = self.events.try_clone().map_err(CommandError::new)?;
        // Those of this process, if it has set some up already.
        let made_here = self.config.vsock.is_some() && load.vsock_override.is_none();
        let vsock = if made_here {
            self.vsock.take()
        } else {
            config.vsock.as_ref().map(VsockSockets::of).transpose().map_err(CommandError::new)?.flatten()
        };
        let loaded = Loaded { config, disks, networks, vsock };
        let metadata = self.metadata.with_way(loaded.config.mmds_config.as_ref());
        // Where the guest found its devices, whatever this process was told.
        let pci = saved.config.pci;
        let devices = loaded.devices(metadata.service(&self.identity.id), pci);
        let machine_config = loaded.config.machine_config.clone();
        let clock = if load.clock_realtime { ClockAfter::CatchesUp } else { ClockAfter::Continues };
        let restored = self.task(Some(&job_of(load)), move |token| {
            token.check()?;
            Paused::restore(Restore {
                config: &machine_config,
                state: &saved.machine,
                ram,
                page_server,
                serial,
                devices,
                clock,
                events,
                stop: Some(token.as_fd()),
            })
            .map_err(|e| CommandError::new(format_args!("cannot go on with the saved microVM: {e}")))
        });
        let machine = match restored.map_err(CommandError::from).flatten() {
            Ok(machine) => machine,
            Err(error) => {
                if made_here {
                    self.vsock = loaded.vsock;
                }
                return Err(error);
            }
        };
        // The machine has the networks: whose network goes away closes it.
        let Loaded { config, disks, vsock, .. } = loaded;
        (self.config, self.disks, self.vsock) = (config, disks, vsock);
        files.keep(|path| self.has_overlay(path));
        if load.resume_vm {
            ahead.iter_mut().for_each(Ahead::guest_runs);
        }
        (self.metadata, self.ahead) = (metadata, ahead);
        self.platform.pci = pci;
        self.host.guest_starts(self.serial_output.is_none());
        self.state = if load.resume_vm {
            State::Running(machine.resume().map_err(CommandError::new)?)
        } else {
            State::Paused(machine)
        };
        log::info!("the guest of {} goes on", load.snapshot_path.display());
        Ok(())
    }
}

/// What clients see of a load.
fn job_of(load: &SnapshotLoad) -> task::Job {
    let (_, memory) = load.memory();
    task::Job { snapshot_path: load.snapshot_path.clone(), mem_file_path: memory.to_owned() }
}

/// A saved microVM with everything that it needs open, before there is a machine. Dropping it
/// closes all of it and removes the overlays that were made for it.
struct Opened {
    saved: Saved,
    config: FullVmConfig,
    disks: Vec<Disk>,
    // After the disks, so that the files are removed when they are closed.
    files: NewFiles,
    networks: Vec<NetBackend>,
    ram: GuestRam,
    page_server: Option<PageServer>,
    ahead: Option<Ahead>,
}

impl Opened {
    /// Reads the state file and opens what it and `load` name. `here` is what this process was told
    /// already.
    fn open(
        load: &SnapshotLoad,
        here: &FullVmConfig,
        locks: &FileLocks,
        token: &Token,
    ) -> Result<Self, CommandError> {
        let saved = Saved::load(&load.snapshot_path).map_err(CommandError::new)?;
        token.check()?;
        let mut config = saved.config(load, here)?;
        // Before the disks, so that it goes after them.
        let mut files = NewFiles::default();
        saved.make_fresh_overlays(load, &mut config, &mut files)?;
        let disks = open_disks(&config.drives, locks, false)?;
        let networks = open_networks(&config.network_interfaces)?;
        token.check()?;
        let (ram, page_server) = saved.memory(load, &config, token)?;
        let ahead = match load.memory() {
            (MemoryBackendType::File, path) if load.prefetch => {
                let path = snapshot::find(path, saved.image.id);
                Some(Ahead::begin(&ram, &path, &saved.image))
            }
            _ => None,
        };
        token.check()?;
        Ok(Opened { saved, config, disks, files, networks, ram, page_server, ahead })
    }
}

impl Saved {
    /// What the microVM is now: as it was saved, with what `load` says and what this process was told already.
    fn config(&self, load: &SnapshotLoad, here: &FullVmConfig) -> Result<FullVmConfig, CommandError> {
        let mut config = self.config.config.clone();
        config.logger.clone_from(&here.logger);
        config.serial.clone_from(&here.serial);
        config.machine_config.track_dirty_pages = load.track_dirty_pages;
        config.machine_config.huge_pages = load.huge_pages.resolve(self.image.huge_pages);
        config.machine_config.check()?;
        for DriveOverride { drive_id, path_on_host, overlay } in &load.drives {
            let drive = config.drives.iter_mut().find(|drive| drive.drive_id == *drive_id);
            let drive = drive.ok_or_else(|| {
                CommandError::new(format_args!("drives: the saved microVM has no drive {drive_id}"))
            })?;
            if let Some(path) = path_on_host {
                drive.path_on_host = Some(path.clone());
            }
            if let Some(overlay) = overlay {
                let mut overlay = overlay.clone();
                if overlay.layers.is_empty() && path_on_host.is_none() && self.is_fresh(drive_id) {
                    // It is the disk's own contents that are in them.
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
            (None, ..) => return Err(CommandError::new("vsock: the saved microVM has no such device")),
        };
        // What was saved may be a fork's child without sockets; what is said now must be a path.
        load.vsock_override.as_ref().and(config.vsock.as_ref()).map_or(Ok(()), config::Vsock::check)?;
        apply_network_overrides(&mut config.network_interfaces, &load.network_overrides)?;
        Ok(config)
    }

    /// Whether a drive begins on an overlay that is made at the load.
    fn is_fresh(&self, drive_id: &str) -> bool {
        self.config.fresh_overlays.iter().any(|fresh| fresh == drive_id)
    }

    /// Makes the files of overlays that are made at the load. Each load has others, whose number is the first that is free: what an earlier one's
    /// guest wrote does not belong to the memory that this one goes on with.
    fn make_fresh_overlays(
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

    /// An overlay that held the guest's writes must be there: one that was made anew would be another disk.
    fn check_overlays(&self, load: &SnapshotLoad, config: &FullVmConfig) -> Result<(), CommandError> {
        for drive in &config.drives {
            let Some(overlay) = &drive.overlay else { continue };
            let id = &drive.drive_id;
            let given = load.drives.iter().any(|by| by.drive_id == *id && by.overlay.is_some());
            if given || self.is_fresh(id) {
                continue;
            }
            if !std::fs::metadata(&overlay.path).is_ok_and(|file| file.len() > 0) {
                return Err(CommandError::new(format_args!(
                    "drive {id}: its overlay {} is missing or empty",
                    overlay.path.display()
                )));
            }
        }
        Ok(())
    }

    /// The memory, and who sends it.
    fn memory(
        &self,
        load: &SnapshotLoad,
        config: &FullVmConfig,
        token: &Token,
    ) -> Result<(GuestRam, Option<PageServer>), CommandError> {
        let (regions, track) = (&self.image.layout, load.track_dirty_pages);
        let huge_pages = config.machine_config.huge_pages;
        match load.memory() {
            (MemoryBackendType::File, path) => {
                image::recover(path, Some(self.image.id), token).map_err(CommandError::new)?;
                let path = snapshot::find(path, self.image.id);
                let ram = GuestRam::from_file_with(regions, &path, huge_pages, track, token)
                    .map_err(CommandError::new)?;
                Ok((ram, None))
            }
            (MemoryBackendType::Uffd, socket) => {
                let (ram, server) = GuestRam::from_page_server(regions, socket, huge_pages, track)
                    .map_err(CommandError::new)?;
                // Those that this thread comes to when it tells the guest that it is another one: it must not wait for them.
                let here = [layout::VM_GENERATION_ID, layout::VMCLOCK];
                server.probe(&here, PAGE_SERVER_PATIENCE, token).map_err(CommandError::new)?;
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
    fn only_a_number_at_the_end_of_a_name_is_left_out() {
        for (path, stem) in
            [("d/disk.img.s.state.12", "d/disk.img.s.state"), ("d/disk.img", "d/disk.img"), ("disk", "disk")]
        {
            assert_eq!(without_number(Path::new(path)), Path::new(stem));
        }
    }
}
