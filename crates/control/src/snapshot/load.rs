//! `PUT /snapshot/load`.

use config::{DriveOverride, FullVmConfig, MemoryBackendType, SnapshotLoad, check_drives};
use machine::chipset::ClockAfter;
use machine::{Paused, Restore};
use memory::GuestRam;

use super::Saved;
use crate::CommandError;
use crate::controller::{Controller, Host, Loaded, State, open_disks};

impl<H: Host> Controller<H> {
    /// Goes on with a microVM that was saved.
    pub(crate) fn load_snapshot(&mut self, load: &SnapshotLoad) -> Result<(), CommandError> {
        if let Some(what) = self.configured() {
            return Err(CommandError::new(format_args!(
                "PUT /snapshot/load needs a microVM that nothing was set for, and {what} was"
            )));
        }
        let saved = Saved::open(&load.snapshot_path).map_err(CommandError::new)?;
        let config = saved.config(load, &self.config)?;
        let disks = open_disks(&config.drives)?;
        let ram = saved.memory(load, &config)?;
        let loaded = Loaded { config, disks };
        let machine = Paused::restore(Restore {
            config: &loaded.config.machine_config,
            state: &saved.machine,
            ram,
            serial: self.serial_for(&loaded.config)?,
            // Where the guest found its devices, whatever this process was told.
            devices: loaded.devices(saved.config.pci),
            clock: if load.clock_realtime { ClockAfter::CatchesUp } else { ClockAfter::Continues },
            events: self.events.try_clone().map_err(CommandError::new)?,
        })
        .map_err(|e| CommandError::new(format_args!("cannot go on with the saved microVM: {e}")))?;
        (self.config, self.disks) = (loaded.config, loaded.disks);
        self.platform.pci = saved.config.pci;
        self.host.guest_starts(self.serial_output.is_none());
        self.state = if load.resume_vm {
            State::Running(machine.resume().map_err(CommandError::new)?)
        } else {
            State::Paused(machine)
        };
        log::info!("the guest of {} goes on", load.snapshot_path.display());
        Ok(())
    }

    /// What was set that a snapshot brings with it.
    fn configured(&self) -> Option<&'static str> {
        let default = FullVmConfig::default();
        let config = &self.config;
        if config.boot_source.is_some() {
            Some("/boot-source")
        } else if config.machine_config != default.machine_config {
            Some("/machine-config")
        } else if !config.drives.is_empty() {
            Some("/drives")
        } else if config.entropy.is_some() {
            Some("/entropy")
        } else {
            None
        }
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
                drive.overlay = Some(overlay.clone());
            }
        }
        check_drives(&config.drives)?;
        Ok(config)
    }

    fn memory(&self, load: &SnapshotLoad, config: &FullVmConfig) -> Result<GuestRam, CommandError> {
        let (huge_pages, track) = (config.machine_config.huge_pages, load.track_dirty_pages);
        match load.memory() {
            (MemoryBackendType::File, path) => {
                let path = snapshot::find(path, self.image.id);
                GuestRam::from_file(&self.image.layout, &path, huge_pages, track).map_err(CommandError::new)
            }
            (MemoryBackendType::Uffd, _) => Err(CommandError::new("mem_backend Uffd: not yet")),
        }
    }
}
