//! The pages that a guest needs first after a restore, and having them ready.
//!
//! A restored guest starts with an empty page table: each page that it touches costs a fault, and on a cold page cache a read
//! of the disk. Most guests touch the same pages after every restore. So the first restore is watched ([`Recorder`]), what it
//! touched is kept beside the snapshot ([`WorkingSet`]), and later restores fill those pages in ahead of the guest, in the same
//! order ([`Prefetch`]).
//!
//! A working set is advice. A wrong one costs time and memory, never correctness: pages are filled in with what they contain
//! anyway. One that belongs to another image is refused all the same.
//!
//! # The file
//!
//! The format of state files ([`snapshot`]) with the kind `working-set`: checksummed, versioned, read in proportion to its size. A
//! set never has more pages than the guest.

mod prefetch;
mod record;

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use serde::{Deserialize, Serialize};
use snapshot::{FileId, Header, ReadError, Section, Snapshot, WriteError, Writer};

pub use prefetch::{Prefetch, PrefetchOptions, Prefetched};
pub use record::{RecordOptions, Recorder};

use crate::image::ImageInfo;
use crate::layout::MemoryLayout;
use crate::pages::PAGE;
use crate::resident::ResidentError;

const KIND: &str = "working-set";

/// Why there is no working set.
#[derive(Debug, thiserror::Error)]
pub enum WorkingSetError {
    /// The file cannot be read.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// The file cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// It was recorded with another memory image.
    #[error("{} is of memory image {found}, not {wanted}", path.display())]
    OtherImage {
        /// The file.
        path: PathBuf,
        /// The image it is of.
        found: FileId,
        /// The image that is restored.
        wanted: FileId,
    },
    /// Its pages are not pages of this guest.
    #[error("{}: run {run} of the working set is not within the guest's memory", path.display())]
    Bounds {
        /// The file.
        path: PathBuf,
        /// The number of the run.
        run: usize,
    },
    /// The page tables cannot be seen: `/proc` is missing, most often.
    #[error(transparent)]
    Resident(#[from] ResidentError),
    /// No thread could be started.
    #[error("cannot start a thread for the working set: {0}")]
    Thread(std::io::Error),
}

/// Pages in the order in which a guest came to them.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkingSet {
    image: FileId,
    runs: Vec<PageRun>,
}

/// A run of pages of one region.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "(u32, u64, u64, bool)", into = "(u32, u64, u64, bool)")]
pub struct PageRun {
    /// The region's number.
    pub region: u32,
    /// The first page, counted from the region's start.
    pub first: u64,
    /// How many pages.
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
    fn new(region: usize, pages: Range<u64>, written: bool) -> Self {
        PageRun { region: region as u32, first: pages.start, count: pages.end - pages.start, written }
    }
}

impl Section for WorkingSet {
    const NAME: &'static str = "working-set";
}

impl WorkingSet {
    /// Where the working set of the image at `image` is kept: beside it.
    pub fn path_for(image: &Path) -> PathBuf {
        let mut path = image.as_os_str().to_os_string();
        path.push(".working-set");
        path.into()
    }

    /// The runs in order.
    pub fn runs(&self) -> &[PageRun] {
        &self.runs
    }

    /// How many pages it has.
    pub fn pages(&self) -> u64 {
        self.runs.iter().map(|run| run.count).sum()
    }

    /// Writes it to `path`, in place of an older one.
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

    /// The first run that is outside the guest's memory, or that makes the set larger than it.
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
    fn a_saved_set_is_loaded_for_its_image_only() {
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
    fn a_set_that_leaves_the_guest_or_is_larger_than_it_is_refused() {
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
    fn every_truncation_and_every_flipped_byte_is_refused() {
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
    fn a_machines_state_is_no_working_set() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("state");
        Writer::new(&Header::new("microvm", "test", 0)).unwrap().commit(&path).unwrap();
        let error = WorkingSet::load(&path, &info()).unwrap_err().to_string();
        assert!(error.ends_with("holds \"microvm\", not \"working-set\""), "{error}");
    }
}
