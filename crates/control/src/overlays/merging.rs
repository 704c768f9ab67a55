//! Merging the layers of a drive into one file, while the guest runs and without pausing it.
//!
//! # How
//!
//! After each fork or live snapshot, also one that failed, a thread copies what the layers of a
//! drive hold into a new file, if there are [`MANY_LAYERS`] or more. Forks and live snapshots add
//! layers meanwhile. The first one after the copy is complete puts the new file in the place of
//! exactly the copied layers, for the microVM and for its children or loads. Where the microVM
//! keeps its overlay, because it has not written to it, it keeps the layers too, until a later fork
//! or live snapshot.
//!
//! # Invariants
//!
//! - A configuration, here, of a child or in a snapshot, names the new file only once it is
//!   complete and on the disk.
//! - A file that no configuration names is removed: by the thread when the copy fails, else with
//!   the [`Merge`]. It is removed under the lock of its [`Progress`], so that a name is never
//!   removed twice, when it may already be the name of another file.
//! - fork(2) copies the lock and not the thread. So a child never looks at its parent's merges:
//!   they are in its parent's `Drives`, which it leaves alone and never drops. A child starts with
//!   no merges, and merges its own layers.
//! - The thread keeps the layers and the new file open, which nothing else writes to or closes. Its
//!   errors go to the log: no guest needs the merge.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use block::disk::{Disk, LayerMerge};
use config::Drive;
use sync::locked;

use super::files::NewFiles;
use super::plan::stem;
use crate::CommandError;

/// The number of layers from which on they are merged: each of them takes memory, and time at each
/// request.
const MANY_LAYERS: usize = 16;

/// The merges of a microVM, at most one of each drive.
#[derive(Debug, Default)]
pub(crate) struct Merges(Vec<Merge>);

/// The merge of one drive's layers. Dropping it gives it up, and removes its file unless a
/// configuration names it.
#[derive(Debug)]
struct Merge {
    /// The drive's id and disk when the merge started.
    drive_id: String,
    disk: Option<PathBuf>,
    /// The layers that are merged, from the bottom up.
    layers: Vec<PathBuf>,
    /// The new file.
    path: PathBuf,
    progress: Arc<Mutex<Progress>>,
}

/// How far a merge is. Its lock is never held across code that can panic.
///
/// A thread that panicked leaves `Copying`, and the file is never used.
#[derive(Debug)]
enum Progress {
    /// The file is no complete overlay yet.
    Copying(NewFiles),
    /// The file is complete, and no configuration names it.
    Complete(NewFiles),
    /// The file is complete, and configurations name it.
    Used,
    /// The merge failed or was given up, and the file is removed.
    Gone,
}

impl Merges {
    /// Returns `drive` with the file of a complete merge in the place of the layers that it holds.
    pub(crate) fn applied_to(&self, drive: &Drive) -> Drive {
        let mut drive = drive.clone();
        let merge = self.0.iter().find(|merge| merge.is_of(&drive) && merge.is_complete());
        if let (Some(merge), Some(overlay)) = (merge, &mut drive.overlay) {
            overlay.layers.splice(..merge.layers.len(), [merge.path.clone()]);
        }
        drive
    }

    /// Keeps the complete files that a configuration names from now on.
    pub(crate) fn keep(&self, is_named: impl Fn(&Path) -> bool) {
        for merge in self.0.iter().filter(|merge| is_named(&merge.path)) {
            let mut progress = locked(&merge.progress);
            *progress = match std::mem::replace(&mut *progress, Progress::Gone) {
                Progress::Complete(files) => {
                    files.keep(|_| true);
                    Progress::Used
                }
                other => other,
            };
        }
    }

    /// Cancels the merge of a drive that gets another disk.
    pub(crate) fn cancel(&mut self, drive_id: &str) {
        self.0.retain(|merge| merge.drive_id != drive_id);
    }

    /// Starts to merge the layers of `drive` of the microVM `vm_id`, if there are many, and they
    /// are not being merged already.
    pub(crate) fn begin(&mut self, vm_id: &str, drive: &Drive, disk: &Disk) {
        self.0.retain(|merge| merge.drive_id != drive.drive_id || (merge.is_of(drive) && !merge.is_gone()));
        let is_known = self.0.iter().any(|merge| merge.drive_id == drive.drive_id);
        if is_known || disk.is_read_only() || layers(drive).len() < MANY_LAYERS {
            return;
        }
        match Merge::begin(vm_id, drive, disk) {
            Ok(merge) => self.0.push(merge),
            Err(error) => log::warn!("{error}; its layers are not merged"),
        }
    }
}

impl Merge {
    fn begin(vm_id: &str, drive: &Drive, disk: &Disk) -> Result<Self, CommandError> {
        let (merge, copy) = Self::prepare(vm_id, drive, disk)?;
        let (drive_id, path, progress) =
            (drive.drive_id.clone(), merge.path.clone(), Arc::clone(&merge.progress));
        sync::thread::spawn("io merge", None, move || run(&drive_id, &path, copy, &progress))
            .map_err(|e| CommandError::drive(&drive.drive_id, format!("cannot start a thread: {e}")))?;
        Ok(merge)
    }

    /// Opens all layers and the new file. Nothing is copied yet.
    fn prepare(vm_id: &str, drive: &Drive, disk: &Disk) -> Result<(Self, LayerMerge), CommandError> {
        let mut files = NewFiles::default();
        let path = files.numbered(&drive.drive_id, &stem(drive, vm_id)?, &BTreeSet::new())?;
        let copy = disk.merge_layers(&path).map_err(|e| CommandError::drive(&drive.drive_id, e))?;
        let merge = Merge {
            drive_id: drive.drive_id.clone(),
            disk: drive.path_on_host.clone(),
            layers: layers(drive).to_vec(),
            path,
            progress: Arc::new(Mutex::new(Progress::Copying(files))),
        };
        Ok((merge, copy))
    }

    /// Whether the lowest layers of `drive` are those of this merge.
    fn is_of(&self, drive: &Drive) -> bool {
        self.drive_id == drive.drive_id
            && self.disk == drive.path_on_host
            && layers(drive).starts_with(&self.layers)
    }

    fn is_complete(&self) -> bool {
        matches!(*locked(&self.progress), Progress::Complete(_) | Progress::Used)
    }

    fn is_gone(&self) -> bool {
        matches!(*locked(&self.progress), Progress::Gone)
    }
}

impl Drop for Merge {
    fn drop(&mut self) {
        // The thread sees it before it copies its next piece.
        *locked(&self.progress) = Progress::Gone;
    }
}

/// The body of the thread.
fn run(drive_id: &str, path: &Path, copy: LayerMerge, progress: &Mutex<Progress>) {
    let shown = path.display();
    let copied = copy.run(&|| matches!(*locked(progress), Progress::Copying(_)));
    {
        let mut progress = locked(progress);
        let Progress::Copying(files) = std::mem::replace(&mut *progress, Progress::Gone) else { return };
        if copied.is_ok() {
            *progress = Progress::Complete(files);
        }
    }
    match copied {
        Ok(()) => log::info!("drive {drive_id}: its layers were merged into {shown}"),
        Err(error) => log::warn!("drive {drive_id}: its layers cannot be merged: {error}"),
    }
}

fn layers(drive: &Drive) -> &[PathBuf] {
    drive.overlay.as_ref().map_or(&[], |overlay| &overlay.layers)
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::os::unix::fs::FileExt;

    use block::disk::DiskOptions;
    use config::{IoEngine, Overlay};
    use tempfile::TempDir;

    use super::*;

    /// A disk of 1 MiB with `count` layers, each of which holds the first sectors, below an
    /// overlay.
    struct Layered {
        dir: TempDir,
        drive: Drive,
        disk: Disk,
    }

    impl Layered {
        fn new(count: usize) -> Self {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("disk");
            File::create(&base).unwrap().set_len(1 << 20).unwrap();
            let json = format!(
                r#"{{"drive_id": "d", "path_on_host": "{}", "is_root_device": false}}"#,
                base.display()
            );
            let mut drive: Drive = serde_json::from_str(&json).unwrap();
            drive.io_engine = Some(IoEngine::Sync);
            let mut layers = Vec::new();
            for number in 0..count {
                let path = dir.path().join(format!("layer{number}"));
                Self::open(&mut drive, &path, &layers);
                let file = File::options().write(true).open(&path).unwrap();
                file.write_all_at(&[0xff], 8192).unwrap();
                layers.push(path);
            }
            let disk = Self::open(&mut drive, &dir.path().join("top"), &layers);
            Layered { dir, drive, disk }
        }

        fn open(drive: &mut Drive, top: &Path, layers: &[PathBuf]) -> Disk {
            drive.overlay = Some(Overlay { path: top.into(), layers: layers.to_vec(), size_mib: None });
            Disk::open(&DiskOptions::of(drive)).unwrap()
        }

        /// A merge and the body of its thread.
        fn prepared(&self) -> (Merges, impl FnOnce() + use<>) {
            let (merge, copy) = Merge::prepare("vm", &self.drive, &self.disk).unwrap();
            let (path, progress) = (merge.path.clone(), Arc::clone(&merge.progress));
            (Merges(vec![merge]), move || run("d", &path, copy, &progress))
        }

        fn merged(&self) -> PathBuf {
            self.dir.path().join("disk.vm.1")
        }
    }

    fn with_layers(drive: &Drive, layers: &[PathBuf]) -> Drive {
        let mut drive = drive.clone();
        drive.overlay.as_mut().unwrap().layers = layers.to_vec();
        drive
    }

    #[test]
    fn complete_merge_replaces_exactly_its_layers() {
        let layered = Layered::new(3);
        let (merges, thread) = layered.prepared();
        let drive = &layered.drive;
        assert_eq!(merges.applied_to(drive), *drive, "the merge is not complete");
        thread();
        let merged = layered.merged();
        assert_eq!(layers(&merges.applied_to(drive)), std::slice::from_ref(&merged));
        let more = [layers(drive), &["x".into()]].concat();
        let stacked = with_layers(drive, &more);
        assert_eq!(layers(&merges.applied_to(&stacked)), [merged.clone(), "x".into()]);
        for other in [
            with_layers(drive, &layers(drive)[..2]),
            with_layers(drive, &layers(drive)[1..]),
            with_layers(drive, &[merged, "x".into()]),
            Drive { drive_id: "e".into(), ..drive.clone() },
            Drive { path_on_host: Some("/x".into()), ..drive.clone() },
            Drive { overlay: None, ..drive.clone() },
        ] {
            assert_eq!(merges.applied_to(&other), other);
        }
        // The overlay that was created on the layers still opens.
        drop(layered.disk);
        Disk::open(&DiskOptions::of(&merges.applied_to(drive))).unwrap();
    }

    #[test]
    fn merged_file_is_kept_if_named_and_removed_otherwise() {
        let layered = Layered::new(3);
        let merged = layered.merged();
        let (merges, thread) = layered.prepared();
        thread();
        merges.keep(|_| false);
        drop(merges);
        assert!(!merged.exists(), "no configuration named it");
        let (merges, thread) = layered.prepared();
        thread();
        merges.keep(|path| path == merged);
        assert_eq!(
            layers(&merges.applied_to(&layered.drive)),
            std::slice::from_ref(&merged),
            "others may still use it"
        );
        drop(merges);
        assert!(merged.exists());
    }

    #[test]
    fn abandoned_merge_leaves_a_new_file_of_the_same_name() {
        let layered = Layered::new(3);
        let merged = layered.merged();
        let (mut merges, thread) = layered.prepared();
        merges.cancel("e");
        assert!(merged.exists());
        merges.cancel("d");
        assert!(!merged.exists());
        std::fs::write(&merged, "").unwrap();
        thread();
        assert_eq!(std::fs::read(&merged).unwrap(), b"");
    }

    #[test]
    fn failed_merge_leaves_no_file_and_is_tried_again() {
        let layered = Layered::new(MANY_LAYERS);
        let (mut merges, thread) = layered.prepared();
        let base = File::options().write(true).open(layered.drive.path_on_host.as_ref().unwrap()).unwrap();
        base.set_len(0).unwrap();
        thread();
        assert!(!layered.merged().exists() && merges.0[0].is_gone());
        assert_eq!(merges.applied_to(&layered.drive), layered.drive);
        base.set_len(1 << 20).unwrap();
        merges.begin("vm", &layered.drive, &layered.disk);
        assert!(merges.0.len() == 1 && !merges.0[0].is_gone());
    }

    #[test]
    fn only_many_layers_are_merged_and_only_once() {
        let few = Layered::new(MANY_LAYERS - 1);
        let mut merges = Merges::default();
        merges.begin("vm", &few.drive, &few.disk);
        assert!(merges.0.is_empty() && !few.merged().exists());
        let many = Layered::new(MANY_LAYERS);
        merges.begin("vm", &many.drive, &many.disk);
        assert_eq!(merges.0[0].path, many.merged());
        let more = with_layers(&many.drive, &[layers(&many.drive), &["x".into()]].concat());
        merges.begin("vm", &more, &many.disk);
        assert_eq!(merges.0.len(), 1, "the drive is being merged already");
        // A drive on the merged file has few layers.
        merges.begin("vm", &with_layers(&many.drive, &[many.merged(), "x".into()]), &many.disk);
        assert!(merges.0.is_empty());
    }
}
