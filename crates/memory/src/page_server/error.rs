//! Errors of memory that comes from a page server.

use std::io;
use std::path::PathBuf;
use std::time::Duration;

use crate::ram::MapError;

/// Why memory cannot come from a page server.
#[derive(Debug, thiserror::Error)]
pub enum PageServerError {
    /// The kernel refused the mapping.
    #[error(transparent)]
    Map(#[from] MapError),
    /// The kernel gives no userfaultfd: it is not permitted, or not built in.
    #[error(
        "page server: cannot create a userfaultfd: {0}; it needs read access to /dev/userfaultfd, or CAP_SYS_PTRACE"
    )]
    Userfault(io::Error),
    /// A region cannot be registered with the userfaultfd.
    #[error("page server: cannot register {size} bytes of guest memory with userfaultfd: {source}")]
    Register {
        /// Length of the region in bytes.
        size: u64,
        /// The kernel's reason.
        source: io::Error,
    },
    /// No process listens, or none accepts within five seconds.
    #[error("page server {}: cannot connect: {source}", path.display())]
    Connect {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The connection broke before the server received the regions.
    #[error("page server {}: cannot send the memory regions: {source}", path.display())]
    Send {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
    /// The server did not send pages in time.
    #[error(transparent)]
    Fetch(#[from] FetchError),
    /// A descriptor of the server cannot be polled.
    #[error("page server {}: cannot watch it: {source}", path.display())]
    Watch {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}

/// Why pages did not arrive.
#[derive(Debug, thiserror::Error)]
pub enum FetchError {
    /// The server lives but did not answer a page fault in time.
    #[error("page server {}: it did not answer a page fault within {} ms", path.display(), waited.as_millis())]
    Unanswered {
        /// The socket.
        path: PathBuf,
        /// The time limit.
        waited: Duration,
    },
    /// The server is an orphan, and no process reads page faults.
    #[error("page server {}: it is gone", path.display())]
    Gone {
        /// The socket.
        path: PathBuf,
    },
    /// The caller cancelled ([`Observer::cancelled`](crate::image::Observer::cancelled)).
    #[error("page server {}: waiting for it was cancelled", path.display())]
    Cancelled {
        /// The socket.
        path: PathBuf,
    },
    /// The thread that waits for pages cannot be started.
    #[error("page server {}: cannot start a thread: {source}", path.display())]
    Thread {
        /// The socket.
        path: PathBuf,
        /// The kernel's reason.
        source: io::Error,
    },
}
