//! The debugger's thread: waits for a debugger, serves it, and lets the guest run when it is gone.
//!
//! One debugger is served at a time; others are turned away. A debugger counts as attached from its
//! first byte, so that a connection without one (a probe) does not touch the guest.

use std::io;
use std::os::unix::net::UnixStream;
use std::sync::Arc;

use gdbstub::common::Signal;
use gdbstub::conn::Connection;
use gdbstub::stub::state_machine::GdbStubStateMachine;
use gdbstub::stub::{DisconnectReason, GdbStub, GdbStubError, MultiThreadStopReason};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::io::Errno;
use rustix::net::SocketFlags;

use super::client::Client;
use super::error::DebugError;
use super::socket::DebugSocket;
use super::state::{DebugEnd, SharedState};
use super::target::{self, Target};
use crate::events::{EventSink, MachineEvent};

/// How long the thread waits after it could not accept a connection.
const ACCEPT_RETRY: Timespec = Timespec { tv_sec: 0, tv_nsec: 100_000_000 };

/// The debugger's thread.
pub(super) struct Server {
    pub(super) socket: DebugSocket,
    pub(super) target: Target,
    pub(super) state: Arc<SharedState>,
    pub(super) events: EventSink,
}

/// Why a session ended.
#[derive(Debug)]
enum Ended {
    Detached,
    Killed,
    /// The guest is at its end.
    Finished,
    Lost(String),
}

/// What happened first.
#[derive(Debug)]
struct Ready {
    end: bool,
    input: bool,
}

impl Server {
    /// Serves debuggers until the guest ends.
    pub(super) fn run(mut self) {
        while let Some(stream) = self.wait_for_debugger() {
            if !self.state.attach() {
                log::warn!("gdb socket {}: a debugger is turned away during a snapshot or fork", self.path());
                continue;
            }
            log::info!("gdb socket {}: a debugger is attached", self.path());
            // The debugger sees the end of the connection when its breakpoints are gone.
            let connection = stream.try_clone();
            let lost = match self.serve(stream) {
                Ended::Detached => None,
                Ended::Lost(why) => Some(why),
                // The guest does not run any more.
                Ended::Killed => return self.events.post(MachineEvent::Killed),
                Ended::Finished => return,
            };
            // In memory that is saved or forked there is no breakpoint.
            if let Err(error) = self.target.guest.leave() {
                return log::error!("gdb socket {}: {error}", self.path());
            }
            self.state.detach();
            match lost {
                None => log::info!("gdb socket {}: the debugger detached", self.path()),
                Some(why) => log::warn!("gdb socket {}: the debugger is gone: {why}", self.path()),
            }
            drop(connection);
        }
    }

    fn path(&self) -> std::path::Display<'_> {
        self.socket.path.display()
    }

    /// Waits for a debugger that sends something. `None` once the guest ends.
    fn wait_for_debugger(&self) -> Option<UnixStream> {
        let mut candidate: Option<UnixStream> = None;
        loop {
            let mut fds = vec![
                PollFd::new(self.state.wake(), PollFlags::IN),
                PollFd::new(&self.socket.listener, PollFlags::IN),
            ];
            fds.extend(candidate.as_ref().map(|stream| PollFd::new(stream, PollFlags::IN)));
            if wait(&mut fds, None).is_err() || !fds[0].revents().is_empty() {
                return None;
            }
            let connects = !fds[1].revents().is_empty();
            let sends = fds.get(2).is_some_and(|fd| !fd.revents().is_empty());
            if sends {
                let mut byte = [0];
                // Without a byte it is closed, and the next may come.
                match rustix::net::recv(candidate.as_ref()?, &mut byte, rustix::net::RecvFlags::PEEK) {
                    Ok((1.., _)) => return candidate,
                    Err(Errno::AGAIN | Errno::INTR) => {}
                    Ok(_) | Err(_) => candidate = None,
                }
            }
            if connects {
                // The newest: the one before has not sent anything.
                candidate = self.accept().or(candidate);
            }
        }
    }

    fn accept(&self) -> Option<UnixStream> {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        match rustix::net::accept_with(&self.socket.listener, flags) {
            Ok(stream) => Some(stream.into()),
            Err(Errno::AGAIN | Errno::INTR | Errno::CONNABORTED) => None,
            Err(error) => {
                log::warn!("gdb socket {}: cannot accept a debugger: {error}", self.path());
                // The host is out of descriptors: the connection waits in the queue.
                let _ = wait(&mut [PollFd::new(self.state.wake(), PollFlags::IN)], Some(&ACCEPT_RETRY));
                None
            }
        }
    }

    /// Serves one debugger. The guest's vCPUs are held at its beginning.
    fn serve(&mut self, stream: UnixStream) -> Ended {
        let client = Client::new(stream, self.state.shared_wake());
        match self.converse(client) {
            Ok(ended) => ended,
            Err(why) => Ended::Lost(why),
        }
    }

    fn converse(&mut self, client: Client) -> Result<Ended, String> {
        self.target.guest.hold().map_err(|e| e.to_string())?;
        let stub = GdbStub::builder(client).build().map_err(|e| e.to_string())?;
        let mut machine = stub.run_state_machine(&mut self.target).map_err(|e| text(&e))?;
        let mut last = false;
        loop {
            machine = match machine {
                GdbStubStateMachine::Idle(mut idle) => {
                    match self.next_byte(idle.borrow_conn(), &mut last)? {
                        Some(byte) => idle.incoming_data(&mut self.target, byte).map_err(|e| text(&e))?,
                        // The debugger does not wait for an answer now.
                        None if self.state.has_ended() => return Ok(Ended::Finished),
                        None => idle.into(),
                    }
                }
                GdbStubStateMachine::Running(mut running) => {
                    if let Some(byte) = running.borrow_conn().next() {
                        running.incoming_data(&mut self.target, byte).map_err(|e| text(&e))?
                    } else if let Some(stop) = self.target.guest.next_stop().map_err(|e| e.to_string())? {
                        running.report_stop(&mut self.target, target::reason(stop)).map_err(|e| text(&e))?
                    } else {
                        let ready = self.wait(running.borrow_conn(), true)?;
                        if ready.end {
                            // Best effort: the debugger may be gone too.
                            let _ = running.report_stop(&mut self.target, end_reason(self.state.end()));
                            return Ok(Ended::Finished);
                        }
                        if ready.input {
                            running.borrow_conn().receive().map_err(|e| e.to_string())?;
                        }
                        running.into()
                    }
                }
                GdbStubStateMachine::CtrlCInterrupt(interrupted) => {
                    self.target.guest.hold().map_err(|e| e.to_string())?;
                    let tid = target::thread(self.target.guest.current());
                    let reason = MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGINT };
                    interrupted.interrupt_handled(&mut self.target, Some(reason)).map_err(|e| text(&e))?
                }
                GdbStubStateMachine::Disconnected(mut disconnected) => {
                    if disconnected.get_reason() != DisconnectReason::Kill {
                        return Ok(Ended::Detached);
                    }
                    // gdb waits for it, and gdbstub does not send it. It may be gone already.
                    let client = disconnected.borrow_conn();
                    let _ = client.write_all(b"$OK#9a").and_then(|()| client.flush());
                    return Ok(Ended::Killed);
                }
            }
        }
    }

    /// The next byte of the debugger; `None` if the guest ended, or there is none yet. Sets `last`
    /// with what is read after the end.
    fn next_byte(&self, client: &mut Client, last: &mut bool) -> Result<Option<u8>, String> {
        if let Some(byte) = client.next() {
            return Ok(Some(byte));
        }
        // What was sent before the guest's end may be the command that waits for it.
        let ready = self.wait(client, false)?;
        if ready.input && !*last {
            *last = ready.end;
            client.receive().map_err(|e| e.to_string())?;
        }
        Ok(client.next())
    }

    /// Waits for the debugger, for the guest to end, and if `guest` for it to stop. Turns other
    /// debuggers away.
    fn wait(&self, client: &Client, guest: bool) -> Result<Ready, String> {
        let mut fds = [
            PollFd::new(self.state.wake(), PollFlags::IN),
            PollFd::new(client, PollFlags::IN),
            PollFd::new(&self.socket.listener, PollFlags::IN),
            PollFd::new(self.target.guest.wake(), if guest { PollFlags::IN } else { PollFlags::empty() }),
        ];
        wait(&mut fds, None).map_err(|e| e.to_string())?;
        let [end, input, other, _] = fds.map(|fd| !fd.revents().is_empty());
        if other {
            drop(self.accept());
        }
        Ok(Ready { end, input })
    }
}

/// Waits for descriptors, at most `limit`.
fn wait(fds: &mut [PollFd<'_>], limit: Option<&Timespec>) -> Result<(), Errno> {
    rustix::io::retry_on_intr(|| poll(fds, limit)).map(drop)
}

/// The end of the guest, as the protocol has it.
fn end_reason(end: DebugEnd) -> MultiThreadStopReason<u64> {
    match end {
        DebugEnd::Exited(status) => MultiThreadStopReason::Exited(status),
        DebugEnd::Signalled(number) => MultiThreadStopReason::Terminated(Signal(number)),
    }
}

fn text(error: &GdbStubError<DebugError, io::Error>) -> String {
    error.to_string()
}
