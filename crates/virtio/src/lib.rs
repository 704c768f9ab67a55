//! The virtio core: queues, workers, two transports, and the [`Device`](device::Device) trait.
//!
//! It knows no concrete device: each has a crate of its own under `crates/devices`.
//!
//! ```text
//!  vCPU thread                       I/O worker thread
//!  -----------                       -----------------
//!  bus -> transport (mmio | pci)     epoll
//!           |  registers, status,      |  kick eventfds, completions, timers, host descriptors
//!           |  features, queue set-up  v
//!           v                        Task  (serves one or more queues, owns the backend)
//!        Device: features, config      |
//!           space, activate, reset     v
//!                                    Interrupt (a trait; the transport raises it)
//! ```
//!
//! - A [`Device`](device::Device) is plain data that the driver reads and negotiates. It knows no
//!   transport, opens no file and reads no clock. vCPU threads access it under the lock of its
//!   transport, for registers only.
//! - At `DRIVER_OK` the transport activates the device with its queues. The device returns
//!   [`Task`](worker::Task)s, each with its queues and its backend, and the transport adds them to
//!   I/O workers. A kick goes from an ioeventfd to a worker, and an interrupt from a worker to an
//!   irqfd. Neither passes through a vCPU thread or the main thread.
//! - At a reset the tasks are removed from their workers. Each drains first, without holding up the
//!   other tasks of its worker. Only then does the status register read 0.
//! - `save` returns a plain serde struct, and `restore` rebuilds the same device by the same path
//!   as `new`. Requests in flight are drained first, so no request is part of a state.
//!
//! | module | contents |
//! |---|---|
//! | [`queue`] | split virtqueues, the device's side |
//! | [`device`] | the [`Device`](device::Device) trait and its saved state |
//! | [`worker`] | I/O worker threads and the [`Task`](worker::Task) trait |
//! | [`transport`] | virtio-mmio and virtio-pci |
//! | [`feature`] | feature bits of the ring and the transport |
//! | [`rate_limiter`] | token buckets for bytes and operations |
//!
//! # Hostile guests
//!
//! All values read from a ring or a register are guest input. None may cause a panic, a hang, an
//! unbounded allocation or an access outside guest memory. If the driver breaks the rules of a
//! queue, the device sets `DEVICE_NEEDS_RESET`, which is counted and logged (the first, second,
//! fourth, … time). The device is dead until it is reset. Everything else keeps running.
//!
//! # How the machine uses it
//!
//! The machine implements these traits over KVM:
//!
//! | trait | with | note |
//! |---|---|---|
//! | [`IoEventFds`](transport::IoEventFds) | `KVM_IOEVENTFD` on MMIO | [`Any`](transport::NotifyMatch::Any): length 0, no datamatch; [`U32`](transport::NotifyMatch::U32): length 4 and datamatch |
//! | [`IrqLine`](transport::mmio::IrqLine) | an eventfd that is the GSI's irqfd, edge-triggered | one GSI of [`IRQ_LINES`](transport::mmio::IRQ_LINES) per device, not shared |
//! | [`MsiVectors`](transport::pci::MsiVectors) | an irqfd and a route per vector, or `KVM_SIGNAL_MSI` in `trigger` | `set` is called once per message, on a vCPU thread; `trigger` on workers and, when a vector is unmasked, on vCPU threads |
//!
//! **Start.** Create guest memory, the VM and its memory slots. Then:
//!
//! 1. [`Workers::start`](worker::Workers::start). All threads are created here and by
//!    [`dedicated`](worker::Workers::dedicated) (for tasks that block), never later: activation
//!    runs on vCPU threads.
//! 2. For each device: create it, wrap it in an [`Attachment`](transport::Attachment), and pass
//!    that to [`MmioTransport::new`](transport::mmio::MmioTransport::new) or
//!    [`PciRoot::new_function`](transport::pci::PciRoot::new_function) (and plug that into the
//!    [`PciRoot`](transport::pci::PciRoot)). This registers the ioeventfds, so vCPUs and memory
//!    slots come first. Later changes (limits, the file of a disk) go through the control handle
//!    that the device's constructor returned, not through the transport.
//! 3. Put the transports on the bus, each behind a lock (the root has its own): MMIO windows to
//!    [`read`](transport::mmio::MmioTransport::read) and
//!    [`write`](transport::mmio::MmioTransport::write) (which may return a reset to
//!    [wait](transport::Resetting::wait) for, without the lock); the ECAM window, the ports 0xcf8
//!    to 0xcff and the window of BARs to the root.
//!
//! **Pause.** Stop the vCPUs first: any of them may be waiting for a reset on mmio, for at most
//! [`RESET_TIMEOUT`](transport::RESET_TIMEOUT). Then [`Workers::pause`](worker::Workers::pause). It
//! returns when nothing is in flight, or returns the worker that has not drained.
//! [`resume`](worker::Workers::resume) undoes it in either case. Control handles may be used while
//! the workers are paused; their changes take effect on resume.
//!
//! **Save.** While paused: `save()` of each transport (it contains the device's state) and of the
//! root. The machine saves the address, line or slot of each device along with it.
//!
//! **Restore.** Memory, VM, restored interrupt controller. Workers, *paused at once*. Then each
//! device from its state by its own constructor, each transport by `new` at the saved address and
//! then `restore(state)`, which activates a device that was active.
//! [`Workers::resume`](worker::Workers::resume), then the vCPUs. Every queue is polled once and
//! every driver gets one interrupt, so a kick or an interrupt in flight at the save need not be in
//! the state. If the configuration changed (another disk), the generation has changed, and the
//! control handle raises the interrupt.
//!
//! **Fork.** Pause, save, fork. The child drops what it inherited (paused workers hold no lock, and
//! their threads do not exist in it) and restores from the saved structs with its own descriptors.
//!
//! **Reset and unplug.** A reset by the driver needs nothing from the machine. To remove a device:
//! `unplug(timeout)` of its transport (false means that it still drains: repeat), then remove it
//! from the bus or the root, then [`release`](worker::Workers::release) its dedicated workers.
//!
//! **Stop.** Dropping the last clone of the [`Workers`](worker::Workers) (the transports have some)
//! makes them drain, detach their tasks and end, without waiting: right for a process that exits.
//! [`stop`](worker::Workers::stop) waits.
//!
//! `unplug`, `release` and `stop` have no caller outside tests yet (*planned*: hot-plug).
//!
//! # Tests
//!
//! The feature `testing` has the driver's side of a queue, a guest on either transport and a worker
//! that a test steps by hand ([`testing`]), and the entry points of the targets under `fuzz/`
//! ([`fuzz`]). `loom` checks the order of memory accesses between device and driver ([`queue`]) and
//! between workers and a guest that masks vectors, `stateright` the protocol of queues, tasks and
//! workers under pauses, saves and forks. Both run the production code.

#![forbid(unsafe_code)]

pub mod device;
pub mod feature;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod interrupt;
#[cfg(test)]
mod model;
pub mod queue;
pub mod rate_limiter;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod worker;
