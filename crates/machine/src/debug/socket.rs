//! The socket at which debuggers connect.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};

use socket_file::{SocketFile, SocketType};

use super::error::DebuggerError;

/// A socket that listens. Its file is removed with it.
#[derive(Debug)]
pub(crate) struct DebugSocket {
    /// Its path.
    pub(super) path: PathBuf,
    /// Non-blocking.
    pub(super) listener: OwnedFd,
    _file: SocketFile,
}

impl DebugSocket {
    /// Creates the socket.
    pub(crate) fn bind(path: &Path) -> Result<Self, DebuggerError> {
        let (listener, file) = socket_file::bind("gdb socket", path, SocketType::STREAM)?;
        Ok(DebugSocket { path: path.to_owned(), listener, _file: file })
    }
}
