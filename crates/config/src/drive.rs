//! `/drives/{id}`: block devices.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::vm_config::null_is_default;
use crate::{ConfigError, RateLimiter, in_range};

/// Longest `drive_id` in bytes.
pub const MAX_DRIVE_ID_LEN: usize = 64;
/// Most queues of one drive.
pub const MAX_DRIVE_QUEUES: u16 = 32;
/// Smallest queue of a drive, in descriptors.
pub const MIN_DRIVE_QUEUE_SIZE: u16 = 16;
/// Largest queue of a drive, in descriptors.
pub const MAX_DRIVE_QUEUE_SIZE: u16 = 1024;
/// The queue size where none is given.
pub const DEFAULT_DRIVE_QUEUE_SIZE: u16 = 256;
/// Most layers between a disk and the overlay that is written to.
pub const MAX_OVERLAY_LAYERS: usize = 32;

/// A block device.
///
/// `num_queues`, `io_threads`, `queue_size`, `overlay` and `lock` are extensions; Firecracker has the other fields.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Drive {
    /// Its name: 1 to [`MAX_DRIVE_ID_LEN`] visible ASCII characters (in a request's path, only letters, digits and `_` can
    /// stand). The guest reads the first 20 as the serial number.
    pub drive_id: String,
    /// Whether the guest's root file system is on it.
    pub is_root_device: bool,
    /// The partition that the root file system is on, by its unique id; only looked at on the root device.
    #[serde(default)]
    pub partuuid: Option<String>,
    /// Whether the guest's flushes wait for the disk.
    #[serde(default, deserialize_with = "null_is_default")]
    pub cache_type: CacheType,
    /// Whether the guest cannot write.
    #[serde(default, deserialize_with = "null_is_default")]
    pub is_read_only: bool,
    /// The file or block device that is the disk. A file of no length is a disk of no size, which an update can replace.
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// Limits on bytes and operations; none where absent.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// How the disk is read and written; [`IoEngine::Async`] where absent and the host's kernel can, else [`IoEngine::Sync`].
    #[serde(default)]
    pub io_engine: Option<IoEngine>,
    /// The socket of a vhost-user back end, in place of `path_on_host`. Not supported.
    #[serde(default)]
    pub socket: Option<PathBuf>,
    /// Number of request queues, 1 to [`MAX_DRIVE_QUEUES`]; 1 where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub num_queues: Option<u16>,
    /// Number of I/O threads that the queues are spread over, 1 to `num_queues`; 1 where absent. 1 with an overlay.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub io_threads: Option<u16>,
    /// Descriptors per queue: a power of two from [`MIN_DRIVE_QUEUE_SIZE`] to [`MAX_DRIVE_QUEUE_SIZE`];
    /// [`DEFAULT_DRIVE_QUEUE_SIZE`] where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue_size: Option<u16>,
    /// Where writes go, so that `path_on_host` is only read.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
    /// Whether other monitors are kept from writing to `path_on_host`, and from reading it while this one writes to it; true where absent. False is for
    /// disks that several microVMs share on purpose, such as those of shared-disk file systems.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub lock: Option<bool>,
}

/// A copy-on-write overlay of a drive.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Overlay {
    /// The file that writes go to. It is made if it does not exist or is empty; with `is_read_only` it must exist.
    pub path: PathBuf,
    /// Overlays between `path_on_host` and `path`, each made on the ones before it. They are only read.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub layers: Vec<PathBuf>,
    /// Size of the disk in MiB when the overlay is made; that of the disk beneath where absent, and not less.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub size_mib: Option<u64>,
}

/// Whether a guest's flush waits for the disk.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub enum CacheType {
    /// The guest cannot flush. What it wrote survives the monitor, and may be lost with the host.
    #[default]
    Unsafe,
    /// The guest can flush, and what it flushed survives the host.
    Writeback,
}

/// How a disk is read and written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum IoEngine {
    /// One request at a time, on a thread that waits for it.
    Sync,
    /// Many requests at a time, through `io_uring`.
    Async,
}

/// A drive that has the right form and cannot be meant.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum DriveError {
    /// A `drive_id` that is empty, too long, or has blanks, control or non-ASCII characters.
    #[error("drive_id {drive_id:?}: it must be 1 to {MAX_DRIVE_ID_LEN} visible ASCII characters")]
    Id {
        /// What was given.
        drive_id: String,
    },
    /// The body speaks of another drive than the path of the request.
    #[error("drive_id is {body:?} and the request is for {path:?}")]
    OtherId {
        /// The id in the body.
        body: String,
        /// The id in the path, or of the drive that is to be changed.
        path: String,
    },
    /// Neither a disk nor a socket.
    #[error("drive {drive_id} has no path_on_host")]
    NoPath {
        /// Which drive.
        drive_id: String,
    },
    /// A vhost-user back end.
    #[error("drive {drive_id} has a socket: vhost-user block devices are not supported yet")]
    VhostUser {
        /// Which drive.
        drive_id: String,
    },
    /// A path that the kernel cannot take.
    #[error("drive {drive_id}: {field} is empty or has a NUL byte")]
    BadPath {
        /// Which drive.
        drive_id: String,
        /// The field's name in JSON.
        field: &'static str,
    },
    /// A queue size that is no power of two.
    #[error("queue_size is {queue_size}: it must be a power of two")]
    QueueSize {
        /// What was given.
        queue_size: u16,
    },
    /// More threads than one for an overlay.
    #[error("io_threads is {io_threads}: a drive with an overlay has one I/O thread")]
    OverlayThreads {
        /// What was given.
        io_threads: u16,
    },
    /// A new disk under an overlay that was made on the old one.
    #[error("drive {drive_id} has an overlay: a new path_on_host needs a new overlay")]
    OverlayOnOldPath {
        /// Which drive.
        drive_id: String,
    },
}

impl Drive {
    /// Checks bounds and combinations.
    pub fn check(&self) -> Result<(), ConfigError> {
        let drive_id = || self.drive_id.clone();
        let well_formed = self.drive_id.bytes().all(|b| b.is_ascii_graphic());
        if !well_formed || self.drive_id.is_empty() || self.drive_id.len() > MAX_DRIVE_ID_LEN {
            return Err(DriveError::Id { drive_id: drive_id() }.into());
        }
        if self.socket.is_some() {
            return Err(DriveError::VhostUser { drive_id: drive_id() }.into());
        }
        if self.path_on_host.is_none() {
            return Err(DriveError::NoPath { drive_id: drive_id() }.into());
        }
        for (field, path) in self.paths() {
            let bytes = path.as_os_str().as_encoded_bytes();
            if bytes.is_empty() || bytes.contains(&0) {
                return Err(DriveError::BadPath { drive_id: drive_id(), field }.into());
            }
        }
        check_drive_queues(self.num_queues(), self.io_threads(), self.queue_size())?;
        if let Some(overlay) = &self.overlay {
            if self.io_threads() > 1 {
                return Err(DriveError::OverlayThreads { io_threads: self.io_threads() }.into());
            }
            in_range("overlay.layers", overlay.layers.len() as u64, 0, MAX_OVERLAY_LAYERS as u64)?;
            in_range("overlay.size_mib", overlay.size_mib.unwrap_or(0), 0, MAX_OVERLAY_SIZE_MIB)?;
        }
        self.rate_limiter.as_ref().map_or(Ok(()), RateLimiter::check)
    }

    /// Number of request queues.
    pub fn num_queues(&self) -> u16 {
        self.num_queues.unwrap_or(1)
    }

    /// Number of I/O threads that the queues are spread over.
    pub fn io_threads(&self) -> u16 {
        self.io_threads.unwrap_or(1)
    }

    /// Descriptors per queue.
    pub fn queue_size(&self) -> u16 {
        self.queue_size.unwrap_or(DEFAULT_DRIVE_QUEUE_SIZE)
    }

    /// Whether other monitors are kept from its disk.
    pub fn lock(&self) -> bool {
        self.lock.unwrap_or(true)
    }

    /// This drive with the fields of `update` in place of its own, checked.
    ///
    /// Of a rate limiter only the buckets that `update` names are replaced.
    pub fn updated(&self, update: &DriveUpdate) -> Result<Drive, ConfigError> {
        if update.drive_id != self.drive_id {
            let (body, path) = (update.drive_id.clone(), self.drive_id.clone());
            return Err(DriveError::OtherId { body, path }.into());
        }
        let mut new = self.clone();
        if let Some(path) = &update.path_on_host {
            if self.overlay.is_some() && update.overlay.is_none() && self.path_on_host.as_ref() != Some(path)
            {
                return Err(DriveError::OverlayOnOldPath { drive_id: self.drive_id.clone() }.into());
            }
            new.path_on_host = Some(path.clone());
        }
        if let Some(overlay) = &update.overlay {
            new.overlay = Some(overlay.clone());
        }
        if let Some(limits) = update.rate_limiter {
            let old = self.rate_limiter.unwrap_or_default();
            new.rate_limiter = Some(RateLimiter {
                bandwidth: limits.bandwidth.or(old.bandwidth),
                ops: limits.ops.or(old.ops),
            });
        }
        new.check()?;
        Ok(new)
    }

    fn paths(&self) -> impl Iterator<Item = (&'static str, &PathBuf)> {
        let overlay = self.overlay.iter().map(|overlay| ("overlay.path", &overlay.path));
        let layers = self.overlay.iter().flat_map(|overlay| &overlay.layers);
        let disk = self.path_on_host.iter().map(|path| ("path_on_host", path));
        disk.chain(overlay).chain(layers.map(|path| ("overlay.layers", path)))
    }
}

/// Checks how the queues of a drive are cut.
pub fn check_drive_queues(num_queues: u16, io_threads: u16, queue_size: u16) -> Result<(), ConfigError> {
    in_range("num_queues", num_queues.into(), 1, MAX_DRIVE_QUEUES.into())?;
    in_range("io_threads", io_threads.into(), 1, num_queues.into())?;
    in_range("queue_size", queue_size.into(), MIN_DRIVE_QUEUE_SIZE.into(), MAX_DRIVE_QUEUE_SIZE.into())?;
    if queue_size.is_power_of_two() { Ok(()) } else { Err(DriveError::QueueSize { queue_size }.into()) }
}

/// Largest disk of an overlay in MiB: 16 TiB.
const MAX_OVERLAY_SIZE_MIB: u64 = 16 << 20;

/// The body of `PATCH /drives/{id}`: what is absent or null stays as it is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DriveUpdate {
    /// Which drive.
    pub drive_id: String,
    /// The disk to go on with. The same path again makes the guest see a new size (and changes nothing where there is an overlay, whose size is its own).
    #[serde(default)]
    pub path_on_host: Option<PathBuf>,
    /// New limits; a bucket that is absent stays as it is, one of no size is switched off.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
    /// A new overlay (an extension).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub overlay: Option<Overlay>,
}

impl DriveUpdate {
    /// Whether it changes nothing, which the API refuses.
    pub fn is_empty(&self) -> bool {
        let DriveUpdate { drive_id: _, path_on_host, rate_limiter, overlay } = self;
        path_on_host.is_none() && rate_limiter.is_none() && overlay.is_none()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
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
    fn a_minimal_drive_has_firecrackers_defaults() {
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
    fn clients_may_send_null_and_empty_limiters() {
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
    fn what_cannot_be_meant_is_refused_by_name() {
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
    fn an_update_changes_what_it_names() {
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
    fn an_overlay_does_not_move_to_another_disk() {
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
        fn any_checked_drive_survives_its_own_json(
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
