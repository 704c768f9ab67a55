//! `/drives/{id}`: block devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks;
use crate::error::{ConfigError, DriveError};
use crate::limits::{MAX_DRIVE_ID_LEN, MAX_OVERLAY_LAYERS, MAX_OVERLAY_SIZE_MIB};
#[cfg(any(doc, feature = "schema"))]
use crate::limits::{MAX_DRIVE_QUEUE_SIZE, MAX_DRIVE_QUEUES, MIN_DRIVE_QUEUE_SIZE};
use crate::queues::{DEFAULT_IO_THREADS, DEFAULT_NUM_QUEUES, QueueBounds, QueueConfig};
use crate::serde_helpers::null_is_default;
use crate::token_bucket::RateLimiter;

/// Default `queue_size` of a drive.
pub const DEFAULT_DRIVE_QUEUE_SIZE: u16 = 256;
/// Default `lock` of a drive.
const DEFAULT_LOCK: bool = true;

/// A block device.
///
/// `num_queues`, `io_threads`, `queue_size`, `overlay` and `lock` are extensions. Firecracker has
/// the other fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(transform = crate::schema::require_path_on_host))]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Id: 1 to [`MAX_DRIVE_ID_LEN`] visible ASCII characters. The path of an API request can hold
    /// only letters, digits and `_`. The guest reads the first 20 as the serial number.
    #[cfg_attr(feature = "schema", schemars(length(min = 1, max = MAX_DRIVE_ID_LEN), regex(pattern = crate::schema::VISIBLE)))]
    pub drive_id: String,
    /// Whether this is the guest's root device.
    pub is_root_device: bool,
    /// PARTUUID of the partition with the root file system; used only on the root device.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether the guest can flush its writes to the disk.
    #[serde(default, deserialize_with = "null_is_default")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::null_is_default::<CacheType>"))]
    pub cache_type: CacheType,
    /// Whether the guest cannot write.
    #[serde(default, deserialize_with = "null_is_default")]
    #[cfg_attr(feature = "schema", schemars(schema_with = "crate::schema::null_is_default::<bool>"))]
    pub is_read_only: bool,
    /// The disk: a file or block device. An empty file is a disk of size 0, which an update can
    /// replace.
    #[serde(default)]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::PATH)))]
    pub path_on_host: Option<PathBuf>,
    /// Limits on bytes and operations; none if absent.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// I/O engine. If absent: `Async` if the host's kernel supports it, otherwise `Sync`.
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// Socket of a vhost-user backend, instead of `path_on_host`. Not supported.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Number of request queues, 1 to [`MAX_DRIVE_QUEUES`]; 1 if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_DRIVE_QUEUES), extend("default" = DEFAULT_NUM_QUEUES), extend("x-vesta-extension" = true)))]
    pub num_queues: Option<u16>,
    /// Number of I/O threads that share the queues, 1 to `num_queues`; 1 if absent. With an overlay
    /// it must be 1.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = 1, max = MAX_DRIVE_QUEUES), extend("default" = DEFAULT_IO_THREADS), extend("x-vesta-extension" = true)))]
    pub io_threads: Option<u16>,
    /// Descriptors per queue: a power of two from [`MIN_DRIVE_QUEUE_SIZE`] to
    /// [`MAX_DRIVE_QUEUE_SIZE`]; [`DEFAULT_DRIVE_QUEUE_SIZE`] if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(min = MIN_DRIVE_QUEUE_SIZE, max = MAX_DRIVE_QUEUE_SIZE), extend("default" = DEFAULT_DRIVE_QUEUE_SIZE), extend("x-vesta-extension" = true)))]
    pub queue_size: Option<u16>,
    /// Overlay that receives the writes. `path_on_host` is then only read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("x-vesta-extension" = true)))]
    pub overlay: Option<Overlay>,
    /// Whether `path_on_host` is locked; true if absent. The lock keeps other monitors from writing
    /// to it, and from reading it while this one writes to it. False is for disks that several
    /// microVMs share on purpose, such as those of shared-disk file systems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("default" = DEFAULT_LOCK), extend("x-vesta-extension" = true)))]
    pub lock: Option<bool>,
}

/// A copy-on-write overlay of a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// The file that receives the writes. It is created if it does not exist or is empty. With
    /// `is_read_only` it must exist.
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::PATH)))]
    pub path: PathBuf,
    /// Overlays between `path_on_host` and `path`, lowest first. They are only read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    #[cfg_attr(feature = "schema", schemars(length(max = MAX_OVERLAY_LAYERS), inner(regex(pattern = crate::schema::PATH))))]
    pub layers: Vec<PathBuf>,
    /// Size of the disk in MiB when the overlay is created: at least that of the disk below, which
    /// is also the default.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(range(max = MAX_OVERLAY_SIZE_MIB)))]
    pub size_mib: Option<u64>,
}

/// A new overlay for one drive of a running microVM.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct DriveOverlay {
    /// Id of the drive.
    pub drive_id: String,
    /// The file of the overlay. It must be empty or not exist.
    pub overlay: PathBuf,
}

/// Whether a guest can flush its writes to the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum CacheType {
    /// The device offers no flush. Writes survive the end of the monitor, but not always that of
    /// the host.
    #[default]
    Unsafe,
    /// The device offers a flush. Flushed writes survive a crash of the host.
    Writeback,
}

/// I/O engine of a disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum IoEngine {
    /// Blocking system calls, one request at a time.
    Sync,
    /// `io_uring`, many requests at a time.
    Async,
}

impl Overlay {
    /// Checks bounds.
    pub(crate) fn check(&self) -> Result<(), ConfigError> {
        checks::path("overlay.path", &self.path)?;
        self.layers.iter().try_for_each(|layer| checks::path("overlay.layers", layer))?;
        checks::in_range("overlay.layers", self.layers.len() as u64, 0, MAX_OVERLAY_LAYERS as u64)?;
        checks::in_range("overlay.size_mib", self.size_mib.unwrap_or(0), 0, MAX_OVERLAY_SIZE_MIB)
    }
}

impl Drive {
    /// A writable drive with all defaults, which is not the root device.
    pub fn new(drive_id: impl Into<String>, path_on_host: impl Into<PathBuf>) -> Drive {
        Drive {
            drive_id: drive_id.into(),
            is_root_device: false,
            partuuid: None,
            cache_type: CacheType::default(),
            is_read_only: false,
            path_on_host: Some(path_on_host.into()),
            rate_limiter: None,
            io_engine: None,
            socket: None,
            num_queues: None,
            io_threads: None,
            queue_size: None,
            overlay: None,
            lock: None,
        }
    }

    /// Checks bounds and combinations.
    pub fn check(&self) -> Result<(), ConfigError> {
        if !checks::is_device_id(&self.drive_id, MAX_DRIVE_ID_LEN) {
            return Err(DriveError::Id { drive_id: self.drive_id.clone() }.into());
        }
        self.check_fields().map_err(|error| error.in_drive(&self.drive_id))
    }

    fn check_fields(&self) -> Result<(), ConfigError> {
        if self.socket.is_some() {
            return Err(DriveError::VhostUser.into());
        }
        let Some(path) = &self.path_on_host else { return Err(DriveError::NoPath.into()) };
        checks::path("path_on_host", path)?;
        self.queues().check(QueueBounds::DRIVE)?;
        if let Some(overlay) = &self.overlay {
            if self.io_threads() > 1 {
                return Err(DriveError::OverlayThreads { io_threads: self.io_threads() }.into());
            }
            overlay.check()?;
        }
        self.rate_limiter.as_ref().map_or(Ok(()), RateLimiter::check)
    }

    /// The queues, with defaults.
    pub fn queues(&self) -> QueueConfig {
        let (num_queues, io_threads) = (self.num_queues(), self.io_threads());
        QueueConfig { num_queues, io_threads, queue_size: self.queue_size() }
    }

    /// Number of request queues.
    pub fn num_queues(&self) -> u16 {
        self.num_queues.unwrap_or(DEFAULT_NUM_QUEUES)
    }

    /// Number of I/O threads that share the queues.
    pub fn io_threads(&self) -> u16 {
        self.io_threads.unwrap_or(DEFAULT_IO_THREADS)
    }

    /// Descriptors per queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size.unwrap_or(DEFAULT_DRIVE_QUEUE_SIZE)
    }

    /// Whether the disk is locked against other monitors.
    pub fn lock(&self) -> bool {
        self.lock.unwrap_or(DEFAULT_LOCK)
    }

    /// Returns this drive with the fields of `update`, checked. Of a rate limiter, only the buckets
    /// in `update` are replaced.
    pub fn updated(&self, update: &DriveUpdate) -> Result<Drive, ConfigError> {
        if update.drive_id != self.drive_id {
            let (body, path) = (update.drive_id.clone(), self.drive_id.clone());
            return Err(DriveError::IdMismatch { body, path }.into());
        }
        let mut new = self.clone();
        if let Some(path) = &update.path_on_host {
            if self.overlay.is_some() && update.overlay.is_none() && self.path_on_host.as_ref() != Some(path)
            {
                return Err(ConfigError::from(DriveError::OverlayOnOldPath).in_drive(&self.drive_id));
            }
            new.path_on_host = Some(path.clone());
        }
        if let Some(overlay) = &update.overlay {
            new.overlay = Some(overlay.clone());
        }
        // Before the buckets that limit nothing are removed.
        let limits = update.rate_limiter.as_ref().map_or(Ok(()), RateLimiter::check);
        limits.map_err(|error| error.in_drive(&self.drive_id))?;
        new.rate_limiter = RateLimiter::updated(self.rate_limiter, update.rate_limiter);
        new.check()?;
        Ok(new)
    }
}

/// Checks each drive, that ids are unique, and that at most one drive is the root device.
pub fn check_drives(drives: &[Drive]) -> Result<(), ConfigError> {
    let mut root: Option<&Drive> = None;
    for (i, drive) in drives.iter().enumerate() {
        drive.check()?;
        if drives[..i].iter().any(|other| other.drive_id == drive.drive_id) {
            return Err(ConfigError::DuplicateDrive { drive_id: drive.drive_id.clone() });
        }
        if !drive.is_root_device {
            continue;
        }
        if let Some(first) = root.replace(drive) {
            let (first, second) = (first.drive_id.clone(), drive.drive_id.clone());
            return Err(ConfigError::TwoRootDevices { first, second });
        }
    }
    Ok(())
}

/// The body of `PATCH /drives/{id}`. A field that is absent or null changes nothing.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[cfg_attr(feature = "schema", schemars(extend("minProperties" = 2)))]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Id of the drive.
    pub drive_id: String,
    /// The new disk. The same path again makes a changed size visible to the guest. It does nothing
    /// to a drive with an overlay, which has its own size.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// New limits. An absent bucket is unchanged; one of size 0 is removed.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// A new overlay. An extension.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("x-vesta-extension" = true)))]
    pub overlay: Option<Overlay>,
}

impl DriveUpdate {
    /// An update of the drive `drive_id` that changes nothing yet.
    pub fn new(drive_id: impl Into<String>) -> DriveUpdate {
        DriveUpdate { drive_id: drive_id.into(), path_on_host: None, rate_limiter: None, overlay: None }
    }

    /// Whether the update has no field that changes something. The API refuses such an update.
    pub fn is_empty(&self) -> bool {
        let DriveUpdate { drive_id: _, path_on_host, rate_limiter, overlay } = self;
        path_on_host.is_none() && rate_limiter.is_none() && overlay.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::limits::MAX_DRIVE_QUEUES;
    use proptest::prelude::*;

    fn parse(json: &str) -> Drive {
        let drive: Drive = serde_json::from_str(json).unwrap();
        drive.check().unwrap();
        drive
    }

    fn refused(json: &str) -> String {
        match serde_json::from_str::<Drive>(json) {
            Ok(drive) => drive.check().unwrap_err().to_string(),
            Err(error) => error.to_string(),
        }
    }

    #[test]
    fn minimal_drive_has_firecrackers_defaults() {
        let drive = parse(r#"{"drive_id":"rootfs","is_root_device":true,"path_on_host":"/r.ext4"}"#);
        assert_eq!(drive.cache_type, CacheType::Unsafe);
        assert_eq!((drive.num_queues(), drive.io_threads(), drive.queue_size()), (1, 1, 256));
        assert!(drive.lock());
        assert_eq!(
            serde_json::to_string(&drive).unwrap(),
            r#"{"drive_id":"rootfs","is_root_device":true,"partuuid":null,"cache_type":"Unsafe","is_read_only":false,"path_on_host":"/r.ext4","rate_limiter":null,"io_engine":null,"socket":null}"#
        );
    }

    #[test]
    fn null_and_empty_rate_limiters_are_accepted() {
        for limiter in ["null", "{}"] {
            let json = format!(
                r#"{{"drive_id":"d","is_root_device":false,"path_on_host":"x","rate_limiter":{limiter},"partuuid":null,"socket":null,"io_engine":null,"is_read_only":null,"cache_type":null}}"#
            );
            let drive = parse(&json);
            assert!(drive.rate_limiter.is_none_or(|limits| limits == RateLimiter::default()));
        }
    }

    #[test]
    fn all_fields_are_read() {
        let drive = parse(
            r#"{"drive_id":"d_1","is_root_device":false,"path_on_host":"x","is_read_only":true,"cache_type":"Writeback",
                "io_engine":"Sync","partuuid":"0eaa91a0-01","num_queues":4,"io_threads":1,"queue_size":512,
                "rate_limiter":{"ops":{"size":1,"refill_time":100}},"overlay":{"path":"o","layers":["a"],"size_mib":5},"lock":false}"#,
        );
        assert!(!drive.lock());
        assert_eq!(drive.io_engine, Some(IoEngine::Sync));
        assert_eq!(drive.cache_type, CacheType::Writeback);
        assert_eq!(drive.overlay.unwrap().layers, [PathBuf::from("a")]);
    }

    #[test]
    fn invalid_fields_are_named() {
        let with = |fields: &str| refused(&format!(r#"{{"drive_id":"d","is_root_device":false,{fields}}}"#));
        assert!(with(r#""path_on_host":"x","socket":"s""#).contains("vhost-user"));
        assert!(with(r#""partuuid":null"#).contains("path_on_host"));
        assert!(with(r#""path_on_host":"""#).contains("path_on_host"));
        assert!(with(r#""path_on_host":"x","queue_size":100"#).contains("queue_size is 100"));
        assert!(with(r#""path_on_host":"x","queue_size":2048"#).contains("between 16 and 1024"));
        assert!(with(r#""path_on_host":"x","num_queues":0"#).contains("num_queues is 0"));
        assert!(with(r#""path_on_host":"x","io_threads":2"#).contains("io_threads is 2"));
        assert!(
            with(r#""path_on_host":"x","num_queues":2,"io_threads":2,"overlay":{"path":"o"}"#)
                .contains("overlay")
        );
        assert!(with(r#""path_on_host":"x","overlay":{"path":"o","layer":[]}"#).contains("layer"));
        assert!(with(r#""path_on_host":"x","cache":"Unsafe""#).contains("cache"));
        assert!(refused(r#"{"drive_id":"a b","is_root_device":false,"path_on_host":"x"}"#).contains("a b"));
    }

    #[test]
    fn update_changes_the_fields_it_names() {
        let drive = parse(
            r#"{"drive_id":"d","is_root_device":false,"path_on_host":"x","rate_limiter":{"ops":{"size":1,"refill_time":100}}}"#,
        );
        let update = |json: &str| drive.updated(&serde_json::from_str(json).unwrap());
        let new = update(
            r#"{"drive_id":"d","path_on_host":"y","rate_limiter":{"bandwidth":{"size":5,"refill_time":1}}}"#,
        )
        .unwrap();
        assert_eq!(new.path_on_host, Some("y".into()));
        let limits = new.rate_limiter.unwrap();
        assert_eq!((limits.bandwidth.unwrap().size, limits.ops.unwrap().size), (5, 1));
        assert_eq!(update(r#"{"drive_id":"d","rate_limiter":null}"#).unwrap(), drive);
        assert!(update(r#"{"drive_id":"e"}"#).unwrap_err().to_string().contains("\"e\""));
    }

    #[test]
    fn overlay_does_not_move_to_another_disk() {
        let drive =
            parse(r#"{"drive_id":"d","is_root_device":false,"path_on_host":"x","overlay":{"path":"o"}}"#);
        let update = |json: &str| drive.updated(&serde_json::from_str(json).unwrap());
        assert!(update(r#"{"drive_id":"d","path_on_host":"y"}"#).is_err());
        update(r#"{"drive_id":"d","path_on_host":"x"}"#).unwrap();
        let new = update(r#"{"drive_id":"d","path_on_host":"y","overlay":{"path":"p"}}"#).unwrap();
        assert_eq!(new.overlay.unwrap().path, PathBuf::from("p"));
    }

    proptest! {
        #[test]
        fn checked_drive_round_trips_through_json(
            queues in 1u16..=MAX_DRIVE_QUEUES,
            size in 4u32..=10,
            read_only: bool,
            writeback: bool,
            lock: Option<bool>,
        ) {
            let mut drive = parse(r#"{"drive_id":"d","is_root_device":false,"path_on_host":"x"}"#);
            drive.num_queues = Some(queues);
            drive.queue_size = Some(1 << size);
            drive.is_read_only = read_only;
            drive.cache_type = if writeback { CacheType::Writeback } else { CacheType::Unsafe };
            drive.lock = lock;
            drive.check().unwrap();
            let json = serde_json::to_string(&drive).unwrap();
            prop_assert_eq!(json.contains("\"lock\""), lock.is_some());
            prop_assert_eq!(parse(&json), drive);
        }
    }
}
