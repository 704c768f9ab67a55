//! The stream backend: frames over a Unix stream socket, in the protocol of `passt`. It needs no
//! privileges.
//!
//! Each frame follows its length, a big-endian 32-bit integer. There are no offloads. Received
//! bytes are read in large pieces and delivered frame by frame. Sent frames are buffered and
//! written once per batch.
//!
//! # Errors
//!
//! [`Errno::NOTCONN`] ends the connection: the peer has closed it, or has sent a length greater
//! than [`MAX_FRAME`]. While the peer does not read, [`Stream::send`] returns [`Errno::AGAIN`] once
//! [`OUT_LIMIT`] bytes are buffered.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use memory::iovec::GuestIoVec;
use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};

use crate::interceptor::MAX_FRAME;

/// Bytes of the length field before a frame.
const PREFIX: usize = 4;
/// Size of the receive buffer in bytes.
const IN_SIZE: usize = 256 << 10;
/// Once this many bytes are buffered, no more frames are accepted.
const OUT_LIMIT: usize = 256 << 10;
/// How long [`Stream::connect`] blocks while the server's backlog is full.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(1);

/// The server's socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to {path}: {source}")]
pub struct StreamError {
    /// Path of the socket.
    pub path: PathBuf,
    /// The kernel's reason.
    pub source: io::Error,
}

/// A connection to another process that serves a network.
#[derive(Debug, Clone)]
pub struct Stream {
    name: String,
    socket: Arc<OwnedFd>,
    /// Received bytes: `start..end` is not consumed yet. Allocated by the first read.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// Bytes to send. The first `written` of them are sent.
    outgoing: Vec<u8>,
    written: usize,
}

impl Stream {
    /// Connects to the server that listens at `path`. Blocks for [`CONNECT_TIMEOUT`] at most.
    pub fn connect(path: &Path) -> Result<Self, StreamError> {
        let failed = |errno: Errno| {
            let source = match errno {
                Errno::AGAIN => {
                    io::Error::new(io::ErrorKind::WouldBlock, "the server does not accept connections")
                }
                errno => errno.into(),
            };
            StreamError { path: path.to_owned(), source }
        };
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        // passt lets one client wait: its backlog is full for a moment while another one connects.
        set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIMEOUT)).map_err(failed)?;
        rustix::net::connect(&socket, &address).map_err(failed)?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(failed)?;
        Ok(Self::new(path.display().to_string(), socket))
    }

    pub(crate) fn new(name: String, socket: OwnedFd) -> Self {
        Stream {
            name,
            socket: Arc::new(socket),
            incoming: Vec::new(),
            start: 0,
            end: 0,
            outgoing: Vec::new(),
            written: 0,
        }
    }

    /// The socket's path, for log messages.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Returns the next frame and keeps it until [`Stream::consume`]. [`Errno::AGAIN`]: there is
    /// none.
    pub(crate) fn frame(&mut self) -> Result<&[u8], Errno> {
        loop {
            if let Some(len) = self.complete_len()? {
                let begin = self.start + PREFIX;
                return Ok(&self.incoming[begin..begin + len]);
            }
            self.read()?;
        }
    }

    /// Drops the frame that [`Stream::frame`] returned.
    pub(crate) fn consume(&mut self) {
        if let Ok(Some(len)) = self.complete_len() {
            self.start += PREFIX + len;
        }
    }

    /// Length of the next frame, if all of it is received.
    fn complete_len(&self) -> Result<Option<usize>, Errno> {
        let received = &self.incoming[self.start..self.end];
        let Some((prefix, rest)) = received.split_first_chunk::<PREFIX>() else { return Ok(None) };
        let len = u32::from_be_bytes(*prefix) as usize;
        if len > MAX_FRAME {
            return Err(Errno::NOTCONN);
        }
        Ok((rest.len() >= len).then_some(len))
    }

    fn read(&mut self) -> Result<(), Errno> {
        if self.incoming.is_empty() {
            self.incoming.resize(IN_SIZE, 0);
        }
        // Less than one frame is left, and the buffer holds several.
        self.incoming.copy_within(self.start..self.end, 0);
        (self.start, self.end) = (0, self.end - self.start);
        let (got, _) = rustix::io::retry_on_intr(|| {
            rustix::net::recv(&self.socket, &mut self.incoming[self.end..], RecvFlags::DONTWAIT)
        })?;
        if got == 0 {
            return Err(Errno::NOTCONN);
        }
        self.end += got;
        Ok(())
    }

    /// Buffers a frame, which [`Stream::flush`] writes: `head`, and `rest` without its first
    /// `offset` bytes.
    pub(super) fn send(&mut self, head: &[u8], rest: &GuestIoVec, offset: usize) -> Result<(), Errno> {
        if self.outgoing.len() - self.written >= OUT_LIMIT {
            self.flush()?;
            if self.outgoing.len() - self.written >= OUT_LIMIT {
                return Err(Errno::AGAIN);
            }
        }
        let len = (head.len() as u64 + rest.len().saturating_sub(offset as u64)) as u32;
        self.outgoing.extend_from_slice(&len.to_be_bytes());
        self.outgoing.extend_from_slice(head);
        rest.copy_out(offset, &mut self.outgoing);
        Ok(())
    }

    /// Writes buffered bytes until the socket is full.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while self.has_unsent() {
            let rest = &self.outgoing[self.written..];
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, rest, flags)) {
                Ok(count) => self.written += count,
                // The socket is full, or the kernel is short of memory: try again later.
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => break,
                Err(error) => return Err(error),
            }
        }
        self.outgoing.drain(..self.written);
        self.written = 0;
        Ok(())
    }

    /// Whether the peer is still connected.
    pub(super) fn is_there(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        match rustix::net::recv(&self.socket, &mut [0; 1], flags) {
            Ok((len, _)) => len > 0,
            Err(error) => error == Errno::AGAIN,
        }
    }

    /// Ends the connection, also where another process has a copy of the descriptor.
    pub(super) fn shutdown(&self) {
        // An error means that it has ended already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Whether buffered bytes are not written yet.
    pub(super) fn has_unsent(&self) -> bool {
        self.written < self.outgoing.len()
    }
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn pair() -> (Stream, UnixStream) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        theirs.set_nonblocking(true).unwrap();
        (Stream::new("test".into(), ours.into()), theirs)
    }

    fn framed(frame: &[u8]) -> Vec<u8> {
        [&(frame.len() as u32).to_be_bytes()[..], frame].concat()
    }

    #[test]
    fn frames_are_parsed_from_a_stream_in_any_pieces() {
        let (mut stream, mut peer) = pair();
        let frames: Vec<Vec<u8>> = [60, 1, 1500, 65000].iter().map(|&len| vec![len as u8; len]).collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut received = Vec::new();
        for piece in bytes.chunks(997) {
            peer.write_all(piece).unwrap();
            while let Ok(frame) = stream.frame() {
                received.push(frame.to_vec());
                stream.consume();
            }
        }
        assert_eq!(received, frames);
    }

    #[test]
    fn connect_to_a_server_with_a_full_backlog_times_out() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("full");
        let flags = SocketFlags::CLOEXEC;
        let server = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&server, 0).unwrap();
        let waiting: Vec<_> = std::iter::from_fn(|| Stream::connect(&path).ok()).take(10).collect();
        assert!(waiting.len() < 10);
        let refused = Stream::connect(&path).unwrap_err().to_string();
        assert!(refused.contains("full") && refused.contains("does not accept connections"), "{refused}");
    }

    #[test]
    fn frame_is_kept_until_consumed() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&framed(b"one")).unwrap();
        assert_eq!(stream.frame(), Ok(&b"one"[..]));
        assert_eq!(stream.frame(), Ok(&b"one"[..]));
        stream.consume();
        assert_eq!(stream.frame(), Err(Errno::AGAIN));
    }

    #[test]
    fn too_long_frame_or_hangup_ends_the_connection() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&(MAX_FRAME as u32 + 1).to_be_bytes()).unwrap();
        assert_eq!(stream.frame(), Err(Errno::NOTCONN));
        let (mut stream, peer) = pair();
        drop(peer);
        assert_eq!(stream.frame(), Err(Errno::NOTCONN));
    }

    #[test]
    fn peer_that_stops_reading_gets_all_frames_later() {
        let (mut stream, mut peer) = pair();
        let empty = GuestIoVec::new();
        let mut sent = 0;
        while stream.send(&[7; 1000], &empty, 0) == Ok(()) {
            stream.flush().unwrap();
            sent += 1;
            assert!(sent < 100_000, "the socket never is full");
        }
        assert!(stream.has_unsent());
        let mut got = Vec::new();
        while stream.has_unsent() {
            let mut piece = vec![0; 64 << 10];
            let count = peer.read(&mut piece).unwrap();
            got.extend_from_slice(&piece[..count]);
            stream.flush().unwrap();
        }
        let _ = peer.read_to_end(&mut got);
        assert_eq!(got.len(), sent * 1004);
        assert!(got.chunks(1004).all(|frame| frame == framed(&[7; 1000])));
    }
}
