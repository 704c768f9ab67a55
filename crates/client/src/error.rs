//! [`Error`]: why a request has no good answer.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use config::IdError;
use vesta_http::ResponseError;

/// Why a request has no good answer.
///
/// After [`Error::Refused`] nothing has changed in the microVM, unless the endpoint's documentation
/// says so. After every other error the request may or may not have been carried out, except where
/// the variant says that it was not sent.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The monitor refused the request.
    #[error("{request}: status {status}: {fault_message}")]
    Refused {
        /// Method and path.
        request: String,
        /// The HTTP status: 400, 413 for data over a limit, or 503 for a connection too many.
        status: u16,
        /// The monitor's reason: the field, its value and its bound.
        fault_message: String,
    },
    /// The socket cannot be connected to. The request was not sent.
    #[error("{}: cannot connect: {source}", socket.display())]
    Connect {
        /// The API socket.
        socket: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The time limit is over. The connection is closed, so that a late answer cannot be taken for
    /// that to another request; the monitor may still carry the request out.
    #[error("no answer within {limit:?}")]
    Timeout {
        /// The limit: see [`Timeouts`](crate::Timeouts).
        limit: Duration,
    },
    /// The monitor closed the connection without an answer, perhaps because it ended.
    #[error("the monitor closed the connection without an answer")]
    Closed {
        /// Whether any byte of the request may have reached the monitor.
        request_sent: bool,
    },
    /// Reading or writing the socket failed.
    #[error("cannot {action} the API socket: {source}")]
    Io {
        /// What failed: read, write or configure.
        action: &'static str,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The bytes on the socket are no response that can be read.
    #[error("invalid response: {0}")]
    Protocol(#[from] ProtocolError),
    /// The body of a response is not what this client expects, for example that of a newer monitor.
    #[error("{request}: unexpected answer: {source}")]
    Answer {
        /// Method and path.
        request: String,
        /// The field, and its line and column.
        source: serde_json::Error,
    },
    /// A request cannot be written as JSON: a path in it is not UTF-8. It was not sent.
    #[error("{request}: the request cannot be written as JSON: {source}")]
    Body {
        /// Method and path.
        request: String,
        /// Why not.
        source: serde_json::Error,
    },
    /// The id of a drive or network interface cannot be part of a path. The request was not sent.
    #[error(transparent)]
    Id(#[from] IdError),
}

/// Why bytes are no response that can be read.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum ProtocolError {
    /// The head of the response.
    #[error(transparent)]
    Head(#[from] ResponseError),
    /// The head is longer than any that the monitor sends.
    #[error("the head is longer than {limit} bytes")]
    HeadTooLong {
        /// Most bytes accepted.
        limit: usize,
    },
    /// The body is longer than any that the monitor sends.
    #[error("the body has {len} bytes; at most {limit}")]
    BodyTooLong {
        /// Length announced.
        len: u64,
        /// Most bytes accepted.
        limit: u64,
    },
    /// The body is not UTF-8.
    #[error("the body is not UTF-8")]
    NotUtf8,
    /// The connection ended within a response.
    #[error("the connection was closed within the response: {0}")]
    Truncated(String),
    /// There are bytes after the response.
    #[error("there is more after the response: {0}")]
    Excess(String),
}

impl Error {
    /// Whether the monitor is not there, or not yet: a new one may still create its socket.
    pub fn is_absent(&self) -> bool {
        use io::ErrorKind::{ConnectionRefused, NotFound};
        match self {
            Error::Connect { source, .. } => matches!(source.kind(), NotFound | ConnectionRefused),
            _ => false,
        }
    }

    /// The HTTP status with which the monitor refused the request.
    pub fn status(&self) -> Option<u16> {
        match self {
            Error::Refused { status, .. } => Some(*status),
            _ => None,
        }
    }

    /// The monitor's reason for refusing the request.
    pub fn fault_message(&self) -> Option<&str> {
        match self {
            Error::Refused { fault_message, .. } => Some(fault_message),
            _ => None,
        }
    }
}
