//! [`Backends`]: what the machine is built from, besides its state.

use std::sync::Arc;

use config::FullVmConfig;
use machine::devices::{DeviceSetup, VsockSetup};

use crate::drives::Drives;
use crate::networks::Networks;
use crate::settings::Settings;
use crate::vsock::VsockSockets;

/// The configuration of a microVM, with everything open that its devices use on the host.
///
/// A boot fills it in command by command. A load and a fork open all of it at once.
#[derive(Debug, Default)]
pub(crate) struct Backends {
    pub(crate) settings: Settings,
    pub(crate) drives: Drives,
    pub(crate) networks: Networks,
    /// The sockets of `settings.vsock`.
    pub(crate) vsock: Option<VsockSockets>,
}

impl Backends {
    /// The whole configuration, for a snapshot or a child: without the debugger's socket, which is
    /// this process's own.
    pub(crate) fn config(&self) -> FullVmConfig {
        let mut config = self.settings.with(self.drives.configs(), self.networks.configs());
        config.machine_config.gdb_socket_path = None;
        config
    }

    /// The devices to build, with clones of their backends. Interfaces with metadata reach
    /// `metadata`.
    pub(crate) fn device_setup(&self, metadata: Option<Arc<mmds::Service>>, pci: bool) -> DeviceSetup {
        let vsock = self.settings.vsock.as_ref().map(|config| VsockSetup {
            guest_cid: config.guest_cid,
            sockets: self.vsock.as_ref().map(VsockSockets::for_device).unwrap_or_default(),
        });
        DeviceSetup {
            drives: self.drives.iter().map(|(drive, disk)| (drive.clone(), disk.clone())).collect(),
            networks: self
                .networks
                .iter()
                .map(|(network, backend)| (network.clone(), backend.clone()))
                .collect(),
            entropy: self.settings.entropy.clone(),
            vsock,
            metadata,
            pci,
        }
    }
}
