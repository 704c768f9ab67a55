//! The HTTP/1.x of the metadata service. Bytes in, bytes out.
//!
//! A [`Session`] is one connection. It reads one request at a time and accepts no further byte
//! until its response has been sent. A guest that sends and does not read fills the window of its
//! TCP connection, not memory here.
//!
//! # Bounds
//!
//! A request head is at most [`MAX_HEAD`](limits::MAX_HEAD) bytes and
//! [`MAX_HEADERS`](limits::MAX_HEADERS) headers. No request to this service needs a body: one that
//! has one is invalid, and the bodies of methods that are not supported are skipped. A request that
//! is malformed, or whose end is uncertain, gets an error, and the connection closes.

mod limits;
mod request;
pub(crate) mod response;
mod session;

#[cfg(any(test, feature = "testing"))]
pub(crate) use limits::MAX_HEAD;
pub(crate) use request::{Method, Request, TtlHeader};
pub(crate) use session::Session;
