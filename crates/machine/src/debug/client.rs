//! The connection of one debugger: bytes in and out, never waiting for ever.

use std::io::{self, ErrorKind, Read};
use std::os::fd::{AsFd, BorrowedFd};
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use gdbstub::conn::Connection;
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SendFlags;
use sync::EventFd;

/// Bytes of answers that are collected before they are sent.
const OUTPUT: usize = 4096;

/// How long a debugger may take to read an answer, in seconds.
const WRITE_TIMEOUT: i64 = 10;

/// A debugger that is connected. Its socket is non-blocking.
#[derive(Debug)]
pub(super) struct Client {
    stream: UnixStream,
    /// Bytes that were received, and how many of them were taken.
    input: Vec<u8>,
    taken: usize,
    output: Vec<u8>,
    /// Readable once the guest ends: then no answer is waited for.
    end: Arc<EventFd>,
}

impl Client {
    /// A client on a non-blocking socket.
    pub(super) fn new(stream: UnixStream, end: Arc<EventFd>) -> Self {
        Client { stream, input: Vec::new(), taken: 0, output: Vec::new(), end }
    }

    /// The next byte that was received, without reading from the socket.
    pub(super) fn next(&mut self) -> Option<u8> {
        let byte = self.input.get(self.taken).copied()?;
        self.taken += 1;
        Some(byte)
    }

    /// Reads what has arrived, if anything. `UnexpectedEof`: the debugger is gone.
    pub(super) fn receive(&mut self) -> io::Result<()> {
        let mut buffer = [0; 1024];
        match self.stream.read(&mut buffer) {
            Ok(0) => Err(ErrorKind::UnexpectedEof.into()),
            Ok(count) => {
                self.input.drain(..self.taken);
                self.taken = 0;
                self.input.extend_from_slice(&buffer[..count]);
                Ok(())
            }
            Err(e) if matches!(e.kind(), ErrorKind::WouldBlock | ErrorKind::Interrupted) => Ok(()),
            Err(e) => Err(e),
        }
    }

    fn send_all(&mut self) -> io::Result<()> {
        let mut rest = &self.output[..];
        while !rest.is_empty() {
            match rustix::net::send(&self.stream, rest, SendFlags::NOSIGNAL) {
                Ok(count) => rest = &rest[count..],
                Err(Errno::INTR) => {}
                Err(Errno::AGAIN) => self.wait_writable()?,
                Err(e) => return Err(e.into()),
            }
        }
        self.output.clear();
        Ok(())
    }

    fn wait_writable(&self) -> io::Result<()> {
        let limit = Timespec { tv_sec: WRITE_TIMEOUT, tv_nsec: 0 };
        let mut fds = [PollFd::new(&self.stream, PollFlags::OUT), PollFd::new(&*self.end, PollFlags::IN)];
        match poll(&mut fds, Some(&limit)) {
            Ok(0) => Err(ErrorKind::TimedOut.into()),
            Ok(_) if !fds[1].revents().is_empty() => Err(ErrorKind::Interrupted.into()),
            Ok(_) | Err(Errno::INTR) => Ok(()),
            Err(e) => Err(e.into()),
        }
    }
}

impl Connection for Client {
    type Error = io::Error;

    fn write(&mut self, byte: u8) -> io::Result<()> {
        self.output.push(byte);
        if self.output.len() < OUTPUT { Ok(()) } else { self.send_all() }
    }

    fn flush(&mut self) -> io::Result<()> {
        self.send_all()
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.stream.as_fd()
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use super::*;

    fn pair() -> (Client, UnixStream, Arc<EventFd>) {
        let (ours, theirs) = UnixStream::pair().unwrap();
        ours.set_nonblocking(true).unwrap();
        let end = Arc::new(EventFd::new().unwrap());
        (Client::new(ours, Arc::clone(&end)), theirs, end)
    }

    #[test]
    fn bytes_come_in_order_and_the_end_is_an_error() {
        let (mut client, mut debugger, _end) = pair();
        client.receive().unwrap();
        assert_eq!(client.next(), None);
        debugger.write_all(b"ab").unwrap();
        client.receive().unwrap();
        assert_eq!(client.next(), Some(b'a'));
        debugger.write_all(b"c").unwrap();
        drop(debugger);
        client.receive().unwrap();
        assert_eq!((client.next(), client.next(), client.next()), (Some(b'b'), Some(b'c'), None));
        assert_eq!(client.receive().unwrap_err().kind(), ErrorKind::UnexpectedEof);
    }

    #[test]
    fn debugger_that_does_not_read_does_not_delay_the_end() {
        let (mut client, _debugger, end) = pair();
        end.signal();
        // Until the socket's buffer is full.
        let failed = (0..1 << 24).find_map(|_| client.write(0).err()).unwrap();
        assert_eq!(failed.kind(), ErrorKind::Interrupted);
        assert!(client.output.len() <= OUTPUT);
    }
}
