//! A debugger's view of a vCPU: what its thread asks of the vCPU's thread, and the reports that it
//! gets.
//!
//! # Invariants
//!
//! - A held vCPU does not run, whatever its owner asks. The owner's pause and the debugger's hold
//!   are independent: the vCPU runs only if neither is in force.
//! - Each request but [`DebugRequest::Attach`] gets one report. [`DebugReport::Stopped`] comes
//!   without a request, and the vCPU is held from then on.
//! - A vCPU without a debugger has no [`DebugPort`], and pays nothing for this module.
//!
//! # Errors
//!
//! What KVM refuses is part of the report. A vCPU thread that has ended sends none any more.

use std::sync::Arc;
use std::sync::mpsc::Sender;

use kvm_bindings::{KVM_GUESTDBG_USE_SW_BP, kvm_fpu, kvm_guest_debug, kvm_regs, kvm_sregs};
use kvm_ioctls::VcpuFd;
use sync::EventFd;

use crate::kvm::{Ioctl, KvmError};

/// The exception of an `int3` instruction (#BP).
pub(crate) const BREAKPOINT_EXCEPTION: u32 = 3;

/// The registers that a debugger sees.
#[derive(Debug, Clone, Copy, PartialEq, Default)]
pub(crate) struct CpuRegisters {
    pub(crate) general: kvm_regs,
    pub(crate) system: kvm_sregs,
    pub(crate) float: kvm_fpu,
}

/// Why a vCPU left the guest for the debugger (`KVM_EXIT_DEBUG`).
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct DebugExit {
    /// The exception: #DB (1) or #BP (3).
    pub(crate) exception: u32,
    /// The linear address of the instruction: at an `int3`, or after a step or an access.
    pub(crate) pc: u64,
    /// The cause of a #DB, as in the register DR6.
    pub(crate) dr6: u64,
}

/// What the debugger's thread asks of a vCPU's thread.
#[derive(Debug, Clone)]
pub(crate) enum DebugRequest {
    /// Connects the debugger, which holds the vCPU from now on. Comes once, before the others.
    Attach(ReportSender),
    /// Hold the vCPU: [`DebugReport::Held`].
    Hold,
    /// End the hold, and run the guest with these breakpoints: [`DebugReport::Released`].
    Release(Box<kvm_guest_debug>),
    /// Only while held: [`DebugReport::Registers`].
    Read,
    /// Only while held: [`DebugReport::Written`].
    Write(Box<CpuRegisters>),
}

/// What a vCPU's thread reports to the debugger's.
#[derive(Debug)]
pub(crate) enum DebugReport {
    /// The vCPU is held as requested.
    Held,
    /// The vCPU is held because of this exit.
    Stopped(DebugExit),
    /// The vCPU is released; it stays held after an error.
    Released(Result<(), KvmError>),
    /// The registers.
    Registers(Box<Result<CpuRegisters, KvmError>>),
    /// The registers are set.
    Written(Result<(), KvmError>),
}

/// Sends the reports of one vCPU, and wakes the debugger's thread.
#[derive(Debug, Clone)]
pub(crate) struct ReportSender {
    pub(crate) vcpu: u8,
    pub(crate) reports: Sender<(u8, DebugReport)>,
    pub(crate) wake: Arc<EventFd>,
}

impl ReportSender {
    fn send(&self, report: DebugReport) {
        // The debugger's thread may have ended.
        if self.reports.send((self.vcpu, report)).is_ok() {
            self.wake.signal();
        }
    }
}

/// A vCPU thread's end of the debugger.
#[derive(Debug)]
pub(super) struct DebugPort {
    reports: ReportSender,
    held: bool,
    /// Whether `int3` instructions of the guest are the debugger's first.
    traps_int3: bool,
}

impl DebugPort {
    /// The port of a vCPU that the debugger holds.
    pub(super) fn new(reports: ReportSender) -> Self {
        DebugPort { reports, held: true, traps_int3: false }
    }

    /// Whether the debugger keeps the vCPU from running.
    pub(super) fn holds(&self) -> bool {
        self.held
    }

    /// Whether the debugger takes `int3` instructions.
    pub(super) fn traps_int3(&self) -> bool {
        self.traps_int3
    }

    /// Holds the vCPU because of an exit, and reports it.
    pub(super) fn stop(&mut self, fd: &VcpuFd, exit: DebugExit) {
        self.hold(fd);
        self.reports.send(DebugReport::Stopped(exit));
    }

    /// Serves a request other than `Attach`. The vCPU is not in the guest.
    pub(super) fn serve(&mut self, fd: &VcpuFd, request: &DebugRequest) {
        let report = match request {
            DebugRequest::Attach(_) => return,
            DebugRequest::Hold => {
                self.hold(fd);
                DebugReport::Held
            }
            DebugRequest::Release(debug) => DebugReport::Released(self.release(fd, debug)),
            DebugRequest::Read => DebugReport::Registers(Box::new(read(fd))),
            DebugRequest::Write(registers) => DebugReport::Written(write(fd, registers)),
        };
        self.reports.send(report);
    }

    fn hold(&mut self, fd: &VcpuFd) {
        if !self.held {
            self.held = true;
            // Notifies the guest's watchdogs that time will jump. KVM refuses it for a guest that
            // has set up no such clock.
            let _ = fd.kvmclock_ctrl();
        }
    }

    fn release(&mut self, fd: &VcpuFd, debug: &kvm_guest_debug) -> Result<(), KvmError> {
        fd.set_guest_debug(debug).ioctl("KVM_SET_GUEST_DEBUG")?;
        self.traps_int3 = debug.control & KVM_GUESTDBG_USE_SW_BP != 0;
        self.held = false;
        Ok(())
    }
}

fn read(fd: &VcpuFd) -> Result<CpuRegisters, KvmError> {
    Ok(CpuRegisters {
        general: fd.get_regs().ioctl("KVM_GET_REGS")?,
        system: fd.get_sregs().ioctl("KVM_GET_SREGS")?,
        float: fd.get_fpu().ioctl("KVM_GET_FPU")?,
    })
}

/// Sets the registers that differ. KVM checks them.
fn write(fd: &VcpuFd, new: &CpuRegisters) -> Result<(), KvmError> {
    let old = read(fd)?;
    // First, because KVM refuses most.
    if new.system != old.system {
        fd.set_sregs(&new.system).ioctl("KVM_SET_SREGS")?;
    }
    if new.float != old.float {
        fd.set_fpu(&new.float).ioctl("KVM_SET_FPU")?;
    }
    if new.general != old.general {
        fd.set_regs(&new.general).ioctl("KVM_SET_REGS")?;
    }
    Ok(())
}
