//! The main thread's loop: commands from the API, the guest's end, signals.
//!
//! The controller has the API's requests. While it runs a command that takes long, it answers
//! questions itself, and a signal cancels the command.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::time::Duration;

use control::api::{ApiServer, Request, Requests};
use control::fork::ForkPlan;
use control::{Controller, Host};
use machine::legacy::{Output, SerialSetup};
use machine::{EventSource, MachineEvent};
use rustix::event::{PollFd, PollFlags, poll};
use virtio::rate_limiter::RateLimiterConfig;

use crate::process::{self, ForkResult};
use crate::signals::Signals;
use crate::{child, logger, signals, terminal};

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
        wait(controller.requests(), events, signals)?;
        if let Some(signal) = signals.arrived() {
            break Ended::Signal(signal);
        }
        if let Some(event) = events.take() {
            break guest_ended(&event);
        }
        // One at a time, so that an event or a signal is seen between them.
        if let Some(Request { command, reply_to }) = controller.requests().and_then(Requests::try_recv) {
            reply_to.send(controller.run(command));
        }
    };
    controller.drain_serial(SERIAL_DRAIN_TIMEOUT);
    Ok(ended)
}

/// Waits until there is a request, an event or a signal.
fn wait(requests: Option<&Requests>, events: &EventSource, signals: &Signals) -> io::Result<()> {
    let mut fds = vec![PollFd::new(events, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
    fds.extend(requests.map(|r| PollFd::from_borrowed_fd(r.as_fd(), PollFlags::IN)));
    match poll(&mut fds, None) {
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
        MachineEvent::Reset => {
            log::info!("the guest reset itself, which ends it");
            Ended::Guest
        }
        // Some guests reboot by a triple fault, so it is no failure of the monitor.
        MachineEvent::TripleFault(fault) => {
            log::error!("the guest ended by {fault}");
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

/// This process, as the controller sees it.
#[derive(Debug)]
pub(crate) struct ProcessHost;

impl Host for ProcessHost {
    fn set_up_logger(&mut self, wanted: &config::Logger) -> io::Result<()> {
        logger::set_up(wanted)
    }

    fn standard_io(&mut self) -> io::Result<SerialSetup> {
        Ok(SerialSetup {
            output: Some(Output::stdout()?),
            input: Some(rustix::stdio::stdin().as_fd().try_clone_to_owned()?),
            limit: RateLimiterConfig::default(),
        })
    }

    fn fork(&mut self, plan: ForkPlan) -> io::Result<()> {
        process::reap_automatically();
        let _signals = signals::block();
        let log = logger::hold();
        match process::fork()? {
            ForkResult::Child => {
                drop(log);
                // `_signals` is never dropped here: signals stay blocked until the child handles
                // them itself.
                child::run(plan)
            }
            ForkResult::Parent => {
                plan.children.into_iter().filter_map(|child| child.api).for_each(ApiServer::leave_to_fork);
                Ok(())
            }
        }
    }

    fn fork_writer(&mut self, kept: Vec<RawFd>, work: Box<dyn FnOnce() -> bool>) -> io::Result<()> {
        process::reap_automatically();
        let _signals = signals::block();
        let log = logger::hold();
        match process::fork()? {
            ForkResult::Child => {
                drop(log);
                child::write(kept, work)
            }
            ForkResult::Parent => Ok(()),
        }
    }

    fn asked_to_end(&self) -> Option<BorrowedFd<'_>> {
        signals::descriptor()
    }

    fn guest_starts(&mut self, with_standard_io: bool) {
        if with_standard_io {
            terminal::set_raw();
        }
    }
}
