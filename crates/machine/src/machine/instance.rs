//! A machine's parts, and what can be done with them whether it runs or not.

use std::sync::Arc;
use std::time::Duration;

use memory::{GuestRam, PageSet, TakeDirtyError};

use crate::debug::{DebugEnd, Debugger, DebuggerAttached, KeptOut};
use crate::devices::Devices;
use crate::kvm::{Ioctl, Kvm, KvmError, Vm};
use crate::legacy::{Cmos, ConsoleThread, I8042, KeyboardFull, SerialPort};
use crate::page_watch::PageWatch;
use crate::stats::MachineStats;
use crate::vcpu::VcpuHandle;

/// A machine, running or paused.
///
/// Its fields are dropped in order. Before that, all vCPU threads are asked to stop.
#[derive(Debug)]
pub struct Machine {
    /// Before the vCPUs: its thread talks to theirs.
    pub(super) debugger: Option<Debugger>,
    /// Before the vCPUs: its drop lets go of vCPU threads that wait for a page, which the drop of
    /// `vcpus` joins.
    pub(super) page_watch: Option<PageWatch>,
    pub(super) vcpus: Vec<VcpuHandle>,
    pub(super) devices: Devices,
    pub(super) console: ConsoleThread,
    pub(super) serial: Arc<SerialPort>,
    pub(super) keyboard: Arc<I8042>,
    pub(super) cmos: Arc<Cmos>,
    /// MSRs that are saved even if KVM does not list them: a CPU template changes them.
    pub(super) more_msrs: Vec<u32>,
    pub(super) vm: Vm,
    pub(super) kvm: Kvm,
}

impl Drop for Machine {
    fn drop(&mut self) {
        // Before `page_watch` turns missing pages into zeros: no vCPU may run with these.
        self.vcpus.iter().for_each(VcpuHandle::request_stop);
    }
}

impl Machine {
    /// The devices, to be changed while they work.
    pub fn devices(&self) -> &Devices {
        &self.devices
    }

    /// A handle to the counters of all parts.
    pub fn stats(&self) -> MachineStats {
        MachineStats {
            vcpus: self.vcpus.iter().map(VcpuHandle::stats).collect(),
            serial: self.console.stats(),
            keyboard: self.keyboard.stats(),
            devices: self.devices.stats(),
        }
    }

    /// The guest's memory.
    pub fn ram(&self) -> &GuestRam {
        self.vm.ram()
    }

    /// The pages that the guest or its devices wrote since the last call; `None` if the machine
    /// does not track them.
    ///
    /// The pages count as not written from now on. A caller that fails to save them calls
    /// [`GuestRam::mark_dirty_again`]. After an error all of them still count as written.
    pub fn take_dirty_pages(&self) -> Result<Option<PageSet>, KvmError> {
        let regions = self.ram().regions();
        let taken = self.ram().take_dirty_pages(|index| {
            let size = usize::try_from(regions[index].size).unwrap_or(usize::MAX);
            // Memory slots are numbered as regions are.
            let slot = u32::try_from(index).unwrap_or(u32::MAX);
            self.vm.shared_fd().get_dirty_log(slot, size).ioctl("KVM_GET_DIRTY_LOG")
        });
        taken.map_err(|error| match error {
            TakeDirtyError::Log(error) => error,
            TakeDirtyError::Length(_) => KvmError::StateTooLarge("dirty pages"),
        })
    }

    /// Keeps debuggers out as long as the value lives, for a snapshot or a fork: the memory of a
    /// guest under a debugger has breakpoints. `None` if the machine has no debugger's socket.
    pub fn keep_debugger_out(&self) -> Result<Option<KeptOut>, DebuggerAttached> {
        self.debugger.as_ref().map(Debugger::keep_out).transpose()
    }

    /// Reports the end of the guest to its debugger, if it has one, which is not served any more.
    pub fn end_debugging(&self, end: DebugEnd) {
        if let Some(debugger) = &self.debugger {
            debugger.end(end);
        }
    }

    /// Presses Ctrl+Alt+Del on the guest's keyboard. A paused guest sees it when it runs again.
    pub fn press_ctrl_alt_del(&self) -> Result<(), KeyboardFull> {
        self.keyboard.press_ctrl_alt_del()
    }

    /// Waits at most `limit` until the serial port's output is written. Returns whether it is.
    pub fn drain_serial(&self, limit: Duration) -> bool {
        self.console.drain(limit)
    }
}
