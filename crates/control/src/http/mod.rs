//! HTTP/1.0 and 1.1 on the server's side, as bytes in and bytes out: no sockets, no waiting.
//!
//! A [`Decoder`] takes bytes in pieces of any size and gives whole requests; a [`Response`] becomes bytes. What clients
//! of Firecracker can observe is kept: the status line without a reason phrase, the headers and their order, and the
//! two shapes of an error body: `{"fault_message": ..}` from the API, `{ "error": .. }` from the protocol below it.
//!
//! # Invariants
//!
//! - How the bytes were cut into pieces never changes which requests come out.
//! - A decoder holds at most one head, one body (both bounded by its limits) and what came with their last piece.
//! - Where the end of a bad request is not certain, nothing that follows is taken for a request: the connection closes.
//!
//! # Not supported
//!
//! Chunked bodies and methods other than GET, PUT, PATCH and DELETE: both are refused, and the connection closes.

mod request;
mod response;

pub use request::{Decoded, Decoder, MAX_HEADERS, ProtocolError, Refusal, Request};
pub use response::{Response, TOO_MANY_CONNECTIONS, put_continue};

/// What a request wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Method {
    /// Tell.
    Get,
    /// Set.
    Put,
    /// Change.
    Patch,
    /// Remove.
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

/// The protocol's version; an answer has its request's.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0: one request per connection unless the client asks to keep it.
    Http10,
    /// HTTP/1.1: the connection stays unless the client asks to close it.
    Http11,
}

impl Version {
    fn name(self) -> &'static str {
        match self {
            Version::Http10 => "HTTP/1.0",
            Version::Http11 => "HTTP/1.1",
        }
    }
}
