//! [`Settings`]: the part of the configuration that has no backend of its own.

use config::{
    BootSource, Drive, Entropy, FullVmConfig, Logger, MachineConfig, MmdsConfig, NetworkInterface, Serial,
    Vsock,
};

/// The configuration without drives and network interfaces, which are kept with their backends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) machine_config: MachineConfig,
    pub(crate) boot_source: Option<BootSource>,
    pub(crate) logger: Option<Logger>,
    pub(crate) serial: Option<Serial>,
    pub(crate) entropy: Option<Entropy>,
    pub(crate) vsock: Option<Vsock>,
    pub(crate) mmds_config: Option<MmdsConfig>,
}

impl Settings {
    /// Takes a whole configuration apart.
    pub(crate) fn split(config: FullVmConfig) -> (Self, Vec<Drive>, Vec<NetworkInterface>) {
        let FullVmConfig {
            machine_config,
            boot_source,
            logger,
            serial,
            entropy,
            vsock,
            mmds_config,
            drives,
            network_interfaces,
            // No snapshot has it, and a fork's child has its own.
            metrics: _,
            // Devices that this version does not support.
            balloon: _,
            cpu_config: _,
            memory_hotplug: _,
            pmem: _,
        } = config;
        let settings = Settings { machine_config, boot_source, logger, serial, entropy, vsock, mmds_config };
        (settings, drives, network_interfaces)
    }

    /// The whole configuration, with these drives and interfaces.
    pub(crate) fn with(&self, drives: Vec<Drive>, network_interfaces: Vec<NetworkInterface>) -> FullVmConfig {
        let Settings { machine_config, boot_source, logger, serial, entropy, vsock, mmds_config } =
            self.clone();
        FullVmConfig {
            machine_config,
            boot_source,
            logger,
            serial,
            entropy,
            vsock,
            mmds_config,
            drives,
            network_interfaces,
            ..FullVmConfig::default()
        }
    }
}
