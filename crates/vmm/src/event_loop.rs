//! The main thread's loop: commands from the API, the guest's end, signals.
//!
//! The controller has the API's requests. While it runs a command that takes long, it answers
//! questions itself, and a signal cancels the command. Lines of metrics are written when they are
//! due, in either loop.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use control::api::{Request, Requests};
use control::{Controller, Host};
use machine::debug::DebugEnd;
use machine::{EventSource, MachineEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::exit::ExitCode;
use crate::personality::Personality;
use crate::run_error::{RunError, report};
use crate::signals::{self, Signals};

/// How long the guest's last serial output may take when the process ends.
const SERIAL_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long closing the guest's overlays may take when the process ends.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the loop ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The guest ended by itself.
    Guest,
    /// The guest cannot be run any further.
    Fault,
    /// A signal asked the process to end.
    Signal(i32),
}

/// Serves until the guest ends or a signal comes.
pub(crate) fn serve<H: Host>(
    controller: &mut Controller<H>,
    events: &EventSource,
    signals: &Signals,
) -> io::Result<Ended> {
    let ended = loop {
        wait(controller.requests(), events, signals, controller.tick())?;
        if let Some(signal) = signals.arrived() {
            break Ended::Signal(signal);
        }
        if let Some(event) = events.take() {
            let ended = guest_ended(&event);
            Personality::of_this_process().log_stop();
            break ended;
        }
        // One at a time, so that an event or a signal is seen between them.
        if let Some(Request { command, reply_to }) = controller.requests().and_then(Requests::try_recv) {
            reply_to.send(controller.run(command));
        }
    };
    controller.end_debugging(debug_end(ended));
    controller.drain_serial(SERIAL_DRAIN_TIMEOUT);
    Ok(ended)
}

/// Waits until there is a request, an event or a signal, at most `limit`.
fn wait(
    requests: Option<&Requests>,
    events: &EventSource,
    signals: &Signals,
    limit: Option<Duration>,
) -> io::Result<()> {
    let mut fds = vec![PollFd::new(events, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
    fds.extend(requests.map(|r| PollFd::from_borrowed_fd(r.as_fd(), PollFlags::IN)));
    let limit = limit.map(|limit| Timespec::try_from(limit).expect("a few minutes fit"));
    match poll(&mut fds, limit.as_ref()) {
        Ok(_) | Err(rustix::io::Errno::INTR) => Ok(()),
        Err(e) => Err(e.into()),
    }
}

fn guest_ended(event: &MachineEvent) -> Ended {
    match event {
        MachineEvent::PowerOff => {
            log::info!("the guest powered off");
            Ended::Guest
        }
        MachineEvent::Killed => {
            log::info!("a debugger killed the guest");
            Ended::Guest
        }
        MachineEvent::Reset => {
            log::info!("the guest reset itself, which ends it");
            Ended::Guest
        }
        // Some guests reboot by a triple fault, so it is no failure of the monitor.
        MachineEvent::TripleFault(fault) => {
            log::error!("the guest ended: {fault}");
            Ended::Guest
        }
        MachineEvent::Fatal(fault) => {
            log::error!("the guest cannot be run any further: {fault}");
            Ended::Fault
        }
        MachineEvent::MemoryLost(reason) => {
            log::error!("the guest cannot be run any further: its memory is lost: {reason}");
            Ended::Fault
        }
    }
}

/// The end as a debugger is told.
fn debug_end(ended: Ended) -> DebugEnd {
    match ended {
        Ended::Guest => DebugEnd::Exited(0),
        Ended::Fault => DebugEnd::Exited(1),
        Ended::Signal(number) => DebugEnd::Signalled(u8::try_from(number).unwrap_or(u8::MAX)),
    }
}

/// The exit status. May end the process by a signal instead.
pub(crate) fn exit_code(personality: Personality, ended: Result<Ended, RunError>) -> ExitCode {
    match ended {
        Ok(Ended::Guest) => ExitCode::Ok,
        Ok(Ended::Fault) => ExitCode::Generic,
        Ok(Ended::Signal(signal)) => signals::end_by(signal),
        Err(error) => report(personality, &error),
    }
}
