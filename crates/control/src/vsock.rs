//! The host sockets of the vsock device: created when the device is configured, removed when it is
//! configured again or the process ends.

use std::path::{Path, PathBuf};

use config::Vsock;
use vsock::{BindError, HostSockets, Listener, SocketFile, SocketKind, check_socket_path};

use crate::CommandError;
use crate::reopen::{Reopened, open_or_reopen};

/// A socket that listens, its file, and its path.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    listener: Listener,
    _file: SocketFile,
}

/// The paths of the sockets of one device: for streams, and for messages if there is one.
type Paths = (PathBuf, Option<PathBuf>);

/// The sockets of one device.
#[derive(Debug)]
pub(crate) struct VsockSockets {
    stream: Bound,
    messages: Option<Bound>,
}

impl VsockSockets {
    /// Creates the sockets that `config` asks for, in the place of those in `slot`.
    ///
    /// The old sockets are closed first, because the new ones may have their paths. If the new ones
    /// cannot be created, the old ones are created again.
    pub(crate) fn replace(slot: &mut Option<Self>, config: &Vsock) -> Result<(), CommandError> {
        let wanted = paths(config);
        let Some(old) = slot.as_ref().map(VsockSockets::paths) else {
            *slot = Some(Self::bind(&wanted)?);
            return Ok(());
        };
        // A client may be waiting in the queue of the very socket.
        if old == wanted {
            return Ok(());
        }
        *slot = None;
        match open_or_reopen(&wanted, &old, |paths| Ok(Self::bind(paths)?)) {
            Reopened::New(sockets) => {
                *slot = Some(sockets);
                Ok(())
            }
            Reopened::Old(sockets, error) => {
                *slot = Some(sockets);
                Err(error)
            }
            Reopened::Nothing { error, lost } => {
                log::error!("the vsock device has lost its sockets: {lost}");
                Err(error)
            }
        }
    }

    fn paths(&self) -> Paths {
        (self.stream.path.clone(), self.messages.as_ref().map(|bound| bound.path.clone()))
    }

    /// Creates the sockets that `config` asks for.
    ///
    /// `None` where there is no device, or its path is empty: the child of a fork has such a device
    /// if its sockets were not overridden.
    pub(crate) fn create(config: Option<&Vsock>) -> Result<Option<Self>, BindError> {
        match config {
            Some(config) if !config.uds_path.as_os_str().is_empty() => Self::bind(&paths(config)).map(Some),
            _ => Ok(None),
        }
    }

    fn bind((stream, messages): &Paths) -> Result<Self, BindError> {
        let bind = |path: &Path, kind| {
            let (listener, file) = Listener::bind(path, kind)?;
            Ok(Bound { path: path.to_owned(), listener, _file: file })
        };
        Ok(VsockSockets {
            stream: bind(stream, SocketKind::Stream)?,
            messages: messages.as_deref().map(|path| bind(path, SocketKind::SeqPacket)).transpose()?,
        })
    }

    /// Checks whether the sockets of `config` could be created now, as far as can be seen without
    /// creating them.
    pub(crate) fn check_possible(config: &Vsock) -> Result<(), BindError> {
        let paths = [Some(&config.uds_path), config.seqpacket_uds_path.as_ref()];
        paths.into_iter().flatten().try_for_each(|path| check_socket_path(path))
    }

    /// The sockets in the form that the device takes.
    pub(crate) fn for_device(&self) -> HostSockets {
        let listeners = [Some(&self.stream), self.messages.as_ref()]
            .into_iter()
            .flatten()
            .map(|bound| bound.listener.clone());
        HostSockets { listeners: listeners.collect(), path: Some(self.stream.path.clone()) }
    }
}

fn paths(config: &Vsock) -> Paths {
    (config.uds_path.clone(), config.seqpacket_uds_path.clone())
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn config(dir: &Path, stream: &str, messages: Option<&str>) -> Vsock {
        Vsock {
            guest_cid: 3,
            uds_path: dir.join(stream),
            vsock_id: None,
            seqpacket_uds_path: messages.map(|name| dir.join(name)),
        }
    }

    #[test]
    fn new_paths_replace_the_sockets_and_the_same_paths_keep_them() {
        let dir = tempfile::tempdir().unwrap();
        let mut slot = None;
        VsockSockets::replace(&mut slot, &config(dir.path(), "a", None)).unwrap();
        let _waiting = UnixStream::connect(dir.path().join("a")).unwrap();
        VsockSockets::replace(&mut slot, &config(dir.path(), "a", None)).unwrap();
        assert_eq!(slot.as_ref().unwrap().for_device().listeners.len(), 1);
        VsockSockets::replace(&mut slot, &config(dir.path(), "b", Some("a"))).unwrap();
        assert_eq!(slot.as_ref().unwrap().for_device().listeners.len(), 2);
        assert!(dir.path().join("a").exists() && dir.path().join("b").exists());
        drop(slot);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn sockets_that_cannot_be_created_leave_the_old_ones() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("taken"), "").unwrap();
        let mut slot = None;
        VsockSockets::replace(&mut slot, &config(dir.path(), "a", None)).unwrap();
        VsockSockets::replace(&mut slot, &config(dir.path(), "b", Some("taken"))).unwrap_err();
        UnixStream::connect(dir.path().join("a")).unwrap();
        assert!(!dir.path().join("b").exists());
        assert_eq!(std::fs::read(dir.path().join("taken")).unwrap(), b"");
    }
}
