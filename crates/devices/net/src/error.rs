//! Errors in the creation of a network device.

use crate::backend::vhost::VhostError;

/// Why a network device cannot be created.
#[derive(Debug, thiserror::Error)]
pub enum NetError {
    /// The backend has another number of queue pairs than the configuration.
    #[error("network interface {id}: its backend has {has} queue pairs; {wanted} are configured")]
    Pairs {
        /// Id of the interface.
        id: String,
        /// Number of queue pairs in the configuration.
        wanted: u16,
        /// Number of queue pairs of the backend.
        has: usize,
    },
    /// The kernel's vhost-net cannot be claimed.
    #[error("network interface {id}: {source}")]
    VhostClaim {
        /// Id of the interface.
        id: String,
        /// The kernel's error.
        source: VhostError,
    },
    /// A function that needs to see each frame was configured, but the kernel moves the frames.
    #[error("network interface {id}: {what} cannot be combined with backend vhost")]
    Vhost {
        /// Id of the interface.
        id: String,
        /// The function that needs to see each frame.
        what: &'static str,
    },
}
