//! Tests of files that appear whole or not at all.

use std::io::Write;
use std::os::unix::fs::PermissionsExt;

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

/// The same with its temporary name, as a writer leaves it that is killed before the final one.
fn linked(path: &Path, text: &str) -> Staged {
    let mut file = staged(path, text);
    file.link().unwrap();
    file
}

#[test]
fn a_file_has_no_final_name_before_it_is_committed() {
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
fn a_dropped_file_leaves_nothing_at_any_stage() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    drop(AtomicFile::create(&path).unwrap());
    drop(staged(&path, "whole"));
    drop(linked(&path, "whole"));
    assert_eq!(names(dir.path()), Vec::<String>::new());
}

#[test]
fn an_older_file_is_replaced_and_its_permissions_stay() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("state");
    std::fs::write(&path, "old").unwrap();
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o600)).unwrap();
    staged(&path, "new").commit().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"new");
    assert_eq!(std::fs::metadata(&path).unwrap().permissions().mode() & 0o7777, 0o600);
}

#[test]
fn a_symbolic_link_stays_and_what_it_points_to_is_replaced() {
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
fn what_is_not_a_regular_file_is_refused_by_name() {
    let error = AtomicFile::create(Path::new("/dev/null")).unwrap_err();
    assert_eq!(error.to_string(), "cannot create /dev/null: what is there is not a regular file");
}

#[test]
fn a_link_to_nothing_is_refused_before_anything_is_written() {
    let dir = tempfile::tempdir().unwrap();
    let link = dir.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link).unwrap();
    let error = AtomicFile::create(&link).unwrap_err().to_string();
    assert!(error.contains("link: it is a symbolic link to a file that does not exist"), "{error}");
    assert_eq!(names(dir.path()), ["link"]);
}

/// A file that is mounted on itself, as a jail has it. Unmounted with the value.
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
fn a_mount_point_is_refused_before_anything_is_written() {
    if !rustix::process::geteuid().is_root() {
        eprintln!("not run: mounting needs root");
        return;
    }
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("mem");
    std::fs::write(&path, "old").unwrap();
    let _mount = BindMount::new(&path);
    let error = AtomicFile::create(&path).unwrap_err().to_string();
    assert!(error.contains("mem: it is a mount point"), "{error}");
    assert_eq!(std::fs::read(&path).unwrap(), b"old");
    assert_eq!(names(dir.path()), ["mem"]);
}

#[test]
fn an_immutable_file_is_refused_before_anything_is_written() {
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
        assert!(refused.unwrap_err().contains("mem: it is immutable or append-only"));
        assert_eq!(names(dir.path()), ["mem"]);
    }
}

#[test]
fn a_missing_directory_is_named() {
    let error = AtomicFile::create(Path::new("/no/such/place/state")).unwrap_err();
    assert!(error.to_string().starts_with("cannot create /no/such/place/state: No such file"), "{error}");
}

#[test]
fn the_longest_name_works() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("n".repeat(NAME_MAX));
    staged(&path, "x").commit().unwrap();
    assert_eq!(std::fs::read(&path).unwrap(), b"x");
}

#[test]
fn a_pair_replaces_an_older_pair_and_leaves_no_other_name() {
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
fn a_pair_whose_memory_cannot_be_placed_leaves_the_old_state() {
    for old in [None, Some("old")] {
        let dir = tempfile::tempdir().unwrap();
        let (memory, state) = (dir.path().join("memory"), dir.path().join("state"));
        if let Some(old) = old {
            std::fs::write(&state, old).unwrap();
        }
        let (new_memory, new_state) = (staged(&memory, "new"), staged(&state, "new"));
        // A directory in the way: no file can replace it.
        std::fs::create_dir(&memory).unwrap();
        let error = commit_pair(new_memory, new_state).unwrap_err();
        assert_eq!(error.path, memory);
        assert_eq!(std::fs::read_to_string(&state).ok().as_deref(), old);
        assert!(names(dir.path()).iter().all(|n| !n.contains(SUFFIX)), "{:?}", names(dir.path()));
    }
}

#[test]
fn the_memory_of_a_state_is_found_where_its_writer_died() {
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
fn an_id_survives_text_and_nothing_else_is_one() {
    let id = FileId(0x00ab);
    assert_eq!(id.to_string().parse(), Ok(id));
    for bad in ["", "12", "00000000000000zz", "+0000000000000ab", "000000000000000ab"] {
        assert!(bad.parse::<FileId>().is_err(), "{bad}");
    }
}

#[test]
fn two_spellings_of_a_file_are_the_same_place_whether_it_is_there_or_not() {
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
    assert!(!is_same_path(Path::new("/nowhere/s"), Path::new("/nowhere/s")), "nobody can write there");
}

#[test]
fn what_killed_writers_left_goes_with_the_next_file_of_that_name_and_what_living_ones_write_stays() {
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
