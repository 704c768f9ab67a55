//! [`replay`]: turns the bytes of a connection into commands without a socket or threads, for
//! fuzzing.

use super::limits::Limits;
use super::routes::{RouteError, Routed, route};
use crate::http::{Decoded, Decoder, Refusal};

/// The outcome of one request.
#[derive(Debug)]
pub enum Replayed {
    /// A command for the main thread.
    Command(Routed),
    /// A request that the API does not know: a fault.
    Fault(RouteError),
    /// Bytes that are not HTTP: a protocol error.
    Refused(Refusal),
}

/// The outcomes of a connection on which `pieces` arrive one after the other.
pub fn replay<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, limits: &Limits) -> Vec<Replayed> {
    let mut decoder = Decoder::new(limits.max_head, limits.max_payload);
    let mut out = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            out.push(match decoder.next() {
                Decoded::NeedMore | Decoded::Lost => break,
                Decoded::Continue => continue,
                Decoded::Request(request) => match route(&request) {
                    Ok(routed) => Replayed::Command(routed),
                    Err(error) => Replayed::Fault(error),
                },
                Decoded::Refused(refusal) => Replayed::Refused(refusal),
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Command;

    #[test]
    fn connection_becomes_commands_and_errors_in_order() {
        let bytes = b"GET /version HTTP/1.1\r\n\r\nGET /nowhere HTTP/1.1\r\n\r\nnonsense\r\n";
        let out = replay([&bytes[..]], &Limits::default());
        let [Replayed::Command(routed), Replayed::Fault(_), Replayed::Refused(_)] = out.as_slice() else {
            panic!("{out:?}")
        };
        assert_eq!(routed.command, Command::GetVersion);
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(pieces in prop::collection::vec(prop::collection::vec(any::<u8>(), 0..64), 0..16)) {
            replay(pieces.iter().map(Vec::as_slice), &Limits::default());
        }
    }
}
