//! `PUT /snapshot/create`.

use std::time::{SystemTime, UNIX_EPOCH};

use config::{SnapshotCreate, SnapshotType};
use machine::{MachineState, Paused};
use memory::image::{self, ImageInfo, Observer, Written};
use memory::{GuestRam, PageSet};
use snapshot::{Header, Staged, Writer};

use super::{KIND, SavedConfig};
use crate::CommandError;
use crate::controller::{Controller, Host, State};

/// All that goes into a snapshot but the memory's contents.
pub(crate) struct Picture {
    pub(crate) config: SavedConfig,
    pub(crate) machine: MachineState,
    pub(crate) created_by: String,
    /// The pages of a Diff; `None` for a Full snapshot.
    pub(crate) pages: Option<PageSet>,
}

impl<H: Host> Controller<H> {
    /// Saves the paused microVM.
    pub(crate) fn create_snapshot(&mut self, create: &SnapshotCreate) -> Result<(), CommandError> {
        let State::Paused(machine) = &self.state else {
            return Err(CommandError::new(format_args!(
                "PUT /snapshot/create needs a paused microVM, and it is {} (live snapshots need not: \"live\": true)",
                self.phase().name()
            )));
        };
        self.sync_disks()?;
        let picture = self.picture(machine, create.snapshot_type)?;
        let ram = machine.ram().clone();
        let written = picture.write(&ram, create, &());
        if let (Err(_), Some(pages)) = (&written, &picture.pages) {
            ram.put_back(pages);
        }
        let (memory, state) = written?;
        snapshot::commit_pair(memory, state).map_err(|error| {
            if let Some(pages) = &picture.pages {
                ram.put_back(pages);
            }
            CommandError::new(error)
        })
    }

    /// Takes the picture of a machine that stands still. The pages that were written so far count as saved from here on.
    fn picture(&self, machine: &Paused, kind: SnapshotType) -> Result<Picture, CommandError> {
        let state = machine.save().map_err(CommandError::new)?;
        // Also for a Full snapshot: the next Diff is on top of this one.
        let dirty = machine.take_dirty_pages().map_err(CommandError::new)?;
        let pages = match kind {
            SnapshotType::Full => None,
            SnapshotType::Diff => match dirty {
                Some(dirty) => Some(dirty),
                None => Some(machine.ram().own_pages().map_err(CommandError::new)?),
            },
        };
        Ok(Picture {
            config: SavedConfig {
                config: self.config.clone(),
                pci: self.platform.pci,
                id: self.identity.id.clone(),
            },
            machine: state,
            created_by: format!("{} {}", self.identity.app_name, self.identity.version),
            pages,
        })
    }

    /// Lets the disks' files hold what the guest wrote.
    fn sync_disks(&self) -> Result<(), CommandError> {
        for (drive, disk) in self.config.drives.iter().zip(&self.disks) {
            disk.sync().map_err(|e| {
                CommandError::new(format_args!("drive {}: cannot sync its disk: {e}", drive.drive_id))
            })?;
        }
        Ok(())
    }
}

impl Picture {
    /// Writes both files, whole and on disk, under temporary names.
    pub(crate) fn write(
        &self,
        ram: &GuestRam,
        create: &SnapshotCreate,
        observer: &dyn Observer,
    ) -> Result<(Staged, Staged), CommandError> {
        let Written { file: memory, info, .. } = match &self.pages {
            None => image::write_full(ram, &create.mem_file_path, observer),
            Some(pages) => image::write_diff(ram, &create.mem_file_path, pages, observer),
        }
        .map_err(CommandError::new)?;
        let state = self.stage_state(&info, create).map_err(CommandError::new)?;
        Ok((memory, state))
    }

    fn stage_state(&self, info: &ImageInfo, create: &SnapshotCreate) -> Result<Staged, snapshot::WriteError> {
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_millis();
        let now = u64::try_from(now).unwrap_or(u64::MAX);
        let mut writer = Writer::new(&Header::new(KIND, &self.created_by, now))?;
        writer.put(&self.config)?;
        writer.put(info)?;
        writer.put(&self.machine)?;
        writer.stage(&create.snapshot_path)
    }
}
