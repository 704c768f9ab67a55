//! A microVM on KVM: vCPUs, boot, chipset and devices; built, run, paused, saved and restored.
//!
//! This crate knows KVM. It knows neither HTTP nor JSON. It has two entries: [`Paused::build`]
//! takes a [`Setup`] (open files, checked configuration), and [`Paused::restore`] takes a
//! [`Restore`] (saved state, guest memory). Both return a machine whose vCPUs are paused.
//!
//! # Map
//!
//! ```text
//!  machine    Setup, Restore --> Paused <--> Running      MachineState (state)
//!     |
//!     +-- kvm          /dev/kvm; the order of its calls, in types
//!     +-- boot         kernel and initrd into guest memory; page tables, MP table, zero page, PVH
//!     +-- acpi         ACPI tables
//!     +-- cpu          CPUID, MSRs, registers; CPU templates; saved and restored
//!     +-- vcpu         the threads that run the guest     vcpu_signal   how they are interrupted
//!     +-- debug        gdb on a Unix socket: breakpoints, registers, memory
//!     +-- chipset      PICs, I/O APIC, PIT, kvmclock; saved and restored
//!     +-- devices      virtio devices: the device table, addresses, MMIO and PCI
//!     +-- legacy       serial port, keyboard, CMOS clock, power registers, boot timer, pvpanic
//!     +-- vm_gen_id    VM generation ID and VMClock
//!     +-- page_watch   notices the end of a page server
//!
//!  below: bus          which device is at a port or address
//!         events       what ends a guest, and notices about it, for the machine's owner
//!         layout       the guest's addresses, ports and interrupt lines
//!         stats        counters of all parts
//!         raw          KVM structures in the state file, with their sizes checked
//!  aside: probe        whether this host's KVM runs unmodified guests
//!         cpu_view     what a guest's vCPU shows, for tools
//! ```
//!
//! # Lifecycle
//!
//! [`Paused`] and [`Running`] are one machine in two states. [`Paused::resume`] and
//! [`Running::pause`] consume the one and return the other, so that only a paused machine can be
//! saved. A fork is a save, a fork of the process by the owner, and a restore in the child.
//! Dropping either ends the machine.
//!
//! # Threads
//!
//! | thread | started by | what it does |
//! |---|---|---|
//! | the owner's (`main`) | | builds, pauses, saves; changes devices by their control handles |
//! | `fc_vcpu N` | [`machine`] | runs the guest; accesses registers on its exits |
//! | `io N` | [`devices`], if there are any | runs devices ([`virtio::worker`]) |
//! | `serial` | [`legacy`] | connects the serial port to the host |
//! | `gdb` | a machine with `gdb_socket_path` | serves a debugger ([`debug`]) |
//! | `page_watch` | a restore with a page server | reports the server's end |
//!
//! # The order of KVM calls
//!
//! ```text
//!  create VM -> memory slots -> irqchip -> vCPUs -> PIT -> irqfds, ioeventfds
//! ```
//!
//! Types enforce it up to the PIT ([`kvm`]): a memory slot that is added later costs 6 to 25 ms.
//! The module `machine::assemble` has the rest, and the order in which state is restored.
//!
//! # Errors
//!
//! - [`StartError`], [`SaveError`], [`PauseError`](machine::PauseError): a step failed. Their texts
//!   name the thing, the value and the bound. A machine that cannot be paused is returned, running.
//! - [`MachineEvent`]: the guest ended. [`Notice`]: its kernel panicked, or a device failed; it
//!   continues. Nothing that a guest does panics this process.
//! - [`VcpuThreadDied`](vcpu::VcpuThreadDied): a bug in this monitor.
//!
//! # Invariants
//!
//! - In a [`Paused`] machine no vCPU runs, no access of a vCPU is half done, and no request is in
//!   flight.
//! - A vCPU thread accesses registers only. It has one wait, which is bounded: a driver that resets
//!   a device on virtio-mmio waits until requests in flight are done, at most
//!   [`virtio::transport::RESET_TIMEOUT`].
//! - The owner's thread accesses no guest memory that may be missing. During a restore, vCPU
//!   threads do what needs such memory, and the owner stops waiting if pages do not arrive.
//!
//! # Unsafe code
//!
//! Only in the leaf modules `kvm::memory_slot`, `kvm::eventfd`, `vcpu_signal`, `cpu::tsc` and
//! `cpu::xsave`, each of which says why.
//!
//! # Callers
//!
//! `control` owns the machine and decides what may be done with it when. `vmm` creates the event
//! channel and the outputs, and its tools for CPU templates ask [`shown_cpu`]. `xtask` asks the
//! [`probe`].

#![deny(unsafe_code)]

pub mod boot;
pub mod bus;
pub mod chipset;
pub mod debug;
pub mod devices;
pub mod events;
pub mod kvm;
pub mod layout;
pub mod legacy;
pub mod machine;
pub mod probe;
pub mod state;
pub mod stats;
pub mod vcpu;

mod acpi;
mod cpu;
mod cpu_view;
mod page_watch;
mod raw;
mod vcpu_signal;
mod vm_gen_id;

pub use cpu::{TemplateError, static_template};
pub use cpu_view::shown_cpu;
pub use devices::{DeviceSetup, Devices};
pub use events::{
    EventSink, EventSource, MachineEvent, Notice, NoticeSink, Notices, VcpuFault, event_channel,
};
pub use machine::{Paused, Restore, Running, SaveError, Setup, StartError};
pub use state::MachineState;
pub use stats::MachineStats;
