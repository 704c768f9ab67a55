//! Checked TCP transfers: both ends of the network tests, on the host and in guests.
//!
//! A client connects and sends a request of 17 bytes: a letter, a seed and a length. Then it either
//! sends so many bytes of the seed's sequence and reads one byte of result, or reads and checks
//! them itself. A server serves any number of clients at a time.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::net::{TcpListener, TcpStream, ToSocketAddrs};
use std::time::{Duration, Instant};

/// The longest silence on a connection.
const TIMEOUT: Duration = Duration::from_mins(1);
const UPLOAD: u8 = b'u';
const DOWNLOAD: u8 = b'd';
const GOOD: u8 = b'+';
const BAD: u8 = b'-';
const PIECE: usize = 64 << 10;

/// A sequence of bytes that never repeats within what tests send.
struct Sequence(u64);

impl Sequence {
    fn new(seed: u64) -> Self {
        Sequence(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn fill(&mut self, bytes: &mut [u8]) {
        for chunk in bytes.chunks_mut(8) {
            self.0 ^= self.0 << 13;
            self.0 ^= self.0 >> 7;
            self.0 ^= self.0 << 17;
            chunk.copy_from_slice(&self.0.to_le_bytes()[..chunk.len()]);
        }
    }
}

/// Sends `len` bytes. Returns the time until the other side has checked them.
pub fn upload(to: impl ToSocketAddrs, seed: u64, len: u64) -> Result<Duration> {
    let mut stream = connect(to)?;
    let begun = Instant::now();
    request(&mut stream, UPLOAD, seed, len)?;
    send(&mut stream, seed, len)?;
    let mut verdict = [0];
    stream.read_exact(&mut verdict)?;
    if verdict[0] == GOOD { Ok(begun.elapsed()) } else { Err(wrong("the other side got other bytes")) }
}

/// Requests `len` bytes and checks them. Returns the time that took.
pub fn download(from: impl ToSocketAddrs, seed: u64, len: u64) -> Result<Duration> {
    let mut stream = connect(from)?;
    let begun = Instant::now();
    request(&mut stream, DOWNLOAD, seed, len)?;
    check(&mut stream, seed, len)?;
    Ok(begun.elapsed())
}

/// Serves clients without end, each on a thread of its own.
pub fn serve(listener: &TcpListener) {
    for stream in listener.incoming().flatten() {
        std::thread::spawn(move || {
            // The client sees the error too, or has closed.
            let _ = answer(stream);
        });
    }
}

fn answer(mut stream: TcpStream) -> Result<()> {
    set_timeouts(&stream)?;
    let mut request = [0; 17];
    stream.read_exact(&mut request)?;
    let number =
        |at: usize| u64::from_le_bytes(request[at..at + 8].try_into().expect("eight bytes are eight bytes"));
    let (seed, len) = (number(1), number(9));
    match request[0] {
        UPLOAD => {
            let verdict = if check(&mut stream, seed, len).is_ok() { GOOD } else { BAD };
            stream.write_all(&[verdict])
        }
        DOWNLOAD => send(&mut stream, seed, len),
        _ => Err(wrong("no such request")),
    }
}

fn connect(to: impl ToSocketAddrs) -> Result<TcpStream> {
    let address = to.to_socket_addrs()?.next().ok_or(ErrorKind::AddrNotAvailable)?;
    let stream = TcpStream::connect_timeout(&address, TIMEOUT)?;
    set_timeouts(&stream)?;
    Ok(stream)
}

fn set_timeouts(stream: &TcpStream) -> Result<()> {
    stream.set_read_timeout(Some(TIMEOUT))?;
    stream.set_write_timeout(Some(TIMEOUT))
}

fn request(stream: &mut TcpStream, what: u8, seed: u64, len: u64) -> Result<()> {
    let request = [&[what][..], &seed.to_le_bytes(), &len.to_le_bytes()].concat();
    stream.write_all(&request)
}

fn send(stream: &mut TcpStream, seed: u64, len: u64) -> Result<()> {
    let mut sequence = Sequence::new(seed);
    let mut piece = vec![0; PIECE];
    let mut left = len;
    while left > 0 {
        let now = left.min(PIECE as u64) as usize;
        sequence.fill(&mut piece[..now]);
        stream.write_all(&piece[..now])?;
        left -= now as u64;
    }
    Ok(())
}

fn check(stream: &mut TcpStream, seed: u64, len: u64) -> Result<()> {
    let mut sequence = Sequence::new(seed);
    let (mut piece, mut want) = (vec![0; PIECE], vec![0; PIECE]);
    let mut left = len;
    while left > 0 {
        let now = left.min(PIECE as u64) as usize;
        stream.read_exact(&mut piece[..now])?;
        sequence.fill(&mut want[..now]);
        if piece[..now] != want[..now] {
            return Err(wrong("these are not the bytes that were sent"));
        }
        left -= now as u64;
    }
    Ok(())
}

fn wrong(what: &str) -> Error {
    Error::new(ErrorKind::InvalidData, what)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn transfers_in_both_directions_are_accepted() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || serve(&listener));
        for len in [0, 1, 7, 100_000] {
            upload(address, 5, len).unwrap();
            download(address, 6, len).unwrap();
        }
    }

    #[test]
    fn a_changed_byte_is_detected() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        std::thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            stream.read_exact(&mut [0; 17]).unwrap();
            send(&mut stream, 7, 1000).unwrap();
        });
        assert_eq!(download(address, 6, 1000).unwrap_err().kind(), ErrorKind::InvalidData);
    }
}
