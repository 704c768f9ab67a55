//! Why a machine has no debugger, and why a debugging session ends early.

use std::path::PathBuf;

use socket_file::BindError;

use crate::kvm::KvmError;
use crate::vcpu::VcpuThreadDied;

/// An error that ends the session of a debugger. The guest then runs without one.
#[derive(Debug, thiserror::Error)]
pub(super) enum DebugError {
    /// KVM refuses something.
    #[error(transparent)]
    Kvm(#[from] KvmError),
    /// The machine is ending, or a bug.
    #[error(transparent)]
    ThreadDied(#[from] VcpuThreadDied),
    /// A bug in this monitor.
    #[error("a vCPU sent a report that was not asked for")]
    OutOfOrder,
}

/// Why a machine has no debugger.
#[derive(Debug, thiserror::Error)]
pub enum DebuggerError {
    /// The socket cannot be created.
    #[error(transparent)]
    Socket(#[from] BindError),
    /// The host is out of descriptors or threads.
    #[error("gdb_socket_path: cannot start the debugger's thread: {0}")]
    Host(#[from] std::io::Error),
    /// A bug in this monitor.
    #[error(transparent)]
    ThreadDied(#[from] VcpuThreadDied),
}

/// A debugger is attached to the guest.
#[derive(Debug, thiserror::Error)]
#[error("gdb socket {}: a debugger is attached; detach it before a snapshot or a fork", path.display())]
pub struct DebuggerAttached {
    /// The socket.
    pub path: PathBuf,
}
