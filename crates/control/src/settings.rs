//! [`Settings`]: the part of the configuration that has no backend of its own.

use config::{
    BootSource, CpuConfig, CpuTemplate, Drive, Entropy, FullVmConfig, Logger, MachineConfig, MmdsConfig,
    NetworkInterface, Serial, Vsock,
};

/// The configuration without drives and network interfaces, which are kept with their backends.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Settings {
    pub(crate) machine_config: MachineConfig,
    /// The custom CPU template. Then `machine_config` has no static one.
    pub(crate) cpu_config: Option<CpuConfig>,
    pub(crate) boot_source: Option<BootSource>,
    pub(crate) logger: Option<Logger>,
    pub(crate) serial: Option<Serial>,
    pub(crate) entropy: Option<Entropy>,
    pub(crate) vsock: Option<Vsock>,
    pub(crate) mmds_config: Option<MmdsConfig>,
}

impl Settings {
    /// Sets vCPUs and memory. Of the CPU templates the last one counts: a template in `config`
    /// takes the place of any other, also `None`. Without one, the present template stays, as with
    /// Firecracker.
    pub(crate) fn set_machine_config(&mut self, config: MachineConfig) {
        let cpu_template = match config.cpu_template {
            None => self.machine_config.cpu_template,
            given => {
                self.cpu_config = None;
                given.filter(|template| *template != CpuTemplate::None)
            }
        };
        self.machine_config = MachineConfig { cpu_template, ..config };
    }

    /// Sets the custom CPU template, in place of any other. An empty one is none.
    pub(crate) fn set_cpu_config(&mut self, template: CpuConfig) {
        self.machine_config.cpu_template = None;
        self.cpu_config = (!template.is_empty()).then_some(template);
    }

    /// Takes a whole configuration apart.
    pub(crate) fn split(config: FullVmConfig) -> (Self, Vec<Drive>, Vec<NetworkInterface>) {
        let FullVmConfig {
            machine_config,
            cpu_config,
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
            memory_hotplug: _,
            pmem: _,
        } = config;
        let settings =
            Settings { machine_config, cpu_config, boot_source, logger, serial, entropy, vsock, mmds_config };
        (settings, drives, network_interfaces)
    }

    /// The whole configuration, with these drives and interfaces.
    pub(crate) fn with(&self, drives: Vec<Drive>, network_interfaces: Vec<NetworkInterface>) -> FullVmConfig {
        let Settings { machine_config, cpu_config, boot_source, logger, serial, entropy, vsock, mmds_config } =
            self.clone();
        FullVmConfig {
            machine_config,
            cpu_config,
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

#[cfg(test)]
mod tests {
    use config::KvmCapability;

    use super::*;

    fn machine(cpu_template: Option<CpuTemplate>) -> MachineConfig {
        MachineConfig { cpu_template, ..MachineConfig::default() }
    }

    #[test]
    fn last_cpu_template_counts() {
        let custom = CpuConfig { kvm_capabilities: vec![KvmCapability::Require(1)], ..CpuConfig::default() };
        let mut settings = Settings::default();
        let templates =
            |settings: &Settings| (settings.machine_config.cpu_template, settings.cpu_config.clone());
        settings.set_cpu_config(custom.clone());
        settings.set_machine_config(machine(None));
        assert_eq!(templates(&settings), (None, Some(custom.clone())));
        settings.set_machine_config(machine(Some(CpuTemplate::T2)));
        assert_eq!(templates(&settings), (Some(CpuTemplate::T2), None));
        settings.set_machine_config(machine(None));
        assert_eq!(templates(&settings), (Some(CpuTemplate::T2), None));
        settings.set_cpu_config(custom.clone());
        assert_eq!(templates(&settings), (None, Some(custom.clone())));
        settings.set_machine_config(machine(Some(CpuTemplate::None)));
        assert_eq!(templates(&settings), (None, None));
        settings.set_machine_config(machine(Some(CpuTemplate::T2A)));
        settings.set_cpu_config(CpuConfig::default());
        assert_eq!(templates(&settings), (None, None));
    }
}
