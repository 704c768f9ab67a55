//! HTTP/1.0 and 1.1: parses request heads and writes responses, for servers; parses response heads,
//! for clients. Bytes in, bytes out: no sockets, no waiting, no threads.
//!
//! The API (`control`), the metadata service (`mmds`) and the client of the API (`vesta-client`)
//! share this crate:
//!
//! - [`HeadParser`] finds the request head at the start of a buffer that grows. Its caller owns the
//!   buffer and decides about the body.
//! - [`RequestHead::framing`] says how long the body is and whether the connection stays open.
//! - [`Response::put`] writes a response as clients of Firecracker know it.
//! - [`ResponseHead::parse`] finds the response head at the start of a client's buffer, and
//!   [`ResponseHead::body_len`] says how long the body is.
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
//! Chunked bodies: [`RequestHead::framing`] and [`ResponseHead::body_len`] refuse every
//! `Transfer-Encoding` but, in requests, `identity`.

#![forbid(unsafe_code)]

mod head;
mod response;
mod response_head;
mod version;

pub use head::{Framing, HeadError, HeadParser, NO_HEADER, RequestHead, decimal};
pub use response::Response;
pub use response_head::{ResponseError, ResponseHead};
pub use version::Version;
