//! One adapter for each kind of device: its crate as the device table sees it.

mod block;
mod entropy;
mod mmds;
mod net;
mod vsock;

pub(super) use block::BlockAdapter;
pub(super) use entropy::EntropyAdapter;
pub(super) use net::NetAdapter;
pub(super) use vsock::VsockAdapter;
pub use vsock::VsockSetup;
