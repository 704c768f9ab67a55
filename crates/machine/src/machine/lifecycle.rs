//! A machine that is paused and a machine that runs.

use std::ops::Deref;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::build;
use super::error::{SaveError, StartError};
use super::instance::Machine;
use super::setup::{Restore, Setup};
use crate::chipset::ChipsetState;
use crate::cpu::StateFormat;
use crate::state::MachineState;
use crate::vcpu::{PauseWaitError, VcpuHandle, VcpuThreadDied};

/// How long vCPUs may take to pause: one may wait for a page.
pub const VCPU_TIMEOUT: Duration = Duration::from_secs(5);

/// How long requests in flight may take when a machine is paused.
pub const DRAIN_TIMEOUT: Duration = Duration::from_secs(10);

/// Why a machine was not paused.
#[derive(Debug, thiserror::Error)]
pub enum PauseError {
    /// A vCPU or a device did not pause in time. The machine runs.
    #[error("the microVM was not paused: {why}")]
    Busy {
        /// The machine.
        machine: Running,
        /// The vCPU or the I/O worker that did not pause.
        why: String,
    },
    /// A bug in this monitor. The machine is lost.
    #[error(transparent)]
    ThreadDied(#[from] VcpuThreadDied),
}

/// A machine whose vCPUs and devices are paused: built, restored or paused.
#[derive(Debug)]
pub struct Paused(Box<Machine>);

/// A machine whose vCPUs run.
#[derive(Debug)]
pub struct Running(Box<Machine>);

impl Paused {
    /// Builds a machine, ready to run its first instruction.
    pub fn build(setup: Setup<'_>) -> Result<Self, StartError> {
        build::build(setup).map(|machine| Paused(Box::new(machine)))
    }

    /// Restores a saved machine. Its guest learns that it was restored ([`crate::vm_gen_id`]).
    pub fn restore(restore: Restore<'_>) -> Result<Self, StartError> {
        build::restore(restore).map(|machine| Paused(Box::new(machine)))
    }

    /// Saves all state but guest memory. The machine stays paused; it can be resumed or saved
    /// again.
    pub fn save(&self) -> Result<MachineState, SaveError> {
        let format = Arc::new(StateFormat::of(&self.kvm, &self.vm, &self.more_msrs)?);
        // Timers and interrupt controllers keep running. An interrupt that the chipset passes to a
        // vCPU during the save is in the state of both.
        let chipset = ChipsetState::save(&self.vm.shared_fd())?;
        self.vcpus.iter().try_for_each(|vcpu| vcpu.request_state(&format))?;
        // All answers are taken, also if one is an error: none may be left in a channel.
        let vcpus = self.vcpus.iter().map(VcpuHandle::take_state).collect::<Vec<_>>();
        let vcpus = vcpus.into_iter().map(|state| Ok(state??)).collect::<Result<_, SaveError>>()?;
        Ok(MachineState {
            vcpus,
            chipset,
            devices: self.devices.save(),
            serial: self.serial.save(),
            keyboard: self.keyboard.save(),
            cmos: self.cmos.save(),
        })
    }

    /// Resumes the devices, then the vCPUs.
    pub fn resume(self) -> Result<Running, VcpuThreadDied> {
        if let Some(workers) = self.0.devices.workers() {
            workers.resume();
        }
        self.0.vcpus.iter().try_for_each(VcpuHandle::resume)?;
        Ok(Running(self.0))
    }
}

impl Running {
    /// Pauses all vCPUs, then the devices. When it returns, each access that a vCPU had begun is
    /// complete, and no request is in flight.
    ///
    /// A page server may keep a vCPU waiting, and a disk a request. If they take longer than
    /// [`VCPU_TIMEOUT`] or [`DRAIN_TIMEOUT`], the machine runs on.
    pub fn pause(self) -> Result<Paused, PauseError> {
        self.pause_within(VCPU_TIMEOUT, DRAIN_TIMEOUT)
    }

    /// [`Running::pause`], with other timeouts for the vCPUs and then for the devices.
    pub fn pause_within(self, vcpus: Duration, devices: Duration) -> Result<Paused, PauseError> {
        self.0.vcpus.iter().try_for_each(VcpuHandle::request_pause)?;
        let deadline = Instant::now() + vcpus;
        match self.0.vcpus.iter().try_for_each(|vcpu| vcpu.wait_paused(deadline)) {
            Ok(()) => {}
            Err(PauseWaitError::ThreadDied(died)) => return Err(died.into()),
            // vCPUs that have paused resume now. One that has not resumes after its pause.
            Err(busy @ PauseWaitError::Busy(_)) => {
                self.0.vcpus.iter().try_for_each(VcpuHandle::resume)?;
                return Err(PauseError::Busy { machine: self, why: busy.to_string() });
            }
        }
        let drained = self.0.devices.workers().map_or(Ok(()), |workers| workers.pause(devices));
        let paused = Paused(self.0);
        match drained {
            Ok(()) => Ok(paused),
            Err(busy) => Err(PauseError::Busy { machine: paused.resume()?, why: busy.to_string() }),
        }
    }
}

impl Deref for Paused {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}

impl Deref for Running {
    type Target = Machine;

    fn deref(&self) -> &Machine {
        &self.0
    }
}
