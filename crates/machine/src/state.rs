//! A whole machine as plain data: [`Paused::save`](crate::Paused::save) returns it, and
//! [`Paused::restore`](crate::Paused::restore) takes it.
//!
//! # What it contains
//!
//! All state that a guest could notice, but for its memory: vCPUs, the chipset that KVM emulates,
//! virtio devices with their transports, serial port, keyboard, and the index of the CMOS clock. No
//! request is in flight when it is saved. A kick or an interrupt that is on its way is not part of
//! it, and need not be (see [`virtio`]).
//!
//! # What it does not contain
//!
//! - Guest memory ([`memory`]).
//! - The devices' backends: files, sockets, interfaces. They come with
//!   [`Restore`](crate::Restore) and may be other ones.

use serde::{Deserialize, Serialize};
use snapshot::Section;

use crate::chipset::ChipsetState;
use crate::cpu::VcpuState;
use crate::devices::DevicesState;
use crate::legacy::{CmosState, KeyboardState, SerialPortState};

/// The state of a paused machine.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct MachineState {
    /// The vCPUs, in order of their APIC IDs.
    pub vcpus: Vec<VcpuState>,
    /// Interrupt controllers, timer chip and paravirtual clock.
    pub chipset: ChipsetState,
    /// Virtio devices.
    pub devices: DevicesState,
    /// The serial port.
    pub serial: SerialPortState,
    /// The keyboard controller.
    pub keyboard: KeyboardState,
    /// The CMOS clock. Missing in states that were saved before it existed.
    #[serde(default)]
    pub cmos: CmosState,
}

impl Section for MachineState {
    const NAME: &'static str = "machine";
}
