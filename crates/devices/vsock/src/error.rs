//! Why a host socket of the device cannot be created.

use std::io;
use std::path::PathBuf;

/// Longest path of a Unix socket in bytes: `sun_path` without the terminating NUL.
pub const MAX_PATH_LEN: usize = 107;

/// Why a socket of the device cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum BindError {
    /// The path is empty or too long for a socket address.
    #[error("vsock socket {}: path is {len} bytes long; must be 1 to {MAX_PATH_LEN}", path.display())]
    PathLength {
        /// The path given.
        path: PathBuf,
        /// Its length in bytes.
        len: usize,
    },
    /// A file exists at the path.
    #[error("vsock socket {}: path is in use: {existing}", path.display())]
    InUse {
        /// The path given.
        path: PathBuf,
        /// What exists there.
        existing: ExistingFile,
    },
    /// Any other error.
    #[error("vsock socket {}: cannot create: {source}", path.display())]
    Io {
        /// The path given.
        path: PathBuf,
        /// The error of the system call.
        source: io::Error,
    },
}

/// What exists at the path of a socket that is to be created.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ExistingFile {
    /// A socket on which a process listens, or that cannot be probed, for example for lack of
    /// permission.
    LiveSocket,
    /// A socket on which no process listens: its process has ended without removing it.
    StaleSocket,
    /// A file of another type.
    NotASocket,
}

impl std::fmt::Display for ExistingFile {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            ExistingFile::LiveSocket => "socket of another process",
            ExistingFile::StaleSocket => "stale socket on which no process listens; remove it",
            ExistingFile::NotASocket => "not a socket",
        })
    }
}
