//! Tests of Diffs that are written in place: the image after each step, and who may write.

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use config::HugePages;
use rustix::fs::OFlags;
use snapshot::FileId;
use tempfile::TempDir;
use vm_memory::{Bytes, GuestAddress};

use super::base::{CommitStep, FILE_SYSTEMS, mark_base};
use super::log::apply;
use super::reader::{BaseState, inspect, marked};
use super::*;
use crate::PageSet;
use crate::image::error::ImageError;
use crate::image::file::{ImageTarget, open_image, reflink};
use crate::image::partial;
use crate::image::{RestoreError, WrittenImage, merge, write_diff, write_full};
use crate::observer::Observer;
use crate::pages::PAGE;
use crate::ram::GuestRam;
use crate::sys::lease::HeldLease;

const MIB: u32 = 4;

/// A guest that was saved and has written pages since.
struct Saved {
    dir: TempDir,
    path: PathBuf,
    ram: GuestRam,
    /// The pages that were written since.
    pages: PageSet,
    /// The saved image.
    old: Vec<u8>,
    /// The guest's memory now.
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

/// A directory on a file system where a base is written in place, because it cannot share blocks.
fn place() -> Option<PathBuf> {
    let usable = |dir: &PathBuf| {
        let [one, other] = [(); 2].map(|()| tempfile::tempfile_in(dir).ok());
        let (Some(one), Some(other)) = (one, other) else { return false };
        let known = rustix::fs::fstatfs(&one).is_ok_and(|fs| FILE_SYSTEMS.contains(&fs.f_type));
        known && !reflink(&one, &other) && mark::is_possible(&one)
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

    /// The same guest, restored from its own image.
    fn restored(place: &Path) -> Self {
        let Saved { dir, path, ram, .. } = Self::new(place);
        let ram = GuestRam::from_file(ram.layout(), &path, HugePages::None, true).unwrap();
        Self::changed(dir, path, ram)
    }

    fn changed(dir: TempDir, path: PathBuf, ram: GuestRam) -> Self {
        let old = std::fs::read(&path).unwrap();
        let mut pages = ram.empty_page_set();
        // Data over data, data in a hole, zeros over data, zeros in a hole.
        for (page, byte) in [(1, 2), (2, 3), (7, 4), (500, 5), (8, 0), (9, 0), (600, 0)] {
            put(&ram, page, byte);
            pages.insert(0, page..page + 1);
        }
        let new = all(&ram);
        Saved { dir, path, ram, pages, old, new }
    }

    fn write(&self) -> WrittenImage {
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

    /// Writes the Diff while `meanwhile` lives, and checks that it is not written in place.
    fn assert_copied<T>(&self, meanwhile: T) {
        let before = self.inode();
        self.write().file.commit().unwrap();
        drop(meanwhile);
        assert_ne!(self.inode(), before, "the base was written");
        assert_eq!(self.contents(), self.new);
        assert_eq!(self.names(), 1);
    }
}

/// Cancels after so many steps, in place of a kill.
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
fn diff_is_written_in_place_if_the_base_has_no_other_user() {
    let Some(place) = place() else { return };
    for saved in [Saved::new(&place), Saved::restored(&place)] {
        let before = saved.inode();
        let written = saved.write();
        assert_eq!(written.data_bytes, 4 * PAGE, "only what is not zero");
        assert_eq!(saved.contents(), saved.old, "the base changed before the commit");
        written.file.commit().unwrap();
        assert_eq!(saved.inode(), before, "the base was copied");
        assert_eq!(saved.contents(), saved.new);
        assert_eq!(all(&saved.ram), saved.new);
        assert_eq!((saved.names(), marked(&saved.path).unwrap()), (1, None));
    }
}

#[test]
fn base_open_in_another_process_is_copied() {
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
fn base_opened_before_the_commit_is_copied() {
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
fn base_with_a_second_link_or_a_forked_user_is_copied() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let other = saved.dir.path().join("other");
    std::fs::hard_link(&saved.path, &other).unwrap();
    saved.write().file.commit().unwrap();
    assert_eq!(std::fs::read(&other).unwrap(), saved.old);
    assert_eq!(saved.contents(), saved.new);

    let saved = Saved::restored(&place);
    saved.ram.note_fork();
    saved.assert_copied(());
}

#[test]
fn diff_dropped_before_the_commit_leaves_the_base() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    drop(saved.write());
    let stop = StopAfter(AtomicU64::new(2));
    let error = write_diff(&saved.ram, &saved.path, &saved.pages, &stop).unwrap_err();
    assert!(matches!(error, ImageError::Cancelled { .. }), "{error}");
    assert_eq!(saved.contents(), saved.old);
    assert_eq!(saved.names(), 1);
}

/// The monitor is killed while it applies the log, and the next one at each step of the recovery.
#[test]
fn kill_during_apply_or_recovery_is_recovered() {
    const STEPS: u64 = 8;
    let Some(place) = place() else { return };
    for step in 0..STEPS {
        for by_mark in [false, true] {
            let saved = Saved::new(&place);
            let written = saved.write();
            let id = written.info.id;
            // The steps of `StagedImage::commit` until the kill.
            let size = saved.new.len() as u64;
            let log = written.file.into_redo_diff().unwrap().into_log();
            let base = mark_base(&saved.ram, &saved.path, id, &mut |_| {}).unwrap();
            let observer = StopAfter(AtomicU64::new(step));
            let target = ImageTarget { file: &base, path: &saved.path, size, observer: &observer };
            let _ = apply(log.file(), &log.path(), &target);
            drop((base, log));
            // The mark shows that the base is not a complete image.
            assert!(saved.names() == 2 && marked(&saved.path).unwrap() == Some(id));
            let id = (!by_mark).then_some(id);
            let stopped = recover(&saved.path, id, &StopAfter(AtomicU64::new(step)));
            assert!(stopped.is_ok() || saved.names() == 2, "the log is gone, but the image is not recovered");
            recover(&saved.path, id, &()).unwrap();
            assert_eq!(saved.contents(), saved.new, "{step}");
            assert_eq!((saved.names(), marked(&saved.path).unwrap()), (1, None));
        }
    }
}

const ALL_STEPS: [CommitStep; 6] = [
    CommitStep::Committed,
    CommitStep::Opened,
    CommitStep::Marked,
    CommitStep::Alone,
    CommitStep::Written,
    CommitStep::Unmarked,
];

impl Saved {
    /// Writes and commits the Diff, and calls `at` after each step.
    fn commit(&self, mut at: impl FnMut(CommitStep)) -> FileId {
        let written = self.write();
        let id = written.info.id;
        written.file.into_redo_diff().unwrap().commit_in_steps(None, &mut at).unwrap();
        id
    }

    fn map(&self) -> Result<GuestRam, RestoreError> {
        GuestRam::from_file(self.ram.layout(), &self.path, HugePages::None, false)
    }
}

#[test]
fn commit_killed_after_any_step_leaves_a_whole_image() {
    let Some(place) = place() else { return };
    for make in [Saved::new, Saved::restored] {
        for last in ALL_STEPS {
            let saved = make(&place);
            let written = saved.write();
            let id = written.info.id;
            let patch = written.file.into_redo_diff().unwrap();
            let mut at = |step| {
                if step == last {
                    resume_unwind(Box::new(step));
                }
            };
            let killed = catch_unwind(AssertUnwindSafe(|| patch.commit_in_steps(None, &mut at)));
            assert!(killed.is_err(), "{last:?} was not reached");
            let is_marked = [CommitStep::Marked, CommitStep::Alone, CommitStep::Written].contains(&last);
            assert_eq!(marked(&saved.path).unwrap(), is_marked.then_some(id), "{last:?}");
            // Without the state file, a reader uses the mark.
            let reader = saved.map().unwrap();
            let is_new = is_marked || last == CommitStep::Unmarked;
            assert_eq!(all(&reader) == saved.new, is_new, "{last:?}");
            assert_eq!(all(&reader) == saved.old, !is_new, "{last:?}");
            recover(&saved.path, Some(id), &()).unwrap();
            assert_eq!(all(&saved.map().unwrap()), saved.new, "{last:?}");
            assert_eq!((saved.names(), marked(&saved.path).unwrap()), (1, None), "{last:?}");
        }
    }
}

/// A reader opens the base after one step of the writer and reads the mark after the same or a
/// later one. The file that it then uses is complete and does not change.
#[test]
fn reader_at_any_commit_step_gets_a_stable_image() {
    let Some(place) = place() else { return };
    let read = |file: &File| {
        let mut bytes = vec![0; (MIB as usize) << 20];
        file.read_exact_at(&mut bytes, 0).unwrap();
        bytes
    };
    for make in [Saved::new, Saved::restored] {
        for (first, opens_at) in ALL_STEPS.into_iter().enumerate() {
            let copied = opens_at < CommitStep::Alone;
            for looks_at in ALL_STEPS.into_iter().skip(first) {
                let saved = make(&place);
                let case = format!("open at {opens_at:?}, look at {looks_at:?}");
                let (mut file, mut used, mut seen) = (None, None, None);
                saved.commit(|step| {
                    if step == opens_at {
                        file = Some(open_image(&saved.path, OFlags::RDONLY).unwrap());
                    }
                    if step == looks_at {
                        let file = file.take().unwrap();
                        seen = Some(inspect(&file, &saved.path).unwrap());
                        used = (seen == Some(BaseState::Whole)).then(|| (read(&file), file));
                    }
                });
                // The writer used a new file and never reached that step.
                if seen.is_none() {
                    assert!(copied && looks_at >= CommitStep::Alone, "{case}");
                    let file = file.unwrap();
                    assert_eq!(read(&file), saved.old, "{case}");
                    assert_eq!(inspect(&file, &saved.path).unwrap(), BaseState::Whole, "{case}");
                }
                if let Some((bytes, file)) = used {
                    assert_eq!(read(&file), bytes, "{case}: it changed");
                    assert!(bytes == saved.old || bytes == saved.new, "{case}: it is half written");
                }
                assert_eq!(all(&saved.map().unwrap()), saved.new, "{case}");
                assert_eq!((saved.names(), marked(&saved.path).unwrap()), (1, None), "{case}");
            }
        }
    }
}

/// Reports each call, which a reader makes while it waits for a writer.
struct Asked(std::sync::Mutex<std::sync::mpsc::Sender<()>>);

impl Observer for Asked {
    fn cancelled(&self) -> bool {
        let _ = self.0.lock().unwrap().send(());
        false
    }
}

#[test]
fn clone_and_merge_wait_while_the_base_is_written() {
    let Some(place) = place() else { return };
    for step in [CommitStep::Marked, CommitStep::Alone, CommitStep::Written] {
        let saved = Saved::new(&place);
        let (diff, output) = (saved.dir.path().join("diff"), saved.dir.path().join("output"));
        let mut page = saved.ram.empty_page_set();
        page.insert(0, 1..2);
        write_diff(&saved.ram, &diff, &page, &()).unwrap().file.commit().unwrap();
        std::thread::scope(|scope| {
            let mut readers = Vec::new();
            saved.commit(|reached| {
                if reached != step {
                    return;
                }
                let (sender, asked) = std::sync::mpsc::channel();
                let observer = Asked(std::sync::Mutex::new(sender));
                let (saved, layout) = (&saved, saved.ram.layout());
                readers.push(scope.spawn(move || {
                    all(&GuestRam::from_file_with(layout, &saved.path, HugePages::None, false, &observer)
                        .unwrap())
                }));
                asked.recv().expect("the clone did not wait");
                let (sender, asked) = std::sync::mpsc::channel();
                let observer = Asked(std::sync::Mutex::new(sender));
                let (diff, output) = (&diff, &output);
                readers.push(scope.spawn(move || {
                    merge(&saved.path, diff, output, &observer).unwrap();
                    std::fs::read(output).unwrap()
                }));
                asked.recv().expect("the merge did not wait");
            });
            assert_eq!(readers.len(), 2, "{step:?} was not reached");
            for reader in readers {
                assert_eq!(reader.join().unwrap(), saved.new, "{step:?}");
            }
        });
    }
}

#[test]
fn second_writer_leaves_a_marked_base_alone() {
    let Some(place) = place() else { return };
    for other_at in [CommitStep::Opened, CommitStep::Marked, CommitStep::Alone, CommitStep::Written] {
        let saved = Saved::new(&place);
        let before = saved.inode();
        let id = saved.commit(|step| {
            if step == other_at {
                let other = FileId::random().unwrap();
                assert!(mark_base(&saved.ram, &saved.path, other, &mut |_| {}).is_none(), "{step:?}");
            }
        });
        assert_eq!((saved.inode(), saved.contents()), (before, saved.new.clone()), "{other_at:?}");
        assert_eq!((saved.names(), marked(&saved.path).unwrap()), (1, None), "{id}");
    }
}

#[test]
fn writer_copies_if_its_mark_or_base_was_replaced() {
    let Some(place) = place() else { return };
    let other = FileId::random().unwrap();
    let replaced = |path: &Path| {
        let copy = path.with_file_name("copy");
        std::fs::copy(path, &copy).unwrap();
        std::fs::rename(copy, path).unwrap();
    };
    let changes: [&dyn Fn(&Path); 3] = [
        &|path| mark::clear(&File::open(path).unwrap()).unwrap(),
        &|path| mark::set(&File::open(path).unwrap(), other).unwrap(),
        &replaced,
    ];
    for change in changes {
        let saved = Saved::new(&place);
        saved.commit(|step| {
            assert!(step < CommitStep::Alone, "the base was written");
            if step == CommitStep::Marked {
                change(&saved.path);
            }
        });
        assert_eq!(saved.contents(), saved.new);
        assert_eq!((saved.names(), marked(&saved.path).unwrap()), (1, None));
    }
}

#[test]
fn mark_without_a_log_is_ignored() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    mark::set(&File::open(&saved.path).unwrap(), FileId::random().unwrap()).unwrap();
    assert_eq!(all(&saved.map().unwrap()), saved.old);
    let before = saved.inode();
    saved.write().file.commit().unwrap();
    assert_eq!((saved.inode(), saved.contents()), (before, saved.new.clone()));
    assert_eq!((saved.names(), marked(&saved.path).unwrap()), (1, None));
}

/// A reader has opened the half-written base of a killed writer, and another process recovers it.
#[test]
fn reader_reopens_a_base_that_was_recovered() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let log = saved.write().file.into_redo_diff().unwrap().into_log();
    let base = mark_base(&saved.ram, &saved.path, log.id(), &mut |_| {}).unwrap();
    base.write_all_at(&[2; PAGE as usize], PAGE).unwrap();
    drop((base, log));
    let reader = open_image(&saved.path, OFlags::RDONLY).unwrap();
    assert!(matches!(inspect(&reader, &saved.path).unwrap(), BaseState::Marked(_)));
    recover(&saved.path, None, &()).unwrap();
    assert_eq!(inspect(&reader, &saved.path).unwrap(), BaseState::Replaced);
    assert_eq!(all(&saved.map().unwrap()), saved.new);
}

#[test]
fn every_opener_waits_for_a_lease_to_end() {
    type Opener = fn(&Saved);
    let openers: [(&str, Opener); 5] = [
        ("reading a mark", |saved| assert!(marked(&saved.path).unwrap().is_some())),
        ("a restore", |saved| assert_eq!(all(&saved.map().unwrap()), saved.old)),
        ("a base to change", |saved| assert!(open_base(&saved.ram, &saved.path).is_some())),
        ("a base to copy", |saved| drop(saved.write())),
        ("a merge", |saved| {
            let missing = saved.dir.path().join("missing");
            let error = merge(&saved.path, &missing, &missing, &()).unwrap_err();
            assert!(matches!(error, ImageError::Read { path, .. } if path == missing));
        }),
    ];
    let Some(place) = place() else { return };
    for (name, open) in openers {
        let saved = Saved::new(&place);
        mark::set(&File::open(&saved.path).unwrap(), FileId::random().unwrap()).unwrap();
        let lease = HeldLease::take(&saved.path);
        std::thread::scope(|scope| {
            let opener = scope.spawn(|| open(&saved));
            lease.release_to_opener();
            opener.join().unwrap_or_else(|_| panic!("{name} failed"));
        });
    }
}

#[test]
fn diff_killed_at_its_commit_is_recovered_by_the_state_id() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let written = saved.write();
    let id = written.info.id;
    drop(written.file.into_redo_diff().unwrap().into_log());
    assert_eq!(saved.contents(), saved.old);
    recover(&saved.path, Some(FileId::random().unwrap()), &()).unwrap();
    assert_eq!(saved.contents(), saved.old, "the log of another state was applied");
    recover(&saved.path, Some(id), &()).unwrap();
    assert_eq!(saved.contents(), saved.new);
    assert_eq!(saved.names(), 1);
}

#[test]
fn diff_onto_a_half_written_base_recovers_it_first() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let written = saved.write();
    let log = written.file.into_redo_diff().unwrap().into_log();
    drop((mark_base(&saved.ram, &saved.path, log.id(), &mut |_| {}).unwrap(), log));
    put(&saved.ram, 50, 9);
    let mut pages = saved.ram.empty_page_set();
    pages.insert(0, 50..51);
    write_diff(&saved.ram, &saved.path, &pages, &()).unwrap().file.commit().unwrap();
    assert_eq!(saved.contents(), all(&saved.ram));
    assert_eq!(saved.names(), 1);
}

#[test]
fn damaged_log_is_an_error_and_changes_nothing() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let written = saved.write();
    let id = written.info.id;
    let log = written.file.into_redo_diff().unwrap().into_log();
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
        let error = recover(&saved.path, Some(id), &()).unwrap_err();
        assert!(error.to_string().contains("vesta-redo"), "{error}");
        assert_eq!(saved.contents(), saved.old);
        assert_eq!(saved.names(), 2);
    }
    std::fs::write(&path, good).unwrap();
    recover(&saved.path, Some(id), &()).unwrap();
    assert_eq!(saved.contents(), saved.new);
}

#[test]
fn diff_onto_an_unmerged_diff_keeps_zero_pages_as_data() {
    let Some(place) = place() else { return };
    let saved = Saved::new(&place);
    let diff = saved.dir.path().join("diff");
    let mut some = saved.ram.empty_page_set();
    some.insert(0, 500..502);
    write_diff(&saved.ram, &diff, &some, &()).unwrap().file.commit().unwrap();
    assert!(partial::is_marked(&File::open(&diff).unwrap()));
    let before = diff.metadata().unwrap().ino();
    write_diff(&saved.ram, &diff, &saved.pages, &()).unwrap().file.commit().unwrap();
    assert_eq!(diff.metadata().unwrap().ino(), before, "it was copied");
    assert!(partial::is_marked(&File::open(&diff).unwrap()));
    crate::image::merge_in_place(&saved.path, &diff, &()).unwrap();
    assert_eq!(saved.contents(), saved.new, "a zero page was taken for a hole");
}
