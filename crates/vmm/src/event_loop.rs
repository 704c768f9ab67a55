//! The main thread's loop: commands from the API, the guest's end, signals.
//!
//! The controller has the API's requests. While it carries out a command that takes long it answers
//! questions itself, and stops for a signal.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};
use std::time::Duration;

use control::api::{ApiServer, Request, Requests};
use control::fork::Family;
use control::{CommandError, Controller, Host};
use machine::legacy::{Output, SerialSetup};
use machine::{EventSource, MachineEvent};
use rustix::event::{PollFd, PollFlags, poll};
use virtio::rate_limiter::RateLimiterConfig;

use crate::process::{self, Side};
use crate::signals::Signals;
use crate::{child, logger, signals, terminal};

/// How long the guest's last output may take to be carried out when the process ends.
const LAST_OUTPUT: Duration = Duration::from_secs(1);

/// How long the last writes to the guest's overlays may take when the process ends.
const LAST_WRITES: Duration = Duration::from_secs(5);

/// What ended the loop.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Ended {
    /// The guest, by itself.
    Guest,
    /// The guest, because it could not be run any further.
    Fault,
    /// A signal.
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
        if let Some(signal) = signals.asked() {
            break Ended::Signal(signal);
        }
        if let Some(event) = events.take() {
            break guest_ended(&event);
        }
        // One at a time, so that an end is seen between them.
        if let Some(Request { command, reply_to }) = controller.requests().and_then(Requests::try_recv) {
            reply_to.send(controller.run(command));
        }
    };
    controller.drain_serial(LAST_OUTPUT);
    Ok(ended)
}

/// What is left to do for a microVM when the process ends, whether it was ever started or not.
pub(crate) fn end<H: Host>(controller: &mut Controller<H>) {
    controller.give_up_merges();
    controller.close_disks(LAST_WRITES);
    controller.remove_socket_files();
}

/// Waits until any of them has something.
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
            log::info!("the guest switched itself off");
            Ended::Guest
        }
        MachineEvent::Reset => {
            log::info!("the guest reset itself, which ends it");
            Ended::Guest
        }
        // A guest may reboot by a triple fault, so it is no failure of the monitor's.
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

/// This process, as the controller uses it.
#[derive(Debug)]
pub(crate) struct ProcessHost;

impl Host for ProcessHost {
    fn set_up_logger(&mut self, wanted: &config::Logger) -> Result<(), CommandError> {
        logger::set_up(wanted).map_err(|error| {
            let path = wanted.log_path.as_deref().unwrap_or("".as_ref());
            CommandError::new(format_args!("cannot open the log {}: {error}", path.display()))
        })
    }

    fn standard_io(&mut self) -> io::Result<SerialSetup> {
        Ok(SerialSetup {
            output: Some(Output::stdout()?),
            input: Some(rustix::stdio::stdin().as_fd().try_clone_to_owned()?),
            limit: RateLimiterConfig::default(),
        })
    }

    fn fork(&mut self, family: Family) -> io::Result<()> {
        process::reap_automatically();
        let _signals = signals::hold();
        let log = logger::hold();
        match process::fork()? {
            Side::Child => {
                drop(log);
                // Signals wait on until the child has its own way to be told of them: it never comes back to where this would end.
                child::live(family)
            }
            Side::Parent => {
                family.seeds.into_iter().filter_map(|seed| seed.api).for_each(ApiServer::leave_to_fork);
                Ok(())
            }
        }
    }

    fn fork_writer(&mut self, kept: Vec<RawFd>, work: Box<dyn FnOnce() -> bool>) -> io::Result<()> {
        process::reap_automatically();
        let _signals = signals::hold();
        let log = logger::hold();
        match process::fork()? {
            Side::Child => {
                drop(log);
                child::write(kept, work)
            }
            Side::Parent => Ok(()),
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
