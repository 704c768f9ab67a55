//! What a machine is built from.

use std::os::fd::BorrowedFd;

use config::{CpuConfig, MachineConfig};
use memory::GuestRam;
use memory::page_server::PageServer;

use crate::boot::BootFiles;
use crate::chipset::ClockAfter;
use crate::devices::DeviceSetup;
use crate::events::EventSink;
use crate::legacy::{SerialSetup, StartTimes};
use crate::state::MachineState;

/// Everything that a new machine is built from.
#[derive(Debug)]
pub struct Setup<'a> {
    /// vCPUs and memory, checked.
    pub config: &'a MachineConfig,
    /// The custom CPU template, checked. It takes the place of a static one in `config`.
    pub cpu_config: Option<&'a CpuConfig>,
    /// Kernel, initrd and command line.
    pub boot: BootFiles,
    /// The host's side of the serial port.
    pub serial: SerialSetup,
    /// The times that the boot timer counts from; `None` for no boot timer.
    pub boot_timer: Option<StartTimes>,
    /// Virtio devices.
    pub devices: DeviceSetup,
    /// Receives the event that ends the guest.
    pub events: EventSink,
}

/// Everything that a saved machine is restored from.
#[derive(Debug)]
pub struct Restore<'a> {
    /// vCPUs and memory, as they were.
    pub config: &'a MachineConfig,
    /// The custom CPU template with which the machine was built: it says what this host's KVM must
    /// have. Its effect on vCPUs is in `state`.
    pub cpu_config: Option<&'a CpuConfig>,
    /// The saved state.
    pub state: &'a MachineState,
    /// The guest's memory, with its contents.
    pub ram: GuestRam,
    /// Sends the contents that are missing in `ram`.
    pub page_server: Option<PageServer>,
    /// The host's side of the serial port.
    pub serial: SerialSetup,
    /// The saved virtio devices, with the backends that they have now.
    pub devices: DeviceSetup,
    /// What the guest's clock shows.
    pub clock: ClockAfter,
    /// Receives the event that ends the guest.
    pub events: EventSink,
    /// Readable once the restore is cancelled: it then stops waiting for pages.
    pub stop: Option<BorrowedFd<'a>>,
}
