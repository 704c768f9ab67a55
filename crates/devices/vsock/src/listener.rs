//! Listening sockets of the device, and connecting to those of host servers.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{SocketFlags, accept_with};
use socket_file::{BindError, SocketFile, SocketType};

use crate::packet::SocketKind;

/// The name of the sockets in errors.
const WHAT: &str = "vsock socket";

/// A non-blocking listening socket. Clones are the same socket.
#[derive(Debug, Clone)]
pub struct Listener {
    fd: Arc<OwnedFd>,
    kind: SocketKind,
}

impl Listener {
    /// Creates a socket at `path`, where no file may exist, and listens on it.
    pub fn bind(path: &Path, kind: SocketKind) -> Result<(Listener, SocketFile), BindError> {
        let (fd, file) = socket_file::bind(WHAT, path, socket_type(kind))?;
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
        accept_with(&self.fd, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK)
    }
}

/// Checks whether [`Listener::bind`] could succeed at `path`, as far as that can be found out
/// without creating a socket.
pub fn check_socket_path(path: &Path) -> Result<(), BindError> {
    socket_file::check_possible(WHAT, path)
}

/// Connects to the socket at `path` without waiting. `EAGAIN` means that its backlog is full.
pub(crate) fn connect_to(path: &Path, kind: SocketKind) -> Result<OwnedFd, Errno> {
    socket_file::connect_to(path, socket_type(kind))
}

fn socket_type(kind: SocketKind) -> SocketType {
    match kind {
        SocketKind::Stream => SocketType::STREAM,
        SocketKind::SeqPacket => SocketType::SEQPACKET,
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    #[test]
    fn listener_accepts_without_waiting() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        let (listener, _file) = Listener::bind(&path, SocketKind::Stream).unwrap();
        let _client = UnixStream::connect(&path).unwrap();
        listener.accept().unwrap();
        assert_eq!(listener.accept().unwrap_err(), Errno::AGAIN);
    }

    #[test]
    fn path_in_use_is_refused_by_name() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("v.sock");
        check_socket_path(&path).unwrap();
        let _bound = Listener::bind(&path, SocketKind::SeqPacket).unwrap();
        check_socket_path(&path).unwrap_err();
        let error = Listener::bind(&path, SocketKind::Stream).unwrap_err();
        assert!(error.to_string().starts_with("vsock socket /"), "{error}");
        assert!(error.to_string().contains(path.to_str().unwrap()), "{error}");
    }
}
