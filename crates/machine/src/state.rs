//! A whole machine as plain data: what [`Paused::save`](crate::Paused::save) gives and [`Paused::restore`](crate::Paused::restore) takes.
//!
//! # What is in it
//!
//! Everything that a guest could notice but for its memory: vCPUs, what KVM emulates, virtio devices
//! with their transports, serial port, keyboard, the CMOS clock's index. Requests in flight are in
//! none of it: they were drained. Which interrupt or kick was on its way need not be in it either
//! (see [`virtio`]).
//!
//! # What is not
//!
//! Memory, which is large and has its own ways ([`memory`]). What the devices are made of on the host: files, sockets, interfaces. These
//! come with [`Restore`](crate::Restore), because they may be other ones.

use serde::{Deserialize, Serialize};
use snapshot::Section;

use crate::chipset::ChipsetState;
use crate::cpu::VcpuState;
use crate::devices::DevicesState;
use crate::legacy::{CmosState, KeyboardState, SerialPortState};

/// The state of a machine that stands still.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// The vCPUs, in order of their APIC ids.
    pub vcpus: Vec<VcpuState>,
    /// What KVM emulates for all of them.
    pub chipset: ChipsetState,
    /// Virtio devices.
    pub devices: DevicesState,
    /// The serial port.
    pub serial: SerialPortState,
    /// The keyboard controller.
    pub keyboard: KeyboardState,
    /// The CMOS clock; machines were saved that had none.
    #[serde(default)]
    pub cmos: CmosState,
}

impl Section for MachineState {
    const NAME: &'static str = "machine";
}
