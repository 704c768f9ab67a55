//! [`Lifecycle`]: the machine of a microVM, in the phase that it is in.
//!
//! ```text
//!                 start              pause
//! Configured --------------> Running -------> Paused      (a bug left no machine: Stopped)
//!      |                        ^               | ^
//!      |                        '--- resume ----' |
//!      '------- load or fork, not resumed --------'
//! ```
//!
//! # Invariants
//!
//! - Nothing else changes the phase: the state is private here. Which commands are possible in
//!   which phase is in [`phase`](crate::phase).
//! - The machine is owned by its state. [`Paused`] and [`Running`] are types, so that only a paused
//!   machine can be saved or forked.
//!
//! # Errors
//!
//! An attempt to pause that fails leaves the machine running. A machine whose vCPU thread died is
//! lost: an event that ends the process is posted, and the state is Stopped.

use std::time::Duration;

use machine::machine::{Machine, PauseError};
use machine::vcpu::VcpuThreadDied;
use machine::{EventSink, MachineEvent, NoticeSink, Paused, Running, VcpuFault};

use crate::{CommandError, Phase};

/// The machine of a microVM and its phase.
#[derive(Debug)]
pub(crate) struct Lifecycle {
    state: State,
    /// Where the machine reports that it ends.
    events: EventSink,
}

#[derive(Debug)]
enum State {
    Configured,
    Running(Running),
    /// The task that pauses the machine has it.
    Pausing,
    Paused(Paused),
    /// There is no machine any more. The process ends.
    Stopped,
}

impl Lifecycle {
    /// A microVM that has no machine yet.
    pub(crate) fn new(events: EventSink) -> Self {
        Lifecycle { state: State::Configured, events }
    }

    /// The phase as the user sees it.
    ///
    /// A machine that is being paused counts as running. Stopped counts as paused: the process is
    /// about to end, and no command finds a machine.
    pub(crate) fn phase(&self) -> Phase {
        match &self.state {
            State::Configured => Phase::Configured,
            State::Running(_) | State::Pausing => Phase::Running,
            State::Paused(_) | State::Stopped => Phase::Paused,
        }
    }

    /// Whether there is or was a machine.
    pub(crate) fn has_started(&self) -> bool {
        self.phase() != Phase::Configured
    }

    /// Whether the machine is lost.
    pub(crate) fn is_stopped(&self) -> bool {
        matches!(self.state, State::Stopped)
    }

    /// Whether the machine runs, and is not being paused.
    pub(crate) fn is_running(&self) -> bool {
        matches!(self.state, State::Running(_))
    }

    /// The machine, running or paused.
    pub(crate) fn machine(&self) -> Option<&Machine> {
        match &self.state {
            State::Running(machine) => Some(machine),
            State::Paused(machine) => Some(machine),
            State::Configured | State::Pausing | State::Stopped => None,
        }
    }

    /// The machine if it is paused.
    pub(crate) fn paused(&self) -> Option<&Paused> {
        if let State::Paused(machine) = &self.state { Some(machine) } else { None }
    }

    /// Another sender of the machine's events, for a machine to be built.
    pub(crate) fn events(&self) -> std::io::Result<EventSink> {
        self.events.try_clone()
    }

    /// Posts notices about the guest.
    pub(crate) fn notices(&self) -> NoticeSink {
        self.events.notices()
    }

    /// Starts a machine that was built or restored, and lets it run if `resume`. On an error there
    /// is no machine, as before.
    pub(crate) fn start(&mut self, machine: Paused, resume: bool) -> Result<(), VcpuThreadDied> {
        self.state = if resume { State::Running(machine.resume()?) } else { State::Paused(machine) };
        Ok(())
    }

    /// Pauses a running machine, which may take `limit` for the vCPUs and as long for the devices.
    /// False if they take longer: the machine runs on then.
    pub(crate) fn pause_within(&mut self, limit: Duration) -> Result<bool, CommandError> {
        match std::mem::replace(&mut self.state, State::Stopped) {
            State::Running(machine) => match machine.pause_within(limit, limit) {
                Err(PauseError::Busy { machine, .. }) => {
                    self.state = State::Running(machine);
                    Ok(false)
                }
                paused => self.end_pause(paused).map(|()| true),
            },
            State::Stopped => Err(CommandError::NoMachine),
            other => {
                self.state = other;
                Ok(true)
            }
        }
    }

    /// Gives out a running machine to be paused elsewhere. [`Self::end_pause`],
    /// [`Self::abort_pause`] or [`Self::lose_paused`] has to follow. `None` if no machine runs.
    pub(crate) fn begin_pause(&mut self) -> Option<Running> {
        match std::mem::replace(&mut self.state, State::Pausing) {
            State::Running(machine) => Some(machine),
            other => {
                self.state = other;
                None
            }
        }
    }

    /// Takes the machine back from an attempt to pause it.
    pub(crate) fn end_pause(&mut self, paused: Result<Paused, PauseError>) -> Result<(), CommandError> {
        match paused {
            Ok(machine) => {
                self.state = State::Paused(machine);
                Ok(())
            }
            Err(PauseError::Busy { machine, why }) => {
                self.state = State::Running(machine);
                Err(CommandError::Pause(why))
            }
            Err(PauseError::ThreadDied(gone)) => Err(self.lose(&gone)),
        }
    }

    /// Takes back a machine that was given out and runs on.
    pub(crate) fn abort_pause(&mut self, machine: Running) {
        self.state = State::Running(machine);
    }

    /// Notes that a machine that was given out does not come back.
    pub(crate) fn lose_paused(&mut self) -> CommandError {
        self.state = State::Stopped;
        CommandError::NoMachine
    }

    /// Resumes a paused machine. One that runs already is left alone.
    pub(crate) fn resume(&mut self) -> Result<(), CommandError> {
        match std::mem::replace(&mut self.state, State::Stopped) {
            State::Paused(machine) => match machine.resume() {
                Ok(machine) => {
                    self.state = State::Running(machine);
                    Ok(())
                }
                Err(gone) => Err(self.lose(&gone)),
            },
            State::Stopped => Err(CommandError::NoMachine),
            other => {
                self.state = other;
                Ok(())
            }
        }
    }

    /// Notes that a vCPU thread died, which is a bug in this monitor, and ends the process.
    fn lose(&mut self, gone: &VcpuThreadDied) -> CommandError {
        self.state = State::Stopped;
        log::error!("{gone}");
        let fault = VcpuFault { vcpu: gone.0, reason: gone.to_string(), instruction: None };
        self.events.post(MachineEvent::Fatal(fault));
        CommandError::VcpuDied(gone.to_string())
    }
}
