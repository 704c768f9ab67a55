//! Opening a disk: a file or a block device, and the overlays on it.
//!
//! A [`Disk`] is what a drive's paths name, opened once. It is cheap to clone, and each clone is the same disk; the
//! [`DiskQueue`]s that serve its requests come from it. Opening is where everything is checked that can be: what is
//! left are errors of single requests.
//!
//! # Callers
//!
//! `machine` opens disks, on main: when a drive is attached, and when its path is replaced.

pub(crate) mod backlog;
mod base;
mod layered;
mod options;
pub mod queue;
mod split;

#[cfg(test)]
use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use config::{CacheType, IoEngine};

use self::base::BaseDisk;
pub use self::layered::LayerMerge;
use self::layered::LayeredDisk;
pub use self::options::DiskOptions;
use self::queue::DiskQueue;
pub(crate) use self::split::DISCARD_AT_A_TIME;
#[cfg(test)]
pub(crate) use self::split::DISCARD_PART;
#[cfg(any(test, feature = "testing"))]
use crate::engine::DrainingUring;
use crate::engine::{Blocking, BlockingEngine, Engine, Uring, UringError};
pub use crate::error::DiskError;
pub use crate::host_file::health::ContentsUnknown;
use crate::host_file::health::DiskHealth;
use crate::host_file::lock::LockMode;
pub use crate::host_file::lock::{FileLocks, LockError};
pub use crate::host_file::name::make_name_durable;
use crate::io_request::Tag;
use crate::overlay::{ActiveLayer, ActiveOptions, BackingLayer};

/// An open disk.
#[derive(Debug, Clone)]
pub struct Disk {
    layers: Arc<LayeredDisk>,
    read_only: bool,
    cache_type: CacheType,
    engine: IoEngine,
    /// For fuzzing: requests are over when they are submitted, with [`IoEngine::Async`] too.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) draining: bool,
}

impl Disk {
    /// Opens a disk and the overlays on it, for a process that has no other disks.
    pub fn open(options: &DiskOptions) -> Result<Self, DiskError> {
        Self::open_with(options, &FileLocks::default(), None)
    }

    /// Opens a disk and the overlays on it.
    ///
    /// `locks` are those of this process's disks. `replaces` is the disk in whose extent it comes: where both are the same file, contents
    /// that are unknown stay so.
    pub fn open_with(
        options: &DiskOptions,
        locks: &FileLocks,
        replaces: Option<&Disk>,
    ) -> Result<Self, DiskError> {
        let engine = engine_of(options)?;
        let base = Arc::new(BaseDisk::open(options, locks)?);
        if let Some(old) = replaces
            && options.overlay.is_some()
            && base.is_same_disk(old.layers.base())
            && old.layers.active().is_none()
        {
            // What lies beneath the overlay would be what is unknown.
            old.check()?;
        }
        let same = replaces.filter(|old| base.shares_writes_with(old.layers.base()));
        let health = same.map_or_else(
            || DiskHealth::new(options.overlay.as_ref().map_or(&options.path, |overlay| &overlay.path)),
            |old| Arc::clone(old.layers.health()),
        );
        let mut layers = LayeredDisk::new(base, Arc::clone(&health));
        if let Some(overlay) = &options.overlay {
            let unreadable = |source| DiskError::Read { path: options.path.clone(), source };
            for path in &overlay.layers {
                let beneath = layers.backing_id().map_err(unreadable)?;
                layers.push_backing(BackingLayer::open(path, beneath)?);
            }
            let beneath = layers.backing_id().map_err(unreadable)?;
            if options.read_only {
                layers.push_backing(BackingLayer::open(&overlay.path, beneath)?);
            } else {
                let options = ActiveOptions {
                    below: &layers.files(),
                    size: overlay.size_mib.map(|mib| mib << 20),
                    wait_for_disk: options.cache_type == CacheType::Writeback,
                    name_is_durable: options.name_is_durable,
                    health,
                };
                layers.set_active(ActiveLayer::open(&overlay.path, beneath, options)?);
            }
        }
        Ok(Disk {
            layers: Arc::new(layers),
            read_only: options.read_only,
            cache_type: options.cache_type,
            engine,
            #[cfg(any(test, feature = "testing"))]
            draining: false,
        })
    }

    /// Size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.layers.size()
    }

    /// Whether writes are refused.
    pub fn is_read_only(&self) -> bool {
        self.read_only
    }

    /// Whether the guest's flushes wait for the disk.
    pub fn cache_type(&self) -> CacheType {
        self.cache_type
    }

    /// Whether the guest is offered flushes.
    pub(crate) fn can_flush(&self) -> bool {
        self.cache_type == CacheType::Writeback
    }

    /// How it is read and written.
    pub fn engine(&self) -> IoEngine {
        self.engine
    }

    /// Whether writes go to an overlay, so that only one [`DiskQueue`] may be in use at a time.
    pub fn has_overlay(&self) -> bool {
        self.layers.active().is_some()
    }

    /// Whether workers of its own make it quicker, ones that may wait for it ([`Blocking::Allowed`]): where a request would
    /// otherwise go to another thread and back, though most are but copies into the page cache. Writes to a file do (most file
    /// systems cannot tell `io_uring` beforehand that they will not wait), and everything with [`IoEngine::Sync`].
    ///
    /// A disk of no size counts as well: it stands for one that takes its extent later, when workers cannot be made any more.
    pub fn wants_own_workers(&self) -> bool {
        self.engine == IoEngine::Sync || (!self.read_only && self.layers.writes_to_file())
    }

    /// Something that serves requests: its own ring or thread. A disk with an overlay has at most one in use at a time.
    pub fn queue(&self, blocking: Blocking) -> Result<DiskQueue, DiskError> {
        let files = self.layers.queue_files();
        #[cfg(any(test, feature = "testing"))]
        if self.draining && self.engine == IoEngine::Async {
            return Ok(self.queue_with(Box::new(DrainingUring::new(files)?)));
        }
        let engine: Box<dyn Engine<Tag>> = match (self.engine, blocking) {
            (IoEngine::Async, _) => Box::new(Uring::new(files, blocking)?),
            (IoEngine::Sync, Blocking::Never) => return Err(DiskError::SyncOnSharedWorker),
            (IoEngine::Sync, Blocking::Allowed) => Box::new(BlockingEngine::new(files)),
        };
        Ok(self.queue_with(engine))
    }

    /// As [`queue`](Self::queue), with an engine for the files of the layers.
    pub(crate) fn queue_with(&self, engine: Box<dyn Engine<Tag>>) -> DiskQueue {
        let flush = self.cache_type == CacheType::Writeback && !self.read_only;
        DiskQueue::new(Arc::clone(&self.layers), engine, flush)
    }

    /// The files that an engine works on, by number.
    #[cfg(test)]
    pub(crate) fn files(&self) -> Vec<Arc<File>> {
        self.layers.files()
    }

    /// Fails once the disk's contents are unknown: a sync of it failed.
    pub fn check(&self) -> Result<(), ContentsUnknown> {
        self.layers.health().check()
    }

    /// The files for one more queue, by number.
    #[cfg(test)]
    pub(crate) fn queue_files(&self) -> Vec<Arc<File>> {
        self.layers.queue_files()
    }

    /// Makes the files hold all that the disk does, and durable if flushes wait for the disk. Blocks; for the moments in which
    /// no request is in flight, such as a snapshot.
    pub fn sync(&self) -> Result<(), DiskError> {
        let _one = self.layers.health().begin()?;
        match self.layers.active() {
            Some(active) => Ok(active.sync("a sync of the paused microVM's disk")?),
            None => self.sync_base("a sync of the paused microVM's disk"),
        }
    }

    /// Makes what was written to a plain disk durable, if flushes wait for it.
    fn sync_base(&self, what: &'static str) -> Result<(), DiskError> {
        match self.layers.base().sync_file() {
            Some(file) if self.cache_type == CacheType::Writeback => {
                Ok(self.layers.health().sync(file, what)?)
            }
            _ => Ok(()),
        }
    }
}

impl Disk {
    /// Ends its use in order: an overlay is closed, so that it holds on any host what was written to it (durable, if flushes wait for the
    /// disk). A plain disk has what was written to it already, as far as it is promised. Blocks. No request is in flight. An error
    /// if the disk's contents are unknown.
    pub fn close(&self) -> Result<(), DiskError> {
        let _one = self.layers.health().begin()?;
        self.layers.active().map_or(Ok(()), |active| Ok(active.close()?))
    }

    /// Makes its files a base that others can put overlays on: they hold all that the disk does (durable if flushes wait for the
    /// disk), and may be read by others. Blocks. No request is in flight, and none may come any more: whoever used this disk goes on with
    /// an overlay on it.
    pub fn freeze(&self) -> Result<(), DiskError> {
        let _one = self.layers.health().begin()?;
        if let Some(active) = self.layers.active() {
            return Ok(active.freeze()?);
        }
        self.sync_base("the sync of a disk that becomes a base")?;
        if !self.read_only {
            self.layers.base().set_lock(LockMode::Shared)?;
        }
        Ok(())
    }

    /// Whether its writes go to an overlay that holds nothing yet: what lies below is all that there is.
    pub fn is_unwritten(&self) -> bool {
        self.layers.active().is_some_and(ActiveLayer::is_unwritten)
    }

    /// The layers that are only read, to be merged into the blank file at `path` on another thread. Requests may come meanwhile.
    pub fn merge_layers(&self, path: &Path) -> Result<LayerMerge, DiskError> {
        self.check()?;
        self.layers.merge_layers(path)
    }

    /// Lets the disk itself have what was written so far, if flushes wait for it, so that a freeze soon after waits for little. Blocks;
    /// requests may come meanwhile.
    pub fn write_back(&self) -> Result<(), DiskError> {
        let _one = self.layers.health().begin()?;
        if self.read_only || self.cache_type == CacheType::Unsafe {
            return Ok(());
        }
        match self.layers.active() {
            Some(active) => Ok(active.write_back()?),
            None => self.sync_base("a write-back of what was written"),
        }
    }

    /// Undoes [`Disk::freeze`]: it is written to again. Only if nobody has put an overlay on it.
    pub fn thaw(&self) -> Result<(), DiskError> {
        match self.layers.active() {
            Some(active) => Ok(active.thaw()?),
            None if self.read_only => Ok(()),
            None => Ok(self.layers.base().set_lock(LockMode::Exclusive)?),
        }
    }
}

/// The engine that `options` ask for, or the best that the kernel has.
fn engine_of(options: &DiskOptions) -> Result<IoEngine, UringError> {
    match options.engine {
        Some(IoEngine::Async) => {
            Uring::<()>::new(Vec::new(), Blocking::Never)?;
            Ok(IoEngine::Async)
        }
        Some(IoEngine::Sync) => Ok(IoEngine::Sync),
        None => match Uring::<()>::new(Vec::new(), Blocking::Never) {
            Ok(_) => Ok(IoEngine::Async),
            Err(error) => {
                log::info!("disks use io_engine Sync: {error}");
                Ok(IoEngine::Sync)
            }
        },
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn wants(bytes: u64, read_only: bool, engine: IoEngine) -> bool {
        let file = tempfile::NamedTempFile::new().unwrap();
        file.as_file().set_len(bytes).unwrap();
        let disk = Disk::open(&DiskOptions {
            path: file.path().into(),
            read_only,
            cache_type: CacheType::Unsafe,
            engine: Some(engine),
            overlay: None,
            io_threads: 1,
            lock: true,
            name_is_durable: false,
        });
        disk.unwrap().wants_own_workers()
    }

    #[test]
    fn who_would_go_through_another_thread_wants_workers_of_its_own() {
        assert!(wants(4096, false, IoEngine::Async), "writes to a file");
        assert!(!wants(4096, true, IoEngine::Async), "reads go through the ring");
        assert!(wants(4096, true, IoEngine::Sync), "all waits");
        assert!(wants(0, false, IoEngine::Async), "what is to take its extent may be written to");
    }
}
