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
//! once; the device is dead until it is reset, and everything else goes on.
//!
//! # Where unsafe is
//!
//! Nowhere but in leaf modules that say so (`io_uring` submission of guest iovecs).

#![deny(unsafe_code)]

pub mod block;
pub mod device;
pub mod entropy;
pub mod eventfd;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
pub mod queue;
pub mod rate_limiter;
mod sync;
#[cfg(any(test, feature = "testing"))]
pub mod testing;
pub mod transport;
pub mod worker;
