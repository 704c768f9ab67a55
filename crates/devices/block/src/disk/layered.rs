//! Where a sector is: a disk, overlays that are only read, and at most one that is written to.
//!
//! A plain disk is a stack with nothing on it. Files are numbered from the bottom: 0 is the disk.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::sync::Arc;

use super::base::Base;
use crate::SECTOR;
use crate::error::DiskError;
use crate::host_file::health::DiskHealth;
use crate::overlay::flush::FlushTarget;
use crate::overlay::merge::{Merged, Target};
use crate::overlay::{Beneath, Lower, Top, TopState};

/// Bytes at each end of a disk that tell it from another.
const FINGERPRINT_BYTES: u64 = 64 << 10;

/// The layers of a disk.
#[derive(Debug)]
pub(crate) struct Stack {
    base: Arc<Base>,
    /// Whether what is written to holds what was written.
    health: Arc<DiskHealth>,
    /// From the bottom up.
    lower: Vec<Arc<Lower>>,
    top: Option<Top>,
}

/// Layers of a disk that are only read, and the file that is to hold what they do. It keeps them open, and nothing else of the disk: who writes
/// to that, or closes it, need not wait.
#[derive(Debug)]
pub struct LayerMerge {
    /// With nothing on it that is written to.
    layers: Stack,
    target: Target,
}

impl LayerMerge {
    /// Copies what the layers hold. The file is an overlay that can stand in their place, for whatever lies on them, once this has succeeded; until then it
    /// is none. Blocks for as long as that takes; fails early when `goes_on` says no.
    pub fn run(self, goes_on: &dyn Fn() -> bool) -> Result<(), DiskError> {
        let Some(topmost) = self.layers.lower.last() else { return Ok(()) };
        let plain = Stack::new(Arc::clone(&self.layers.base), Arc::clone(&self.layers.health));
        let beneath = plain
            .describe()
            .map_err(|source| DiskError::Read { path: self.target.path().to_owned(), source })?;
        Ok(self.target.fill(&self.layers, beneath, topmost.identity, goes_on)?)
    }
}

impl Merged for Stack {
    fn size(&self) -> u64 {
        self.size()
    }

    fn holder(&self, offset: u64, len: u64) -> (Option<(&File, u64)>, u64) {
        let place = self.locate(None, offset, len);
        let layer = usize::from(place.file).checked_sub(1).map(|layer| &self.lower[layer]);
        (layer.map(|layer| (&*layer.file, place.offset)), place.len)
    }
}

/// Where a run of sectors is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Place {
    /// Which file.
    pub(crate) file: u8,
    /// Offset in it, in bytes.
    pub(crate) offset: u64,
    /// Length of the run in bytes.
    pub(crate) len: u64,
}

impl Stack {
    /// A plain disk.
    pub(crate) fn new(base: Arc<Base>, health: Arc<DiskHealth>) -> Self {
        Stack { base, health, lower: Vec::new(), top: None }
    }

    /// The plain disk at the bottom.
    pub(crate) fn base(&self) -> &Base {
        &self.base
    }

    /// Whether what is written to holds what was written.
    pub(crate) fn health(&self) -> &Arc<DiskHealth> {
        &self.health
    }

    /// Puts an overlay that is only read on top.
    pub(crate) fn push_lower(&mut self, lower: Lower) {
        debug_assert!(self.top.is_none());
        self.lower.push(Arc::new(lower));
    }

    /// Puts the overlay that is written to on top.
    pub(crate) fn set_top(&mut self, top: Top) {
        self.top = Some(top);
    }

    /// Size of the disk in bytes, a multiple of 512.
    pub(crate) fn size(&self) -> u64 {
        match (&self.top, self.lower.last()) {
            (Some(top), _) => top.size,
            (None, Some(lower)) => lower.size,
            (None, None) => self.base.size(),
        }
    }

    /// The files, by number.
    pub(crate) fn files(&self) -> Vec<Arc<File>> {
        self.files_on(self.base.file())
    }

    /// The files for one more queue, by number.
    pub(crate) fn files_of_queue(&self) -> Vec<Arc<File>> {
        self.files_on(self.base.file_of_queue())
    }

    fn files_on(&self, base: &Arc<File>) -> Vec<Arc<File>> {
        let lower = self.lower.iter().map(|lower| &lower.file);
        let top = self.top.iter().map(|top| &top.file);
        std::iter::once(base).chain(lower).chain(top).cloned().collect()
    }

    /// The overlay that is written to.
    pub(crate) fn top(&self) -> Option<&Top> {
        self.top.as_ref()
    }

    /// The file that is written to, and where in it the disk begins.
    pub(crate) fn write_target(&self) -> (u8, u64) {
        self.top.as_ref().map_or((0, 0), |top| (self.top_file(), top.layout.data))
    }

    /// What a flush makes durable.
    pub(crate) fn flush_target(&self) -> FlushTarget<'_> {
        FlushTarget { file: self.write_target().0, layer: self.top(), health: &self.health }
    }

    /// Whether what is written to is a file, and no block device.
    pub(crate) fn writes_to_file(&self) -> bool {
        self.top.is_some() || self.base.file().metadata().is_ok_and(|metadata| metadata.is_file())
    }

    fn top_file(&self) -> u8 {
        (self.lower.len() + 1) as u8
    }

    /// Where the `len` bytes from `offset` are, or as many of them as are in one place. Both are multiples of 512, `len` is not
    /// 0, and they do not reach past the end of the disk. `state` is that of the overlay that is written to.
    pub(crate) fn locate(&self, state: Option<&TopState>, offset: u64, len: u64) -> Place {
        let (sector, mut count) = (offset / SECTOR, len / SECTOR);
        let place = |file, start: u64, count| Place { file, offset: start + offset, len: count * SECTOR };
        if let (Some(top), Some(state)) = (&self.top, state) {
            let (held, alike) = state.run(sector, count);
            if held {
                return place(self.top_file(), top.layout.data, alike);
            }
            count = alike;
        }
        for (index, lower) in self.lower.iter().enumerate().rev() {
            let (held, alike) = lower.run(sector, count);
            if held {
                return place((index + 1) as u8, lower.layout.data, alike);
            }
            count = alike;
        }
        place(0, 0, count)
    }

    /// What the next overlay has to know about this stack. Reads 128 KiB, and waits for them.
    pub(crate) fn describe(&self) -> io::Result<Beneath> {
        let size = self.size();
        let mut bytes = vec![0; FINGERPRINT_BYTES.min(size) as usize];
        let mut fingerprint = crc32fast::Hasher::new();
        for offset in [0, size - bytes.len() as u64] {
            self.read_now(offset, &mut bytes)?;
            fingerprint.update(&bytes);
        }
        let below = self.lower.last().map(|lower| lower.identity);
        Ok(Beneath {
            size,
            uuid: below.map_or([0; 16], |below| below.uuid),
            sessions: below.map_or(0, |below| below.sessions),
            fingerprint: fingerprint.finalize(),
        })
    }

    /// The layers that are only read, to be merged into the blank file at `path`.
    pub(crate) fn merge_layers(&self, path: &Path) -> Result<LayerMerge, DiskError> {
        let layers = Stack {
            base: Arc::clone(&self.base),
            health: Arc::clone(&self.health),
            lower: self.lower.clone(),
            top: None,
        };
        Ok(LayerMerge { layers, target: Target::open(path)? })
    }

    /// Reads what the layers below the one that is written to hold.
    fn read_now(&self, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        let files = self.files();
        while !bytes.is_empty() {
            let place = self.locate(None, offset, bytes.len() as u64);
            let (now, later) = bytes.split_at_mut(place.len as usize);
            files[usize::from(place.file)].read_exact_at(now, place.offset)?;
            offset += place.len;
            bytes = later;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::path::PathBuf;

    use super::*;
    use crate::overlay::{OverlayError, TopOptions};

    /// A plain disk, and layers on it, the last of them larger; each has written sectors of its own, over some of the others'.
    struct Family {
        dir: tempfile::TempDir,
        base: PathBuf,
        layers: Vec<PathBuf>,
    }

    const SECTORS: u64 = 40_000;

    fn options(size: Option<u64>, wait_for_disk: bool) -> TopOptions<'static> {
        let health = DiskHealth::new("overlay");
        TopOptions { below: &[], size, wait_for_disk, name_is_durable: true, health }
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
                let beneath = family.stack().describe().unwrap();
                let size = beneath.size + if layer == 3 { 4096 } else { 0 };
                let top = Top::open(&path, beneath, options(Some(size), layer % 2 == 0)).unwrap();
                let (at, session) = top.beginning();
                top.file.write_all_at(&session, at).unwrap();
                top.has_begun();
                for (sector, count) in
                    [(layer * 3, 8), (1000 + layer * 5000, 33_000 / (layer + 1)), (SECTORS - 4, 4)]
                {
                    let count = count.min(SECTORS - sector);
                    // Some are zeros, which stand in a hole.
                    if layer != 1 {
                        let bytes = vec![200 + layer as u8; (count * SECTOR) as usize];
                        top.file.write_all_at(&bytes, top.layout.data + sector * SECTOR).unwrap();
                    }
                    top.hold(sector, count);
                }
                drop(top);
                family.layers.push(path);
            }
            family
        }

        fn stack_on(base: &Path, layers: &[PathBuf]) -> Result<Stack, DiskError> {
            let file = File::open(base).unwrap();
            let size = file.metadata().unwrap().len();
            let mut stack = Stack::new(Base::of(file, size), DiskHealth::new(base));
            for path in layers {
                let beneath = stack.describe().unwrap();
                stack.push_lower(Lower::open(path, beneath)?);
            }
            Ok(stack)
        }

        fn stack(&self) -> Stack {
            Self::stack_on(&self.base, &self.layers).unwrap()
        }
    }

    fn contents(stack: &Stack) -> Vec<u8> {
        let mut bytes = vec![0; stack.size() as usize];
        stack.read_now(0, &mut bytes).unwrap();
        bytes
    }

    #[test]
    fn merged_layers_hold_what_the_layers_did_and_carry_what_was_made_on_them() {
        let family = Family::new();
        let old = family.stack();
        let on_top = family.dir.path().join("top");
        drop(Top::open(&on_top, old.describe().unwrap(), options(None, true)).unwrap());
        let merged = family.dir.path().join("merged");
        File::create(&merged).unwrap();
        old.merge_layers(&merged).unwrap().run(&|| true).unwrap();
        let new = Family::stack_on(&family.base, std::slice::from_ref(&merged)).unwrap();
        assert!(contents(&old) == contents(&new), "the merged layers differ");
        Family::stack_on(&family.base, &[merged.clone(), on_top]).unwrap();
        // It is not written twice, nor put on another disk.
        assert!(old.merge_layers(&merged).is_err());
        let other = family.dir.path().join("other");
        std::fs::write(&other, vec![0; (SECTORS * SECTOR) as usize]).unwrap();
        assert!(Family::stack_on(&other, &[merged]).is_err());
    }
    #[test]
    fn a_merge_that_is_given_up_leaves_nothing_that_could_be_taken_for_an_overlay() {
        let family = Family::new();
        let merged = family.dir.path().join("merged");
        File::create(&merged).unwrap();
        let pieces = std::cell::Cell::new(0);
        let goes_on = || pieces.replace(pieces.get() + 1) < 5;
        assert!(family.stack().merge_layers(&merged).unwrap().run(&goes_on).is_err());
        assert_eq!(pieces.get(), 6, "it stops when it is told to");
        assert!(Family::stack_on(&family.base, &[merged]).is_err());
    }

    #[test]
    fn a_merge_keeps_layers_from_being_written_to_and_not_what_lies_on_them() {
        let family = Family::new();
        let mut stack = family.stack();
        let beneath = stack.describe().unwrap();
        let top = family.dir.path().join("top");
        stack.set_top(Top::open(&top, beneath, options(None, true)).unwrap());
        let merged = family.dir.path().join("merged");
        File::create(&merged).unwrap();
        let merge = stack.merge_layers(&merged).unwrap();
        drop(stack);
        Top::open(&top, beneath, options(None, true)).expect("it was closed");
        let below = Family::stack_on(&family.base, &family.layers[..3]).unwrap().describe().unwrap();
        let write = || Top::open(&family.layers[3], below, options(None, false));
        assert!(matches!(write(), Err(OverlayError::InUse { .. })));
        merge.run(&|| true).unwrap();
        write().expect("nobody reads it any more");
    }
}
