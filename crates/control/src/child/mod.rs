//! What a fork passes to its children: [`ForkPlan`], [`ChildSpec`] and [`ParentState`].

mod report;

use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::path::PathBuf;

use config::{FullVmConfig, Logger, Metrics};
use machine::MachineState;
use memory::GuestRam;
use net::NetBackend;

use crate::api::ApiServer;
use crate::metadata::Metadata;
use crate::overlays::plan::OverlayPlan;
use crate::{Identity, Platform};
pub use report::Reporter;
pub(crate) use report::{Report, Reports};

/// Everything that the children of one fork need.
///
/// A child takes the last entry of `children`, and leaves the others to the next child.
#[derive(Debug)]
pub struct ForkPlan {
    /// The children that are not forked yet.
    pub children: Vec<ChildSpec>,
    /// The state with which all children start.
    pub parent: ParentState,
}

/// The guest as it was at the fork.
#[derive(Debug)]
pub struct ParentState {
    pub(crate) state: MachineState,
    pub(crate) ram: GuestRam,
}

impl ParentState {
    /// The descriptors that a child keeps for it.
    pub fn descriptors(&self) -> Vec<RawFd> {
        self.ram.descriptors()
    }
}

/// One child of a fork.
#[derive(Debug)]
pub struct ChildSpec {
    /// Its identity.
    pub identity: Identity,
    /// Its API socket, if it has one.
    pub api: Option<ApiServer>,
    /// Its log, if it is not its parent's.
    pub logger: Option<Logger>,
    /// The output of its metrics, if it has one.
    pub(crate) metrics: Option<Metrics>,
    /// The cgroup that it moves to.
    pub cgroup: Option<PathBuf>,
    /// Reports to the parent how the start went. If it is dropped unused, the parent sees that the
    /// child ended.
    pub reporter: Reporter,
    pub(crate) platform: Platform,
    /// Its configuration. The drives are its parent's until `plan` is applied.
    pub(crate) config: FullVmConfig,
    pub(crate) plan: OverlayPlan,
    pub(crate) metadata: Metadata,
    /// By interface: its backend, open. An interface that was not overridden has its link down.
    pub(crate) networks: Vec<NetBackend>,
    pub(crate) resume: bool,
}

impl ChildSpec {
    /// The descriptors that the child keeps for it.
    pub fn descriptors(&self) -> Vec<RawFd> {
        let api = self.api.as_ref().map(|api| api.as_fd().as_raw_fd());
        let networks = self.networks.iter().flat_map(NetBackend::descriptors);
        networks.chain(api).chain([self.reporter.as_fd().as_raw_fd()]).collect()
    }
}
