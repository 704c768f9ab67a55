//! The host's side: Unix sockets.
//!
//! A [`Listener`] is the socket that host clients connect to, at `uds_path`; [`HostSockets`] has the listeners of a device and knows
//! where connections of the guest go: port P is the socket `{uds_path}_P`.
//!
//! The socket file belongs to [`SocketFile`], which removes it at its end: it is whoever owns the configuration that decides when that
//! is, not the device.

use std::ffi::OsString;
use std::fs;
use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, SocketAddrUnix, SocketFlags, SocketType, accept_with, bind, connect, listen, socket_with,
};

use super::packet::SocketKind;

/// Longest path of a Unix socket in bytes: `sun_path` less the closing NUL.
pub const MAX_PATH_LEN: usize = 107;

/// Connections that wait for the device, as far as the host's kernel allows (`net.core.somaxconn`).
const BACKLOG: i32 = 4096;

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// Why a socket of the device cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path is empty or does not fit in a socket address.
    #[error("the vsock path {} is {len} bytes long: it must have 1 to {MAX_PATH_LEN}", path.display())]
    PathLength {
        /// The path given.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// There is something at the path.
    #[error("the vsock path {} is in use: {occupant}", path.display())]
    InUse {
        /// The path given.
        path: PathBuf,
        /// What is there.
        occupant: Occupant,
    },
    /// Anything else.
    #[error("cannot make the vsock socket {}: {source}", path.display())]
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
    /// A socket on which a process answers, or of which it cannot be told.
    Socket,
    /// A socket on which nobody answers, left behind by a process that is gone.
    Leftover,
    /// Something that is no socket.
    OtherFile,
}

impl std::fmt::Display for Occupant {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Occupant::Socket => "it is the socket of another process",
            Occupant::Leftover => "it is a socket on which nobody answers, so it can be removed",
            Occupant::OtherFile => "it is no socket",
        })
    }
}

/// A socket file that is removed with this value, unless something else has taken its place or this is a fork of the process that made it.
#[derive(Debug)]
pub struct SocketFile {
    path: PathBuf,
    /// Device and inode.
    identity: (u64, u64),
    owner: u32,
}

impl Drop for SocketFile {
    fn drop(&mut self) {
        let present = identity(&self.path).is_ok_and(|present| present == self.identity);
        if present && self.owner == std::process::id() {
            // If it cannot be removed, it stays: nobody could be told.
            let _ = fs::remove_file(&self.path);
        }
    }
}

fn identity(path: &Path) -> io::Result<(u64, u64)> {
    fs::symlink_metadata(path).map(|file| (file.dev(), file.ino()))
}

/// A socket that takes connections and never waits for them. Clones are the same socket.
#[derive(Debug, Clone)]
pub struct Listener {
    fd: Arc<OwnedFd>,
    kind: SocketKind,
}

impl Listener {
    /// Makes a socket at `path`, where nothing may be.
    pub fn bind(path: &Path, kind: SocketKind) -> Result<(Listener, SocketFile), BindError> {
        let len = path.as_os_str().as_bytes().len();
        if !(1..=MAX_PATH_LEN).contains(&len) {
            return Err(BindError::PathLength { path: path.to_owned(), len });
        }
        let io_error = |source: io::Error| BindError::Io { path: path.to_owned(), source };
        let fd = socket(kind).map_err(|e| io_error(e.into()))?;
        let address = SocketAddrUnix::new(path).map_err(|e| io_error(e.into()))?;
        match bind(&fd, &address) {
            Ok(()) => {}
            Err(Errno::ADDRINUSE) => {
                return Err(BindError::InUse { path: path.to_owned(), occupant: occupant(path) });
            }
            Err(error) => return Err(io_error(error.into())),
        }
        let identity = identity(path).map_err(io_error)?;
        let file = SocketFile { path: path.to_owned(), identity, owner: std::process::id() };
        listen(&fd, BACKLOG).map_err(|e| io_error(e.into()))?;
        Ok((Listener { fd: Arc::new(fd), kind }, file))
    }

    /// What kind of connections it takes.
    pub(super) fn kind(&self) -> SocketKind {
        self.kind
    }

    /// The descriptor, to be waited for.
    pub(super) fn fd(&self) -> &Arc<OwnedFd> {
        &self.fd
    }

    /// Takes a connection that waits.
    pub(super) fn accept(&self) -> Result<OwnedFd, Errno> {
        accept_with(&self.fd, FLAGS)
    }
}

/// Whether nothing stands in the way of a socket at `path`, as far as can be seen without making one.
pub fn is_possible(path: &Path) -> Result<(), BindError> {
    let len = path.as_os_str().as_bytes().len();
    if !(1..=MAX_PATH_LEN).contains(&len) {
        return Err(BindError::PathLength { path: path.to_owned(), len });
    }
    if fs::symlink_metadata(path).is_ok() {
        return Err(BindError::InUse { path: path.to_owned(), occupant: occupant(path) });
    }
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match fs::metadata(directory) {
        Ok(_) => Ok(()),
        Err(source) => Err(BindError::Io { path: path.to_owned(), source }),
    }
}

/// What is at `path`, which is in use.
fn occupant(path: &Path) -> Occupant {
    if !fs::metadata(path).is_ok_and(|file| file.file_type().is_socket()) {
        return Occupant::OtherFile;
    }
    match dial(path, SocketKind::Stream) {
        Err(Errno::CONNREFUSED) => Occupant::Leftover,
        _ => Occupant::Socket,
    }
}

fn socket(kind: SocketKind) -> Result<OwnedFd, Errno> {
    let kind = match kind {
        SocketKind::Stream => SocketType::STREAM,
        SocketKind::SeqPacket => SocketType::SEQPACKET,
    };
    socket_with(AddressFamily::UNIX, kind, FLAGS, None)
}

/// Connects to the socket at `path` without waiting. `AGAIN`: its queue is full now.
fn dial(path: &Path, kind: SocketKind) -> Result<OwnedFd, Errno> {
    let fd = socket(kind)?;
    connect(&fd, &SocketAddrUnix::new(path)?)?;
    Ok(fd)
}

/// The sockets of a device. By default it has none, and all connections of the guest are refused.
#[derive(Debug, Default)]
pub struct HostSockets {
    /// Where host clients connect; each listens to another kind.
    pub listeners: Vec<Listener>,
    /// What the sockets are named after that the guest's connections go to.
    pub path: Option<PathBuf>,
}

impl HostSockets {
    /// Connects to whoever serves `port` on the host, without waiting.
    pub(super) fn dial(&self, port: u32, kind: SocketKind) -> Result<OwnedFd, Errno> {
        let mut path = OsString::from(self.path.as_ref().ok_or(Errno::NOENT)?);
        path.push(format!("_{port}"));
        dial(Path::new(&path), kind)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::{UnixListener, UnixStream};

    use super::*;

    #[test]
    fn a_socket_file_lives_as_long_as_its_owner() {
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
    fn a_path_in_use_is_refused_with_what_is_there_and_stays() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        is_possible(&path).unwrap();
        is_possible(&dir.path().join("missing/v")).unwrap_err();
        let refusal = || {
            is_possible(&path).unwrap_err();
            let error = Listener::bind(&path, SocketKind::Stream).unwrap_err();
            assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
            assert!(path.exists());
            let BindError::InUse { occupant, .. } = error else { panic!("{error}") };
            occupant
        };
        let listener = UnixListener::bind(&path).unwrap();
        assert_eq!(refusal(), Occupant::Socket);
        drop(listener);
        assert_eq!(refusal(), Occupant::Leftover);
        fs::remove_file(&path).unwrap();
        fs::write(&path, "").unwrap();
        assert_eq!(refusal(), Occupant::OtherFile);
    }

    #[test]
    fn paths_that_no_socket_can_have_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let long = dir.path().join("x".repeat(MAX_PATH_LEN));
        for path in [Path::new(""), &long] {
            let error = Listener::bind(path, SocketKind::Stream).unwrap_err();
            assert!(matches!(error, BindError::PathLength { .. }), "{error}");
        }
        let missing = Listener::bind(&dir.path().join("missing/v"), SocketKind::Stream).unwrap_err();
        assert!(matches!(missing, BindError::Io { .. }), "{missing}");
    }

    #[test]
    fn a_guests_connection_goes_to_the_socket_of_its_port_and_kind() {
        let dir = tempfile::tempdir().unwrap();
        let sockets = HostSockets { listeners: Vec::new(), path: Some(dir.path().join("v")) };
        assert_eq!(sockets.dial(52, SocketKind::Stream).unwrap_err(), Errno::NOENT);
        let listener = UnixListener::bind(dir.path().join("v_52")).unwrap();
        let _there = sockets.dial(52, SocketKind::Stream).unwrap();
        listener.accept().unwrap();
        assert_eq!(sockets.dial(52, SocketKind::SeqPacket).unwrap_err(), Errno::PROTOTYPE);
        let (_messages, _file) =
            Listener::bind(&dir.path().join("v_4294967295"), SocketKind::SeqPacket).unwrap();
        sockets.dial(u32::MAX, SocketKind::SeqPacket).unwrap();
        let path = Some(dir.path().join("x".repeat(MAX_PATH_LEN)));
        let long = HostSockets { listeners: Vec::new(), path };
        assert_eq!(long.dial(1, SocketKind::Stream).unwrap_err(), Errno::NAMETOOLONG);
        assert_eq!(HostSockets::default().dial(52, SocketKind::Stream).unwrap_err(), Errno::NOENT);
    }
}
