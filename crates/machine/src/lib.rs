//! KVM and the life of a microVM.
//!
//! From files and numbers to a guest that runs, pauses and ends. This room knows KVM; it knows neither HTTP nor JSON. The one
//! entry is [`Paused::build`]: it takes a [`Setup`] and gives a machine that stands before its first instruction.
//!
//! | module | what it is about |
//! |---|---|
//! | [`machine`] | the machine as its owner has it: build, resume, pause |
//! | `assemble` | putting a machine together, one that boots or one that was saved |
//! | [`state`] | a whole machine as plain data |
//! | [`kvm`] | KVM, the order of its calls in the types |
//! | [`vcpu`] | the threads that run the guest, and the pause protocol |
//! | [`boot`] | kernel files, boot protocols, memory map, MP table |
//! | `acpi` | ACPI tables |
//! | `cpu` | CPUID, MSRs, registers at entry |
//! | `page_watch` | noticing that a guest's page server is gone |
//! | `raw` | KVM structures in the state file, with their sizes checked |
//! | `generation` | telling a guest that it was restored or forked |
//! | [`devices`] | virtio devices: their places, their events, KVM's part in them |
//! | [`chipset`] | what KVM emulates for the machine as a whole, saved and restored |
//! | [`bus`] | which device is at an address |
//! | [`legacy`] | serial port, keyboard controller, CMOS clock, power registers, boot timer |
//! | [`events`] | what a machine tells its owner |
//! | [`probe`] | can this host's KVM run unmodified guests? |
//! | [`layout`] | the guest's addresses, ports and interrupt lines |
//!
//! # Invariants
//!
//! - A [`Paused`] machine is still: no vCPU runs, and every access that one had begun is done.
//! - A vCPU thread touches registers only. Nothing that can take long happens on it, but for one wait: a driver that resets a device on
//!   virtio-mmio while requests are in flight goes on when they are done, or after [`virtio::transport::RESET_TIMEOUT`].
//! - The owner's thread accesses no guest memory that may be missing. What needs some while a
//!   machine is restored runs on the vCPUs' threads, and the owner stops waiting if pages do not
//!   arrive (`assemble`).
//! - Nothing that a guest does panics this process; what it cannot go on from becomes a [`MachineEvent`].
//!
//! # Callers
//!
//! `control`, which owns the machine and decides what may be done to it when; `xtask`, which asks the [`probe`].

pub mod boot;
pub mod bus;
pub mod chipset;
pub mod devices;
pub mod events;
pub mod kvm;
pub mod layout;
pub mod legacy;
pub mod machine;
pub mod probe;
pub mod state;
pub mod vcpu;

mod acpi;
mod cpu;
mod page_watch;
mod raw;
mod vcpu_signal;
mod vm_gen_id;

pub use devices::{DeviceSetup, Devices};
pub use events::{EventSink, EventSource, MachineEvent, VcpuFault, event_channel};
pub use machine::{Paused, Restore, Running, SaveError, Setup, StartError};
pub use state::MachineState;
