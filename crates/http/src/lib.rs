//! HTTP/1.0 and 1.1 for servers: parses request heads and writes responses. Bytes in, bytes out:
//! no sockets, no waiting, no threads.
//!
//! The API (`control`) and the metadata service (`mmds`) share this crate:
//!
//! - [`HeadParser`] finds the request head at the start of a buffer that grows. Its caller owns the
//!   buffer and decides about the body.
//! - [`RequestHead::framing`] says how long the body is and whether the connection stays open.
//! - [`Response::put`] writes a response as clients of Firecracker know it.
//!
//! # Invariants
//!
//! - How a stream is cut into pieces never changes which heads come out of it.
//! - A buffer is parsed once for each line that arrives, not once for each byte.
//! - Every [`HeadError`] leaves it uncertain where the next request starts. The caller closes the
//!   connection after the response.
//!
//! # Not supported
//!
//! Chunked bodies: [`RequestHead::framing`] refuses every `Transfer-Encoding`.

#![forbid(unsafe_code)]

mod head;
mod response;

pub use head::{Framing, HeadError, HeadParser, NO_HEADER, RequestHead, decimal};
pub use response::Response;

/// Version of the protocol. A response has the version of its request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Version {
    /// HTTP/1.0: one request per connection, unless the client sends `Connection: keep-alive`.
    Http10,
    /// HTTP/1.1: the connection stays open, unless the client sends `Connection: close`.
    Http11,
}

impl Version {
    /// Its name on the wire.
    pub fn name(self) -> &'static str {
        match self {
            Version::Http10 => "HTTP/1.0",
            Version::Http11 => "HTTP/1.1",
        }
    }
}
