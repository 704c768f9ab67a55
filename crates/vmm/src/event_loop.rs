//! The main thread's loop: commands from the API, the guest's end and what is noticed of it,
//! signals.
//!
//! The controller has the API's requests. While it runs a command that takes long, it answers
//! questions itself, and a signal cancels the command. Lines of metrics are written when they are
//! due, in either loop.

use std::io;
use std::os::fd::AsFd;
use std::time::Duration;

use control::api::{Request, Requests};
use control::events::{Event, ExitReason, ResetCause};
use control::{Controller, Host, Phase};
use machine::debug::DebugEnd;
use machine::{EventSource, MachineEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};

use crate::exit::ExitCode;
use crate::personality::Personality;
use crate::readiness::Readiness;
use crate::run_error::{RunError, report};
use crate::signals::{self, Signals};

/// How long the guest's last serial output may take when the process ends.
const SERIAL_DRAIN_TIMEOUT: Duration = Duration::from_secs(1);

/// How long closing the guest's overlays may take when the process ends.
pub(crate) const CLOSE_TIMEOUT: Duration = Duration::from_secs(5);

/// Why the loop ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset(ResetCause),
    /// A debugger killed the guest.
    Killed,
    /// The guest cannot be run any further, for this reason.
    Fault(String),
    /// A signal asked the process to end.
    Signal(i32),
}

/// Serves until the guest ends or a signal comes.
pub(crate) fn serve<H: Host>(
    controller: &mut Controller<H>,
    events: &EventSource,
    signals: &Signals,
    readiness: &mut Readiness,
) -> io::Result<Ended> {
    note_running(controller, readiness);
    let ended = loop {
        let mut ended = None;
        if wait(controller, events, signals)? {
            ended = events.take();
            // After the event: what the guest did before it is known now.
            controller.publish_notices(events.take_notices());
        }
        if let Some(signal) = signals.arrived() {
            break Ended::Signal(signal);
        }
        if let Some(event) = ended {
            let ended = guest_ended(&event);
            Personality::of_this_process().log_stop();
            break ended;
        }
        controller.publish_snapshot_job();
        // One at a time, so that an event or a signal is seen between them.
        if let Some(Request { command, reply_to }) = controller.requests().and_then(Requests::try_recv) {
            let result = controller.run(command);
            note_running(controller, readiness);
            reply_to.send(result);
        }
    };
    controller.end_debugging(debug_end(&ended));
    match &ended {
        Ended::PowerOff => controller.publish(&Event::PowerOff),
        Ended::Reset(cause) => controller.publish(&Event::Reset(*cause)),
        Ended::Killed | Ended::Fault(_) | Ended::Signal(_) => {}
    }
    controller.drain_serial(SERIAL_DRAIN_TIMEOUT);
    Ok(ended)
}

fn note_running<H: Host>(controller: &Controller<H>, readiness: &mut Readiness) {
    if controller.phase() == Phase::Running {
        readiness.guest_runs();
    }
}

/// Waits until there is a request, an event, a notice, a signal, progress of a live snapshot or a
/// line of metrics to write. Returns whether there may be an event or a notice.
fn wait<H: Host>(controller: &Controller<H>, events: &EventSource, signals: &Signals) -> io::Result<bool> {
    let mut fds = vec![PollFd::new(events, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
    fds.extend(controller.requests().map(|r| PollFd::from_borrowed_fd(r.as_fd(), PollFlags::IN)));
    fds.extend(controller.snapshot_job_fd().map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN)));
    let limit = controller.tick().map(|limit| Timespec::try_from(limit).expect("a few minutes fit"));
    match poll(&mut fds, limit.as_ref()) {
        Ok(_) => Ok(!fds[0].revents().is_empty()),
        Err(rustix::io::Errno::INTR) => Ok(false),
        Err(e) => Err(e.into()),
    }
}

fn guest_ended(event: &MachineEvent) -> Ended {
    match event {
        MachineEvent::PowerOff => {
            log::info!("the guest powered off");
            Ended::PowerOff
        }
        MachineEvent::Killed => {
            log::info!("a debugger killed the guest");
            Ended::Killed
        }
        MachineEvent::Reset => {
            log::info!("the guest reset itself, which ends it");
            Ended::Reset(ResetCause::Request)
        }
        // Some guests reboot by a triple fault, so it is no failure of the monitor.
        MachineEvent::TripleFault(fault) => {
            log::error!("the guest ended: {fault}");
            Ended::Reset(ResetCause::TripleFault)
        }
        MachineEvent::Fatal(fault) => {
            log::error!("the guest cannot be run any further: {fault}");
            Ended::Fault(fault.to_string())
        }
        MachineEvent::MemoryLost(reason) => {
            log::error!("the guest cannot be run any further: its memory is lost: {reason}");
            Ended::Fault(format!("its memory is lost: {reason}"))
        }
    }
}

/// The end as a debugger is told.
fn debug_end(ended: &Ended) -> DebugEnd {
    match ended {
        Ended::PowerOff | Ended::Reset(_) | Ended::Killed => DebugEnd::Exited(0),
        Ended::Fault(_) => DebugEnd::Exited(1),
        Ended::Signal(number) => DebugEnd::Signalled(u8::try_from(*number).unwrap_or(u8::MAX)),
    }
}

/// Publishes the last event: how the process will end.
pub(crate) fn publish_exit<H: Host>(
    controller: &Controller<H>,
    personality: Personality,
    ended: &Result<Ended, RunError>,
) {
    let (reason, code) = match ended {
        Ok(Ended::PowerOff) => (ExitReason::PowerOff, ExitCode::Ok),
        Ok(Ended::Reset(cause)) => (ExitReason::Reset(*cause), ExitCode::Ok),
        Ok(Ended::Killed) => (ExitReason::Debugger, ExitCode::Ok),
        Ok(Ended::Fault(reason)) => (ExitReason::Fault(reason.clone()), ExitCode::Generic),
        Ok(Ended::Signal(signal)) => (ExitReason::Signal(*signal), ExitCode::of_signal(*signal)),
        Err(error) => (ExitReason::Error(error.to_string()), error.code(personality)),
    };
    controller.publish(&Event::Exit { reason, code: code as i32 });
}

/// The exit status. May end the process by a signal instead.
pub(crate) fn exit_code(personality: Personality, ended: Result<Ended, RunError>) -> ExitCode {
    match ended {
        Ok(Ended::PowerOff | Ended::Reset(_) | Ended::Killed) => ExitCode::Ok,
        Ok(Ended::Fault(_)) => ExitCode::Generic,
        Ok(Ended::Signal(signal)) => signals::end_by(signal),
        Err(error) => report(personality, &error),
    }
}
