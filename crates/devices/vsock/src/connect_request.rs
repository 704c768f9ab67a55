//! The request that a host client sends first: `CONNECT port\n`.
//!
//! The line is peeked at in the socket's buffer, and read once it is complete. So the data after it
//! stays in the socket for the connection to read. On a `SOCK_SEQPACKET` socket it is the first
//! message, and its line end is optional.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use crate::packet::SocketKind;

/// Longest line in bytes, including its line end.
pub(crate) const MAX_LEN: usize = 32;

/// A host client's request, as far as it has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum ConnectRequest {
    /// A complete request for this port of the guest.
    Port(u32),
    /// The beginning of a request, or nothing yet.
    Partial,
    /// No valid request can follow, or the client has closed the socket.
    Invalid,
}

/// Reads a request from `socket` without waiting.
pub(crate) fn read(socket: impl AsFd, kind: SocketKind) -> ConnectRequest {
    let socket = socket.as_fd();
    // One byte more than a message may have, to find out if it is longer.
    let mut bytes = [0; MAX_LEN + 1];
    let len = match recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => return ConnectRequest::Invalid,
        Ok((len, _)) => len,
        Err(Errno::AGAIN) => return ConnectRequest::Partial,
        Err(_) => return ConnectRequest::Invalid,
    };
    let line = match (bytes[..len.min(MAX_LEN)].iter().position(|&byte| byte == b'\n'), kind) {
        (Some(end), SocketKind::Stream) => end + 1,
        (Some(_) | None, SocketKind::SeqPacket) if len <= MAX_LEN => len,
        (None, SocketKind::Stream) if len < MAX_LEN => return ConnectRequest::Partial,
        _ => return ConnectRequest::Invalid,
    };
    let Some(port) = parse(&bytes[..line]) else { return ConnectRequest::Invalid };
    match recv(socket, &mut bytes[..line], RecvFlags::DONTWAIT) {
        Ok((taken, _)) if taken == line => ConnectRequest::Port(port),
        _ => ConnectRequest::Invalid,
    }
}

/// Parses a line: `connect` in any case, then a decimal port.
fn parse(line: &[u8]) -> Option<u32> {
    let mut words = std::str::from_utf8(line).ok()?.split_ascii_whitespace();
    let (word, port) = (words.next()?, words.next()?);
    if !word.eq_ignore_ascii_case("connect") || words.next().is_some() {
        return None;
    }
    port.parse().ok()
}

#[cfg(test)]
mod tests {
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;

    use super::*;

    fn send(text: &[u8]) -> (ConnectRequest, UnixStream, UnixStream) {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(text).unwrap();
        (read(&server, SocketKind::Stream), client, server)
    }

    #[test]
    fn data_after_the_line_stays_in_the_socket() {
        let (request, client, mut server) = send(b"CONNECT 1024\nhello\n");
        assert_eq!(request, ConnectRequest::Port(1024));
        drop(client);
        let mut rest = String::new();
        server.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello\n");
    }

    #[test]
    fn any_case_and_cr_lf_are_accepted() {
        assert_eq!(send(b"connect 4294967295\n").0, ConnectRequest::Port(u32::MAX));
        assert_eq!(send(b"Connect 0\r\n").0, ConnectRequest::Port(0));
    }

    #[test]
    fn a_line_in_pieces_is_partial_until_complete() {
        let (request, mut client, server) = send(b"CONN");
        assert_eq!(request, ConnectRequest::Partial);
        client.write_all(b"ECT 7").unwrap();
        assert_eq!(read(&server, SocketKind::Stream), ConnectRequest::Partial);
        client.write_all(b"\n").unwrap();
        assert_eq!(read(&server, SocketKind::Stream), ConnectRequest::Port(7));
    }

    #[test]
    fn invalid_requests_are_detected_at_once() {
        for text in [
            &b"GET / HTTP/1.1\r\n"[..],
            b"CONNECT\n",
            b"CONNECT x\n",
            b"CONNECT 4294967296\n",
            b"CONNECT -1\n",
            b"CONNECT 1 2\n",
            b"\n",
            b"CONNECT \xff\n",
            b"CONNECT                         1\n",
            &[b'x'; 40],
        ] {
            assert_eq!(send(text).0, ConnectRequest::Invalid, "{}", String::from_utf8_lossy(text));
        }
        let (_, client, server) = send(b"CONN");
        drop(client);
        let mut rest = [0; 4];
        (&server).read_exact(&mut rest).unwrap();
        assert_eq!(read(&server, SocketKind::Stream), ConnectRequest::Invalid);
    }

    #[test]
    fn the_longest_line_is_accepted_and_one_byte_more_is_not() {
        let longest = format!("CONNECT 1{}\n", " ".repeat(MAX_LEN - 10));
        assert_eq!((longest.len(), send(longest.as_bytes()).0), (MAX_LEN, ConnectRequest::Port(1)));
        let longer = format!("CONNECT 1{}\n", " ".repeat(MAX_LEN - 9));
        assert_eq!(send(longer.as_bytes()).0, ConnectRequest::Invalid);
    }
}
