//! Disks: a file or a block device, with or without overlays.
//!
//! A [`Disk`] is what the paths of a drive name, opened once. Clones share it. The [`DiskQueue`]s
//! that serve its requests are created from it. Everything that can be checked is checked when it
//! is opened; later errors are those of single requests.
//!
//! # Callers
//!
//! The `control` crate opens disks when a drive is configured or its path is replaced, and for a
//! fork or a snapshot. Tools read disks with [`DiskImage`].

pub(crate) mod backlog;
mod base;
mod buffer_pool;
mod image;
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
pub use self::image::{DiskImage, ImageExtent, ImageExtents};
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
use crate::host_file::health::DiskHealth;
pub use crate::host_file::health::{ContentsUnknown, ContentsUnknownHook};
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
    /// For fuzzing: requests are complete when they are submitted, also with [`IoEngine::Async`].
    #[cfg(any(test, feature = "testing"))]
    pub(crate) draining: bool,
}

impl Disk {
    /// Opens a disk and its overlays, in a process that has no other disks.
    pub fn open(options: &DiskOptions) -> Result<Self, DiskError> {
        Self::open_with(options, &FileLocks::default(), None)
    }

    /// Opens a disk and its overlays.
    ///
    /// `locks` are the locks of this process. `replaces` is the disk that this one replaces: if
    /// both are the same file and its contents are unknown, they stay so.
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
            // The overlay would be created on a base with unknown contents.
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
                let backing = layers.backing_id().map_err(unreadable)?;
                layers.push_backing(BackingLayer::open(path, backing)?);
            }
            let backing = layers.backing_id().map_err(unreadable)?;
            if options.read_only {
                layers.push_backing(BackingLayer::open(&overlay.path, backing)?);
            } else {
                let options = ActiveOptions {
                    backing_files: &layers.files(),
                    size: overlay.size_mib.map(|mib| mib << 20),
                    wait_for_disk: options.cache_type == CacheType::Writeback,
                    name_is_durable: options.name_is_durable,
                    health,
                };
                layers.set_active(ActiveLayer::open(&overlay.path, backing, options)?);
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

    /// Whether the guest cannot write.
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

    /// The engine that serves it.
    pub fn engine(&self) -> IoEngine {
        self.engine
    }

    /// Whether writes go to an overlay, so that only one [`DiskQueue`] may be in use at a time.
    pub fn has_overlay(&self) -> bool {
        self.layers.active().is_some()
    }

    /// Whether dedicated workers, which may block ([`Blocking::Allowed`]), are to serve it.
    ///
    /// With [`IoEngine::Sync`] they are needed: every request may block. With [`IoEngine::Async`]
    /// they make writes to a file faster. Most file systems cannot tell `io_uring` beforehand that
    /// a write will not block, so it goes to a kernel thread and back, although it is mostly a copy
    /// to the page cache.
    ///
    /// A file of size 0 counts, too: it stands for a disk that replaces it later, when the workers
    /// of the device cannot be changed.
    pub fn wants_own_workers(&self) -> bool {
        self.engine == IoEngine::Sync || (!self.read_only && self.layers.writes_to_file())
    }

    /// Builds a queue, with an engine of its own, for a worker that may block or not. A disk with
    /// an overlay has at most one queue in use at a time.
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

    /// Its layers.
    pub(crate) fn layers(&self) -> &LayeredDisk {
        &self.layers
    }

    /// The files that an engine works on, by number.
    #[cfg(test)]
    pub(crate) fn files(&self) -> Vec<Arc<File>> {
        self.layers.files()
    }

    /// Fails if the contents are unknown because a sync failed.
    pub fn check(&self) -> Result<(), ContentsUnknown> {
        self.layers.health().check()
    }

    /// Sets the hook that is called once, when a sync fails or now if one has failed. Only the
    /// first call for a disk, or for one that replaces it and is the same file, has an effect.
    pub fn on_contents_unknown(&self, hook: ContentsUnknownHook) {
        self.layers.health().set_hook(hook);
    }

    /// The files for one more queue, by number.
    #[cfg(test)]
    pub(crate) fn queue_files(&self) -> Vec<Arc<File>> {
        self.layers.queue_files()
    }

    /// Writes all metadata to the files, and makes the files durable if flushes wait for the disk.
    /// Blocks. No request may be in flight: the guest is paused, as for a snapshot.
    pub fn sync(&self) -> Result<(), DiskError> {
        let _one = self.layers.health().begin_operation()?;
        match self.layers.active() {
            Some(active) => Ok(active.sync("a sync of the paused microVM's disk")?),
            None => self.sync_base("a sync of the paused microVM's disk"),
        }
    }

    /// Makes a disk without an overlay durable, if flushes wait for the disk.
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
    /// Ends the use of the disk. An overlay is closed, so that any host can open it with all that
    /// was written (durable, if flushes wait for the disk). A disk without an overlay has nothing
    /// to do. Blocks. No request may be in flight. Fails if the contents are unknown.
    pub fn close(&self) -> Result<(), DiskError> {
        let _one = self.layers.health().begin_operation()?;
        self.layers.active().map_or(Ok(()), |active| Ok(active.close()?))
    }

    /// Makes the files a base for other overlays: complete (and durable, if flushes wait for the
    /// disk), and with a shared lock. Blocks. No request may be in flight, and none may follow: the
    /// user of this disk continues with an overlay on it.
    pub fn freeze(&self) -> Result<(), DiskError> {
        let _one = self.layers.health().begin_operation()?;
        if let Some(active) = self.layers.active() {
            return Ok(active.freeze()?);
        }
        self.sync_base("the sync of a disk that becomes a base")?;
        if !self.read_only {
            self.layers.base().set_lock(LockMode::Shared)?;
        }
        Ok(())
    }

    /// Whether writes go to an overlay that has no sector allocated.
    pub fn is_unwritten(&self) -> bool {
        self.layers.active().is_some_and(ActiveLayer::is_unwritten)
    }

    /// Prepares a merge of the read-only layers into the blank file at `path`, which runs on
    /// another thread. Requests may be in flight.
    pub fn merge_layers(&self, path: &Path) -> Result<LayerMerge, DiskError> {
        self.check()?;
        self.layers.merge_layers(path)
    }

    /// Writes dirty pages to the disk, if flushes wait for it, so that a freeze soon after is
    /// quick. Blocks. Requests may be in flight.
    pub fn write_back(&self) -> Result<(), DiskError> {
        let _one = self.layers.health().begin_operation()?;
        if self.read_only || self.cache_type == CacheType::Unsafe {
            return Ok(());
        }
        match self.layers.active() {
            Some(active) => Ok(active.write_back()?),
            None => self.sync_base("a write-back of what was written"),
        }
    }

    /// Undoes [`Disk::freeze`]. Fails if others have an overlay on it open.
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
    fn dedicated_workers_are_wanted_for_file_writes_and_sync() {
        assert!(wants(4096, false, IoEngine::Async), "writes to a file");
        assert!(!wants(4096, true, IoEngine::Async), "reads go through the ring");
        assert!(wants(4096, true, IoEngine::Sync), "all waits");
        assert!(wants(0, false, IoEngine::Async), "what is to take its extent may be written to");
    }
}
