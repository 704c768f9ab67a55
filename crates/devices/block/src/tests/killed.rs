//! What an overlay has when its monitor is killed at any moment: all that had completed.

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::sync::Arc;

use rustix::fs::SeekFrom;

use super::recorder::{OpLog, RecordingEngine};
use super::rig::*;
use sync::locked;

/// Bytes of the disk that one page of the map covers.
const PAGE: u64 = 16 << 20;

/// Offset of the commit map.
const MAP_B: u64 = 8192 + PAGES * 4096;

/// More pages than one round of a run writes.
const PAGES: u64 = 70;

fn rig(dir: &Path, engine: IoEngine, blocking: Blocking, cache_type: CacheType) -> (Rig, DiskOptions) {
    let base = dir.join("base");
    let file = File::create(&base).unwrap();
    file.set_len(PAGES * PAGE).unwrap();
    let options = DiskOptions { cache_type, ..overlaid(&base, dir.join("top"), vec![], engine) };
    (Rig::open_with(&options, blocking), options)
}

/// The header, the session and both maps, as a kill of the process at this moment leaves them.
/// Their data was written before.
fn as_left_by_a_kill_now(options: &DiskOptions) -> Vec<u8> {
    let top = &options.overlay.as_ref().unwrap().path;
    let mut bytes = vec![0; 1 << 20];
    File::open(top).unwrap().read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

/// Copies a file with its holes.
fn copy(from: &Path, to: &Path) {
    let (from, to) = (File::open(from).unwrap(), File::create(to).unwrap());
    to.set_len(from.metadata().unwrap().len()).unwrap();
    let mut at = 0;
    while let Ok(data) = rustix::fs::seek(&from, SeekFrom::Data(at)) {
        at = rustix::fs::seek(&from, SeekFrom::Hole(data)).unwrap();
        let mut bytes = vec![0; (at - data) as usize];
        from.read_exact_at(&mut bytes, data).unwrap();
        to.write_all_at(&bytes, data).unwrap();
    }
}

/// Whether the commit map in `left` has the first sector of a page.
fn map_b_has(left: &[u8], page: u64) -> bool {
    left[(MAP_B + page * 4096) as usize] & 1 == 1
}

#[test]
fn completed_writes_are_in_the_commit_map() {
    for (engine, blocking) in [
        (IoEngine::Async, Blocking::Never),
        (IoEngine::Async, Blocking::Allowed),
        (IoEngine::Sync, Blocking::Allowed),
    ] {
        for cache_type in [CacheType::Unsafe, CacheType::Writeback] {
            let dir = tempfile::tempdir().unwrap();
            let (mut rig, options) = rig(dir.path(), engine, blocking, cache_type);
            let mut pages = Vec::new();
            for page in 0..PAGES {
                pages.push((rig.start_write(page * PAGE, &[page as u8 + 1; 512], u64::MAX), page));
            }
            let mut completed = 0;
            while completed < PAGES {
                rig.queue.submit_and_reap();
                let completions: Vec<_> = std::iter::from_fn(|| rig.queue.pop_completion()).collect();
                let left = as_left_by_a_kill_now(&options);
                for (token, result) in completions {
                    result.unwrap();
                    let page = pages.iter().find(|submitted| submitted.0 == token).unwrap().1;
                    assert!(map_b_has(&left, page), "page {page}, {engine:?} {blocking:?} {cache_type:?}");
                    completed += 1;
                }
                if !rig.queue.has_more() {
                    rig.queue.wait_for_tests();
                }
            }
            // The copy is used as it is.
            let killed = dir.path().join("killed");
            let overlay = options.overlay.as_ref().unwrap();
            copy(&overlay.path, &killed);
            let again = overlaid(&options.path, killed, vec![], engine);
            let mut again = Rig::open(&DiskOptions { cache_type, ..again });
            for page in 0..PAGES {
                assert_eq!(again.read(page * PAGE, 512).unwrap(), [page as u8 + 1; 512], "page {page}");
            }
        }
    }
}

/// The second write to a sector must not complete before its bit is in the commit map.
#[test]
fn concurrent_writes_to_one_sector_are_all_committed() {
    for blocking in [Blocking::Never, Blocking::Allowed] {
        let dir = tempfile::tempdir().unwrap();
        let (mut rig, options) = rig(dir.path(), IoEngine::Async, blocking, CacheType::Unsafe);
        let tokens: Vec<_> = (0..100)
            .map(|number| (rig.start_write(number / 10 * PAGE, &[7; 512], u64::MAX), number / 10))
            .collect();
        let mut completed = 0;
        while completed < tokens.len() {
            rig.queue.submit_and_reap();
            let completions: Vec<_> = std::iter::from_fn(|| rig.queue.pop_completion()).collect();
            let left = as_left_by_a_kill_now(&options);
            for (token, result) in completions {
                result.unwrap();
                let page = tokens.iter().find(|submitted| submitted.0 == token).unwrap().1;
                assert!(map_b_has(&left, page));
                completed += 1;
            }
            if !rig.queue.has_more() {
                rig.queue.wait_for_tests();
            }
        }
    }
}

/// A large discard covers more of the map than one round writes.
#[test]
fn discard_of_a_large_disk_waits_for_all_of_the_commit_map() {
    let dir = tempfile::tempdir().unwrap();
    let (mut rig, options) = rig(dir.path(), IoEngine::Sync, Blocking::Allowed, CacheType::Unsafe);
    rig.do_now(0, Request::Discard { len: PAGES * PAGE }).unwrap();
    let left = as_left_by_a_kill_now(&options);
    for page in 0..PAGES {
        assert!(map_b_has(&left, page), "page {page}");
    }
}

/// More of the map than one round of a flush writes, and then a crash of the host.
#[test]
fn flush_of_many_map_pages_survives_a_host_crash() {
    for blocking in [Blocking::Never, Blocking::Allowed] {
        let dir = tempfile::tempdir().unwrap();
        let (mut rig, options) = rig(dir.path(), IoEngine::Async, blocking, CacheType::Writeback);
        for page in 0..PAGES {
            rig.start_write(page * PAGE + 4096, &[9; 512], u64::MAX);
        }
        rig.finish();
        rig.do_now(0, Request::Flush).unwrap();
        let crashed = dir.path().join("crashed");
        copy(&options.overlay.as_ref().unwrap().path, &crashed);
        super::crash::as_if_host_crashed(&crashed);
        let mut again = Rig::open(&overlaid(&options.path, crashed, vec![], IoEngine::Async));
        for page in 0..PAGES {
            assert_eq!(again.read(page * PAGE + 4096, 512).unwrap(), [9; 512], "page {page}");
        }
    }
}

/// If a page of the map cannot be written because the host's disk is full, the changes that need it
/// fail.
#[test]
fn change_whose_map_page_cannot_be_written_fails_alone() {
    let dir = tempfile::tempdir().unwrap();
    let (mut rig, options) = rig(dir.path(), IoEngine::Sync, Blocking::Allowed, CacheType::Unsafe);
    let recorder = RecordingEngine::new(rig.disk.files(), OpLog::default());
    let broken = Arc::clone(&recorder.broken);
    rig.queue = rig.disk.queue_with(Box::new(recorder));
    *locked(&broken) = MAP_B + 4096..MAP_B + 8192;
    let good = rig.start_write(0, &[1; 512], u64::MAX);
    let bad = rig.start_write(PAGE, &[2; 512], u64::MAX);
    let mut results = rig.finish();
    results.sort_unstable_by_key(|result| result.0);
    assert_eq!(results, [(good, Ok(())), (bad, Err(Errno::NOSPC))]);
    assert_eq!(rig.write(2 * PAGE, &[3; 512]), Ok(()), "it needs another page");
    // Tried again, and still not completed before it is true.
    assert_eq!(rig.write(PAGE, &[2; 512]), Err(Errno::NOSPC));
    *locked(&broken) = 0..0;
    assert_eq!(rig.write(PAGE, &[2; 512]), Ok(()));
    let left = as_left_by_a_kill_now(&options);
    assert!((0..3).all(|page| map_b_has(&left, page)));
}

/// Nothing may be changed before the file has the session.
#[test]
fn changes_fail_while_the_session_cannot_be_written() {
    let dir = tempfile::tempdir().unwrap();
    let (mut rig, options) = rig(dir.path(), IoEngine::Sync, Blocking::Allowed, CacheType::Writeback);
    let recorder = RecordingEngine::new(rig.disk.files(), OpLog::default());
    let broken = Arc::clone(&recorder.broken);
    rig.queue = rig.disk.queue_with(Box::new(recorder));
    *locked(&broken) = 4096..4097;
    rig.start_write(0, &[1; 512], u64::MAX);
    rig.start(PAGE, Request::Discard { len: 512 });
    assert!(rig.finish().iter().all(|result| result.1 == Err(Errno::NOSPC)));
    assert_eq!(rig.read(0, 512).unwrap(), [0; 512]);
    *locked(&broken) = 0..0;
    rig.write(0, &[1; 512]).unwrap();
    assert_eq!(as_left_by_a_kill_now(&options)[4096], 1, "one session");
}
