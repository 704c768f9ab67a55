//! `/snapshot/create` and `/snapshot/load`: requests to save and to restore a microVM.

use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::checks;
use crate::drive::{DriveOverlay, Overlay};
use crate::error::{ConfigError, SnapshotError};
use crate::machine_config::HugePages;
use crate::network_override::NetworkOverride;
use crate::serde_helpers::null_is_default;
use crate::vsock::VsockOverride;

/// The body of `PUT /snapshot/create`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotCreate {
    /// State file to write.
    pub snapshot_path: PathBuf,
    /// Memory file to write.
    pub mem_file_path: PathBuf,
    /// Which pages of memory to write.
    #[serde(default, deserialize_with = "null_is_default")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::null_is_default::<SnapshotType>"))]
    pub snapshot_type: SnapshotType,
    /// Whether the microVM may run meanwhile: a forked process writes the snapshot. An extension.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    #[cfg_attr(feature = "schema", schemars(extend("default" = false), extend("x-vesta-extension" = true)))]
    pub live: bool,
    /// New overlays of this microVM's drives after a live snapshot. Writable drives that are not
    /// listed get a default path. An extension.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::null_is_default::<Vec<DriveOverlay>>", extend("x-vesta-extension" = true)))]
    pub drives: Vec<DriveOverlay>,
}

/// Which pages of memory a snapshot has.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum SnapshotType {
    /// All pages.
    #[default]
    Full,
    /// Pages written since the last snapshot.
    Diff,
}

/// The body of `PUT /snapshot/load`.
#[expect(clippy::struct_excessive_bools, reason = "the API's fields are what they are")]
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct SnapshotLoad {
    /// State file to read.
    pub snapshot_path: PathBuf,
    /// Source of the memory. Either this or `mem_file_path` must be given.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub mem_backend: Option<MemoryBackend>,
    /// Memory file: the same as a `mem_backend` of type File. Deprecated.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("deprecated" = true)))]
    pub mem_file_path: Option<PathBuf>,
    /// Whether pages that the guest writes are tracked, for diff snapshots.
    #[serde(default)]
    pub track_dirty_pages: bool,
    /// Old name of `track_dirty_pages`. Deprecated. Pages are tracked if either is true.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("deprecated" = true)))]
    pub enable_diff_snapshots: Option<bool>,
    /// Whether the microVM resumes after the restore; otherwise it is paused.
    #[serde(default)]
    pub resume_vm: bool,
    /// Whether the guest's clock advances by the time that has passed since the save.
    #[serde(default)]
    pub clock_realtime: bool,
    /// Pages that back guest memory.
    #[serde(default, deserialize_with = "null_is_default")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::null_is_default::<SnapshotHugePages>")
    )]
    pub huge_pages: SnapshotHugePages,
    /// Whether to prefetch the working set: the first restore records the pages that the guest uses
    /// first, later restores fill them in early. Impossible with a page server. An extension.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    #[cfg_attr(feature = "schema", schemars(extend("default" = false), extend("x-vesta-extension" = true)))]
    pub prefetch: bool,
    /// Sockets of the vsock device; unchanged if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub vsock_override: Option<VsockOverride>,
    /// Network interfaces that get another tap.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::null_is_default::<Vec<NetworkOverride>>")
    )]
    pub network_overrides: Vec<NetworkOverride>,
    /// Drives that get another path. An extension.
    #[serde(default, skip_serializing_if = "Vec::is_empty", deserialize_with = "null_is_default")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::null_is_default::<Vec<DriveOverride>>", extend("x-vesta-extension" = true)))]
    pub drives: Vec<DriveOverride>,
}

/// Source of a restored guest's memory.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct MemoryBackend {
    /// Kind of the source.
    pub backend_type: MemoryBackendType,
    /// Path of the memory file, or of the page server's socket.
    pub backend_path: PathBuf,
}

/// Kind of a source of memory.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum MemoryBackendType {
    /// A memory file, mapped privately.
    File,
    /// A page server: a process that handles page faults by userfaultfd.
    Uffd,
}

/// Kind of pages that back a restored guest's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum SnapshotHugePages {
    /// The kind of pages that the saved guest had.
    #[default]
    Snapshot,
    /// Normal pages.
    None,
    /// Transparent huge pages.
    Transparent,
    /// 2 MiB pages from the host's pool (hugetlbfs).
    #[serde(rename = "2M")]
    Hugetlbfs2M,
}

/// New paths of one drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DriveOverride {
    /// Id of the drive.
    pub drive_id: String,
    /// Its file or block device; unchanged if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::PATH)))]
    pub path_on_host: Option<PathBuf>,
    /// Its overlay; unchanged if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
}

impl DriveOverride {
    fn check(&self) -> Result<(), ConfigError> {
        let path = self.path_on_host.as_deref();
        path.map_or(Ok(()), |path| checks::path("path_on_host", path))
            .and_then(|()| self.overlay.as_ref().map_or(Ok(()), Overlay::check))
            .map_err(|error| error.in_drive(&self.drive_id))
    }
}

impl SnapshotCreate {
    /// A request to save all of a paused guest to two files.
    pub fn new(snapshot_path: impl Into<PathBuf>, mem_file_path: impl Into<PathBuf>) -> SnapshotCreate {
        SnapshotCreate {
            snapshot_path: snapshot_path.into(),
            mem_file_path: mem_file_path.into(),
            snapshot_type: SnapshotType::Full,
            live: false,
            drives: Vec::new(),
        }
    }

    /// Checks that all files differ, and that only a live snapshot has `drives`.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !self.live && !self.drives.is_empty() {
            return Err(SnapshotError::DrivesNotLive.into());
        }
        if self.snapshot_path == self.mem_file_path {
            return Err(SnapshotError::SameFile { path: self.snapshot_path.clone() }.into());
        }
        let overlays = || self.drives.iter().map(|drive| &drive.overlay);
        for (field, path) in [("snapshot_path", &self.snapshot_path), ("mem_file_path", &self.mem_file_path)]
        {
            if overlays().any(|overlay| overlay == path) {
                return Err(SnapshotError::OverlayIsSnapshotFile { field, path: path.clone() }.into());
            }
        }
        checks::unique("overlay", overlays().map(|overlay| overlay.display().to_string()))?;
        Ok(checks::unique("drive_id", self.drives.iter().map(|drive| drive.drive_id.clone()))?)
    }
}

impl SnapshotLoad {
    /// A request to load two files with all defaults: the microVM stays paused.
    pub fn from_files(state: PathBuf, memory: PathBuf) -> Self {
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

    /// Moves `enable_diff_snapshots` to its new name. Returns whether the request has a deprecated
    /// field.
    pub fn resolve_deprecated(&mut self) -> bool {
        let old = self.enable_diff_snapshots.take();
        self.track_dirty_pages |= old.unwrap_or(false);
        old.is_some() || self.mem_file_path.is_some()
    }

    /// Checks that memory has exactly one source, that it allows `prefetch` if asked for, and the
    /// bounds of overrides.
    pub fn check(&self) -> Result<(), ConfigError> {
        if self.mem_backend.is_some() == self.mem_file_path.is_some() {
            return Err(SnapshotError::MemoryBackends.into());
        }
        if self.prefetch && self.memory().0 == MemoryBackendType::Uffd {
            return Err(SnapshotError::PrefetchWithUffd.into());
        }
        self.drives.iter().try_for_each(DriveOverride::check)?;
        self.vsock_override.as_ref().map_or(Ok(()), VsockOverride::check)
    }

    /// Kind and path of the source of memory. The request must be checked.
    pub fn memory(&self) -> (MemoryBackendType, &Path) {
        match (&self.mem_backend, &self.mem_file_path) {
            (Some(backend), _) => (backend.backend_type, &backend.backend_path),
            (None, path) => (MemoryBackendType::File, path.as_deref().unwrap_or(Path::new(""))),
        }
    }
}

impl SnapshotHugePages {
    /// Resolves [`SnapshotHugePages::Snapshot`] to the `saved` kind.
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
        load.resolve_deprecated();
        load.check().map_err(|e| e.to_string())?;
        Ok(load)
    }

    #[test]
    fn memory_has_exactly_one_source() {
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
    fn enable_diff_snapshots_is_a_deprecated_alias() {
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
            assert_eq!(
                (load.resolve_deprecated(), load.track_dirty_pages),
                (deprecated, tracked),
                "{fields}"
            );
        }
    }

    #[test]
    fn snapshot_is_full_by_default_and_has_two_files() {
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
    fn only_live_snapshots_have_drives_and_files_are_unique() {
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
            (true, &[("a", "s")], "overlay and snapshot_path are both s"),
            (true, &[("a", "m")], "overlay and mem_file_path are both m"),
            (true, &[("a", "o"), ("b", "o")], "overlay o is given twice"),
            (true, &[("a", "o"), ("a", "p")], "drive_id a is given twice"),
        ] {
            let error = check(live, overlays).unwrap_err();
            assert!(error.contains(named), "{error}");
        }
    }
}
