//! The file of a Unix socket, removed when its owner is dropped.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

/// The file of a Unix socket that this process has created. Dropping it removes the file, unless
/// another file has replaced it or this is a forked child of the process that created it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    creator_pid: u32,
}

impl SocketFile {
    /// Owns the socket file at `path`, which this process has just created.
    pub(crate) fn created(path: &Path) -> io::Result<Self> {
        Ok(SocketFile { path: path.to_owned(), identity: identity(path)?, creator_pid: std::process::id() })
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let present = identity(&self.path).is_ok_and(|present| present == self.identity);
        if present && self.creator_pid == std::process::id() {
            // A failure cannot be reported from here: the file stays.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}
