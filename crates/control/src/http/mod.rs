//! The HTTP of the API: bytes become requests, responses become bytes. No sockets, no waiting.
//!
//! A [`Decoder`] takes bytes in pieces of any size and returns whole requests. A [`Response`]
//! becomes bytes. What clients of Firecracker can observe is the same: the status line without a
//! reason phrase, the headers and their order, and the two forms of an error body:
//! `{"fault_message": ..}` from the API, `{ "error": .. }` from the protocol below it.
//!
//! # Invariants
//!
//! - How a stream is cut into pieces never changes which requests come out of it.
//! - A decoder holds at most one head and one body, both within its limits, and the rest of the
//!   piece that came with their last byte.
//! - A refused request is skipped to its end, and the next one is read. Only where its end is
//!   uncertain, the decoder ignores all that follows, and the connection closes: after a
//!   `Content-Length` that is no number or contradicts another, a transfer encoding other than
//!   chunks, and a refusal that came in place of `100 Continue`.
//! - Connections stay open as long as clients want, also those of HTTP/1.0 and with `Connection:
//!   close`: Firecracker's do, and clients send another request on them.
//!
//! # Not supported
//!
//! Chunked bodies, and methods other than GET, PUT, PATCH and DELETE. Both are refused.

mod decoder;
mod request;
mod response;
mod skip;

pub use decoder::{Decoded, Decoder, MAX_HEADERS};
pub use request::{Method, ProtocolError, Refusal, Request};
pub use response::{Response, TOO_MANY_CONNECTIONS, put_continue, put_event_stream_head};
