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

pub use request::{Decoded, Decoder, MAX_HEADERS, ProtocolError, Refusal, Request};
pub use response::{Response, TOO_MANY_CONNECTIONS, put_continue};
pub use vesta_http::Version;

/// Method of a request. The doc of each says what the API uses it for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Return a resource.
    Get,
    /// Create or replace a resource, or start an action.
    Put,
    /// Change parts of a resource.
    Patch,
    /// Remove a resource.
    Delete,
}

impl Method {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Method::Get => "GET",
            Method::Put => "PUT",
            Method::Patch => "PATCH",
            Method::Delete => "DELETE",
        }
    }

    fn from_name(name: &str) -> Option<Method> {
        [Method::Get, Method::Put, Method::Patch, Method::Delete]
            .into_iter()
            .find(|method| method.name() == name)
    }
}
