//! Virtio: queues, the [`Device`](device::Device) trait, two transports and one folder per device.
//!
//! # How a device is cut
//!
//! ```text
//!  vCPU thread                       io worker thread
//!  -----------                       ----------------
//!  bus -> Transport (mmio | pci)     epoll
//!           |  registers, status,      |  kick eventfd of a queue, completions, timers, host descriptors
//!           |  features, queue set-up  v
//!           v                        Task  (one per queue or group of queues: the rings and the back end)
//!        Device: features, config      |
//!           space, activate, reset     v
//!                                    Interrupt (a trait: the transport raises it)
//! ```
//!
//! - A [`Device`](device::Device) is the *front*: plain data that the driver reads and negotiates. It knows no transport,
//!   opens no file, reads no clock. It is touched on vCPU threads, under the lock of its transport, for registers only.
//! - On `DRIVER_OK` the transport activates it with what the driver set up; the device answers with [`Task`](worker::Task)s,
//!   each owning its queues and its back end, and these go to io workers. A kick goes ioeventfd -> worker and an
//!   interrupt goes irqfd -> guest: neither passes through a vCPU thread or main.
//! - On reset (also in the middle of I/O) the tasks are taken back from their workers: each drains what is in flight, without
//!   stalling other tasks of the same worker, and only then does the status register read 0.
//! - `save` gives a plain serde struct per device and per transport; `restore` makes the same thing again through the same path as a
//!   fresh attach. Quiescing drains in-flight requests first, so that no request is ever part of a state.
//!
//! # Hostile guests
//!
//! Everything read from a ring or a register is the guest's word. Nothing it says may panic, hang a worker, allocate without
//! bound or reach outside guest memory. A queue whose rules the driver broke sets `DEVICE_NEEDS_RESET`, is counted and logged
//! (ever more rarely); the device is dead until it is reset, and everything else goes on.
//!
//! # Where unsafe is
//!
//! Nowhere but in leaf modules that say so (`io_uring` submission of guest iovecs, sockets that read and write guest memory).
//!
//! # How a machine uses it
//!
//! What the machine implements, over KVM:
//!
//! | trait | with | note |
//! |---|---|---|
//! | [`IoEventFds`](transport::IoEventFds) | `KVM_IOEVENTFD` on MMIO | [`Any`](transport::NotifyMatch::Any): length 0, no datamatch; [`U32`](transport::NotifyMatch::U32): length 4 and datamatch |
//! | [`IrqLine`](transport::mmio::IrqLine) | an eventfd that is the GSI's irqfd, edge-triggered | one GSI of [`IRQ_LINES`](transport::mmio::IRQ_LINES) per device; the value is moved in, so that lines are not shared |
//! | [`MsiVectors`](transport::pci::MsiVectors) | an irqfd and a route per vector, or `KVM_SIGNAL_MSI` in `trigger` | `set` comes once per message, on a vCPU thread; `trigger` on workers and, when a vector is unmasked, on vCPU threads |
//!
//! **Start.** Create guest memory, the VM and its memory slots, then:
//!
//! 1. [`Workers::start`](worker::Workers::start); a sandbox for io threads has its place in `on_start`. Threads are made here
//!    and by [`dedicated`](worker::Workers::dedicated) (for tasks that block), never later: activation runs on vCPU threads.
//! 2. For each device: construct it, wrap it in an [`Attachment`](transport::Attachment), and give that to
//!    [`MmioTransport::new`](transport::mmio::MmioTransport::new) (window, line) or
//!    [`PciTransport::new`](transport::pci::PciTransport::new) (BAR address, vectors, and the [`PciRoot`](transport::pci::PciRoot) that it is
//!    then plugged into). That registers the kicks, so the vCPUs and memory slots come first. What the machine has to change later
//!    (limits, a disk's path) it does through the control handle that the device's constructor returned, not through the transport.
//! 3. Put the transports on the bus behind a lock each (the root has its own): MMIO windows to
//!    [`read`](transport::mmio::MmioTransport::read) and [`write`](transport::mmio::MmioTransport::write) (which may answer with
//!    a reset to [wait](transport::Resetting::wait) for, without the lock); the ECAM window, ports
//!    0xcf8 to 0xcff and the window of BARs to the root. The lock is for registers: neither kicks nor interrupts take it.
//!
//! **Pause.** Stop the vCPUs first (any of them may be waiting for a reset on mmio, for
//! [`RESET_TIMEOUT`](transport::RESET_TIMEOUT) at most and all at the same time), then [`Workers::pause`](worker::Workers::pause). It returns when nothing is in
//! flight, or says which worker is not done; [`resume`](worker::Workers::resume) undoes it in either case. Devices are still now; control handles
//! may be used meanwhile and take effect on resume.
//!
//! **Save.** While paused: `save()` of each transport (it contains the device's state), and of the root. The machine saves along with it which
//! address, line or slot a device has.
//!
//! **Restore.** Memory, VM, interrupt controller with its saved state; workers, *paused at once*; then each device from its state by
//! its own constructor, each transport by `new` at the saved place and then `restore(state)`, which starts a device that was running.
//! [`Workers::resume`](worker::Workers::resume), then the vCPUs. Every queue is looked at and every driver gets one interrupt, so a kick or an
//! interrupt that was on its way need not be in any state. A restored machine's guest may find a new configuration
//! (another disk): the generation has changed; the control handle raises the interrupt.
//!
//! **Fork.** Pause, save, fork; the child drops what it inherited (paused workers hold no lock, and their threads do not exist in it) and restores
//! from the saved structs with descriptors of its own.
//!
//! **Reset and unplug.** A reset by the driver needs nothing from the machine. To take a device off: `unplug(patience)` of its transport (false: still
//! draining, ask again), then remove it from the bus or the root, then [`release`](worker::Workers::release) its dedicated workers.
//!
//! **Stop.** Dropping the last clone of the [`Workers`](worker::Workers) (the transports have some) tells them to drain, to detach what is
//! left and to end, and waits for nobody: that is what a process does that is about to exit. [`stop`](worker::Workers::stop) waits for them.
//!
//! What only a machine needs that plugs devices while it runs, or that outlives its guest, has no caller outside tests yet: `unplug`, `release`,
//! `stop`, and `on_start`.
//!
//! # Tests
//!
//! With the feature `testing`: [`testing`] has the driver's side of a queue, a guest's hands on either transport and a worker that
//! a test steps by hand; [`fuzz`] has the entry points of the targets under `fuzz/`. The order of memory accesses between device and driver
//! ([`queue`]) and between workers and a guest that masks vectors is checked by `loom` on the code that runs in production.

#![forbid(unsafe_code)]

pub mod device;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
#[cfg(test)]
mod model;
pub mod queue;
pub mod rate_limiter;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod worker;
