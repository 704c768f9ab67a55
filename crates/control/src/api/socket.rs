//! The socket file: made at the start, removed at the end.

use std::{
    fs, io,
    os::unix::{
        ffi::OsStrExt,
        fs::{FileTypeExt, MetadataExt},
        net::UnixListener,
    },
    path::{Path, PathBuf},
};

use rustix::{
    io::Errno,
    net::{AddressFamily, SocketAddrUnix, SocketFlags, SocketType, connect, socket_with},
};

/// Longest path of a Unix socket in bytes: `sun_path` less the closing NUL.
const MAX_PATH_LEN: usize = 107;

/// Why the API socket cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path is empty, which would be a socket without a name.
    #[error("the path of the API socket is empty")]
    EmptyPath,
    /// The path does not fit in a socket address.
    #[error("the path of the API socket {} is {len} bytes long: at most {MAX_PATH_LEN} fit", path.display())]
    PathTooLong {
        /// The path given.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// There is something at the path.
    #[error("the path of the API socket {} is in use: {occupant}", path.display())]
    InUse {
        /// The path given.
        path: PathBuf,
        /// What is there.
        occupant: Occupant,
    },
    /// Anything else.
    #[error("cannot make the API socket {}: {source}", path.display())]
    Io {
        /// The path given.
        path: PathBuf,
        /// What the kernel says.
        source: io::Error,
    },
}

/// What is at the path of a socket to be made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Occupant {
    /// A socket on which a process answers.
    Process,
    /// A socket on which nobody answers, left behind by a process that is gone.
    Leftover,
    /// A socket of which it cannot be told, for want of a permission or such.
    Unknown,
    /// Something that is no socket.
    OtherFile,
}

impl std::fmt::Display for Occupant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Occupant::Process => "a process answers on it",
            Occupant::Leftover => "nobody answers on it, so it can be removed",
            Occupant::Unknown => "it is a socket that cannot be tried",
            Occupant::OtherFile => "it is no socket",
        })
    }
}

/// A socket file that is removed with this value, unless something else has taken its place.
#[derive(Debug)]
pub(super) struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
}

/// The identity of no file.
const NOBODY: (u64, u64) = (u64::MAX, u64::MAX);

impl SocketFile {
    /// Lets the file be: another process has the socket too, and removes it.
    pub(super) fn keep(mut self) {
        self.identity = NOBODY;
    }
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        if identity(&self.path).is_ok_and(|present| present == self.identity) {
            // If it cannot be removed, it stays: a process that ends has nobody to tell.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// Makes a socket at `path` that takes connections, and never waits for them.
pub(super) fn bind(path: &Path) -> Result<(UnixListener, SocketFile), BindError> {
    let len = path.as_os_str().as_bytes().len();
    if len == 0 {
        return Err(BindError::EmptyPath);
    }
    if len > MAX_PATH_LEN {
        return Err(BindError::PathTooLong { path: path.to_owned(), len });
    }
    let io_error = |source| BindError::Io { path: path.to_owned(), source };
    let listener = match UnixListener::bind(path) {
        Err(error) if error.kind() == io::ErrorKind::AddrInUse => {
            return Err(BindError::InUse { path: path.to_owned(), occupant: occupant(path) });
        }
        result => result.map_err(io_error)?,
    };
    let socket_file = SocketFile { path: path.to_owned(), identity: identity(path).map_err(io_error)? };
    listener.set_nonblocking(true).map_err(io_error)?;
    Ok((listener, socket_file))
}

/// What is at `path`, which is in use.
fn occupant(path: &Path) -> Occupant {
    if !fs::metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        return Occupant::OtherFile;
    }
    match try_connect(path) {
        // It listens, with a queue that is full, or to another kind of socket.
        Ok(()) | Err(Errno::AGAIN | Errno::PROTOTYPE) => Occupant::Process,
        Err(Errno::CONNREFUSED) => Occupant::Leftover,
        Err(_) => Occupant::Unknown,
    }
}

/// Connects and hangs up, without waiting for anyone.
fn try_connect(path: &Path) -> Result<(), Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
    connect(&socket, &SocketAddrUnix::new(path)?)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn a_socket_file_lives_as_long_as_its_owner() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let bound = bind(&path).unwrap();
        assert!(UnixStream::connect(&path).is_ok());
        drop(bound);
        assert!(!path.exists());
    }

    #[test]
    fn what_has_taken_its_place_is_left_alone() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let (listener, socket_file) = bind(&path).unwrap();
        fs::rename(&path, dir.path().join("moved")).unwrap();
        fs::write(&path, "another's").unwrap();
        drop((listener, socket_file));
        assert!(path.exists());
    }

    #[test]
    fn a_path_in_use_is_refused_with_what_is_there() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let refusal = || {
            let error = bind(&path).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            let BindError::InUse { occupant, .. } = error else { panic!("{error}") };
            occupant
        };

        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(refusal(), Occupant::Process);
        drop(listener);
        assert_eq!(refusal(), Occupant::Leftover);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(refusal(), Occupant::OtherFile);
    }

    #[test]
    fn the_longest_path_is_taken_and_one_byte_more_is_not() {
        let dir = tempfile::tempdir().unwrap();
        let fill = MAX_PATH_LEN - dir.path().as_os_str().len() - 1;
        assert!(bind(&dir.path().join("x".repeat(fill))).is_ok());
        let error = bind(&dir.path().join("x".repeat(fill + 1))).unwrap_err();
        assert!(matches!(error, BindError::PathTooLong { len, .. } if len == MAX_PATH_LEN + 1), "{error}");
    }

    #[test]
    fn an_empty_path_and_a_missing_directory_are_refused() {
        assert!(matches!(bind(Path::new("")), Err(BindError::EmptyPath)));
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(bind(&dir.path().join("missing/api")), Err(BindError::Io { .. })));
    }
}
