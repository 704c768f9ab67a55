//! Listening Unix sockets.

use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::Arc;

use rustix::io::Errno;
use rustix::net::{SocketFlags, SocketType, accept_with};
use socket_file::{BindError, SocketFile};

use crate::packet::SocketKind;

/// The name of the sockets in errors.
const NAME: &str = "vsock socket";

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
        let (fd, file) = socket_file::bind(NAME, path, socket_type(kind))?;
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
    socket_file::check_possible(NAME, path)
}

pub(crate) fn socket_type(kind: SocketKind) -> SocketType {
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
}
