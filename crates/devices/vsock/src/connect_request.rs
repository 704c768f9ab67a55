//! What a host client says first: `CONNECT port\n`.
//!
//! The line is looked at in the socket's own buffer and taken out when all of it is there, so that what follows it stays for the
//! connection to read. On a socket of messages it is the first message.

use std::os::fd::AsFd;

use rustix::io::Errno;
use rustix::net::{RecvFlags, recv};

use super::packet::SocketKind;

/// Longest line in bytes, its end included.
pub(super) const MAX_LEN: usize = 32;

/// What there is of a greeting.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum ConnectRequest {
    /// All of it: the client wants this port of the guest.
    Port(u32),
    /// Not all of it yet.
    Partial,
    /// It is none, or its client is gone.
    Bad,
}

/// Reads a greeting from `socket` without waiting.
pub(super) fn read(socket: impl AsFd, kind: SocketKind) -> ConnectRequest {
    let socket = socket.as_fd();
    // One byte more than a message may have.
    let mut bytes = [0; MAX_LEN + 1];
    let len = match recv(socket, &mut bytes[..], RecvFlags::PEEK | RecvFlags::DONTWAIT) {
        Ok((0, _)) => return ConnectRequest::Bad,
        Ok((len, _)) => len,
        Err(Errno::AGAIN) => return ConnectRequest::Partial,
        Err(_) => return ConnectRequest::Bad,
    };
    let line = match (bytes[..len.min(MAX_LEN)].iter().position(|&byte| byte == b'\n'), kind) {
        (Some(end), SocketKind::Stream) => end + 1,
        (Some(_) | None, SocketKind::SeqPacket) if len <= MAX_LEN => len,
        (None, SocketKind::Stream) if len < MAX_LEN => return ConnectRequest::Partial,
        _ => return ConnectRequest::Bad,
    };
    let Some(port) = parse(&bytes[..line]) else { return ConnectRequest::Bad };
    match recv(socket, &mut bytes[..line], RecvFlags::DONTWAIT) {
        Ok((taken, _)) if taken == line => ConnectRequest::Port(port),
        _ => ConnectRequest::Bad,
    }
}

/// The port in a line.
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

    fn read_connect_request(text: &[u8]) -> (ConnectRequest, UnixStream, UnixStream) {
        let (mut client, server) = UnixStream::pair().unwrap();
        client.write_all(text).unwrap();
        (read(&server, SocketKind::Stream), client, server)
    }

    #[test]
    fn a_port_is_read_and_what_follows_the_line_stays() {
        let (greeting, client, mut server) = read_connect_request(b"CONNECT 1024\nhello\n");
        assert_eq!(greeting, ConnectRequest::Port(1024));
        drop(client);
        let mut rest = String::new();
        server.read_to_string(&mut rest).unwrap();
        assert_eq!(rest, "hello\n");
    }

    #[test]
    fn the_word_may_be_in_any_case_and_the_line_end_in_cr_lf() {
        assert_eq!(read_connect_request(b"connect 4294967295\n").0, ConnectRequest::Port(u32::MAX));
        assert_eq!(read_connect_request(b"Connect 0\r\n").0, ConnectRequest::Port(0));
    }

    #[test]
    fn a_line_that_comes_in_pieces_is_waited_for() {
        let (greeting, mut client, server) = read_connect_request(b"CONN");
        assert_eq!(greeting, ConnectRequest::Partial);
        client.write_all(b"ECT 7").unwrap();
        assert_eq!(read(&server, SocketKind::Stream), ConnectRequest::Partial);
        client.write_all(b"\n").unwrap();
        assert_eq!(read(&server, SocketKind::Stream), ConnectRequest::Port(7));
    }

    #[test]
    fn what_is_no_greeting_is_told_at_once() {
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
            assert_eq!(read_connect_request(text).0, ConnectRequest::Bad, "{}", String::from_utf8_lossy(text));
        }
        let (_, client, server) = read_connect_request(b"CONN");
        drop(client);
        let mut rest = [0; 4];
        (&server).read_exact(&mut rest).unwrap();
        assert_eq!(read(&server, SocketKind::Stream), ConnectRequest::Bad);
    }

    #[test]
    fn the_longest_line_is_taken_and_one_byte_more_is_not() {
        let longest = format!("CONNECT 1{}\n", " ".repeat(MAX_LEN - 10));
        assert_eq!((longest.len(), read_connect_request(longest.as_bytes()).0), (MAX_LEN, ConnectRequest::Port(1)));
        let longer = format!("CONNECT 1{}\n", " ".repeat(MAX_LEN - 9));
        assert_eq!(read_connect_request(longer.as_bytes()).0, ConnectRequest::Bad);
    }
}
