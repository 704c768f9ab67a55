//! Bytes that go to and fro for as long as a guest is busy, over TCP or vsock: what the guest sends comes back, and it compares.
//!
//! Every piece that it sends is another one, so none can be missing, come twice or stand in another's place. A connection that is lost
//! is followed by a new one; the guest says how many were.

use std::io::{Error, ErrorKind, Read, Result, Write};
use std::path::Path;
use std::thread;
use std::time::Duration;

use crate::pattern::mix;

/// Bytes of a piece. Both sides' socket buffers hold it: neither waits for the other while it sends.
const PIECE: usize = 8 << 10;
/// The guest says that it goes on after so many pieces.
const SAY_EVERY: u64 = 8;
/// Pause before a new try to connect: nobody tells when a server comes.
const RETRY: Duration = Duration::from_millis(100);

/// Sends back what comes, on each connection, for ever.
pub fn echo_all<S: Read + Write + Send + 'static>(incoming: impl Iterator<Item = Result<S>>) {
    for stream in incoming.flatten() {
        // The other side hears of an error, or is gone.
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

/// Sends and compares until there is such a file. Says, with `what` for the way:
///
/// - `EXCHANGED what N`: so many pieces came back as they were sent;
/// - `LOST what WHY`: the connection was reset;
/// - `LOSSES what N`, then `VERIFIED what`: it is over, and so many connections were lost.
///
/// An error is one that no reset of a connection explains.
pub fn until<S: Read + Write>(what: &str, file: &Path, connect: impl Fn() -> Result<S>) -> Result<()> {
    let (mut pieces, mut losses) = (0u64, 0);
    while !file.exists() {
        let Ok(stream) = connect() else {
            thread::sleep(RETRY);
            continue;
        };
        let going = || {
            if pieces.is_multiple_of(SAY_EVERY) && pieces > 0 {
                say(&format!("EXCHANGED {what} {pieces}"));
            }
            pieces += 1;
            (!file.exists()).then_some(pieces)
        };
        match exchange(stream, going) {
            Ok(()) => {}
            Err(error) if is_loss(error.kind()) => {
                losses += 1;
                say(&format!("LOST {what} {:?}", error.kind()));
            }
            Err(error) => return Err(error),
        }
    }
    say(&format!("LOSSES {what} {losses}"));
    say(&format!("VERIFIED {what}"));
    Ok(())
}

/// Sends pieces and compares what comes back, for as long as `next` has a number for one.
fn exchange(mut stream: impl Read + Write, mut next: impl FnMut() -> Option<u64>) -> Result<()> {
    let (mut sent, mut back) = (vec![0; PIECE], vec![0; PIECE]);
    while let Some(number) = next() {
        for (word, bytes) in (0..).zip(sent.chunks_exact_mut(8)) {
            bytes.copy_from_slice(&mix(number << 32 | word).to_le_bytes());
        }
        stream.write_all(&sent)?;
        stream.read_exact(&mut back)?;
        if sent != back {
            return Err(Error::other(format!("piece {number} came back as another")));
        }
    }
    Ok(())
}

/// Whether it is what programs see of a connection that was reset, whatever they were doing.
fn is_loss(kind: ErrorKind) -> bool {
    matches!(kind, ErrorKind::ConnectionReset | ErrorKind::NotConnected | ErrorKind::BrokenPipe)
}

/// Says one line, in one write, so that the lines of several processes do not mix.
fn say(line: &str) {
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
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
    fn what_comes_back_as_it_was_sent_is_found_good() {
        let (near, far) = UnixStream::pair().unwrap();
        let echo = thread::spawn(move || echo(far));
        exchange(near, numbers(20)).unwrap();
        echo.join().unwrap().unwrap();
    }

    #[test]
    fn another_byte_is_noticed() {
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
    fn a_lost_connection_is_told_from_a_closed_one() {
        let (near, far) = UnixStream::pair().unwrap();
        drop(far);
        assert!(is_loss(exchange(near, numbers(1)).unwrap_err().kind()));
        let (near, mut far) = UnixStream::pair().unwrap();
        let closes = thread::spawn(move || far.read_exact(&mut [0; PIECE]).unwrap());
        assert!(!is_loss(exchange(near, numbers(1)).unwrap_err().kind()));
        closes.join().unwrap();
    }
}
