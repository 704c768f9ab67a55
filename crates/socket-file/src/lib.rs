//! Listening Unix sockets and their files, once for the API socket, the sockets of vsock
//! devices and those of debuggers.
//!
//! [`bind`] creates a socket at a path where nothing exists, and never replaces a file. The
//! [`SocketFile`] removes the file when it is dropped.
//!
//! # Invariants
//!
//! - Only the file that was created is removed. Another file that has its path now stays.
//! - After [`leave_all`] this process removes none.
//! - Only one process removes it. A forked process has a copy of the [`SocketFile`], and dropping
//!   that does nothing before [`SocketFile::adopt`].
//!
//! # Errors
//!
//! [`BindError`] names the socket, its path, and what is in the way.

#![forbid(unsafe_code)]

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
pub use rustix::net::SocketType;
use rustix::net::{AddressFamily, SocketAddrUnix, SocketFlags, connect, listen, socket_with};

/// Longest path of a Unix socket in bytes: `sun_path` without the terminating NUL.
pub const MAX_PATH_LEN: usize = 107;

/// Most clients that wait to be accepted, as far as the kernel allows (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

/// Why a socket cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path is empty or does not fit in a socket address.
    #[error("{what} {}: the path is {len} bytes long; 1 to {MAX_PATH_LEN} fit", path.display())]
    PathLength {
        /// What the socket is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// There is a file at the path.
    #[error("{what} {}: the path is in use: {occupant}", path.display())]
    InUse {
        /// What the socket is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The file at the path.
        occupant: Occupant,
    },
    /// Any other error.
    #[error("{what} {}: cannot create it: {source}", path.display())]
    Io {
        /// What the socket is for.
        what: &'static str,
        /// The path.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// What exists at the path of a socket that is to be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occupant {
    /// A socket on which a process listens.
    Process,
    /// A socket on which no process listens, left behind by a process that ended.
    Leftover,
    /// A socket that this process cannot connect to, for example for lack of permission.
    Unknown,
    /// A file that is no socket.
    OtherFile,
}

impl std::fmt::Display for Occupant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Occupant::Process => "another process listens on it",
            Occupant::Leftover => "no process listens on it; remove it",
            Occupant::Unknown => "it is a socket that cannot be connected to",
            Occupant::OtherFile => "it is not a socket",
        })
    }
}

/// Whether files stay when their [`SocketFile`] is dropped.
static LEFT: AtomicBool = AtomicBool::new(false);

/// Leaves the files of all sockets of this process in place from now on. For the end of a process
/// whose clients remove the files themselves.
pub fn leave_all() {
    LEFT.store(true, Ordering::Relaxed);
}

/// The file of a socket. It is removed with this value, unless another file has taken its place.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    /// The process that removes it.
    owner: Option<u32>,
}

impl SocketFile {
    fn new(path: &Path) -> io::Result<Self> {
        Ok(SocketFile { path: path.to_owned(), identity: identity(path)?, owner: Some(std::process::id()) })
    }

    /// Leaves the file to a forked process, which has a copy of this value and
    /// [adopts](Self::adopt) it.
    pub fn leave_to_child(mut self) {
        self.owner = None;
    }

    /// Makes this process the one that removes the file. For a forked process.
    pub fn adopt(&mut self) {
        self.owner = Some(std::process::id());
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let is_owner = self.owner == Some(std::process::id()) && !LEFT.load(Ordering::Relaxed);
        if is_owner && identity(&self.path).is_ok_and(|present| present == self.identity) {
            // A file that cannot be removed stays. The next bind reports it as a leftover.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// Creates a non-blocking socket at `path` that listens. `what` is its name in errors.
pub fn bind(what: &'static str, path: &Path, kind: SocketType) -> Result<(OwnedFd, SocketFile), BindError> {
    check_length(what, path)?;
    let io_error = |source: io::Error| BindError::Io { what, path: path.to_owned(), source };
    let socket = new_socket(kind).map_err(|e| io_error(e.into()))?;
    let address = SocketAddrUnix::new(path).map_err(|e| io_error(e.into()))?;
    match rustix::net::bind(&socket, &address) {
        Ok(()) => {}
        Err(Errno::ADDRINUSE) => return Err(in_use(what, path)),
        Err(error) => return Err(io_error(error.into())),
    }
    let file = SocketFile::new(path).map_err(io_error)?;
    listen(&socket, BACKLOG).map_err(|e| io_error(e.into()))?;
    Ok((socket, file))
}

/// Checks that a socket could be created at `path`, as far as can be seen without creating it.
pub fn check_possible(what: &'static str, path: &Path) -> Result<(), BindError> {
    check_length(what, path)?;
    if fs::symlink_metadata(path).is_ok() {
        return Err(in_use(what, path));
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match fs::metadata(directory) {
        Ok(_) => Ok(()),
        Err(source) => Err(BindError::Io { what, path: path.to_owned(), source }),
    }
}

/// Connects to the socket at `path`, without waiting. `AGAIN`: its queue is full now.
pub fn connect_to(path: &Path, kind: SocketType) -> Result<OwnedFd, Errno> {
    let socket = new_socket(kind)?;
    connect(&socket, &SocketAddrUnix::new(path)?)?;
    Ok(socket)
}

fn check_length(what: &'static str, path: &Path) -> Result<(), BindError> {
    let len = path.as_os_str().as_bytes().len();
    if (1..=MAX_PATH_LEN).contains(&len) {
        return Ok(());
    }
    Err(BindError::PathLength { what, path: path.to_owned(), len })
}

fn in_use(what: &'static str, path: &Path) -> BindError {
    BindError::InUse { what, path: path.to_owned(), occupant: occupant(path) }
}

/// What exists at `path`.
fn occupant(path: &Path) -> Occupant {
    if !fs::metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        return Occupant::OtherFile;
    }
    match connect_to(path, SocketType::STREAM) {
        // A process listens: its queue is full, or the socket is of another type.
        Ok(_) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Occupant::Process,
        Err(Errno::CONNREFUSED) => Occupant::Leftover,
        Err(_) => Occupant::Unknown,
    }
}

fn new_socket(kind: SocketType) -> Result<OwnedFd, Errno> {
    socket_with(AddressFamily::UNIX, kind, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    fn bind_stream(path: &Path) -> Result<(OwnedFd, SocketFile), BindError> {
        bind("test socket", path, SocketType::STREAM)
    }

    #[test]
    fn socket_file_is_removed_with_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (listener, file) = bind_stream(&path).unwrap();
        UnixStream::connect(&path).unwrap();
        drop(file);
        assert!(!path.exists());
        drop(listener);
    }

    #[test]
    fn another_file_at_the_path_is_not_removed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let bound = bind_stream(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "another's").unwrap();
        drop(bound);
        assert!(path.exists());
    }

    #[test]
    fn socket_file_that_was_left_stays_until_it_is_adopted() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        let (_listener, file) = bind_stream(&path).unwrap();
        let mut copy = SocketFile { path: file.path.clone(), owner: Some(0), ..file };
        file.leave_to_child();
        assert!(path.exists());
        copy.adopt();
        drop(copy);
        assert!(!path.exists());
    }

    #[test]
    fn path_in_use_is_refused_with_its_occupant() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("s");
        check_possible("test socket", &path).unwrap();
        let refused = || {
            check_possible("test socket", &path).unwrap_err();
            let error = bind_stream(&path).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert!(path.exists());
            let BindError::InUse { occupant, .. } = error else { panic!("{error}") };
            occupant
        };
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(refused(), Occupant::Process);
        drop(listener);
        assert_eq!(refused(), Occupant::Leftover);
        fs::remove_file(&path).unwrap();
        let messages = bind("test socket", &path, SocketType::SEQPACKET).unwrap();
        assert_eq!(refused(), Occupant::Process);
        drop(messages);
        fs::write(&path, "").unwrap();
        assert_eq!(refused(), Occupant::OtherFile);
    }

    #[test]
    fn longest_path_is_accepted_and_one_byte_more_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let fill = MAX_PATH_LEN - dir.path().as_os_str().len() - 1;
        assert!(bind_stream(&dir.path().join("x".repeat(fill))).is_ok());
        let error = bind_stream(&dir.path().join("x".repeat(fill + 1))).unwrap_err();
        assert!(matches!(error, BindError::PathLength { len, .. } if len == MAX_PATH_LEN + 1), "{error}");
    }

    #[test]
    fn empty_path_and_missing_directory_are_refused() {
        assert!(matches!(bind_stream(Path::new("")), Err(BindError::PathLength { .. })));
        let missing = tempfile::tempdir().unwrap().path().join("missing/s");
        assert!(matches!(bind_stream(&missing), Err(BindError::Io { .. })));
        assert!(matches!(check_possible("test socket", &missing), Err(BindError::Io { .. })));
    }
}
