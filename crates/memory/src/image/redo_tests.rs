//! Tests of Diffs that are written into their base: what is there at any moment, and who may write.

use std::sync::atomic::{AtomicU64, Ordering};

use config::HugePages;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::*;
use crate::PageSet;
use crate::image::{Written, write_diff, write_full};

const MIB: u32 = 4;

/// A guest that was saved, and has written other pages since.
struct Saved {
    dir: TempDir,
    path: PathBuf,
    ram: GuestRam,
    pages: PageSet,
    old: Vec<u8>,
    new: Vec<u8>,
}

fn all(ram: &GuestRam) -> Vec<u8> {
    let mut bytes = vec![0; ram.size() as usize];
    ram.memory().read_slice(&mut bytes, GuestAddress(0)).unwrap();
    bytes
}

fn put(ram: &GuestRam, page: u64, byte: u8) {
    ram.memory().write_slice(&[byte; PAGE as usize], GuestAddress(page * PAGE)).unwrap();
}

/// A directory on a file system where a base can be written in place: one that shares no blocks.
fn place() -> Option<PathBuf> {
    let usable = |dir: &PathBuf| {
        let [one, other] = [(); 2].map(|()| tempfile::tempfile_in(dir).ok());
        let (Some(one), Some(other)) = (one, other) else { return false };
        let known = rustix::fs::fstatfs(&one).is_ok_and(|fs| FILE_SYSTEMS.contains(&fs.f_type));
        known && !share(&one, &other) && fsetxattr(&one, MARK, b"1", XattrFlags::empty()).is_ok()
    };
    let found = [std::env::temp_dir(), "/dev/shm".into()].into_iter().find(usable);
    if found.is_none() {
        eprintln!("not run: no file system here has attributes and shares no blocks");
    }
    found
}

impl Saved {
    fn new(place: &Path) -> Self {
        let dir = tempfile::tempdir_in(place).unwrap();
        let path = dir.path().join("mem");
        let ram = GuestRam::map(MIB, HugePages::None, true).unwrap();
        (0..100).for_each(|page| put(&ram, page, 1));
        write_full(&ram, &path, &()).unwrap().file.commit().unwrap();
        Self::changed(dir, path, ram)
    }

    /// The same, gone on from its own image.
    fn restored(place: &Path) -> Self {
        let Saved { dir, path, ram, .. } = Self::new(place);
        let ram = GuestRam::from_file(ram.layout(), &path, HugePages::None, true).unwrap();
        Self::changed(dir, path, ram)
    }

    fn changed(dir: TempDir, path: PathBuf, ram: GuestRam) -> Self {
        let old = std::fs::read(&path).unwrap();
        let mut pages = ram.no_pages();
        // Data over data, data in a hole, zeros over data, zeros in a hole.
        for (page, byte) in [(1, 2), (2, 3), (7, 4), (500, 5), (8, 0), (9, 0), (600, 0)] {
            put(&ram, page, byte);
            pages.insert(0, page..page + 1);
        }
        let new = all(&ram);
        Saved { dir, path, ram, pages, old, new }
    }

    fn write(&self) -> Written {
        write_diff(&self.ram, &self.path, &self.pages, &()).unwrap()
    }

    fn inode(&self) -> u64 {
        self.path.metadata().unwrap().ino()
    }

    fn contents(&self) -> Vec<u8> {
        std::fs::read(&self.path).unwrap()
    }

    fn names(&self) -> usize {
        std::fs::read_dir(self.dir.path()).unwrap().count()
    }

    /// Writes the Diff while `meanwhile` lives, which must not be done in place.
    fn assert_copied<T>(&self, meanwhile: T) {
        let before = self.inode();
        self.write().file.commit().unwrap();
        drop(meanwhile);
        assert_ne!(self.inode(), before, "the base was written");
        assert_eq!(self.contents(), self.new);
        assert_eq!(self.names(), 1);
    }
}

/// Stops after so many steps, as a kill would.
struct StopAfter(AtomicU64);

impl Observer for StopAfter {
    fn progress(&self, _: u64, _: u64) {
        let left = self.0.load(Ordering::Relaxed);
        self.0.store(left.saturating_sub(1), Ordering::Relaxed);
    }

    fn cancelled(&self) -> bool {
        self.0.load(Ordering::Relaxed) == 0
    }
}

#[test]
fn a_diff_is_written_into_a_base_without_other_users() {
    let Some(place) = place() else { return };
    for saved in [Saved::new(&place), Saved::restored(&place)] {
        let before = saved.inode();
        let written = saved.write();
        assert_eq!(written.data_bytes, 4 * PAGE, "only what is not zero");
        assert_eq!(saved.contents(), saved.old, "it is not committed");
        written.file.commit().unwrap();
        assert_eq!(saved.inode(), before, "the base was copied");
        assert_eq!(saved.contents(), saved.new);
        assert_eq!(all(&saved.ram), saved.new);
        assert_eq!((saved.names(), marked(&saved.path)), (1, None));
    }
}

#[test]
fn a_base_that_a_clone_or_page_server_has_open_is_copied() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let reader = File::open(&saved.path).unwrap();
    saved.assert_copied(&reader);
    let mut bytes = vec![0; saved.old.len()];
    reader.read_exact_at(&mut bytes, 0).unwrap();
    assert_eq!(bytes, saved.old);

    let saved = Saved::restored(&place);
    let clone = GuestRam::from_file(saved.ram.layout(), &saved.path, HugePages::None, false).unwrap();
    saved.assert_copied(&clone);
    assert_eq!(all(&clone), saved.old);
}

#[test]
fn a_base_that_is_opened_before_the_commit_is_copied() {
    let Some(place) = place() else { return };
    for saved in [Saved::new(&place), Saved::restored(&place)] {
        let written = saved.write();
        let clone = GuestRam::from_file(saved.ram.layout(), &saved.path, HugePages::None, false).unwrap();
        written.file.commit().unwrap();
        assert_eq!(all(&clone), saved.old);
        assert_eq!(saved.contents(), saved.new);
        assert_eq!(saved.names(), 1);
    }
}

#[test]
fn a_base_with_another_name_or_a_forked_user_is_copied() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let other = saved.dir.path().join("other");
    std::fs::hard_link(&saved.path, &other).unwrap();
    saved.write().file.commit().unwrap();
    assert_eq!(std::fs::read(&other).unwrap(), saved.old);
    assert_eq!(saved.contents(), saved.new);

    let saved = Saved::restored(&place);
    saved.ram.will_be_shared();
    saved.assert_copied(());
}

#[test]
fn a_diff_that_is_given_up_before_the_commit_leaves_the_base() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    drop(saved.write());
    let stop = StopAfter(AtomicU64::new(2));
    let error = write_diff(&saved.ram, &saved.path, &saved.pages, &stop).unwrap_err();
    assert!(matches!(error, ImageError::Cancelled { .. }), "{error}");
    assert_eq!(saved.contents(), saved.old);
    assert_eq!(saved.names(), 1);
}

/// The host goes down, or the monitor is killed, after each step of writing to the base, and the
/// next one is killed at each step of completing it.
#[test]
fn a_kill_at_any_step_leaves_the_new_image_to_be_completed() {
    const STEPS: u64 = 8;
    let Some(place) = place() else { return };
    for step in 0..STEPS {
        for by_mark in [false, true] {
            let saved = Saved::new(&place);
            let written = saved.write();
            let id = written.info.id;
            // What `NewImage::commit` does, as far as it comes.
            let base = open_base(&saved.ram, &saved.path).unwrap();
            let size = saved.new.len() as u64;
            let log = written.file.into_patch().unwrap().into_log();
            fsetxattr(&base, MARK, id.to_string().as_bytes(), XattrFlags::empty()).unwrap();
            let observer = StopAfter(AtomicU64::new(step));
            let target = Target { file: &base, path: &saved.path, size, observer: &observer };
            let _ = apply(log.file(), &log.path(), &target);
            drop((base, log));
            // The mark says that half of it is no image.
            assert!(saved.names() == 2 && marked(&saved.path) == Some(id));
            let id = (!by_mark).then_some(id);
            let stopped = settle(&saved.path, id, &StopAfter(AtomicU64::new(step)));
            assert!(stopped.is_ok() || saved.names() == 2, "the log is gone, and so is the image");
            settle(&saved.path, id, &()).unwrap();
            assert_eq!(saved.contents(), saved.new, "{step}");
            assert_eq!((saved.names(), marked(&saved.path)), (1, None));
        }
    }
}

#[test]
fn a_diff_that_is_killed_at_its_commit_is_found_by_its_state() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let written = saved.write();
    let id = written.info.id;
    drop(written.file.into_patch().unwrap().into_log());
    assert_eq!(saved.contents(), saved.old);
    settle(&saved.path, Some(FileId::random().unwrap()), &()).unwrap();
    assert_eq!(saved.contents(), saved.old, "another state's");
    settle(&saved.path, Some(id), &()).unwrap();
    assert_eq!(saved.contents(), saved.new);
    assert_eq!(saved.names(), 1);
}

#[test]
fn a_diff_onto_a_half_written_base_completes_it_first() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let written = saved.write();
    let base = open_base(&saved.ram, &saved.path).unwrap();
    let log = written.file.into_patch().unwrap().into_log();
    fsetxattr(&base, MARK, log.id().to_string().as_bytes(), XattrFlags::empty()).unwrap();
    drop((base, log));
    put(&saved.ram, 50, 9);
    let mut pages = saved.ram.no_pages();
    pages.insert(0, 50..51);
    write_diff(&saved.ram, &saved.path, &pages, &()).unwrap().file.commit().unwrap();
    assert_eq!(saved.contents(), all(&saved.ram));
    assert_eq!(saved.names(), 1);
}

#[test]
fn a_damaged_log_is_an_error_and_changes_nothing() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let written = saved.write();
    let id = written.info.id;
    let log = written.file.into_patch().unwrap().into_log();
    let path = log.path();
    drop(log);
    let good = std::fs::read(&path).unwrap();
    let word = |at: usize, value: u64| {
        let mut bad = good.clone();
        bad[at..at + 8].copy_from_slice(&value.to_le_bytes());
        bad
    };
    let cases = [
        Vec::new(),
        good[..good.len() - 1].to_vec(),
        word(0, 0),
        word(8, u64::MAX),
        word(8, 1),
        word(16, 1 << 40),
        word(16, 0),
        word(24, 7),
    ];
    for bad in cases {
        std::fs::write(&path, bad).unwrap();
        let error = settle(&saved.path, Some(id), &()).unwrap_err();
        assert!(error.to_string().contains("vesta-redo"), "{error}");
        assert_eq!(saved.contents(), saved.old);
        assert_eq!(saved.names(), 2);
    }
    std::fs::write(&path, good).unwrap();
    settle(&saved.path, Some(id), &()).unwrap();
    assert_eq!(saved.contents(), saved.new);
}

#[test]
fn a_diff_without_a_base_below_it_keeps_its_zeros_as_data() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let diff = saved.dir.path().join("diff");
    let mut some = saved.ram.no_pages();
    some.insert(0, 500..502);
    write_diff(&saved.ram, &diff, &some, &()).unwrap().file.commit().unwrap();
    assert!(partial::is_marked(&File::open(&diff).unwrap()));
    let before = diff.metadata().unwrap().ino();
    write_diff(&saved.ram, &diff, &saved.pages, &()).unwrap().file.commit().unwrap();
    assert_eq!(diff.metadata().unwrap().ino(), before, "it was copied");
    assert!(partial::is_marked(&File::open(&diff).unwrap()));
    crate::image::merge_in_place(&saved.path, &diff, &()).unwrap();
    assert_eq!(saved.contents(), saved.new, "a page of zeros was taken for a hole");
}
