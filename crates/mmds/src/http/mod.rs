//! HTTP/1.x on the server's side, as much of it as a metadata service needs: bytes in, bytes out.
//!
//! A [`Session`] is one connection. It reads one request at a time, has it answered, and takes no further byte until the
//! answer has been fetched; so a guest that sends and does not read is met by TCP's window, not by memory here.
//!
//! # Bounds
//!
//! A head is at most [`MAX_HEAD`] bytes and [`MAX_HEADERS`] lines. Bodies are skipped, never kept: nothing that a guest may
//! ask for has one. What is not HTTP, or has no certain end, is answered with an error and the connection closes.

mod head;
mod response;
mod session;

pub(crate) use head::{Head, Method, TtlHeader, decimal};
pub(crate) use response::Response;
pub(crate) use session::Session;

/// Longest request line and headers together, in bytes.
pub(crate) const MAX_HEAD: usize = 4096;
/// Most header lines of a request.
pub(crate) const MAX_HEADERS: usize = 64;
/// Longest body that is skipped, in bytes.
pub(crate) const MAX_BODY: u64 = 64 << 10;
