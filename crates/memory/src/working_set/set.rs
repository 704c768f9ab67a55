//! The working set of an image, and its file.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use snapshot::{FileId, Header, ReadError, Section, Snapshot, WriteError, Writer};

use crate::image::ImageInfo;
use crate::layout::MemoryLayout;
use crate::pages::PAGE;
use crate::resident::ResidentError;

const KIND: &str = "working-set";

/// Why a working set cannot be used or recorded.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// It was recorded with another memory image.
    #[error("working set {}: it is of memory image {found}, not {wanted}", path.display())]
    OtherImage {
        /// The file.
        path: PathBuf,
        /// The image that it was recorded with.
        found: FileId,
        /// The image that is restored.
        wanted: FileId,
    },
    /// It has pages outside the guest's memory.
    #[error("working set {}: run {run} is not within the guest's memory", path.display())]
    Bounds {
        /// The file.
        path: PathBuf,
        /// The index of the run.
        run: usize,
    },
    /// The page tables cannot be read: usually `/proc` is missing.
    #[error(transparent)]
    Resident(#[from] ResidentError),
    /// The thread cannot be started.
    #[error("working set: cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// Pages in the order in which a guest first touched them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    pub(super) image: FileId,
    pub(super) runs: Vec<PageRun>,
}

/// Consecutive pages of one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u64, u64, bool)", into = "(u32, u64, u64, bool)")]
pub struct PageRun {
    /// The index of the region.
    pub region: u32,
    /// The first page, relative to the region's start.
    pub first: u64,
    /// The number of pages.
    pub count: u64,
    /// Whether the guest wrote them.
    pub written: bool,
}

impl From<(u32, u64, u64, bool)> for PageRun {
    fn from((region, first, count, written): (u32, u64, u64, bool)) -> Self {
        PageRun { region, first, count, written }
    }
}

impl From<PageRun> for (u32, u64, u64, bool) {
    fn from(run: PageRun) -> Self {
        (run.region, run.first, run.count, run.written)
    }
}

impl PageRun {
    pub(super) fn new(region: usize, pages: Range<u64>, written: bool) -> Self {
        PageRun { region: region as u32, first: pages.start, count: pages.end - pages.start, written }
    }
}

impl Section for WorkingSet {
    const NAME: &'static str = "working-set";
}

impl WorkingSet {
    /// The path of the working set of the image at `image`: beside it.
    pub fn path_for(image: &Path) -> PathBuf {
        let mut path = image.as_os_str().to_os_string();
        path.push(".working-set");
        path.into()
    }

    /// The runs in order.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// The number of pages in all runs.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// Writes it to `path` and replaces an older file.
    pub fn save(&self, path: &Path) -> Result<(), WorkingSetError> {
        let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |now| now.as_millis());
        let mut writer = Writer::new(&Header::new(KIND, "vesta-vmm", now as u64))?;
        writer.put(self)?;
        Ok(writer.commit(path)?)
    }

    /// Reads it from `path`, for a guest that is restored from the image `info`.
    pub fn load(path: &Path, info: &ImageInfo) -> Result<Self, WorkingSetError> {
        let file = Snapshot::open(path)?;
        file.expect_kind(KIND)?;
        let set: WorkingSet = file.get()?;
        let path = path.to_path_buf();
        if set.image != info.id {
            return Err(WorkingSetError::OtherImage { path, found: set.image, wanted: info.id });
        }
        match set.out_of_bounds(&info.layout) {
            Some(run) => Err(WorkingSetError::Bounds { path, run }),
            None => Ok(set),
        }
    }

    /// The first run that is outside the guest's memory, or that makes the set larger than the
    /// guest.
    fn out_of_bounds(&self, layout: &MemoryLayout) -> Option<usize> {
        let mut left = layout.ram_size() / PAGE;
        self.runs.iter().position(|run| {
            let region = layout.regions().get(run.region as usize);
            let inside = region.is_some_and(|region| {
                run.count > 0 && run.first.checked_add(run.count).is_some_and(|end| end <= region.size / PAGE)
            });
            if !inside || run.count > left {
                return true;
            }
            left -= run.count;
            false
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::image::ImageKind;
    use config::HugePages;

    fn info() -> ImageInfo {
        let layout = MemoryLayout::of_size(1);
        let id = FileId::random().unwrap();
        ImageInfo { layout, kind: ImageKind::Full, id, huge_pages: HugePages::None }
    }

    fn run(region: u32, first: u64, count: u64) -> PageRun {
        PageRun { region, first, count, written: first.is_multiple_of(2) }
    }

    #[test]
    fn saved_set_loads_for_its_own_image_only() {
        let dir = tempfile::tempdir().unwrap();
        let path = WorkingSet::path_for(&dir.path().join("mem"));
        let info = info();
        let set = WorkingSet { image: info.id, runs: vec![run(0, 200, 56), run(0, 0, 1)] };
        set.save(&path).unwrap();
        assert_eq!(WorkingSet::load(&path, &info).unwrap(), set);
        let other = ImageInfo { id: FileId::random().unwrap(), ..info };
        assert!(matches!(WorkingSet::load(&path, &other), Err(WorkingSetError::OtherImage { .. })));
    }

    #[test]
    fn set_beyond_guest_memory_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set");
        let info = info();
        for (runs, bad) in [
            (vec![run(0, 0, 1), run(1, 0, 1)], 1),
            (vec![run(0, 255, 2)], 0),
            (vec![run(0, u64::MAX, 2)], 0),
            (vec![run(0, 0, 0)], 0),
            (vec![run(0, 0, 256), run(0, 0, 1)], 1),
        ] {
            WorkingSet { image: info.id, runs }.save(&path).unwrap();
            let error = WorkingSet::load(&path, &info).unwrap_err();
            assert!(matches!(error, WorkingSetError::Bounds { run, .. } if run == bad), "{error}");
        }
    }

    #[test]
    fn truncated_or_damaged_set_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("set");
        let info = info();
        WorkingSet { image: info.id, runs: vec![run(0, 3, 5)] }.save(&path).unwrap();
        let whole = std::fs::read(&path).unwrap();
        for at in 0..whole.len() {
            let mut flipped = whole.clone();
            flipped[at] ^= 0x10;
            for bytes in [&whole[..at], &flipped] {
                std::fs::write(&path, bytes).unwrap();
                assert!(WorkingSet::load(&path, &info).is_err(), "at {at}");
            }
        }
    }

    #[test]
    fn machine_state_is_refused_as_working_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        Writer::new(&Header::new("microvm", "test", 0)).unwrap().commit(&path).unwrap();
        let error = WorkingSet::load(&path, &info()).unwrap_err().to_string();
        assert!(error.ends_with("holds \"microvm\", not \"working-set\""), "{error}");
    }
}
