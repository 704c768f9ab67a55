//! The layers of a disk: a base disk, read-only overlays on it, and at most one overlay that is
//! written.
//!
//! A disk without overlays has only the base. Files are numbered from the bottom: 0 is the base.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::base::BaseDisk;
use crate::SECTOR;
use crate::error::DiskError;
use crate::host_file::health::DiskHealth;
use crate::overlay::flush::FlushTarget;
use crate::overlay::merge::{MergeSource, MergeTarget};
use crate::overlay::{ActiveLayer, ActiveState, BackingId, BackingLayer};

/// Bytes at each end of a disk that identify it.
const FINGERPRINT_BYTES: u64 = 64 << 10;

/// The layers of a disk.
#[derive(Debug)]
pub(crate) struct LayeredDisk {
    base: Arc<BaseDisk>,
    /// The health of the layer that is written.
    health: Arc<DiskHealth>,
    /// From the bottom up.
    backing: Vec<Arc<BackingLayer>>,
    active: Option<ActiveLayer>,
}

/// A merge of the read-only layers of a disk into a new overlay file.
///
/// It keeps these layers open and nothing else of the disk, so that the active overlay can be
/// written and closed meanwhile.
#[derive(Debug)]
pub struct LayerMerge {
    /// Without an active overlay.
    layers: LayeredDisk,
    target: MergeTarget,
}

impl LayerMerge {
    /// Copies the layers. On success the file is an overlay that replaces them, also as the backing
    /// of overlays created on them; until then it is no overlay. Blocks. Fails early when
    /// `keep_going` returns false.
    pub fn run(self, keep_going: &dyn Fn() -> bool) -> Result<(), DiskError> {
        let Some(topmost) = self.layers.backing.last() else { return Ok(()) };
        let plain = LayeredDisk::new(Arc::clone(&self.layers.base), Arc::clone(&self.layers.health));
        let backing = plain
            .backing_id()
            .map_err(|source| DiskError::Read { path: self.target.path().to_owned(), source })?;
        Ok(self.target.fill(&self.layers, backing, topmost.identity, keep_going)?)
    }
}

impl MergeSource for LayeredDisk {
    fn size(&self) -> u64 {
        self.size()
    }

    fn locate_layer(&self, offset: u64, len: u64) -> (Option<(&File, u64)>, u64) {
        let extent = self.locate(None, offset, len);
        let layer = usize::from(extent.file).checked_sub(1).map(|layer| &self.backing[layer]);
        (layer.map(|layer| (&*layer.file, extent.offset)), extent.len)
    }
}

/// The place where a run of sectors is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Extent {
    /// Number of the file.
    pub(crate) file: u8,
    /// Offset in the file, in bytes.
    pub(crate) offset: u64,
    /// Length of the run, in bytes.
    pub(crate) len: u64,
}

impl LayeredDisk {
    /// A disk without overlays.
    pub(crate) fn new(base: Arc<BaseDisk>, health: Arc<DiskHealth>) -> Self {
        LayeredDisk { base, health, backing: Vec::new(), active: None }
    }

    /// The disk at the bottom.
    pub(crate) fn base(&self) -> &BaseDisk {
        &self.base
    }

    /// The health of the layer that is written.
    pub(crate) fn health(&self) -> &Arc<DiskHealth> {
        &self.health
    }

    /// Adds a read-only overlay on top.
    pub(crate) fn push_backing(&mut self, backing: BackingLayer) {
        debug_assert!(self.active.is_none());
        self.backing.push(Arc::new(backing));
    }

    /// Adds the overlay that is written on top.
    pub(crate) fn set_active(&mut self, active: ActiveLayer) {
        self.active = Some(active);
    }

    /// Size of the disk in bytes, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        match (&self.active, self.backing.last()) {
            (Some(active), _) => active.size,
            (None, Some(backing)) => backing.size,
            (None, None) => self.base.size(),
        }
    }

    /// The files, by number.
    pub(crate) fn files(&self) -> Vec<Arc<File>> {
        self.files_on(self.base.file())
    }

    /// The files for one more queue, by number.
    pub(crate) fn queue_files(&self) -> Vec<Arc<File>> {
        self.files_on(self.base.queue_file())
    }

    fn files_on(&self, base: &Arc<File>) -> Vec<Arc<File>> {
        let backing = self.backing.iter().map(|backing| &backing.file);
        let active = self.active.iter().map(|active| &active.file);
        std::iter::once(base).chain(backing).chain(active).cloned().collect()
    }

    /// The overlay that is written.
    pub(crate) fn active(&self) -> Option<&ActiveLayer> {
        self.active.as_ref()
    }

    /// Number of the file that is written, and the offset of the disk's first byte in it.
    pub(crate) fn write_target(&self) -> (u8, u64) {
        self.active.as_ref().map_or((0, 0), |active| (self.active_file(), active.layout.data))
    }

    /// What a flush makes durable.
    pub(crate) fn flush_target(&self) -> FlushTarget<'_> {
        FlushTarget { file: self.write_target().0, layer: self.active(), health: &self.health }
    }

    /// Whether the layer that is written is a file, and not a block device.
    pub(crate) fn writes_to_file(&self) -> bool {
        self.active.is_some() || self.base.file().metadata().is_ok_and(|metadata| metadata.is_file())
    }

    fn active_file(&self) -> u8 {
        (self.backing.len() + 1) as u8
    }

    /// Where the `len` bytes from `offset` are stored, or as many of them as are in one extent.
    /// Both are multiples of 512. `len` is not 0, and the range lies within the disk. `state` is
    /// that of the active overlay; without it, the active overlay is skipped.
    pub(crate) fn locate(&self, state: Option<&ActiveState>, offset: u64, len: u64) -> Extent {
        let (sector, mut count) = (offset / SECTOR, len / SECTOR);
        let extent = |file, start: u64, count| Extent { file, offset: start + offset, len: count * SECTOR };
        if let (Some(active), Some(state)) = (&self.active, state) {
            let (allocated, same) = state.run(sector, count);
            if allocated {
                return extent(self.active_file(), active.layout.data, same);
            }
            count = same;
        }
        for (index, backing) in self.backing.iter().enumerate().rev() {
            let (allocated, same) = backing.run(sector, count);
            if allocated {
                return extent((index + 1) as u8, backing.layout.data, same);
            }
            count = same;
        }
        extent(0, 0, count)
    }

    /// Identifies this disk for an overlay on it. Reads 128 KiB, and blocks.
    pub(crate) fn backing_id(&self) -> io::Result<BackingId> {
        let size = self.size();
        let mut bytes = vec![0; FINGERPRINT_BYTES.min(size) as usize];
        let mut fingerprint = crc32fast::Hasher::new();
        for offset in [0, size - bytes.len() as u64] {
            self.read_at(offset, &mut bytes)?;
            fingerprint.update(&bytes);
        }
        let below = self.backing.last().map(|backing| backing.identity);
        Ok(BackingId {
            size,
            uuid: below.map_or([0; 16], |below| below.uuid),
            sessions: below.map_or(0, |below| below.sessions),
            fingerprint: fingerprint.finalize(),
        })
    }

    /// A merge of the read-only layers into the blank file at `path`.
    pub(crate) fn merge_layers(&self, path: &Path) -> Result<LayerMerge, DiskError> {
        let layers = LayeredDisk {
            base: Arc::clone(&self.base),
            health: Arc::clone(&self.health),
            backing: self.backing.clone(),
            active: None,
        };
        Ok(LayerMerge { layers, target: MergeTarget::open(path)? })
    }

    /// Reads from the layers below the active overlay. Blocks.
    fn read_at(&self, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        let files = self.files();
        while !bytes.is_empty() {
            let extent = self.locate(None, offset, bytes.len() as u64);
            let (now, later) = bytes.split_at_mut(extent.len as usize);
            files[usize::from(extent.file)].read_exact_at(now, extent.offset)?;
            offset += extent.len;
            bytes = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::overlay::{ActiveOptions, OverlayError};

    /// A base, and overlays on it, the last of them larger. Each has sectors of its own and some of
    /// others.
    struct Family {
        dir: tempfile::TempDir,
        base: PathBuf,
        layers: Vec<PathBuf>,
    }

    const SECTORS: u64 = 40_000;

    fn options(size: Option<u64>, wait_for_disk: bool) -> ActiveOptions<'static> {
        let health = DiskHealth::new("overlay");
        ActiveOptions { backing_files: &[], size, wait_for_disk, name_is_durable: true, health }
    }

    impl Family {
        fn new() -> Self {
            let dir = tempfile::tempdir().unwrap();
            let base = dir.path().join("base");
            let pattern: Vec<u8> = (0..SECTORS * SECTOR).map(|at| (at / 512 % 199) as u8).collect();
            std::fs::write(&base, pattern).unwrap();
            let mut family = Family { dir, base, layers: Vec::new() };
            for layer in 0..4u64 {
                let path = family.dir.path().join(format!("layer{layer}"));
                let backing = family.open().backing_id().unwrap();
                let size = backing.size + if layer == 3 { 4096 } else { 0 };
                let active = ActiveLayer::open(&path, backing, options(Some(size), layer % 2 == 0)).unwrap();
                let (at, session) = active.session_start();
                active.file.write_all_at(&session, at).unwrap();
                active.session_opened();
                for (sector, count) in
                    [(layer * 3, 8), (1000 + layer * 5000, 33_000 / (layer + 1)), (SECTORS - 4, 4)]
                {
                    let count = count.min(SECTORS - sector);
                    // Some are zeros, stored as a hole.
                    if layer != 1 {
                        let bytes = vec![200 + layer as u8; (count * SECTOR) as usize];
                        active.file.write_all_at(&bytes, active.layout.data + sector * SECTOR).unwrap();
                    }
                    active.mark_allocated(sector, count);
                }
                drop(active);
                family.layers.push(path);
            }
            family
        }

        fn open_on(base: &Path, layers: &[PathBuf]) -> Result<LayeredDisk, DiskError> {
            let file = File::open(base).unwrap();
            let size = file.metadata().unwrap().len();
            let mut disk = LayeredDisk::new(BaseDisk::of(file, size), DiskHealth::new(base));
            for path in layers {
                let backing = disk.backing_id().unwrap();
                disk.push_backing(BackingLayer::open(path, backing)?);
            }
            Ok(disk)
        }

        fn open(&self) -> LayeredDisk {
            Self::open_on(&self.base, &self.layers).unwrap()
        }
    }

    fn contents(layers: &LayeredDisk) -> Vec<u8> {
        let mut bytes = vec![0; layers.size() as usize];
        layers.read_at(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn merged_layers_replace_the_layers_below_an_overlay() {
        let family = Family::new();
        let old = family.open();
        let on_top = family.dir.path().join("active");
        drop(ActiveLayer::open(&on_top, old.backing_id().unwrap(), options(None, true)).unwrap());
        let merged = family.dir.path().join("merged");
        File::create(&merged).unwrap();
        old.merge_layers(&merged).unwrap().run(&|| true).unwrap();
        let new = Family::open_on(&family.base, std::slice::from_ref(&merged)).unwrap();
        assert!(contents(&old) == contents(&new), "the merged layers differ");
        Family::open_on(&family.base, &[merged.clone(), on_top]).unwrap();
        // It cannot be written twice, nor used on another base.
        assert!(old.merge_layers(&merged).is_err());
        let other = family.dir.path().join("other");
        std::fs::write(&other, vec![0; (SECTORS * SECTOR) as usize]).unwrap();
        assert!(Family::open_on(&other, &[merged]).is_err());
    }
    #[test]
    fn cancelled_merge_leaves_no_overlay() {
        let family = Family::new();
        let merged = family.dir.path().join("merged");
        File::create(&merged).unwrap();
        let pieces = std::cell::Cell::new(0);
        let keep_going = || pieces.replace(pieces.get() + 1) < 5;
        assert!(family.open().merge_layers(&merged).unwrap().run(&keep_going).is_err());
        assert_eq!(pieces.get(), 6, "the merge continued after it was cancelled");
        assert!(Family::open_on(&family.base, &[merged]).is_err());
    }

    #[test]
    fn merge_locks_its_layers_but_not_the_active_overlay() {
        let family = Family::new();
        let mut layers = family.open();
        let backing = layers.backing_id().unwrap();
        let active = family.dir.path().join("active");
        layers.set_active(ActiveLayer::open(&active, backing, options(None, true)).unwrap());
        let merged = family.dir.path().join("merged");
        File::create(&merged).unwrap();
        let merge = layers.merge_layers(&merged).unwrap();
        drop(layers);
        ActiveLayer::open(&active, backing, options(None, true)).expect("it was closed");
        let below = Family::open_on(&family.base, &family.layers[..3]).unwrap().backing_id().unwrap();
        let write = || ActiveLayer::open(&family.layers[3], below, options(None, false));
        assert!(matches!(write(), Err(OverlayError::InUse { .. })));
        merge.run(&|| true).unwrap();
        write().expect("the merge has released the lock");
    }
}
