//! Tests of atomic files, pairs and leftovers.

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use super::destination::{NAME_MAX, SUFFIX};
use super::*;

fn names(dir: &Path) -> Vec<String> {
    let mut names: Vec<_> =
        std::fs::read_dir(dir).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn staged(path: &Path, text: &str) -> Staged {
    let file = AtomicFile::create(path).unwrap();
    file.file().write_all(text.as_bytes()).unwrap();
    file.stage()
}

/// [`staged`] with its temporary name, as a writer leaves it that is killed before the rename.
fn linked(path: &Path, text: &str) -> Staged {
    let mut file = staged(path, text);
    file.link().unwrap();
    file
}

#[test]
fn file_has_no_final_name_before_its_commit() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    let file = AtomicFile::create(&path).unwrap();
    file.file().write_all(b"half").unwrap();
    assert!(!path.exists());
    file.commit().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"half");
    assert_eq!(names(dir.path()), ["state"]);
}

#[test]
fn dropped_file_leaves_nothing_at_any_stage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    drop(AtomicFile::create(&path).unwrap());
    drop(staged(&path, "whole"));
    drop(linked(&path, "whole"));
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn replacing_a_file_keeps_its_permissions() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    std::fs::write(&path, "old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    staged(&path, "new").commit().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
}

#[test]
fn symlink_stays_and_its_target_is_replaced() {
    let dir = tempfile::tempdir().unwrap();
    let target = dir.path().join("target");
    let link = dir.path().join("link");
    std::fs::write(&target, "old").unwrap();
    std::os::unix::fs::symlink("target", &link).unwrap();
    staged(&link, "new").commit().unwrap();
    assert!(link.symlink_metadata().unwrap().is_symlink());
    assert_eq!(std::fs::read(&target).unwrap(), b"new");
}

#[test]
fn non_regular_file_is_refused_by_name() {
    let error = AtomicFile::create(Path::new("/dev/null")).unwrap_err();
    assert_eq!(error.to_string(), "file /dev/null: cannot create: it is not a regular file");
}

#[test]
fn dangling_symlink_is_refused_before_any_write() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let error = AtomicFile::create(&link).unwrap_err().to_string();
    assert!(
        error.contains("link: cannot create: it is a symbolic link to a file that does not exist"),
        "{error}"
    );
    assert_eq!(names(dir.path()), ["link"]);
}

/// A file that is bind-mounted onto itself, as in a jail. Unmounted on drop.
struct BindMount(std::path::PathBuf);

impl BindMount {
    fn new(path: &Path) -> Self {
        rustix::mount::mount_bind(path, path).expect("root can mount");
        BindMount(path.to_owned())
    }
}

impl Drop for BindMount {
    fn drop(&mut self) {
        rustix::mount::unmount(&self.0, rustix::mount::UnmountFlags::DETACH).unwrap();
    }
}

#[test]
fn mount_point_is_refused_before_any_write() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: mounting needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    std::fs::write(&path, "old").unwrap();
    let _mount = BindMount::new(&path);
    let error = AtomicFile::create(&path).unwrap_err().to_string();
    assert!(error.contains("mem: cannot create: it is a mount point"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["mem"]);
}

#[test]
fn immutable_file_is_refused_before_any_write() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    std::fs::write(&path, "old").unwrap();
    let file = File::open(&path).unwrap();
    let set = |flags| rustix::fs::ioctl_setflags(&file, flags);
    let Ok(before) = rustix::fs::ioctl_getflags(&file) else {
        return eprintln!("not run: no such flags here");
    };
    for flag in [rustix::fs::IFlags::IMMUTABLE, rustix::fs::IFlags::APPEND] {
        if set(before | flag).is_err() {
            return eprintln!("not run: such flags need root");
        }
        let refused = AtomicFile::create(&path).map(drop).map_err(|e| e.to_string());
        set(before).unwrap();
        assert!(refused.unwrap_err().contains("mem: cannot create: it is immutable or append-only"));
        assert_eq!(names(dir.path()), ["mem"]);
    }
}

#[test]
fn missing_directory_error_names_the_path() {
    let error = AtomicFile::create(Path::new("/no/such/place/state")).unwrap_err();
    assert!(
        error.to_string().starts_with("file /no/such/place/state: cannot create: No such file"),
        "{error}"
    );
}

#[test]
fn longest_file_name_works() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("n".repeat(NAME_MAX));
    staged(&path, "x").commit().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"x");
}

#[test]
fn pair_replaces_an_older_pair_and_leaves_no_leftovers() {
    let dir = tempfile::tempdir().unwrap();
    let (memory, state) = (dir.path().join("memory"), dir.path().join("state"));
    for text in ["one", "two"] {
        commit_pair(staged(&memory, text), staged(&state, text)).unwrap();
        assert_eq!(std::fs::read_to_string(&memory).unwrap(), text);
        assert_eq!(std::fs::read_to_string(&state).unwrap(), text);
        assert_eq!(names(dir.path()), ["memory", "state"]);
    }
}

#[test]
fn pair_restores_the_old_state_if_the_memory_rename_fails() {
    for old in [None, Some("old")] {
        let dir = tempfile::tempdir().unwrap();
        let (memory, state) = (dir.path().join("memory"), dir.path().join("state"));
        if let Some(old) = old {
            std::fs::write(&state, old).unwrap();
        }
        let (new_memory, new_state) = (staged(&memory, "new"), staged(&state, "new"));
        // No file can replace a directory.
        std::fs::create_dir(&memory).unwrap();
        let error = commit_pair(new_memory, new_state).unwrap_err();
        assert_eq!(error.path, memory);
        assert_eq!(std::fs::read_to_string(&state).ok().as_deref(), old);
        assert!(names(dir.path()).iter().all(|n| !n.contains(SUFFIX)), "{:?}", names(dir.path()));
    }
}

#[test]
fn find_returns_the_temporary_name_of_a_killed_writer() {
    let dir = tempfile::tempdir().unwrap();
    let memory = dir.path().join("memory");
    std::fs::write(&memory, "old").unwrap();
    let new = linked(&memory, "new");
    let id = new.id();
    assert_eq!(std::fs::read(find(&memory, id)).unwrap(), b"new");
    new.commit().unwrap();
    assert_eq!(find(&memory, id), memory);
    assert_eq!(find(&memory, FileId::random().unwrap()), memory);
}

#[test]
fn file_id_parses_only_its_own_text() {
    let id = FileId(0x00ab);
    assert_eq!(id.to_string().parse(), Ok(id));
    for bad in ["", "12", "00000000000000zz", "+0000000000000ab", "000000000000000ab"] {
        assert!(bad.parse::<FileId>().is_err(), "{bad}");
    }
}

#[test]
fn is_same_path_sees_through_links_and_dots() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    std::fs::create_dir(path("sub")).unwrap();
    std::os::unix::fs::symlink(dir.path(), path("link")).unwrap();
    for there in [false, true] {
        assert!(is_same_path(&path("s"), &path("s")));
        assert!(is_same_path(&path("s"), &path("./s")));
        assert!(is_same_path(&path("s"), &path("sub/../s")));
        assert!(is_same_path(&path("s"), &path("link/s")));
        assert!(!is_same_path(&path("s"), &path("sub/s")));
        assert!(!is_same_path(&path("s"), &path("t")));
        if !there {
            std::fs::write(path("s"), "").unwrap();
        }
    }
    std::os::unix::fs::symlink("s", path("alias")).unwrap();
    assert!(is_same_path(&path("s"), &path("alias")));
    assert!(!is_same_path(Path::new("/nowhere/s"), Path::new("/nowhere/s")), "the directory does not exist");
}

#[test]
fn commit_removes_leftovers_of_killed_writers_only() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let id = "0123456789abcdef";
    let left = [format!("mem.{id}.vesta-tmp"), format!("state.{id}.vesta-tmp")];
    let others = [format!("memory.{id}.vesta-tmp"), format!("mem.{id}.tmp"), "mem.0123.vesta-tmp".to_owned()];
    for name in left.iter().chain(&others) {
        std::fs::write(path(name), "half").unwrap();
    }
    let alive = linked(&path("mem"), "");
    commit_pair(staged(&path("mem"), ""), staged(&path("state"), "")).unwrap();
    let staged = format!("mem.{}.vesta-tmp", alive.id());
    let mut expected = vec!["mem".to_owned(), "state".to_owned(), staged];
    expected.extend(others);
    expected.sort();
    assert_eq!(names(dir.path()), expected);
    alive.commit().unwrap();
}
