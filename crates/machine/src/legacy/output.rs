//! A destination for bytes that never makes its writer wait: a terminal, pipe, socket or file,
//! whose reader may have stopped.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{FileType, Mode, OFlags};
use rustix::net::SendFlags;

/// Bytes that a pipe takes at once whenever it is writable, and the size of a terminal's buffer.
const CHUNK: usize = 4096;

/// An open destination.
#[derive(Debug)]
pub struct Output {
    fd: OwnedFd,
    kind: Kind,
}

/// How to write without waiting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// A file, to which a write does not wait for readers, or an open file description of this
    /// process alone that has `O_NONBLOCK`.
    NonBlocking,
    /// A shared socket: each call has `MSG_DONTWAIT`.
    Socket,
    /// A shared terminal or pipe, whose mode must not be changed: it is polled first, and little is
    /// written at once.
    Shared,
}

impl Output {
    /// This process's standard output.
    pub fn stdout() -> io::Result<Self> {
        Self::from_shared(rustix::stdio::stdout())
    }

    /// A destination that other processes may share. The mode of the shared open file description
    /// is not changed.
    pub fn from_shared(fd: BorrowedFd<'_>) -> io::Result<Self> {
        let kind = FileType::from_raw_mode(rustix::fs::fstat(fd)?.st_mode);
        match kind {
            FileType::Socket => Ok(Output { fd: fd.try_clone_to_owned()?, kind: Kind::Socket }),
            FileType::Fifo | FileType::CharacterDevice => Ok(match reopen(fd) {
                Ok(own) => Output { fd: own, kind: Kind::NonBlocking },
                // In a jail there may be no /proc, or this process may not open the terminal.
                Err(_) => Output { fd: fd.try_clone_to_owned()?, kind: Kind::Shared },
            }),
            // A file is not opened again: other processes may write at the same shared position.
            _ => Ok(Output { fd: fd.try_clone_to_owned()?, kind: Kind::NonBlocking }),
        }
    }

    /// Opens a file, which is created if it is missing and appended to, or a FIFO, which may have
    /// no reader yet.
    pub fn open(path: &Path) -> io::Result<Self> {
        let flags = OFlags::RDWR
            | OFlags::CREATE
            | OFlags::APPEND
            | OFlags::NONBLOCK
            | OFlags::NOCTTY
            | OFlags::CLOEXEC;
        let fd = rustix::fs::open(path, flags, Mode::from_raw_mode(0o644))?;
        Ok(Output { fd, kind: Kind::NonBlocking })
    }

    /// Another handle of the same destination.
    pub fn try_clone(&self) -> io::Result<Self> {
        Ok(Output { fd: self.fd.try_clone()?, kind: self.kind })
    }

    /// Writes as many bytes as fit now; returns how many. [`io::ErrorKind::WouldBlock`] if none
    /// fits.
    pub fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        let written = match self.kind {
            Kind::NonBlocking => rustix::io::write(&self.fd, bytes),
            Kind::Socket => rustix::net::send(&self.fd, bytes, SendFlags::DONTWAIT | SendFlags::NOSIGNAL),
            Kind::Shared if !self.is_writable() => Err(rustix::io::Errno::WOULDBLOCK),
            Kind::Shared => rustix::io::write(&self.fd, &bytes[..bytes.len().min(CHUNK)]),
        };
        Ok(written?)
    }

    fn is_writable(&self) -> bool {
        let mut fds = [PollFd::new(&self.fd, PollFlags::OUT)];
        poll(&mut fds, Some(&Timespec { tv_sec: 0, tv_nsec: 0 })).is_ok_and(|ready| ready > 0)
    }
}

impl AsFd for Output {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }
}

/// Opens the file behind `fd` again, for non-blocking writes.
fn reopen(fd: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    use std::os::fd::AsRawFd;
    let path = format!("/proc/self/fd/{}", fd.as_raw_fd());
    let flags = OFlags::WRONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    Ok(rustix::fs::open(path, flags, Mode::empty())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Writes until the destination takes no more; returns how much it took.
    fn fill(output: &Output) -> usize {
        let mut total = 0;
        loop {
            match output.write(&[b'x'; 10_000]) {
                Ok(n) => total += n,
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => return total,
                Err(e) => panic!("{e}"),
            }
        }
    }

    #[test]
    fn full_pipe_does_not_block() {
        let (_reader, writer) = io::pipe().unwrap();
        let own = Output::from_shared(writer.as_fd()).unwrap();
        assert_eq!(own.kind, Kind::NonBlocking);
        assert!(fill(&own) > 0);
        assert!(
            !rustix::fs::fcntl_getfl(&writer).unwrap().contains(OFlags::NONBLOCK),
            "its mode is left alone"
        );
    }

    #[test]
    fn full_pipe_that_cannot_be_reopened_does_not_block() {
        let (_reader, writer) = io::pipe().unwrap();
        let shared = Output { fd: writer.into(), kind: Kind::Shared };
        assert!(fill(&shared) > 0);
    }

    #[test]
    fn full_socket_does_not_block() {
        let (_reader, writer) = std::os::unix::net::UnixStream::pair().unwrap();
        assert!(fill(&Output::from_shared(writer.as_fd()).unwrap()) > 0);
    }

    #[test]
    fn fifo_without_a_reader_opens_and_does_not_block() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("fifo");
        rustix::fs::mkfifoat(rustix::fs::CWD, &path, Mode::from_raw_mode(0o600)).unwrap();
        assert!(fill(&Output::open(&path).unwrap()) > 0);
    }

    #[test]
    fn a_file_is_appended_to() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        std::fs::write(&path, "old ").unwrap();
        Output::open(&path).unwrap().write(b"new").unwrap();
        assert_eq!(std::fs::read(&path).unwrap(), b"old new");
    }
}
