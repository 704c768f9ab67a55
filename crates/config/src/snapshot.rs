//! `/snapshot/create` and `/snapshot/load`.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::fork::once;
use crate::vm_config::null_is_default;
use crate::{ConfigError, DriveOverlay, HugePages, NetworkOverride, Overlay, VsockOverride};

/// The body of `PUT /snapshot/create`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// Where the state goes.
    pub snapshot_path: PathBuf,
    /// Where the memory goes.
    pub mem_file_path: PathBuf,
    /// All of the memory, or what was written since the last snapshot.
    #[serde(default, deserialize_with = "null_is_default")]
    pub snapshot_type: SnapshotType,
    /// Extension: the microVM need not be paused, and runs on while a fork of it writes.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub live: bool,
    /// Extension: where this microVM's own writes go from a live snapshot on, for drives where the default is not right.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub drives: Vec<DriveOverlay>,
}

/// How much of the memory is saved.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotType {
    /// All of it.
    #[default]
    Full,
    /// What was written since the last snapshot.
    Diff,
}

/// The body of `PUT /snapshot/load`.
#[expect(clippy::struct_excessive_bools, reason = "the API's fields are what they are")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// Where the state is.
    pub snapshot_path: PathBuf,
    /// Where the memory comes from.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemoryBackend>,
    /// Where the memory is: `mem_backend` of type File (deprecated).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_file_path: Option<PathBuf>,
    /// Whether pages that the guest writes are logged, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// The same by its name of old (deprecated); see [`SnapshotLoad::modernize`].
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub enable_diff_snapshots: Option<bool>,
    /// Whether it runs at once; otherwise it is paused.
    #[serde(default)]
    pub resume_vm: bool,
    /// Whether the guest's clock catches up with the time that has passed since it was saved.
    #[serde(default)]
    pub clock_realtime: bool,
    /// The pages that back guest memory.
    #[serde(default, deserialize_with = "null_is_default")]
    pub huge_pages: SnapshotHugePages,
    /// Extension: the pages that the guest came to first are recorded at the first restore, and filled in ahead of it at later ones. Not with
    /// a page server.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub prefetch: bool,
    /// The sockets of the vsock device; those that it had where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Network interfaces whose tap is another one now.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub network_overrides: Vec<NetworkOverride>,
    /// Extension: drives that are elsewhere now.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    pub drives: Vec<DriveOverride>,
}

/// Where memory comes from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// What is at `backend_path`.
    pub backend_type: MemoryBackendType,
    /// The memory file, or the socket of a page server.
    pub backend_path: PathBuf,
}

/// Kinds of memory back ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum MemoryBackendType {
    /// A memory file, mapped privately.
    File,
    /// A page server, which answers page faults.
    Uffd,
}

/// The pages that back a restored guest's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum SnapshotHugePages {
    /// As they were.
    #[default]
    Snapshot,
    /// Ordinary pages.
    None,
    /// Huge pages where the kernel can.
    Transparent,
    /// Pages of 2 MiB from the kernel's pool.
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// A drive that is elsewhere now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// The drive.
    pub drive_id: String,
    /// Where its file or block device is; where it was if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub path_on_host: Option<PathBuf>,
    /// Where its writes go, in place of the overlay that it had; as it was if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
}

/// What is wrong with a snapshot that is asked for.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SnapshotError {
    /// Memory from two places, or from none.
    #[error("exactly one of mem_backend and mem_file_path must be given")]
    MemoryBackends,
    /// A page server decides by itself what it sends first.
    #[error("prefetch is not possible with mem_backend Uffd: the page server decides what it sends first")]
    PrefetchWithServer,
    /// Both parts in one file.
    #[error("snapshot_path and mem_file_path are both {}", path.display())]
    OneFile {
        /// The file.
        path: PathBuf,
    },
    /// An overlay in the file of something else.
    #[error("drives[].overlay is {}, and so is {field}", path.display())]
    OverlayElsewhere {
        /// What else.
        field: &'static str,
        /// The file.
        path: PathBuf,
    },
    /// A paused microVM keeps its disks.
    #[error("drives is only possible with \"live\": true: otherwise the microVM keeps its disks")]
    DrivesNotLive,
}

impl SnapshotCreate {
    /// Checks that all files differ.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !self.live && !self.drives.is_empty() {
            return Err(SnapshotError::DrivesNotLive.into());
        }
        if self.snapshot_path == self.mem_file_path {
            return Err(SnapshotError::OneFile { path: self.snapshot_path.clone() }.into());
        }
        let overlays = || self.drives.iter().map(|drive| &drive.overlay);
        for (field, path) in [("snapshot_path", &self.snapshot_path), ("mem_file_path", &self.mem_file_path)]
        {
            if overlays().any(|overlay| overlay == path) {
                return Err(SnapshotError::OverlayElsewhere { field, path: path.clone() }.into());
            }
        }
        once("overlay", overlays().map(|overlay| overlay.display().to_string()))?;
        Ok(once("drive_id", self.drives.iter().map(|drive| drive.drive_id.clone()))?)
    }
}

impl SnapshotLoad {
    /// What these two files hold, paused, with nothing changed.
    pub fn of_files(state: PathBuf, memory: PathBuf) -> Self {
        SnapshotLoad {
            snapshot_path: state,
            mem_backend: Some(MemoryBackend { backend_type: MemoryBackendType::File, backend_path: memory }),
            mem_file_path: None,
            track_dirty_pages: false,
            enable_diff_snapshots: None,
            resume_vm: false,
            clock_realtime: false,
            huge_pages: SnapshotHugePages::default(),
            network_overrides: Vec::new(),
            prefetch: false,
            vsock_override: None,
            drives: Vec::new(),
        }
    }

    /// Says what is said by a name of old by its name of today. Whether anything deprecated was said at all.
    pub fn modernize(&mut self) -> bool {
        let old = self.enable_diff_snapshots.take();
        self.track_dirty_pages |= old.unwrap_or(false);
        old.is_some() || self.mem_file_path.is_some()
    }

    /// Checks that the memory comes from one place.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.mem_backend.is_some() == self.mem_file_path.is_some() {
            return Err(SnapshotError::MemoryBackends.into());
        }
        if self.prefetch && self.memory().0 == MemoryBackendType::Uffd {
            return Err(SnapshotError::PrefetchWithServer.into());
        }
        Ok(())
    }

    /// Where the memory comes from, if this was checked.
    pub fn memory(&self) -> (MemoryBackendType, &Path) {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(backend), _) => (backend.backend_type, &backend.backend_path),
            (None, path) => (MemoryBackendType::File, path.as_deref().unwrap_or(Path::new(""))),
        }
    }
}

impl SnapshotHugePages {
    /// The pages to use for memory that had `saved`.
    pub fn resolve(self, saved: HugePages) -> HugePages {
        match self {
            SnapshotHugePages::Snapshot => saved,
            SnapshotHugePages::None => HugePages::None,
            SnapshotHugePages::Transparent => HugePages::Transparent,
            SnapshotHugePages::Hugetlbfs2M => HugePages::Hugetlbfs2M,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(json: &str) -> Result<SnapshotLoad, String> {
        let mut load: SnapshotLoad = serde_json::from_str(json).map_err(|e| e.to_string())?;
        load.modernize();
        load.check().map_err(|e| e.to_string())?;
        Ok(load)
    }

    #[test]
    fn memory_comes_from_one_place_by_either_name() {
        let old = load(r#"{"snapshot_path":"s","mem_file_path":"m","enable_diff_snapshots":true}"#).unwrap();
        assert_eq!(old.memory(), (MemoryBackendType::File, Path::new("m")));
        assert!(old.track_dirty_pages);
        let new = load(r#"{"snapshot_path":"s","mem_backend":{"backend_type":"Uffd","backend_path":"u"}}"#)
            .unwrap();
        assert_eq!(new.memory(), (MemoryBackendType::Uffd, Path::new("u")));
        for bad in [
            r#"{"snapshot_path":"s"}"#,
            r#"{"snapshot_path":"s","mem_file_path":"m","mem_backend":{"backend_type":"File","backend_path":"m"}}"#,
        ] {
            assert!(load(bad).unwrap_err().contains("exactly one"));
        }
    }

    #[test]
    fn dirty_pages_are_tracked_if_either_name_says_so_and_the_old_one_is_deprecated() {
        for (fields, tracked, deprecated) in [
            (r#""track_dirty_pages":true"#, true, false),
            (r#""enable_diff_snapshots":true"#, true, true),
            (r#""enable_diff_snapshots":false,"track_dirty_pages":true"#, true, true),
            (r#""enable_diff_snapshots":true,"track_dirty_pages":false"#, true, true),
            (r#""enable_diff_snapshots":false"#, false, true),
        ] {
            let json = format!(
                r#"{{"snapshot_path":"s","mem_backend":{{"backend_type":"File","backend_path":"m"}},{fields}}}"#
            );
            let mut load: SnapshotLoad = serde_json::from_str(&json).unwrap();
            assert_eq!((load.modernize(), load.track_dirty_pages), (deprecated, tracked), "{fields}");
        }
    }

    #[test]
    fn a_snapshot_is_full_unless_asked_and_has_two_files() {
        let create = |json: &str| serde_json::from_str::<SnapshotCreate>(json).unwrap();
        let full = create(r#"{"snapshot_path":"s","mem_file_path":"m"}"#);
        assert_eq!((full.snapshot_type, full.live), (SnapshotType::Full, false));
        full.check().unwrap();
        assert!(create(r#"{"snapshot_path":"s","mem_file_path":"s"}"#).check().is_err());
        create(r#"{"snapshot_path":"s","mem_file_path":"m","snapshot_type":null,"drives":null}"#)
            .check()
            .unwrap();
    }

    #[test]
    fn a_live_snapshot_may_say_where_writes_go_and_names_no_file_twice() {
        let check = |live: bool, overlays: &[(&str, &str)]| {
            let drives =
                overlays.iter().map(|(id, path)| format!(r#"{{"drive_id":"{id}","overlay":"{path}"}}"#));
            let drives = drives.collect::<Vec<_>>().join(",");
            let json =
                format!(r#"{{"snapshot_path":"s","mem_file_path":"m","live":{live},"drives":[{drives}]}}"#);
            serde_json::from_str::<SnapshotCreate>(&json).unwrap().check().map_err(|e| e.to_string())
        };
        check(true, &[("a", "o"), ("b", "p")]).unwrap();
        for (live, overlays, named) in [
            (false, &[("a", "o")][..], "live"),
            (true, &[("a", "s")], "overlay is s, and so is snapshot_path"),
            (true, &[("a", "m")], "overlay is m, and so is mem_file_path"),
            (true, &[("a", "o"), ("b", "o")], "overlay o is given twice"),
            (true, &[("a", "o"), ("a", "p")], "drive_id a is given twice"),
        ] {
            let error = check(live, overlays).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
