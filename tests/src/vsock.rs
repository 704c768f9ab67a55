//! The protocol between programs on the host and `guest-vsock` in the guest.

use std::io::{self, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};

/// The ports that `guest-vsock serve` serves.
pub mod port {
    /// Echoes bytes.
    pub const ECHO: u32 = 1;
    /// Reads to the end, then sends the length (64 bits, little-endian).
    pub const SINK: u32 = 2;
    /// Reads a length (64 bits, little-endian), then sends so many bytes.
    pub const SOURCE: u32 = 3;
    /// Reads a number and a length (32 bits each), then transfers in both directions at once.
    pub const DUPLEX: u32 = 4;
    /// Reads to the end, then sends an answer.
    pub const ANSWER: u32 = 5;
    /// Reads nothing.
    pub const LAZY: u32 = 6;
    /// Echoes messages.
    pub const MESSAGES: u32 = 7;
    /// Reads a length (64 bits, little-endian) and so many bytes, then sends that length back: for
    /// devices without half-closed connections.
    pub const COUNTED: u32 = 8;
    /// Reads no message before the host listens at [`LATE_GATE`], then answers with their number
    /// (32 bits, little-endian).
    pub const LATE: u32 = 9;
    /// See [`LATE`].
    pub const LATE_GATE: u32 = 96;
    /// Nothing listens here.
    pub const UNUSED: u32 = 99;
}

/// The direction of bytes that the guest sends.
pub const FROM_GUEST: u64 = 1;
/// The direction of bytes that the host sends.
pub const FROM_HOST: u64 = 2;

const PIECE: usize = 16 << 10;

/// The bytes from `at` on of stream `index` in one direction. They are random enough to detect
/// missing and misplaced bytes.
fn fill(piece: &mut [u8], index: u32, way: u64, at: u64) {
    for (word, chunk) in (at / 8..).zip(piece.chunks_mut(8)) {
        let mut mixed = word ^ (u64::from(index) << 40) ^ (way << 60);
        mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        chunk.copy_from_slice(&(mixed ^ (mixed >> 31)).to_le_bytes()[..chunk.len()]);
    }
}

/// Sends the bytes of stream `index` in one direction.
pub fn transmit(mut to: impl Write, index: u32, way: u64, bytes: u32) -> io::Result<()> {
    let mut piece = vec![0; PIECE];
    for at in (0..bytes as usize).step_by(PIECE) {
        let piece = &mut piece[..PIECE.min(bytes as usize - at)];
        fill(piece, index, way, at as u64);
        to.write_all(piece)?;
    }
    Ok(())
}

/// Reads to the end, and compares with the bytes of stream `index` in one direction.
pub fn receive(mut from: impl Read, index: u32, way: u64, bytes: u32) -> io::Result<()> {
    let (mut got, mut wanted) = (vec![0; PIECE], vec![0; PIECE]);
    for at in (0..bytes as usize).step_by(PIECE) {
        let len = PIECE.min(bytes as usize - at);
        from.read_exact(&mut got[..len])?;
        fill(&mut wanted[..len], index, way, at as u64);
        if got[..len] != wanted[..len] {
            return Err(io::Error::other(format!("stream {index} is wrong after {at} bytes")));
        }
    }
    match from.read(&mut got)? {
        0 => Ok(()),
        more => Err(io::Error::other(format!("stream {index} has {more} bytes too many"))),
    }
}

/// Longest wait for anything on a connection.
const TIMEOUT: Duration = Duration::from_mins(1);

/// Connects to a port of the guest whose vsock device has its socket at `path`.
pub fn connect(path: &Path, port: u32) -> Result<UnixStream> {
    try_connect(path, port)?.with_context(|| format!("the guest refuses port {port}"))
}

/// As [`connect`]; `None` if the guest refuses the connection.
pub fn try_connect(path: &Path, port: u32) -> Result<Option<UnixStream>> {
    try_connect_within(path, port, TIMEOUT)
}

/// As [`try_connect`], with this time limit for each read and write.
pub fn try_connect_within(path: &Path, port: u32, limit: Duration) -> Result<Option<UnixStream>> {
    let mut stream = UnixStream::connect(path).with_context(|| path.display().to_string())?;
    stream.set_read_timeout(Some(limit))?;
    stream.set_write_timeout(Some(limit))?;
    stream.write_all(format!("CONNECT {port}\n").as_bytes())?;
    let mut line = Vec::new();
    let mut byte = [0];
    while stream.read(&mut byte)? > 0 {
        if byte == *b"\n" {
            let line = String::from_utf8(line)?;
            let Some(Ok(_)) = line.strip_prefix("OK ").map(str::parse::<u32>) else {
                bail!("the device answered {line:?}")
            };
            return Ok(Some(stream));
        }
        line.push(byte[0]);
    }
    if line.is_empty() { Ok(None) } else { bail!("the device answered {line:?} and closed") }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sent_bytes_are_accepted_and_others_refused() {
        for bytes in [0, 1, 7, 8, 100_003] {
            let mut sent = Vec::new();
            transmit(&mut sent, 3, FROM_HOST, bytes).unwrap();
            assert_eq!(sent.len(), bytes as usize);
            receive(sent.as_slice(), 3, FROM_HOST, bytes).unwrap();
            if bytes > 8 {
                assert!(receive(sent.as_slice(), 4, FROM_HOST, bytes).is_err());
                assert!(receive(sent.as_slice(), 3, FROM_GUEST, bytes).is_err());
                sent.swap(50_000, 50_001);
                assert!(receive(sent.as_slice(), 3, FROM_HOST, bytes).is_err());
            }
        }
    }
}
