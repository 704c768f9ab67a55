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
//! - A [`HeadError`] leaves the whole request in the buffer. Its caller finds the next request, or
//!   closes the connection after the response.
//!
//! # Not supported
//!
//! Chunked bodies: [`RequestHead::framing`] refuses every `Transfer-Encoding` but `identity`.

#![forbid(unsafe_code)]

mod head;
mod response;
mod version;

pub use head::{Framing, HeadError, HeadParser, NO_HEADER, RequestHead, decimal};
pub use response::Response;
pub use version::Version;
