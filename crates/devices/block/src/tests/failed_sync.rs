//! Failed syncs: after the first one, the contents of the disk are unknown. Also locks, and the
//! durability of the names of new files.

use std::os::unix::fs::FileExt;
use std::sync::{Arc, Mutex};

use super::crash::as_if_host_crashed;
use super::recorder::{BrokenRange, Faults, FileOp, OpLog, RecordingEngine};
use super::rig::*;
use crate::disk::{ContentsUnknown, DiskError, FileLocks, LockError};
use crate::host_file::health::faults;
use crate::host_file::name::record;
use crate::overlay::OverlayError;
use sync::locked;

const SIZE: u64 = 1 << 20;

fn base_of(dir: &Path) -> PathBuf {
    let path = dir.join("base");
    std::fs::write(&path, pattern(0x55, 0, SIZE)).unwrap();
    path
}

/// A base, the path of an overlay on it, and the options to open both.
fn new_overlay(dir: &Path) -> (PathBuf, PathBuf, DiskOptions) {
    let (base, top) = (base_of(dir), dir.join("top"));
    let options = overlaid(&base, top.clone(), vec![], IoEngine::Sync);
    (base, top, options)
}

/// An overlay whose first sector was flushed and whose second one was not; and its base.
fn half_flushed_overlay(dir: &Path) -> (PathBuf, PathBuf, Rig) {
    let (base, top, options) = new_overlay(dir);
    let mut rig = Rig::open(&options);
    rig.write(0, &[1; 512]).unwrap();
    rig.do_now(0, Request::Flush).unwrap();
    rig.write(512, &[2; 512]).unwrap();
    (base, top, rig)
}

/// The first failure, as named by an error of the disk.
fn cause(error: DiskError) -> ContentsUnknown {
    match error {
        DiskError::ContentsUnknown(cause) | DiskError::Overlay(OverlayError::ContentsUnknown(cause)) => cause,
        other => panic!("{other}"),
    }
}

/// A sync of the disk.
type Sync = fn(&Disk) -> Result<(), DiskError>;

/// All syncs of a disk beside its queues.
const SYNCS: [Sync; 4] = [Disk::write_back, Disk::sync, Disk::freeze, Disk::close];

#[test]
fn any_failed_sync_makes_the_contents_unknown() {
    for engine in ENGINES {
        for with_overlay in [false, true] {
            // Closing a raw disk does not sync it.
            for first in SYNCS.iter().take(if with_overlay { 4 } else { 3 }) {
                let dir = tempfile::tempdir().unwrap();
                let (base, top) = (base_of(dir.path()), dir.path().join("top"));
                let options = raw_or_overlaid(&base, &top, with_overlay, engine);
                let mut rig = Rig::open(&options);
                rig.write(0, &[1; 512]).unwrap();
                let written = if with_overlay { &top } else { &base };
                let _failure = faults::fail(written);
                let reason = cause(first(&rig.disk).unwrap_err());
                assert_eq!((&reason.path, reason.errno), (written, Errno::IO));
                for sync in SYNCS {
                    assert_eq!(cause(sync(&rig.disk).unwrap_err()), reason, "the first cause is named");
                }
                assert!(rig.disk.merge_layers(&dir.path().join("merged")).is_err());
                assert_eq!(rig.do_now(0, Request::Flush), Err(Errno::IO));
                // Requests are still served.
                rig.write(512, &[2; 512]).unwrap();
                assert_eq!(rig.read(0, 1024).unwrap(), [[1; 512], [2; 512]].concat());
            }
        }
    }
}

#[test]
fn failed_flush_is_not_retried_and_fails_later_syncs() {
    for with_overlay in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (base, top) = (base_of(dir.path()), dir.path().join("top"));
        let options = raw_or_overlaid(&base, &top, with_overlay, IoEngine::Sync);
        let mut rig = Rig::open(&options);
        rig.write(0, &[1; 512]).unwrap();
        let failure = faults::fail(if with_overlay { &top } else { &base });
        assert_eq!(rig.do_now(0, Request::Flush), Err(Errno::IO));
        drop(failure);
        assert_eq!(rig.do_now(0, Request::Flush), Err(Errno::IO));
        for sync in SYNCS {
            assert_eq!(cause(sync(&rig.disk).unwrap_err()).what, "a flush");
        }
    }
}

/// The state and the boot id of the session in an overlay file.
fn session(path: &Path) -> (u8, [u8; 16]) {
    let bytes = std::fs::read(path).unwrap();
    (bytes[4096 + 32], bytes[4096 + 8..4096 + 24].try_into().unwrap())
}

#[test]
fn overlay_keeps_flushed_writes_after_a_failed_sync() {
    for fails_in_queue in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (base, top, mut rig) = half_flushed_overlay(dir.path());
        let durable_map = std::fs::read(&top).unwrap()[8192..12288].to_vec();
        let failure = faults::fail(&top);
        if fails_in_queue {
            rig.do_now(0, Request::Flush).unwrap_err();
        } else {
            rig.disk.close().unwrap_err();
        }
        drop(failure);
        rig.write(1024, &[3; 512]).unwrap();
        let killed = dir.path().join("killed");
        std::fs::copy(&top, &killed).unwrap();
        drop(rig);
        for left in [top, killed] {
            assert_eq!(session(&left), (1, [0xff; 16]), "it is not closed");
            assert_eq!(std::fs::read(&left).unwrap()[8192..12288], durable_map);
            // On this boot of the host as on any other.
            let mut rig = Rig::open(&overlaid(&base, left.clone(), vec![], IoEngine::Sync));
            assert_eq!(rig.read(0, 512).unwrap(), [1; 512]);
            assert_eq!(rig.read(512, 1024).unwrap(), pattern(0x55, 512, 1024));
            drop(rig);
            assert_eq!(session(&left).0, 3, "what is left of it is whole again");
        }
    }
}

#[test]
fn overlay_whose_recovery_fails_is_not_closed() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top, _rig) = half_flushed_overlay(dir.path());
    for host_crashed in [false, true] {
        let left = dir.path().join(format!("left{host_crashed}"));
        std::fs::copy(&top, &left).unwrap();
        if host_crashed {
            as_if_host_crashed(&left);
        }
        let again = overlaid(&base, left.clone(), vec![], IoEngine::Sync);
        let failure = faults::fail(&left);
        cause(Disk::open(&again).unwrap_err());
        drop(failure);
        assert_eq!(session(&left), (1, [0xff; 16]));
        let mut rig = Rig::open(&again);
        assert_eq!(rig.read(0, 512).unwrap(), [1; 512]);
        assert_eq!(rig.read(512, 512).unwrap(), pattern(0x55, 512, 512));
    }
}

/// Only the commit map has its contents: without it, it would be another disk.
#[test]
fn overlay_with_unknown_contents_is_refused_not_emptied() {
    let dir = tempfile::tempdir().unwrap();
    let (base, top, options) = new_overlay(dir.path());
    let unsafe_options = DiskOptions { cache_type: CacheType::Unsafe, ..options.clone() };
    Rig::open(&unsafe_options).write(0, &[1; 512]).unwrap();
    let failure = faults::fail(&top);
    cause(Disk::open(&options).unwrap_err());
    drop(failure);
    let as_layer = overlaid(&base, dir.path().join("on_top"), vec![top.clone()], IoEngine::Sync);
    for refused in [&options, &as_layer, &DiskOptions { read_only: true, ..options.clone() }] {
        let error = Disk::open(refused).unwrap_err();
        assert!(matches!(error, DiskError::Overlay(OverlayError::LeftUnknown { .. })), "{error}");
        assert!(error.to_string().contains("top: its contents are unknown"), "{error}");
    }
    // The contents can be read to save them. That changes nothing.
    let mut rig = Rig::open(&unsafe_options);
    assert_eq!(rig.read(0, 512).unwrap(), [1; 512]);
    drop(rig);
    assert!(Disk::open(&options).is_err());
}

#[test]
fn no_session_begins_once_the_contents_are_unknown() {
    let dir = tempfile::tempdir().unwrap();
    let (_, top, options) = new_overlay(dir.path());
    let mut rig = Rig::open(&options);
    let failure = faults::fail(&top);
    rig.disk.write_back().unwrap_err();
    assert_eq!(rig.write(0, &[1; 512]), Err(Errno::IO));
    assert_eq!(rig.do_now(0, Request::Discard { len: 512 }), Err(Errno::IO));
    drop(rig);
    drop(failure);
    let mut rig = Rig::open(&options);
    let failure = faults::fail(&top);
    assert_eq!(rig.write(0, &[1; 512]), Err(Errno::IO), "the sync of the session fails");
    assert_eq!(cause(rig.disk.close().unwrap_err()).what, "the sync of the overlay's first change");
    drop(rig);
    drop(failure);
    assert_eq!(session(&top), (1, [0xff; 16]));
}

/// A disk whose engine is stepped by the test.
fn recorded(options: &DiskOptions) -> (Rig, OpLog, Arc<Faults>, BrokenRange) {
    let mut rig = Rig::open(options);
    let log = Arc::new(Mutex::new(Vec::new()));
    let recorder = RecordingEngine::new(rig.disk.files(), Arc::clone(&log));
    let (faults, broken) = (Arc::clone(&recorder.syncs), Arc::clone(&recorder.broken));
    rig.queue = rig.disk.queue_with(Box::new(recorder));
    (rig, log, faults, broken)
}

fn syncs(log: &Mutex<Vec<FileOp>>) -> usize {
    locked(log).iter().filter(|op| matches!(op, FileOp::Sync | FileOp::FailedSync)).count()
}

/// Two concurrent syncs would share the kernel's one report of a failure.
#[test]
fn flushes_run_one_at_a_time_and_share_the_next() {
    let dir = tempfile::tempdir().unwrap();
    for fails in [false, true] {
        let (mut rig, log, faults, _) = recorded(&raw(&base_of(dir.path()), IoEngine::Sync));
        *locked(&faults.error) = fails.then_some(Errno::IO);
        let tokens = [0; 3].map(|_| rig.start(0, Request::Flush));
        rig.queue.submit_and_reap();
        assert_eq!(syncs(&log), 1);
        let results = rig.finish();
        let wanted = if fails { Err(Errno::IO) } else { Ok(()) };
        assert_eq!(results, tokens.map(|token| (token, wanted)));
        assert_eq!(syncs(&log), if fails { 1 } else { 2 });
    }
}

#[test]
fn unmarkable_session_has_its_commit_map_cleared() {
    let dir = tempfile::tempdir().unwrap();
    let (.., options) = new_overlay(dir.path());
    let (mut rig, _, faults, broken) = recorded(&options);
    rig.write(0, &[1; 512]).unwrap();
    *locked(&broken) = 4096..4097;
    *locked(&faults.error) = Some(Errno::IO);
    rig.do_now(0, Request::Flush).unwrap_err();
    drop(rig);
    let mut rig = Rig::open(&options);
    assert_eq!(rig.read(0, 512).unwrap(), pattern(0x55, 0, 512));
}

#[test]
fn failed_sync_of_a_dropped_queue_is_not_lost() {
    let dir = tempfile::tempdir().unwrap();
    let top = dir.path().join("top");
    let options = overlaid(&base_of(dir.path()), top.clone(), vec![], IoEngine::Sync);
    let mut rig = Rig::open(&options);
    rig.write(0, &[1; 512]).unwrap();
    let failure = faults::fail(&top);
    rig.start(0, Request::Flush);
    drop(rig);
    drop(failure);
    assert_eq!(session(&top).0, 1, "an overlay whose flush failed is not closed");
}

#[test]
fn each_queue_has_an_open_file_of_its_own() {
    let dir = tempfile::tempdir().unwrap();
    let options = DiskOptions { io_threads: 3, ..raw(&base_of(dir.path()), IoEngine::Sync) };
    let disk = Disk::open(&options).unwrap();
    let mut files: Vec<_> = (0..3).map(|_| Arc::as_ptr(&disk.queue_files()[0])).collect();
    files.sort();
    files.dedup();
    assert_eq!(files.len(), 3);
}

#[test]
fn reopened_file_stays_unknown_and_another_is_known() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path());
    let other = dir.path().join("other");
    std::fs::copy(&base, &other).unwrap();
    let options = raw(&base, IoEngine::Sync);
    let locks = FileLocks::default();
    let old = Disk::open_with(&options, &locks, None).unwrap();
    let _failure = faults::fail(&base);
    old.write_back().unwrap_err();
    let same = Disk::open_with(&options, &locks, Some(&old)).unwrap();
    assert!(same.check().is_err());
    let new = Disk::open_with(&DiskOptions { path: other, ..options.clone() }, &locks, Some(&old)).unwrap();
    new.freeze().unwrap();
    let overlaid = overlaid(&base, dir.path().join("top"), vec![], IoEngine::Sync);
    let on_unknown_base = Disk::open_with(&overlaid, &locks, Some(&old));
    assert!(
        matches!(on_unknown_base, Err(DiskError::ContentsUnknown(_))),
        "its pages would be the overlay's"
    );
}

#[test]
fn merge_with_a_failed_sync_leaves_no_overlay() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path());
    let (layer, merged) = (dir.path().join("layer"), dir.path().join("merged"));
    Rig::open(&overlaid(&base, layer.clone(), vec![], IoEngine::Sync)).write(0, &[1; 512]).unwrap();
    let on_top = overlaid(&base, dir.path().join("top"), vec![layer], IoEngine::Sync);
    let disk = Disk::open(&on_top).unwrap();
    std::fs::write(&merged, "").unwrap();
    let merge = disk.merge_layers(&merged).unwrap();
    let failure = faults::fail(&merged);
    merge.run(&|| true).unwrap_err();
    drop(failure);
    assert!(Disk::open(&overlaid(&base, dir.path().join("top2"), vec![merged], IoEngine::Sync)).is_err());
}

#[test]
fn name_of_a_new_overlay_is_durable_when_it_opens() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path());
    let names = |name: &str, name_is_durable| {
        let path = dir.path().join(name);
        let options = overlaid(&base, path.clone(), vec![], IoEngine::Sync);
        record::take();
        drop(Disk::open(&DiskOptions { name_is_durable, ..options }).unwrap());
        record::take() == [path]
    };
    assert!(names("new", false));
    assert!(names("newer", true), "a file that did not exist cannot be durable");
    assert!(!names("new", false), "it is not new any more");
    for (name, name_is_durable) in [("empty", false), ("durable", true)] {
        std::fs::write(dir.path().join(name), "").unwrap();
        assert_eq!(names(name, name_is_durable), !name_is_durable);
    }
}

#[test]
fn raw_disk_has_one_writer_or_any_number_of_readers() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path());
    let write = raw(&base, IoEngine::Sync);
    let read = DiskOptions { read_only: true, ..write.clone() };
    let overlay = |name| overlaid(&base, dir.path().join(name), vec![], IoEngine::Sync);
    let is_locked =
        |options: &DiskOptions| matches!(Disk::open(options), Err(DiskError::Lock(LockError::InUse { .. })));
    let writer = Disk::open(&write).unwrap();
    assert!(is_locked(&write) && is_locked(&read) && is_locked(&overlay("o")));
    assert!(!dir.path().join("o").exists(), "what is refused leaves nothing behind");
    // Without a lock, a drive neither is kept from the disk nor keeps others from it.
    drop(Disk::open(&DiskOptions { lock: false, ..write.clone() }).unwrap());
    // As a fork makes a base.
    writer.freeze().unwrap();
    let readers = [Disk::open(&read).unwrap(), Disk::open(&overlay("a")).unwrap()];
    assert!(is_locked(&write));
    assert!(matches!(writer.thaw(), Err(DiskError::Lock(LockError::InUse { .. }))));
    drop(readers);
    writer.thaw().unwrap();
    assert!(is_locked(&read));
    drop(writer);
    let reader = Disk::open(&read).unwrap();
    assert!(is_locked(&write));
    drop(reader);
    Disk::open(&write).unwrap();
}

/// A disk of size 0 stands for one that comes later. A fork and its children share it, and no guest
/// can write to it.
#[test]
fn disk_of_size_0_is_shared() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("none");
    std::fs::write(&path, "").unwrap();
    let options = raw(&path, IoEngine::Sync);
    let (_one, _other) = (Disk::open(&options).unwrap(), Disk::open(&options).unwrap());
}

/// The kernel reports a failure once for each open file, and `fdatasync` takes the report.
#[test]
fn queue_and_disk_have_separate_open_files() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path());
    let disk = Disk::open(&raw(&base, IoEngine::Sync)).unwrap();
    let _failure = faults::fail(&base);
    disk.write_back().unwrap_err();
    // The open file of the queue has its own report.
    let file = &disk.files()[0];
    assert!(crate::host_file::health::sync_data(file).is_err());
    file.read_exact_at(&mut [0; 512], 0).unwrap();
}
