//! Why a debugging session ends early.

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
