//! Echoed bytes over TCP or vsock, for as long as a guest is busy: the guest compares what comes
//! back with what it sent.
//!
//! All pieces differ, so a missing, repeated or reordered piece is detected. After a lost
//! connection the guest connects again; it reports the number of losses.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::line::print_line;
use crate::pattern::mix;

/// Bytes of a piece. It fits into both sides' socket buffers, so neither blocks while it sends.
const PIECE: usize = 8 << 10;
/// The guest reports progress after so many pieces.
const SAY_EVERY: u64 = 8;
/// The pause before another attempt to connect.
const RETRY: Duration = Duration::from_millis(100);

/// Echoes all connections.
pub fn echo_all<S: Read + Write + Send + 'static>(incoming: impl Iterator<Item = Result<S>>) {
    for stream in incoming.flatten() {
        // The other side sees an error too, or has closed.
        thread::spawn(move || echo(stream));
    }
}

fn echo(mut stream: impl Read + Write) -> Result<()> {
    let mut piece = vec![0; PIECE];
    loop {
        match stream.read(&mut piece)? {
            0 => return Ok(()),
            count => stream.write_all(&piece[..count])?,
        }
    }
}

/// Sends and compares until `file` exists. Prints, with `what` for the transport:
///
/// - `EXCHANGED what N`: N pieces came back unchanged;
/// - `LOST what WHY`: the connection was reset;
/// - `LOSSES what N`, then `VERIFIED what`: the end, after N lost connections.
///
/// Returns an error for all failures but a reset of the connection.
pub fn until<S: Read + Write>(what: &str, file: &Path, connect: impl Fn() -> Result<S>) -> Result<()> {
    let (mut pieces, mut losses) = (0u64, 0);
    while !file.exists() {
        let Ok(stream) = connect() else {
            thread::sleep(RETRY);
            continue;
        };
        let going = || {
            if pieces.is_multiple_of(SAY_EVERY) && pieces > 0 {
                print_line(&format!("EXCHANGED {what} {pieces}"));
            }
            pieces += 1;
            (!file.exists()).then_some(pieces)
        };
        match exchange(stream, going) {
            Ok(()) => {}
            Err(error) if is_loss(error.kind()) => {
                losses += 1;
                print_line(&format!("LOST {what} {:?}", error.kind()));
            }
            Err(error) => return Err(error),
        }
    }
    print_line(&format!("LOSSES {what} {losses}"));
    print_line(&format!("VERIFIED {what}"));
    Ok(())
}

/// Sends pieces and compares the echoes, as long as `next` returns a number for a piece.
fn exchange(mut stream: impl Read + Write, mut next: impl FnMut() -> Option<u64>) -> Result<()> {
    let (mut sent, mut back) = (vec![0; PIECE], vec![0; PIECE]);
    while let Some(number) = next() {
        for (word, bytes) in (0..).zip(sent.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&mix(number << 32 | word).to_le_bytes());
        }
        stream.write_all(&sent)?;
        stream.read_exact(&mut back)?;
        if sent != back {
            return Err(Error::other(format!("piece {number}: its echo differs")));
        }
    }
    Ok(())
}

/// Whether this is an error of a connection that was reset.
fn is_loss(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::NotConnected | ErrorKind::BrokenPipe)
}

#[cfg(test)]
mod tests {
    use std::os::unix::net::UnixStream;

    use super::*;

    fn numbers(count: u64) -> impl FnMut() -> Option<u64> {
        let mut numbers = 0..count;
        move || numbers.next()
    }

    #[test]
    fn an_unchanged_echo_is_accepted() {
        let (near, far) = UnixStream::pair().unwrap();
        let echo = thread::spawn(move || echo(far));
        exchange(near, numbers(20)).unwrap();
        echo.join().unwrap().unwrap();
    }

    #[test]
    fn a_changed_byte_is_detected() {
        let (near, mut far) = UnixStream::pair().unwrap();
        let liar = thread::spawn(move || {
            let mut piece = vec![0; PIECE];
            far.read_exact(&mut piece).unwrap();
            piece[PIECE - 1] ^= 1;
            far.write_all(&piece).unwrap();
        });
        assert!(exchange(near, numbers(20)).unwrap_err().to_string().contains("piece 0"));
        liar.join().unwrap();
    }

    #[test]
    fn a_reset_connection_differs_from_a_closed_one() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        assert!(is_loss(exchange(near, numbers(1)).unwrap_err().kind()));
        let (near, mut far) = UnixStream::pair().unwrap();
        let closes = thread::spawn(move || far.read_exact(&mut [0; PIECE]).unwrap());
        assert!(!is_loss(exchange(near, numbers(1)).unwrap_err().kind()));
        closes.join().unwrap();
    }
}
