//! Finding files by path and id.

use std::path::{Path, PathBuf};

use super::destination::{REDO_SUFFIX, SUFFIX, parent_of, resolve, temporary_name};
use super::id::FileId;

/// Whether two paths name the same file, which need not exist: the same name in the same directory,
/// with symbolic links followed.
pub fn is_same_path(one: &Path, other: &Path) -> bool {
    let location = |path: &Path| {
        let target = resolve(path);
        let dir = rustix::fs::stat(parent_of(&target)).ok()?;
        Some((dir.st_dev, dir.st_ino, target.file_name()?.to_os_string()))
    };
    // A path whose directory cannot be read fails, by name, when it is opened.
    location(one).is_some_and(|one| location(other) == Some(one))
}

/// The path of the file `id` that belongs at `path`: `path`, or the temporary name beside it if its
/// writer died within [`commit_pair`](super::commit_pair).
pub fn find(path: &Path, id: FileId) -> PathBuf {
    let target = resolve(path);
    if let Some(name) = target.file_name() {
        let staged = target.with_file_name(temporary_name(name, id, SUFFIX));
        if staged.exists() {
            return staged;
        }
    }
    path.to_path_buf()
}

/// The path of the redo log `id` of the file at `path`, if there is one.
pub fn redo_path(path: &Path, id: FileId) -> Option<PathBuf> {
    let target = resolve(path);
    let redo = target.with_file_name(temporary_name(target.file_name()?, id, REDO_SUFFIX));
    redo.exists().then_some(redo)
}
