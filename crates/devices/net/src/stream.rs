//! User networking without any right: frames over a Unix stream socket, as `passt` speaks them.
//!
//! Each frame is preceded by its length, four bytes with the most significant first. There are no offloads. What arrives is read in
//! large pieces and handed on frame by frame; what goes out is gathered and written once per batch.
//!
//! # Errors
//!
//! The other side may close the connection, and may send a length that no frame has. Either ends the connection: [`Errno::NOTCONN`].
//! A side that does not read makes [`Stream::send`] say [`Errno::AGAIN`] once [`OUT_LIMIT`] bytes wait.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rustix::io::Errno;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType};

use super::interceptor::MAX_FRAME;
use super::segments::Segments;

/// Bytes of the length before a frame.
const PREFIX: usize = 4;
/// Bytes that are read at once.
const IN_SIZE: usize = 256 << 10;
/// Bytes that may wait to be written before no more are taken.
const OUT_LIMIT: usize = 256 << 10;
/// How long a server that is full may take to accept: the caller waits.
const CONNECT_PATIENCE: Duration = Duration::from_secs(1);

/// The server's socket cannot be used.
#[derive(Debug, thiserror::Error)]
#[error("cannot connect to {path}: {source}")]
pub struct StreamError {
    /// Its path.
    pub path: PathBuf,
    /// The kernel's reason.
    pub source: io::Error,
}

/// A connection to a network in another process.
#[derive(Debug, Clone)]
pub struct Stream {
    name: String,
    socket: Arc<OwnedFd>,
    /// What was read: `start..end` is not handed on yet. Allocated with the first read.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// What is to be written, from `written` on.
    outgoing: Vec<u8>,
    written: usize,
}

impl Stream {
    /// Connects to the server that listens at `path`, which accepts within [`CONNECT_PATIENCE`] or is an error.
    pub fn connect(path: &Path) -> Result<Self, StreamError> {
        let failed = |errno: Errno| {
            let source = match errno {
                Errno::AGAIN => io::Error::new(io::ErrorKind::WouldBlock, "its server accepts no connection"),
                errno => errno.into(),
            };
            StreamError { path: path.to_owned(), source }
        };
        let flags = SocketFlags::CLOEXEC;
        let socket =
            rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).map_err(failed)?;
        let address = SocketAddrUnix::new(path).map_err(failed)?;
        // A server that has just been asked by somebody else may be full for a moment: passt lets one wait.
        set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_PATIENCE)).map_err(failed)?;
        rustix::net::connect(&socket, &address).map_err(failed)?;
        rustix::io::ioctl_fionbio(&socket, true).map_err(failed)?;
        Ok(Self::new(path.display().to_string(), socket))
    }

    pub(super) fn new(name: String, socket: OwnedFd) -> Self {
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

    /// What the user calls it.
    pub(super) fn name(&self) -> &str {
        &self.name
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// The next frame, which stays the next until [`Stream::consume`]. [`Errno::AGAIN`] if there is none.
    pub(super) fn frame(&mut self) -> Result<&[u8], Errno> {
        loop {
            if let Some(len) = self.complete()? {
                let begin = self.start + PREFIX;
                return Ok(&self.incoming[begin..begin + len]);
            }
            self.read()?;
        }
    }

    /// Lets go of the frame that [`Stream::frame`] showed.
    pub(super) fn consume(&mut self) {
        if let Ok(Some(len)) = self.complete() {
            self.start += PREFIX + len;
        }
    }

    /// Length of the next frame, if all of it is here.
    fn complete(&self) -> Result<Option<usize>, Errno> {
        let there = &self.incoming[self.start..self.end];
        let Some((prefix, rest)) = there.split_first_chunk::<PREFIX>() else { return Ok(None) };
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
        // What is left is less than a frame, and the buffer holds several.
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

    /// Takes a frame: `head`, and the segments. It goes out with [`Stream::flush`].
    pub(super) fn send(&mut self, head: &[u8], rest: &Segments, offset: usize) -> Result<(), Errno> {
        if self.outgoing.len() - self.written >= OUT_LIMIT {
            self.flush()?;
            if self.outgoing.len() - self.written >= OUT_LIMIT {
                return Err(Errno::AGAIN);
            }
        }
        let len = (head.len() + rest.len().saturating_sub(offset)) as u32;
        self.outgoing.extend_from_slice(&len.to_be_bytes());
        self.outgoing.extend_from_slice(head);
        rest.copy_out(offset, &mut self.outgoing);
        Ok(())
    }

    /// Writes what waits, as far as the other side takes it.
    pub(super) fn flush(&mut self) -> Result<(), Errno> {
        while self.has_unsent() {
            let rest = &self.outgoing[self.written..];
            let flags = SendFlags::DONTWAIT | SendFlags::NOSIGNAL;
            match rustix::io::retry_on_intr(|| rustix::net::send(&self.socket, rest, flags)) {
                Ok(count) => self.written += count,
                // Not now, or no memory for it now: later.
                Err(Errno::AGAIN | Errno::NOBUFS | Errno::NOMEM) => break,
                Err(error) => return Err(error),
            }
        }
        self.outgoing.drain(..self.written);
        self.written = 0;
        Ok(())
    }

    /// Whether the other side has not hung up.
    pub(super) fn is_there(&self) -> bool {
        let flags = RecvFlags::DONTWAIT | RecvFlags::PEEK;
        match rustix::net::recv(&self.socket, &mut [0; 1], flags) {
            Ok((len, _)) => len > 0,
            Err(error) => error == Errno::AGAIN,
        }
    }

    /// Ends the connection, whoever else has its descriptor.
    pub(super) fn hang_up(&self) {
        // It may have ended already.
        let _ = rustix::net::shutdown(&self.socket, Shutdown::Both);
    }

    /// Whether something waits to be written.
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
    fn frames_are_cut_out_of_the_stream_however_it_comes() {
        let (mut stream, mut peer) = pair();
        let frames: Vec<Vec<u8>> = [60, 1, 1500, 65000].iter().map(|&len| vec![len as u8; len]).collect();
        let bytes: Vec<u8> = frames.iter().flat_map(|frame| framed(frame)).collect();
        let mut got = Vec::new();
        for piece in bytes.chunks(997) {
            peer.write_all(piece).unwrap();
            while let Ok(frame) = stream.frame() {
                got.push(frame.to_vec());
                stream.consume();
            }
        }
        assert_eq!(got, frames);
    }

    #[test]
    fn a_server_that_accepts_nobody_is_an_error_and_not_waited_for() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("full");
        let flags = SocketFlags::CLOEXEC;
        let server = rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None).unwrap();
        rustix::net::bind(&server, &SocketAddrUnix::new(&path).unwrap()).unwrap();
        rustix::net::listen(&server, 0).unwrap();
        let waiting: Vec<_> = std::iter::from_fn(|| Stream::connect(&path).ok()).take(10).collect();
        assert!(waiting.len() < 10);
        let refused = Stream::connect(&path).unwrap_err().to_string();
        assert!(refused.contains("full") && refused.contains("accepts no connection"), "{refused}");
    }

    #[test]
    fn a_frame_stays_until_it_is_consumed() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&framed(b"one")).unwrap();
        assert_eq!(stream.frame(), Ok(&b"one"[..]));
        assert_eq!(stream.frame(), Ok(&b"one"[..]));
        stream.consume();
        assert_eq!(stream.frame(), Err(Errno::AGAIN));
    }

    #[test]
    fn a_length_that_no_frame_has_and_an_end_break_the_connection() {
        let (mut stream, mut peer) = pair();
        peer.write_all(&(MAX_FRAME as u32 + 1).to_be_bytes()).unwrap();
        assert_eq!(stream.frame(), Err(Errno::NOTCONN));
        let (mut stream, peer) = pair();
        drop(peer);
        assert_eq!(stream.frame(), Err(Errno::NOTCONN));
    }

    #[test]
    fn a_peer_that_does_not_read_holds_frames_back_and_then_gets_them_all() {
        let (mut stream, mut peer) = pair();
        let empty = Segments::new();
        let mut sent = 0;
        while stream.send(&[7; 1000], &empty, 0) == Ok(()) {
            stream.flush().unwrap();
            sent += 1;
            assert!(sent < 100_000, "somebody takes it all");
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
