//! [`Target`]: the guest as the protocol's state machine (`gdbstub`) asks for it.
//!
//! vCPU *n* is thread *n* + 1. What KVM refuses is an error for the debugger, which continues. A
//! vCPU thread that has died ends the session.

use gdbstub::common::{Signal, Tid};
use gdbstub::stub::MultiThreadStopReason;
use gdbstub::target::ext::base::BaseOps;
use gdbstub::target::ext::base::multithread::{
    MultiThreadBase, MultiThreadResume, MultiThreadResumeOps, MultiThreadSchedulerLocking,
    MultiThreadSchedulerLockingOps, MultiThreadSingleStep, MultiThreadSingleStepOps,
};
use gdbstub::target::ext::breakpoints::{
    Breakpoints, BreakpointsOps, HwBreakpoint, HwBreakpointOps, HwWatchpoint, HwWatchpointOps, SwBreakpoint,
    SwBreakpointOps, WatchKind,
};
use gdbstub::target::ext::thread_extra_info::{ThreadExtraInfo, ThreadExtraInfoOps};
use gdbstub::target::{TargetError, TargetResult};

use super::error::DebugError;
use super::guest::{Action, Guest, Stop};
use super::hardware::Watch;
use super::registers::{GdbRegisters, X86_64};

/// A guest, with what the debugger plans for its next run.
#[derive(Debug)]
pub(super) struct Target {
    /// The guest.
    pub(super) guest: Guest,
    actions: Vec<Option<Action>>,
    /// What vCPUs without an action do.
    others: Action,
}

impl Target {
    /// The target of a new session.
    pub(super) fn new(guest: Guest) -> Self {
        Target { actions: vec![None; guest.vcpu_count()], guest, others: Action::Run }
    }

    fn vcpu(&self, tid: Tid) -> Option<usize> {
        Some(tid.get() - 1).filter(|vcpu| *vcpu < self.guest.vcpu_count())
    }

    fn set_action(&mut self, tid: Tid, action: Action) {
        // A thread that does not exist needs no action.
        if let Some(vcpu) = self.vcpu(tid) {
            self.actions[vcpu] = Some(action);
        }
    }
}

/// The thread of a vCPU.
pub(super) fn thread(vcpu: usize) -> Tid {
    Tid::MIN.saturating_add(vcpu)
}

/// The report of a stop, as the protocol has it.
pub(super) fn reason(stop: Stop) -> MultiThreadStopReason<u64> {
    let tid = thread(stop.vcpu());
    match stop {
        Stop::Software(_) => MultiThreadStopReason::SwBreak(tid),
        Stop::Hardware(_) => MultiThreadStopReason::HwBreak(tid),
        Stop::Step(_) => MultiThreadStopReason::SignalWithThread { tid, signal: Signal::SIGTRAP },
        Stop::Watch { address, watch, .. } => {
            let kind = if watch == Watch::Write { WatchKind::Write } else { WatchKind::ReadWrite };
            MultiThreadStopReason::Watch { tid, kind, addr: address }
        }
    }
}

/// What KVM refuses does not end the session.
fn refused(error: DebugError) -> TargetError<DebugError> {
    match error {
        DebugError::Kvm(error) => {
            log::debug!("a debugger's request failed: {error}");
            TargetError::NonFatal
        }
        other => TargetError::Fatal(other),
    }
}

impl gdbstub::target::Target for Target {
    type Arch = X86_64;
    type Error = DebugError;

    fn base_ops(&mut self) -> BaseOps<'_, X86_64, DebugError> {
        BaseOps::MultiThread(self)
    }

    fn support_breakpoints(&mut self) -> Option<BreakpointsOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadBase for Target {
    fn read_registers(&mut self, registers: &mut GdbRegisters, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid).ok_or(TargetError::NonFatal)?;
        *registers = GdbRegisters::of(self.guest.registers(vcpu).map_err(refused)?);
        Ok(())
    }

    fn write_registers(&mut self, registers: &GdbRegisters, tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid).ok_or(TargetError::NonFatal)?;
        let mut cpu = *self.guest.registers(vcpu).map_err(refused)?;
        if !registers.apply_to(&mut cpu) {
            return Err(TargetError::NonFatal);
        }
        self.guest.set_registers(vcpu, &cpu).map_err(refused)
    }

    fn read_addrs(&mut self, start: u64, data: &mut [u8], tid: Tid) -> TargetResult<usize, Self> {
        let vcpu = self.vcpu(tid).ok_or(TargetError::NonFatal)?;
        match self.guest.read(vcpu, start, data).map_err(refused)? {
            0 if !data.is_empty() => Err(TargetError::NonFatal),
            count => Ok(count),
        }
    }

    fn write_addrs(&mut self, start: u64, data: &[u8], tid: Tid) -> TargetResult<(), Self> {
        let vcpu = self.vcpu(tid).ok_or(TargetError::NonFatal)?;
        let written = self.guest.write(vcpu, start, data).map_err(refused)?;
        if written { Ok(()) } else { Err(TargetError::NonFatal) }
    }

    fn list_active_threads(&mut self, each: &mut dyn FnMut(Tid)) -> Result<(), DebugError> {
        (0..self.guest.vcpu_count()).map(thread).for_each(each);
        Ok(())
    }

    fn support_resume(&mut self) -> Option<MultiThreadResumeOps<'_, Self>> {
        Some(self)
    }

    fn support_thread_extra_info(&mut self) -> Option<ThreadExtraInfoOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadResume for Target {
    fn resume(&mut self) -> Result<(), DebugError> {
        let (actions, others) = (&self.actions, self.others);
        self.guest.plan(|vcpu| actions[vcpu].unwrap_or(others));
        self.guest.run()
    }

    fn clear_resume_actions(&mut self) -> Result<(), DebugError> {
        self.actions.fill(None);
        self.others = Action::Run;
        Ok(())
    }

    fn set_resume_action_continue(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), DebugError> {
        self.set_action(tid, Action::Run);
        Ok(())
    }

    fn support_single_step(&mut self) -> Option<MultiThreadSingleStepOps<'_, Self>> {
        Some(self)
    }

    fn support_scheduler_locking(&mut self) -> Option<MultiThreadSchedulerLockingOps<'_, Self>> {
        Some(self)
    }
}

impl MultiThreadSingleStep for Target {
    fn set_resume_action_step(&mut self, tid: Tid, _: Option<Signal>) -> Result<(), DebugError> {
        self.set_action(tid, Action::Step);
        Ok(())
    }
}

impl MultiThreadSchedulerLocking for Target {
    fn set_resume_action_scheduler_lock(&mut self) -> Result<(), DebugError> {
        self.others = Action::Stay;
        Ok(())
    }
}

impl ThreadExtraInfo for Target {
    fn thread_extra_info(&self, tid: Tid, buffer: &mut [u8]) -> Result<usize, DebugError> {
        let text = format!("vCPU {}", tid.get() - 1);
        let len = text.len().min(buffer.len());
        buffer[..len].copy_from_slice(&text.as_bytes()[..len]);
        Ok(len)
    }
}

impl Breakpoints for Target {
    fn support_sw_breakpoint(&mut self) -> Option<SwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_breakpoint(&mut self) -> Option<HwBreakpointOps<'_, Self>> {
        Some(self)
    }

    fn support_hw_watchpoint(&mut self) -> Option<HwWatchpointOps<'_, Self>> {
        Some(self)
    }
}

impl SwBreakpoint for Target {
    fn add_sw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        self.guest.add_software(addr).map_err(refused)
    }

    fn remove_sw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.guest.remove_software(addr))
    }
}

impl HwBreakpoint for Target {
    fn add_hw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.guest.add_hardware(addr, 1, Watch::Execute))
    }

    fn remove_hw_breakpoint(&mut self, addr: u64, _: usize) -> TargetResult<bool, Self> {
        Ok(self.guest.remove_hardware(addr, 1, Watch::Execute))
    }
}

/// What the CPU watches for a kind. It cannot watch reads alone.
fn watch(kind: WatchKind) -> Option<Watch> {
    match kind {
        WatchKind::Write => Some(Watch::Write),
        WatchKind::ReadWrite => Some(Watch::Access),
        WatchKind::Read => None,
    }
}

impl HwWatchpoint for Target {
    fn add_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(watch(kind).is_some_and(|watch| self.guest.add_hardware(addr, len, watch)))
    }

    fn remove_hw_watchpoint(&mut self, addr: u64, len: u64, kind: WatchKind) -> TargetResult<bool, Self> {
        Ok(watch(kind).is_some_and(|watch| self.guest.remove_hardware(addr, len, watch)))
    }
}
