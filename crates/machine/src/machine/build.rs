//! From a [`Setup`] or a [`Restore`] to a paused machine: checks first, then [`assemble`].

use config::{CpuConfig, MachineConfig};
use memory::GuestRam;

use super::assemble::{RestoreWait, VmParts, VmSource, assemble};
use super::error::StartError;
use super::instance::Machine;
use super::setup::{Restore, Setup};
use crate::cpu::{Cpuid, GuestCpu, Topology};
use crate::debug::DebugSocket;
use crate::kvm::{Kvm, KvmError};
use crate::page_watch::PageWatch;
use crate::{acpi, boot, layout, vcpu_signal};

/// Builds a new machine: its kernel is loaded, and its first vCPU is at the kernel's entry.
pub(super) fn build(setup: Setup<'_>) -> Result<Machine, StartError> {
    let config = setup.config;
    let kvm = open_kvm(config, setup.cpu_config)?;
    let cpu = GuestCpu::new(&kvm, config, setup.cpu_config)?;
    let ram = GuestRam::map(config.mem_size_mib, config.huge_pages, config.track_dirty_pages)?;
    check_address_width(&ram, setup.devices.pci, cpu.cpuid().physical_address_bits())?;

    // The user's files before the VM is created: they fail most often.
    let debug_socket = config.gdb_socket_path.as_deref().map(DebugSocket::bind).transpose()?;
    let addresses = setup.devices.addresses()?;
    let rsdp = acpi::write_tables(&ram, config.vcpu_count, &addresses);
    let device_args = setup.devices.boot_args(&addresses);
    let loaded = boot::load(&ram, setup.boot, &device_args, config.vcpu_count, rsdp)?;
    log::debug!("kernel loaded, to be entered by the {} protocol", loaded.protocol());

    let parts = VmParts {
        ram,
        devices: setup.devices,
        addresses,
        serial: setup.serial,
        boot_timer: setup.boot_timer,
        debug_socket,
        events: setup.events,
    };
    assemble(kvm, config, parts, &VmSource::Boot { cpu: &cpu, loaded: &loaded })
}

/// Restores a saved machine.
pub(super) fn restore(restore: Restore<'_>) -> Result<Machine, StartError> {
    let (config, state) = (restore.config, restore.state);
    if state.vcpus.len() != usize::from(config.vcpu_count) {
        return Err(StartError::VcpuCount { saved: state.vcpus.len(), configured: config.vcpu_count });
    }
    let kvm = open_kvm(config, restore.cpu_config)?;
    let cpuid = Cpuid::new(&kvm, Topology::new(config.vcpu_count, config.smt))?;
    check_address_width(&restore.ram, restore.devices.pci, cpuid.physical_address_bits())?;
    let parts = VmParts {
        addresses: restore.devices.addresses()?,
        ram: restore.ram,
        devices: restore.devices,
        serial: restore.serial,
        boot_timer: None,
        debug_socket: None,
        events: restore.events,
    };
    let events = parts.events.try_clone();
    let wait = RestoreWait { page_server: restore.page_server.as_ref(), stop: restore.stop };
    let source = VmSource::State { cpuid: &cpuid, state, clock: restore.clock, wait };
    let mut machine = assemble(kvm, config, parts, &source)?;
    if let Some(server) = restore.page_server {
        let watch = events.and_then(|events| PageWatch::start(server, events));
        let host = |source| StartError::Host { what: "the page server's watch", source };
        machine.page_watch = Some(watch.map_err(host)?);
    }
    Ok(machine)
}

/// Opens KVM, checked to have what the CPU template requires, and to allow the configured number of
/// vCPUs.
fn open_kvm(config: &MachineConfig, cpu_config: Option<&CpuConfig>) -> Result<Kvm, StartError> {
    vcpu_signal::install_handler()
        .map_err(|e| StartError::Host { what: "the vCPU signal handler", source: e.into() })?;
    let kvm = Kvm::open_with(cpu_config.map_or(&[], |template| &template.kvm_capabilities))?;
    if usize::from(config.vcpu_count) > kvm.max_vcpus() {
        return Err(KvmError::TooManyVcpus { wanted: config.vcpu_count, max: kvm.max_vcpus() }.into());
    }
    Ok(kvm)
}

/// Checks that the CPU can address RAM and the registers of PCI devices.
fn check_address_width(ram: &GuestRam, pci: bool, bits: u8) -> Result<(), KvmError> {
    let registers = pci.then_some(layout::PCI_BARS.end);
    let end = ram.regions().iter().map(|r| r.guest_addr + r.size).chain(registers).max().unwrap_or(0);
    if bits < 64 && end > 1 << bits { Err(KvmError::AddressWidth { end, bits }) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;

    #[test]
    fn ram_and_bars_beyond_the_address_width_are_refused() {
        let ram = GuestRam::map(5 * 1024, HugePages::None, false).unwrap();
        assert!(check_address_width(&ram, false, 32).is_err());
        assert!(check_address_width(&ram, false, 36).is_ok());
        assert!(check_address_width(&ram, true, 36).is_err(), "BARs of PCI devices begin at 256 GiB");
        assert!(check_address_width(&ram, true, 64).is_ok());
    }
}
