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
//! - Where the end of a bad request is uncertain, the decoder ignores all that follows, and the
//!   connection closes.
//!
//! # Not supported
//!
//! Chunked bodies, and methods other than GET, PUT, PATCH and DELETE. Both are refused, and the
//! connection closes.

mod request;
mod response;

pub use request::{Decoded, Decoder, MAX_HEADERS, Method, ProtocolError, Refusal, Request};
pub use response::{Response, TOO_MANY_CONNECTIONS, put_continue, put_event_stream_head};
pub use vesta_http::Version;
