//! Listening Unix sockets, and connecting to one.

use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileTypeExt;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};

use crate::error::{BindError, ExistingFile, MAX_PATH_LEN};
use crate::packet::SocketKind;
use crate::socket_file::SocketFile;

/// Backlog of a listener. The host's kernel limits it to `net.core.somaxconn`.
const BACKLOG: i32 = 4096;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A non-blocking listening socket. Clones are the same socket.
#[derive(Debug, Clone)]
pub struct Listener {
    fd: Arc<OwnedFd>,
    kind: SocketKind,
}

impl Listener {
    /// Creates a socket at `path`, where no file may exist, and listens on it.
    pub fn bind(path: &Path, kind: SocketKind) -> Result<(Listener, SocketFile), BindError> {
        check_length(path)?;
        let io_error = |source: io::Error| BindError::Io { path: path.to_owned(), source };
        let fd = socket(kind).map_err(|e| io_error(e.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|e| io_error(e.into()))?;
        match bind(&fd, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => return Err(in_use(path)),
            Err(error) => return Err(io_error(error.into())),
        }
        let file = SocketFile::created(path).map_err(io_error)?;
        listen(&fd, BACKLOG).map_err(|e| io_error(e.into()))?;
        Ok((Listener { fd: Arc::new(fd), kind }, file))
    }

    /// The type of connections that it accepts.
    pub(crate) fn kind(&self) -> SocketKind {
        self.kind
    }

    /// The descriptor, for polling.
    pub(crate) fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Accepts a pending connection without waiting. The accepted socket is non-blocking.
    pub(crate) fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.fd, FLAGS)
    }
}

/// Checks whether [`Listener::bind`] could succeed at `path`, as far as that can be found out
/// without creating a socket: the length of the path, that no file is there and that its directory
/// exists.
pub fn check_socket_path(path: &Path) -> Result<(), BindError> {
    check_length(path)?;
    if fs::symlink_metadata(path).is_ok() {
        return Err(in_use(path));
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match fs::metadata(directory) {
        Ok(_) => Ok(()),
        Err(source) => Err(BindError::Io { path: path.to_owned(), source }),
    }
}

fn check_length(path: &Path) -> Result<(), BindError> {
    let len = path.as_os_str().as_bytes().len();
    if (1..=MAX_PATH_LEN).contains(&len) {
        Ok(())
    } else {
        Err(BindError::PathLength { path: path.to_owned(), len })
    }
}

fn in_use(path: &Path) -> BindError {
    BindError::InUse { path: path.to_owned(), existing: existing_file(path) }
}

/// Finds out what exists at `path`.
fn existing_file(path: &Path) -> ExistingFile {
    if !fs::metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        return ExistingFile::NotASocket;
    }
    match connect_to(path, SocketKind::Stream) {
        Err(Errno::CONNREFUSED) => ExistingFile::StaleSocket,
        _ => ExistingFile::LiveSocket,
    }
}

/// Connects to the socket at `path` without waiting. `EAGAIN` means that its backlog is full.
pub(crate) fn connect_to(path: &Path, kind: SocketKind) -> Result<OwnedFd, Errno> {
    let fd = socket(kind)?;
    connect(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}

fn socket(kind: SocketKind) -> Result<OwnedFd, Errno> {
    let kind = match kind {
        SocketKind::Stream => SocketType::STREAM,
        SocketKind::SeqPacket => SocketType::SEQPACKET,
    };
    socket_with(AddressFamily::UNIX, kind, FLAGS, None)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn dropping_a_socket_file_removes_it() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let (listener, file) = Listener::bind(&path, SocketKind::Stream).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        assert_eq!(listener.accept().unwrap_err(), Errno::AGAIN);
        drop(file);
        assert!(!path.exists());
    }

    #[test]
    fn a_path_in_use_is_refused_and_its_file_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        check_socket_path(&path).unwrap();
        check_socket_path(&dir.path().join("missing/v")).unwrap_err();
        let found = || {
            check_socket_path(&path).unwrap_err();
            let error = Listener::bind(&path, SocketKind::Stream).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert!(path.exists());
            let BindError::InUse { existing, .. } = error else { panic!("{error}") };
            existing
        };
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(found(), ExistingFile::LiveSocket);
        drop(listener);
        assert_eq!(found(), ExistingFile::StaleSocket);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(found(), ExistingFile::NotASocket);
    }

    #[test]
    fn paths_of_invalid_length_or_directory_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(MAX_PATH_LEN));
        for path in [Path::new(""), &long] {
            let error = Listener::bind(path, SocketKind::Stream).unwrap_err();
            assert!(matches!(error, BindError::PathLength { .. }), "{error}");
        }
        let missing = Listener::bind(&dir.path().join("missing/v"), SocketKind::Stream).unwrap_err();
        assert!(matches!(missing, BindError::Io { .. }), "{missing}");
    }
}
