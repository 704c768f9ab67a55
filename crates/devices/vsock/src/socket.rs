//! The host's side: Unix sockets.
//!
//! A [`Listener`] is the socket that host clients connect to, at `uds_path`; [`HostSockets`] has the listeners of a device and knows
//! where connections of the guest go: port P is the socket `{uds_path}_P`.
//!
//! The socket file belongs to [`SocketFile`], which removes it at its end: it is whoever owns the configuration that decides when that
//! is, not the device.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use socket_file::SocketType;
pub use socket_file::{BindError, MAX_PATH_LEN, Occupant, SocketFile};

use super::packet::SocketKind;

/// The name of the sockets in errors.
const WHAT: &str = "vsock socket";

const FLAGS: SocketFlags = SocketFlags::CLOEXEC.union(SocketFlags::NONBLOCK);

/// A socket that takes connections and never waits for them. Clones are the same socket.
#[derive(Debug, Clone)]
pub struct Listener {
    fd: Arc<OwnedFd>,
    kind: SocketKind,
}

impl Listener {
    /// Creates a socket at `path`, where nothing may exist.
    pub fn bind(path: &Path, kind: SocketKind) -> Result<(Listener, SocketFile), BindError> {
        let (fd, file) = socket_file::bind(WHAT, path, socket_type(kind))?;
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

/// Checks that a socket could be created at `path`, as far as can be seen without creating it.
pub fn is_possible(path: &Path) -> Result<(), BindError> {
    socket_file::check_possible(WHAT, path)
}

fn socket_type(kind: SocketKind) -> SocketType {
    match kind {
        SocketKind::Stream => SocketType::STREAM,
        SocketKind::SeqPacket => SocketType::SEQPACKET,
    }
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
        socket_file::dial(Path::new(&path), socket_type(kind))
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
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
        assert_eq!(refusal(), Occupant::Process);
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
