//! Disks that fail, shrink or fill up, and files that are no disks.

use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;

use super::rig::*;
use crate::disk::DiskError;
use crate::overlay::OverlayError;

fn base_of(dir: &Path, len: usize) -> PathBuf {
    let path = dir.join("base");
    std::fs::write(&path, pattern(1, 0, len as u64)).unwrap();
    path
}

#[test]
fn truncated_disk_returns_eio_only_past_its_end() {
    for engine in ENGINES {
        for with_overlay in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let base = base_of(dir.path(), 1 << 20);
            let options = raw_or_overlaid(&base, &dir.path().join("top"), with_overlay, engine);
            let mut rig = Rig::open(&options);
            OpenOptions::new().write(true).open(&base).unwrap().set_len(100 << 10).unwrap();
            assert_eq!(rig.read(512 << 10, 4096), Err(Errno::IO));
            assert_eq!(rig.read(96 << 10, 8192), Err(Errno::IO));
            assert_eq!(rig.read(0, 4096).unwrap(), pattern(1, 0, 4096));
            rig.write(4096, &[9; 4096]).unwrap();
            assert_eq!(rig.read(4096, 4096).unwrap(), [9; 4096]);
        }
    }
}

#[test]
fn requests_past_the_end_are_refused() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let base = base_of(dir.path(), 1 << 20);
        let mut rig = Rig::open(&raw(&base, engine));
        for (offset, len) in [
            (1 << 20, 512),
            (0, (1 << 20) + 512),
            (u64::MAX - 511, 512),
            (512, u64::MAX - 511),
            (0, 100),
            (1, 512),
        ] {
            assert_eq!(rig.do_now(offset, Request::Discard { len }), Err(Errno::INVAL), "{offset} {len}");
            assert_eq!(rig.do_now(offset, Request::WriteZeroes { len, unmap: true }), Err(Errno::INVAL));
        }
        assert_eq!(rig.read((1 << 20) - 512, 1024), Err(Errno::INVAL));
        rig.do_now(u64::MAX, Request::Flush).unwrap();
        rig.do_now(512, Request::Discard { len: 0 }).unwrap();
    }
}

#[test]
fn empty_file_is_a_disk_of_size_0() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let base = base_of(dir.path(), 0);
        let mut rig = Rig::open(&raw(&base, engine));
        assert_eq!(rig.disk.size(), 0);
        assert_eq!(rig.read(0, 512), Err(Errno::INVAL));
        rig.do_now(0, Request::Flush).unwrap();
        drop(rig);
        let rig = Rig::open(&overlaid(&base, dir.path().join("top"), vec![], engine));
        assert_eq!(rig.disk.size(), 0);
    }
}

#[test]
fn disk_size_is_rounded_down_to_a_sector() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 1025);
    assert_eq!(Rig::open(&raw(&base, IoEngine::Async)).disk.size(), 1024);
}

#[test]
fn directories_fifos_and_char_devices_are_no_disks() {
    let dir = tempfile::tempdir().unwrap();
    let fifo = dir.path().join("fifo");
    rustix::fs::mknodat(rustix::fs::CWD, &fifo, rustix::fs::FileType::Fifo, 0o600.into(), 0).unwrap();
    for path in [dir.path().to_path_buf(), fifo, "/dev/null".into()] {
        let options = DiskOptions { read_only: true, ..raw(&path, IoEngine::Sync) };
        let error = Disk::open(&options).unwrap_err();
        assert!(matches!(&error, DiskError::NotADisk { path: named } if *named == path), "{error}");
    }
    let missing = dir.path().join("missing");
    let error = Disk::open(&raw(&missing, IoEngine::Sync)).unwrap_err();
    assert!(matches!(&error, DiskError::Open { path, .. } if *path == missing), "{error}");
}

#[test]
fn read_only_disk_is_not_opened_for_writing() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 4096);
    for engine in ENGINES {
        let mut rig = Rig::open(&DiskOptions { read_only: true, ..raw(&base, engine) });
        assert_eq!(rig.write(0, &[1; 512]), Err(Errno::BADF));
        assert_eq!(rig.read(0, 512).unwrap(), pattern(1, 0, 512));
    }
}

fn overlay_error(options: &DiskOptions) -> OverlayError {
    match Disk::open(options).unwrap_err() {
        DiskError::Overlay(error) => error,
        other => panic!("{other}"),
    }
}

#[test]
fn damaged_overlay_is_refused_by_name() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 1 << 20);
    let top = dir.path().join("top");
    let options = overlaid(&base, top.clone(), vec![], IoEngine::Sync);
    Rig::open(&options).write(0, &[1; 512]).unwrap();
    let whole = std::fs::read(&top).unwrap();
    let spoiled = |spoil: &dyn Fn(&mut Vec<u8>)| {
        let mut bytes = whole.clone();
        spoil(&mut bytes);
        std::fs::write(&top, bytes).unwrap();
        let error = overlay_error(&options);
        assert!(error.to_string().contains(top.to_str().unwrap()), "{error}");
        error
    };
    assert!(matches!(spoiled(&|b| b[0] = b'X'), OverlayError::NotAnOverlay { .. }));
    assert!(matches!(spoiled(&|b| b.truncate(10)), OverlayError::NotAnOverlay { .. }));
    assert!(matches!(spoiled(&|b| b[8] = 2), OverlayError::Version { version: 2, .. }));
    assert!(matches!(spoiled(&|b| b[17] ^= 1), OverlayError::Damaged { .. }));
    assert!(matches!(spoiled(&|b| b[4096] ^= 1), OverlayError::Damaged { .. }));
    assert!(matches!(spoiled(&|b| b.truncate(b.len() - 1)), OverlayError::Truncated { .. }));
    assert!(matches!(spoiled(&|b| b.truncate(5000)), OverlayError::Truncated { .. }));
    // The intact file is accepted.
    std::fs::write(&top, &whole).unwrap();
    assert_eq!(Rig::open(&options).read(0, 512).unwrap(), [1; 512]);
}

#[test]
fn overlay_of_another_disk_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 1 << 20);
    let top = dir.path().join("top");
    let options = overlaid(&base, top, vec![], IoEngine::Sync);
    drop(Rig::open(&options));
    let spoil = |offset: u64, len: u64| {
        let file = OpenOptions::new().write(true).open(&base).unwrap();
        file.write_all_at(&[0xee], offset).unwrap();
        file.set_len(len).unwrap();
        overlay_error(&options)
    };
    let error = spoil((1 << 20) - 1, 1 << 20);
    assert!(error.to_string().contains("contents differ"), "{error}");
    let error = spoil(0, 2 << 20);
    assert!(error.to_string().contains("1048576") && error.to_string().contains("2097152"), "{error}");
}

#[test]
fn layer_written_after_an_overlay_was_created_on_it_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 1 << 20);
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let lower = overlaid(&base, first.clone(), vec![], IoEngine::Sync);
    drop(Rig::open(&lower));
    let both = overlaid(&base, second.clone(), vec![first.clone()], IoEngine::Sync);
    drop(Rig::open(&both));
    drop(Rig::open(&both));
    // On the same base, without its layer.
    let error = overlay_error(&overlaid(&base, second, vec![], IoEngine::Sync));
    assert!(error.to_string().contains("another top layer"), "{error}");
    Rig::open(&lower).write(512 << 10, &[1; 512]).unwrap();
    let error = overlay_error(&both);
    assert!(error.to_string().contains("written to after"), "{error}");
}

/// Opening a layer by mistake, or reopening it, must not invalidate the overlays created on it.
#[test]
fn opening_an_overlay_does_not_invalidate_those_on_it() {
    for cache_type in [CacheType::Unsafe, CacheType::Writeback] {
        let dir = tempfile::tempdir().unwrap();
        let base = base_of(dir.path(), 1 << 20);
        let (first, second) = (dir.path().join("first"), dir.path().join("second"));
        let lower = DiskOptions { cache_type, ..overlaid(&base, first.clone(), vec![], IoEngine::Sync) };
        Rig::open(&lower).write(0, &[1; 512]).unwrap();
        let both = DiskOptions { cache_type, ..overlaid(&base, second, vec![first.clone()], IoEngine::Sync) };
        drop(Rig::open(&both));
        let before = std::fs::read(&first).unwrap();
        let mut opened = Rig::open(&lower);
        assert_eq!(opened.read(0, 512).unwrap(), [1; 512]);
        opened.do_now(0, Request::Flush).unwrap();
        drop(opened);
        assert!(std::fs::read(&first).unwrap() == before);
        assert_eq!(Rig::open(&both).read(0, 512).unwrap(), [1; 512]);
    }
}

/// A fork that fails after its overlays were created continues to write to its disks. Those
/// overlays do not fit any more.
#[test]
fn overlay_written_after_thaw_does_not_fit_those_on_it() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 1 << 20);
    let (first, second) = (dir.path().join("first"), dir.path().join("second"));
    let mut rig = Rig::open(&overlaid(&base, first.clone(), vec![], IoEngine::Sync));
    rig.write(0, &[1; 512]).unwrap();
    rig.disk.freeze().unwrap();
    let both = overlaid(&base, second, vec![first], IoEngine::Sync);
    drop(Rig::open(&both));
    rig.disk.thaw().unwrap();
    rig.write(300 << 10, &[2; 512]).unwrap();
    assert_eq!(rig.read(300 << 10, 512).unwrap(), [2; 512]);
    drop(rig);
    let error = overlay_error(&both);
    assert!(error.to_string().contains("written to after"), "{error}");
}

#[test]
fn overlay_has_one_writer_or_any_number_of_readers() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 1 << 20);
    let top = dir.path().join("top");
    let write = overlaid(&base, top, vec![], IoEngine::Sync);
    let read = DiskOptions { read_only: true, ..write.clone() };
    let writer = Rig::open(&write);
    assert!(matches!(overlay_error(&write), OverlayError::InUse { .. }));
    assert!(matches!(overlay_error(&read), OverlayError::InUse { .. }));
    drop(writer);
    let _readers = [Rig::open(&read), Rig::open(&read)];
    assert!(matches!(overlay_error(&write), OverlayError::InUse { .. }));
}

#[test]
fn impossible_overlays_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 3 << 20);
    let mut options = overlaid(&base, dir.path().join("top"), vec![], IoEngine::Sync);
    options.overlay.as_mut().unwrap().size_mib = Some(2);
    assert!(matches!(overlay_error(&options), OverlayError::Size { .. }));
    assert!(!dir.path().join("top").exists(), "what is refused leaves nothing behind");
    options.overlay.as_mut().unwrap().size_mib = Some(4);
    drop(Rig::open(&options));
    options.overlay.as_mut().unwrap().size_mib = Some(5);
    assert!(matches!(overlay_error(&options), OverlayError::Size { .. }));
    options.overlay.as_mut().unwrap().path = dir.path().into();
    assert!(matches!(overlay_error(&options), OverlayError::Io { .. } | OverlayError::NotAFile { .. }));
    // A blank disk cannot be its own overlay.
    let blank = dir.path().join("blank");
    File::create(&blank).unwrap().set_len(1 << 20).unwrap();
    let error = overlay_error(&overlaid(&blank, blank.clone(), vec![], IoEngine::Sync));
    assert!(matches!(error, OverlayError::OwnBacking { .. }), "{error}");
    assert!(std::fs::read(&blank).unwrap().iter().all(|&byte| byte == 0));
    // A read-only overlay must exist.
    let missing = DiskOptions {
        read_only: true,
        ..overlaid(&base, dir.path().join("missing"), vec![], IoEngine::Sync)
    };
    assert!(matches!(overlay_error(&missing), OverlayError::Io { .. }));
}

#[test]
fn interrupted_creation_is_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let base = base_of(dir.path(), 1 << 20);
    let top = dir.path().join("top");
    // The size was set, and the header was not written.
    std::fs::File::create(&top).unwrap().set_len(3 << 20).unwrap();
    let mut rig = Rig::open(&overlaid(&base, top, vec![], IoEngine::Sync));
    assert_eq!(rig.read(0, 4096).unwrap(), pattern(1, 0, 4096));
}
