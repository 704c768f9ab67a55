//! A debugger for the guest: the remote protocol of gdb on a Unix socket.
//!
//! A machine with a `gdb_socket_path` begins with its vCPUs held, and waits for a debugger. The
//! thread `gdb` serves one debugger at a time. It is the only thread that this module starts, and
//! only such a machine has it.
//!
//! # Map
//!
//! ```text
//!  Debugger (owner's thread)
//!     |   state     attached, kept out, ended: what both threads share
//!     v
//!  session (thread `gdb`): client = one connection; the protocol is the crate `gdbstub`
//!     v
//!  target     what gdbstub asks for, by threads         registers   gdb's register file
//!     v
//!  guest      stops, memory, breakpoints
//!     |          paging      linear to physical addresses
//!     |          software    int3 in guest memory       hardware    debug registers
//!     v
//!  vcpus      requests to the vCPU threads, reports from them (vcpu::debug)
//! ```
//!
//! # Invariants
//!
//! - The guest's memory has breakpoints only while a debugger is attached. A snapshot or a fork
//!   keeps debuggers out while it lasts ([`Debugger::keep_out`]), and is refused while one is
//!   attached.
//! - A debugger that detaches, ends or breaks the protocol leaves no breakpoint, and the guest runs
//!   on.
//! - What a debugger sends is parsed by `gdbstub`, in a buffer of fixed size. The number of
//!   breakpoints is bounded, and so is the time for which an answer waits for its reader.
//! - The page tables that it reads are guest input ([`paging`]).
//! - The owner pauses and resumes the machine as without a debugger. A guest that both stop runs
//!   when both let it.
//!
//! # Errors
//!
//! [`DebuggerError`]: the socket or the thread cannot be created, which fails the start of the
//! machine. An error of a session is logged, and ends the session.

mod client;
mod error;
mod guest;
mod hardware;
mod paging;
mod registers;
mod session;
mod socket;
mod software;
mod state;
mod target;
mod vcpus;

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::Duration;

use memory::GuestRam;
use sync::EventFd;

use crate::events::EventSink;
use crate::kvm::Kvm;
use crate::vcpu::VcpuHandle;
pub use error::{DebuggerAttached, DebuggerError};
use guest::Guest;
use session::Server;
pub(crate) use socket::DebugSocket;
use state::SharedState;
pub use state::{DebugEnd, KeptOut};
use target::Target;
use vcpus::Vcpus;

/// How long the end of the process waits for the debugger's thread: a vCPU may wait for a page.
const END_TIMEOUT: Duration = Duration::from_secs(1);

/// The owner's end of the debugger. Dropping it ends the debugger's thread.
#[derive(Debug)]
pub(crate) struct Debugger {
    path: PathBuf,
    state: Arc<SharedState>,
    thread: Option<JoinHandle<()>>,
    /// Disconnected once the thread has ended.
    thread_ended: Receiver<()>,
}

impl Debugger {
    /// Holds the vCPUs, which have not run yet, and starts the thread `gdb`.
    pub(crate) fn start(
        socket: DebugSocket,
        kvm: &Kvm,
        vcpus: &[VcpuHandle],
        ram: GuestRam,
        events: EventSink,
    ) -> Result<Self, DebuggerError> {
        let state = Arc::new(SharedState::new()?);
        let vcpus = Vcpus::attach(vcpus, EventFd::new()?)?;
        let target = Target::new(Guest::new(vcpus, ram, kvm.steps_without_interrupts()));
        let path = socket.path.clone();
        let server = Server { socket, target, state: Arc::clone(&state), events };
        let (ended, thread_ended) = channel();
        let thread = sync::thread::spawn("gdb", None, move || {
            server.run();
            drop::<Sender<()>>(ended);
        })?;
        log::info!("gdb socket {}: the guest waits for a debugger at its entry", path.display());
        Ok(Debugger { path, state, thread: Some(thread), thread_ended })
    }

    /// Keeps debuggers out as long as the value lives, if none is attached.
    pub(crate) fn keep_out(&self) -> Result<KeptOut, DebuggerAttached> {
        self.state.keep_out().ok_or_else(|| DebuggerAttached { path: self.path.clone() })
    }

    /// Reports the end of the guest to the debugger that is attached, and ends the thread, which
    /// removes the socket. Waits at most [`END_TIMEOUT`] for that.
    pub(crate) fn end(&self, end: DebugEnd) {
        self.state.set_end(end);
        // It ends without a message.
        let _ = self.thread_ended.recv_timeout(END_TIMEOUT);
    }
}

impl Drop for Debugger {
    fn drop(&mut self) {
        self.state.set_end(DebugEnd::Exited(0));
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "the debugger's thread does not panic");
        }
    }
}
