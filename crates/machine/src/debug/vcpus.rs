//! The vCPUs as the debugger's thread reaches them: held together, released one by one.
//!
//! # Invariants
//!
//! - A vCPU's registers are asked for only while it is held.
//! - A wait for a report ends: a vCPU leaves the guest at a signal, and a thread that has ended is
//!   noticed.
//! - Reports that come unasked are kept in order, for [`Vcpus::take_stop`].

use std::collections::VecDeque;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::Duration;

use kvm_bindings::kvm_guest_debug;
use sync::EventFd;

use super::error::DebugError;
use crate::vcpu::debug::{CpuRegisters, DebugExit, DebugReport, DebugRequest, ReportSender};
use crate::vcpu::{DebugLink, VcpuHandle, VcpuThreadDied};

/// How long a vCPU may take before it gets another signal.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(2);

/// All vCPUs of a guest, held.
#[derive(Debug)]
pub(super) struct Vcpus {
    vcpus: Vec<Vcpu>,
    reports: Receiver<(u8, DebugReport)>,
    wake: Arc<EventFd>,
    stops: VecDeque<(usize, DebugExit)>,
}

#[derive(Debug)]
struct Vcpu {
    link: DebugLink,
    held: bool,
    /// The registers, once read. Only while held.
    registers: Option<Box<CpuRegisters>>,
}

impl Vcpus {
    /// Attaches to vCPUs that have not run yet, and holds them. `wake` is signalled at each report.
    pub(super) fn attach(handles: &[VcpuHandle], wake: EventFd) -> Result<Self, VcpuThreadDied> {
        let (sender, reports) = channel();
        let wake = Arc::new(wake);
        let mut vcpus = Vec::with_capacity(handles.len());
        for (id, handle) in (0..).zip(handles) {
            let link = handle.debug_link().ok_or(VcpuThreadDied(id))?;
            let reports = ReportSender { vcpu: id, reports: sender.clone(), wake: Arc::clone(&wake) };
            if !link.send(DebugRequest::Attach(reports)) {
                return Err(VcpuThreadDied(id));
            }
            vcpus.push(Vcpu { link, held: true, registers: None });
        }
        Ok(Vcpus { vcpus, reports, wake, stops: VecDeque::new() })
    }

    /// The number of vCPUs.
    pub(super) fn count(&self) -> usize {
        self.vcpus.len()
    }

    /// Readable once there may be a stop to [take](Self::take_stop).
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// Whether a vCPU is held.
    pub(super) fn is_held(&self, index: usize) -> bool {
        self.vcpus[index].held
    }

    /// Holds all vCPUs.
    pub(super) fn hold_all(&mut self) -> Result<(), DebugError> {
        let running: Vec<usize> = (0..self.count()).filter(|index| !self.vcpus[*index].held).collect();
        for index in &running {
            self.send(*index, DebugRequest::Hold)?;
            self.vcpus[*index].link.signal();
        }
        // Each of these owes a report, whether it stops by itself meanwhile or not.
        let mut owing = running;
        while let Some(first) = owing.first() {
            match self.reports.recv_timeout(SIGNAL_INTERVAL) {
                Ok((id, DebugReport::Stopped(exit))) => self.note_stop(id.into(), exit),
                Ok((id, DebugReport::Held)) => {
                    let index = usize::from(id);
                    self.vcpus[index].held = true;
                    owing.retain(|other| *other != index);
                }
                Ok(_) => return Err(DebugError::OutOfOrder),
                Err(RecvTimeoutError::Timeout) => {
                    for index in &owing {
                        self.vcpus[*index].link.signal();
                    }
                }
                Err(RecvTimeoutError::Disconnected) => return Err(died(*first)),
            }
        }
        Ok(())
    }

    /// Lets one vCPU run with these breakpoints.
    pub(super) fn release(&mut self, index: usize, debug: kvm_guest_debug) -> Result<(), DebugError> {
        self.vcpus[index].registers = None;
        self.send(index, DebugRequest::Release(Box::new(debug)))?;
        match self.report(index)? {
            DebugReport::Released(released) => released?,
            _ => return Err(DebugError::OutOfOrder),
        }
        self.vcpus[index].held = false;
        Ok(())
    }

    /// The registers of a held vCPU.
    pub(super) fn registers(&mut self, index: usize) -> Result<&CpuRegisters, DebugError> {
        if self.vcpus[index].registers.is_none() {
            self.send(index, DebugRequest::Read)?;
            let registers = match self.report(index)? {
                DebugReport::Registers(registers) => *registers,
                _ => return Err(DebugError::OutOfOrder),
            }?;
            self.vcpus[index].registers = Some(Box::new(registers));
        }
        self.vcpus[index].registers.as_deref().ok_or(DebugError::OutOfOrder)
    }

    /// Sets the registers of a held vCPU.
    pub(super) fn set_registers(&mut self, index: usize, new: &CpuRegisters) -> Result<(), DebugError> {
        self.vcpus[index].registers = None;
        self.send(index, DebugRequest::Write(Box::new(*new)))?;
        match self.report(index)? {
            DebugReport::Written(written) => Ok(written?),
            _ => Err(DebugError::OutOfOrder),
        }
    }

    /// The next vCPU that stopped by itself, and is held since.
    pub(super) fn take_stop(&mut self) -> Result<Option<(usize, DebugExit)>, DebugError> {
        self.wake.take();
        while let Ok(report) = self.reports.try_recv() {
            match report {
                (id, DebugReport::Stopped(exit)) => self.note_stop(id.into(), exit),
                _ => return Err(DebugError::OutOfOrder),
            }
        }
        Ok(self.stops.pop_front())
    }

    fn note_stop(&mut self, index: usize, exit: DebugExit) {
        self.vcpus[index].held = true;
        self.stops.push_back((index, exit));
    }

    fn send(&self, index: usize, request: DebugRequest) -> Result<(), DebugError> {
        let sent = self.vcpus[index].link.send(request);
        if sent { Ok(()) } else { Err(died(index)) }
    }

    /// Waits for the report that a vCPU owes. The vCPUs stop by themselves meanwhile.
    fn report(&mut self, index: usize) -> Result<DebugReport, DebugError> {
        loop {
            match self.reports.recv_timeout(SIGNAL_INTERVAL) {
                Ok((id, DebugReport::Stopped(exit))) => self.note_stop(id.into(), exit),
                Ok((id, report)) if usize::from(id) == index => return Ok(report),
                Ok(_) => return Err(DebugError::OutOfOrder),
                Err(RecvTimeoutError::Timeout) => self.vcpus[index].link.signal(),
                Err(RecvTimeoutError::Disconnected) => return Err(died(index)),
            }
        }
    }
}

fn died(index: usize) -> DebugError {
    DebugError::ThreadDied(VcpuThreadDied(u8::try_from(index).unwrap_or(u8::MAX)))
}
