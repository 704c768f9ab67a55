//! The host's side of a device: where host clients connect, and where the guest's connections go.
//!
//! The socket files are not part of it. Each belongs to a `SocketFile`, which the owner of the
//! configuration keeps as long as the file is needed.

use std::ffi::OsString;
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use rustix::io::Errno;

use crate::listener::{Listener, connect_to};
use crate::packet::SocketKind;

/// The sockets of a device. The default has none: host clients cannot connect, and all connections
/// of the guest are refused.
#[derive(Debug, Default)]
pub struct HostSockets {
    /// Where host clients connect. At most one for each type of connection.
    pub listeners: Vec<Listener>,
    /// Prefix of the paths that the guest's connections go to: port P is `{path}_P`.
    pub path: Option<PathBuf>,
}

impl HostSockets {
    /// Connects to the host socket of `port`, without waiting. `EAGAIN` means that its backlog is
    /// full.
    pub(crate) fn connect(&self, port: u32, kind: SocketKind) -> Result<OwnedFd, Errno> {
        let mut path = OsString::from(self.path.as_ref().ok_or(Errno::NOENT)?);
        path.push(format!("_{port}"));
        connect_to(Path::new(&path), kind)
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixListener;

    use super::*;
    use socket_file::MAX_PATH_LEN;

    #[test]
    fn guest_connections_go_to_the_socket_of_their_port_and_type() {
        let dir = tempfile::tempdir().unwrap();
        let sockets = HostSockets { listeners: Vec::new(), path: Some(dir.path().join("v")) };
        assert_eq!(sockets.connect(52, SocketKind::Stream).unwrap_err(), Errno::NOENT);
        let listener = UnixListener::bind(dir.path().join("v_52")).unwrap();
        let _connected = sockets.connect(52, SocketKind::Stream).unwrap();
        listener.accept().unwrap();
        assert_eq!(sockets.connect(52, SocketKind::SeqPacket).unwrap_err(), Errno::PROTOTYPE);
        let (_messages, _file) =
            Listener::bind(&dir.path().join("v_4294967295"), SocketKind::SeqPacket).unwrap();
        sockets.connect(u32::MAX, SocketKind::SeqPacket).unwrap();
        let path = Some(dir.path().join("x".repeat(MAX_PATH_LEN)));
        let long = HostSockets { listeners: Vec::new(), path };
        assert_eq!(long.connect(1, SocketKind::Stream).unwrap_err(), Errno::NAMETOOLONG);
        assert_eq!(HostSockets::default().connect(52, SocketKind::Stream).unwrap_err(), Errno::NOENT);
    }
}
