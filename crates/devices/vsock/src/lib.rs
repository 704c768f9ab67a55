//! The virtio socket device (5.10): connections between programs in the guest and programs on the
//! host, without a network.
//!
//! # Host side
//!
//! ```text
//!  host client --> {uds_path}: "CONNECT port\n" --> guest port
//!              <--             "OK hostport\n"  <-- the guest has accepted
//!  guest       --> CID 2, port P                --> {uds_path}_P, where a host program listens
//! ```
//!
//! Each connection is one Unix socket of the same type as the guest's: a stream, or a sequence of
//! messages (`SOCK_SEQPACKET`). Half-closes are forwarded in both directions, as `shutdown(2)` and
//! `VIRTIO_VSOCK_OP_SHUTDOWN`. If no process listens, or the guest refuses the connection, the peer
//! learns it at once: the guest by a reset, the host client by a closed socket.
//!
//! # Structure
//!
//! One task on one io worker serves all three queues. Host sockets are watched edge-triggered: a
//! connection costs one `epoll_ctl` when it begins, one when it ends, and two each time that its
//! host socket fills up and drains.
//!
//! | module | what it has |
//! |---|---|
//! | `device` | the virtio device and [`VsockControl`] |
//! | `task` | the queues, the order of work, the transport reset |
//! | `muxer` | all state between the queues and the host sockets; how connections begin and end |
//! | `from_guest`, `from_host`, `timers` | what packets, host events and deadlines do to it |
//! | `connect`, `accepted` | connections that the guest requests, and that it has accepted |
//! | `to_guest` | filling the guest's buffers |
//! | `table` | connections by ports and by deadline, and the queue of those with packets |
//! | `connection`, `tx_buf` | one connection, and the data that its socket has not taken yet |
//! | `credit` | flow control |
//! | `packet` | the packet header |
//! | `connect_request` | the `CONNECT` line of host clients |
//! | `host_sockets`, `listener` | Unix sockets |
//! | `guest_io` | guest buffers for a socket call |
//! | `shared`, `state`, `stats` | what the device shares with its task; its saved state; its counters |
//!
//! Stream data is not copied: a host socket is read directly into the guest's buffers (as many at
//! once as the guest has credit for), and the guest's packets are written directly to the socket.
//! Only what a socket does not take at once is buffered, at most as much as the guest has credit
//! for. Messages are copied once, because they have to be complete.
//!
//! # Invariants
//!
//! - Memory is bounded: by [`MAX_CONNECTIONS`], by [`MAX_BUFFERED`] bytes of data for all
//!   connections together, and by a maximum of resets that wait to be sent.
//! - No connection waits for another one. Those with packets for the guest take turns of at most
//!   64 KiB (`to_guest::QUANTUM`). The guest's packets are processed whether or not it has buffers
//!   for ours (5.10.6.1).
//! - A connection that ends is removed on both sides, or has a deadline for it.
//!
//! # Errors
//!
//! A packet of an unknown operation, socket type or connection is answered with a reset. A
//! connection is reset if a packet for it violates credit, is shorter than its header says or is
//! not valid in its state. Nothing else is affected. A broken queue sets `DEVICE_NEEDS_RESET` and
//! closes all connections. A host peer that dies or never reads affects only its own connection.
//!
//! # Save and restore
//!
//! Connections are not saved: the host sockets belong to this process. A restored device sends its
//! driver `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, upon which the driver resets its sockets and reads
//! its CID again. [`VsockControl::reset_connections`] does the same to a running device.
//!
//! The driver also resets, without a packet, a connection that it accepts before it handles the
//! event. So host clients wait until it has handled the event, which it shows by returning the
//! event's buffer. They wait for 250 ms at most, as a busy guest could take much longer. After that
//! the guest is sent their connection requests. If it accepts one before it has handled the event,
//! the client gets no reply yet. Once the event is handled, that connection is reset and requested
//! again from a new host port. No data is lost, as the client's data is still in its socket. A
//! driver that never returns the buffer delays its first clients by 10 seconds.

#![forbid(unsafe_code)]

mod accepted;
mod connect;
mod connect_request;
mod connection;
mod credit;
mod device;
mod from_guest;
mod from_host;
#[cfg(any(test, feature = "testing"))]
pub mod fuzz;
mod guest_io;
mod host_sockets;
mod listener;
mod muxer;
mod packet;
mod shared;
mod state;
mod stats;
mod table;
mod task;
#[cfg(test)]
mod tests;
mod timers;
mod to_guest;
mod tx_buf;

pub use ::socket_file::{BindError, MAX_PATH_LEN, Occupant, SocketFile};
pub use device::{Vsock, VsockControl};
pub use host_sockets::HostSockets;
pub use listener::{Listener, check_socket_path};
pub use packet::SocketKind;
pub use state::VsockState;
pub use stats::VsockStats;
pub use table::{MAX_BUFFERED, MAX_CONNECTIONS};
