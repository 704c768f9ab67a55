//! The host sockets of the vsock device: made when the device is configured, removed when it is configured anew or the process ends.

use std::path::{Path, PathBuf};

use config::Vsock;
use vsock::{BindError, HostSockets, Listener, SocketFile, SocketKind, check_socket_path};

/// A socket that listens, its file, and where it is.
#[derive(Debug)]
struct Bound {
    path: PathBuf,
    listener: Listener,
    _file: SocketFile,
}

/// The sockets of one device.
#[derive(Debug)]
pub(crate) struct VsockSockets {
    stream: Bound,
    messages: Option<Bound>,
}

impl VsockSockets {
    /// Makes the sockets that `config` asks for and puts them in `place`. What was there goes first, as the new ones may have its paths; if the
    /// new ones cannot be made, it comes back.
    pub(crate) fn make(place: &mut Option<VsockSockets>, config: &Vsock) -> Result<(), BindError> {
        let paths = |sockets: &VsockSockets| {
            (sockets.stream.path.clone(), sockets.messages.as_ref().map(|bound| bound.path.clone()))
        };
        let wanted = (config.uds_path.clone(), config.seqpacket_uds_path.clone());
        let old = place.as_ref().map(paths);
        // A client may be waiting at the very socket.
        if old.as_ref() == Some(&wanted) {
            return Ok(());
        }
        *place = None;
        match Self::at(&wanted) {
            Ok(sockets) => {
                *place = Some(sockets);
                Ok(())
            }
            Err(error) => {
                *place = old.and_then(|old| {
                    let again = Self::at(&old);
                    again
                        .inspect_err(|gone| log::error!("the vsock device has lost its sockets: {gone}"))
                        .ok()
                });
                Err(error)
            }
        }
    }

    /// The sockets that `config` asks for; none for the device of a fork's child that was given none.
    pub(crate) fn of(config: &Vsock) -> Result<Option<Self>, BindError> {
        if config.uds_path.as_os_str().is_empty() {
            return Ok(None);
        }
        Self::at(&(config.uds_path.clone(), config.seqpacket_uds_path.clone())).map(Some)
    }

    fn at((stream, messages): &(PathBuf, Option<PathBuf>)) -> Result<Self, BindError> {
        let bind = |path: &Path, kind| {
            let (listener, file) = Listener::bind(path, kind)?;
            Ok(Bound { path: path.to_owned(), listener, _file: file })
        };
        Ok(VsockSockets {
            stream: bind(stream, SocketKind::Stream)?,
            messages: messages.as_deref().map(|path| bind(path, SocketKind::SeqPacket)).transpose()?,
        })
    }

    /// Whether `config`'s sockets could be made now, as far as can be seen without making them.
    pub(crate) fn are_possible(config: &Vsock) -> Result<(), BindError> {
        let paths = [Some(&config.uds_path), config.seqpacket_uds_path.as_ref()];
        paths.into_iter().flatten().try_for_each(|path| check_socket_path(path))
    }

    /// The sockets as the device takes them.
    pub(crate) fn for_device(&self) -> HostSockets {
        let listeners = [Some(&self.stream), self.messages.as_ref()]
            .into_iter()
            .flatten()
            .map(|bound| bound.listener.clone());
        HostSockets { listeners: listeners.collect(), path: Some(self.stream.path.clone()) }
    }
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
    fn another_configuration_takes_the_place_of_the_old_one_and_the_same_one_stays() {
        let dir = tempfile::tempdir().unwrap();
        let mut place = None;
        VsockSockets::make(&mut place, &config(dir.path(), "a", None)).unwrap();
        let _waiting = UnixStream::connect(dir.path().join("a")).unwrap();
        VsockSockets::make(&mut place, &config(dir.path(), "a", None)).unwrap();
        assert_eq!(place.as_ref().unwrap().for_device().listeners.len(), 1);
        VsockSockets::make(&mut place, &config(dir.path(), "b", Some("a"))).unwrap();
        assert_eq!(place.as_ref().unwrap().for_device().listeners.len(), 2);
        assert!(dir.path().join("a").exists() && dir.path().join("b").exists());
        drop(place);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 0);
    }

    #[test]
    fn a_configuration_that_cannot_be_leaves_the_old_one() {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("taken"), "").unwrap();
        let mut place = None;
        VsockSockets::make(&mut place, &config(dir.path(), "a", None)).unwrap();
        VsockSockets::make(&mut place, &config(dir.path(), "b", Some("taken"))).unwrap_err();
        UnixStream::connect(dir.path().join("a")).unwrap();
        assert!(!dir.path().join("b").exists());
        assert_eq!(std::fs::read(dir.path().join("taken")).unwrap(), b"");
    }
}
