//! [`Guest`]: a guest under a debugger. What stops it, what the debugger reads and changes, and how
//! it runs on.
//!
//! # Stops
//!
//! If one vCPU stops, all are held. Of vCPUs that stopped at the same time one is reported. The
//! others come again when the guest runs on: a breakpoint stops a vCPU before its instruction. A
//! watch point does not, so its report is kept ([`Guest::next_stop`]).
//!
//! An exception that no breakpoint explains is the guest's own, and is delivered to it.
//!
//! # Breakpoints
//!
//! A software breakpoint ([`Patches`]) is for the address that the debugger names. The guest may
//! reach the byte by another address (a library that two processes map). Its vCPU then steps over
//! the byte while the others are held, and the debugger is not told.
//!
//! An address that is not mapped yet cannot be patched. Such a breakpoint gets a debug register, if
//! one is free. So a breakpoint in a kernel can be set before its page tables exist.

use std::collections::VecDeque;

use kvm_bindings::{
    KVM_GUESTDBG_BLOCKIRQ, KVM_GUESTDBG_ENABLE, KVM_GUESTDBG_INJECT_BP, KVM_GUESTDBG_INJECT_DB,
    KVM_GUESTDBG_SINGLESTEP, KVM_GUESTDBG_USE_HW_BP, KVM_GUESTDBG_USE_SW_BP, kvm_guest_debug,
    kvm_guest_debug_arch,
};
use memory::GuestRam;
use sync::EventFd;
use vm_memory::{Bytes, GuestAddress};

use super::error::DebugError;
use super::hardware::{DebugRegisters, Watch};
use super::paging::AddressSpace;
use super::software::Patches;
use super::vcpus::Vcpus;
use crate::vcpu::debug::{BREAKPOINT_EXCEPTION, CpuRegisters, DebugExit};

/// The part of memory that has one translation.
const PAGE: u64 = 4096;

/// DR6: a single step.
const DR6_STEP: u64 = 1 << 14;

/// What a vCPU does when the guest runs on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Action {
    /// It stays held.
    Stay,
    /// It runs.
    Run,
    /// It executes one instruction.
    Step,
}

/// Why the guest stopped. All vCPUs are held.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Stop {
    /// A vCPU is at a software breakpoint.
    Software(usize),
    /// A vCPU is at a hardware breakpoint.
    Hardware(usize),
    /// A vCPU has accessed what is watched.
    Watch {
        /// The vCPU.
        vcpu: usize,
        /// The address that is watched.
        address: u64,
        /// What is watched.
        watch: Watch,
    },
    /// A vCPU has made its step.
    Step(usize),
}

impl Stop {
    /// The vCPU that stopped.
    pub(super) fn vcpu(self) -> usize {
        match self {
            Stop::Software(vcpu) | Stop::Hardware(vcpu) | Stop::Step(vcpu) | Stop::Watch { vcpu, .. } => vcpu,
        }
    }
}

/// What an exit of a vCPU means.
#[derive(Debug, PartialEq, Eq)]
enum Meaning {
    Stop(Stop),
    /// The exception is the guest's: the flag that delivers it.
    Deliver(u32),
    /// A breakpoint, reached by another address.
    Alias,
}

/// A guest under a debugger.
#[derive(Debug)]
pub(super) struct Guest {
    vcpus: Vcpus,
    ram: GuestRam,
    patches: Patches,
    registers: DebugRegisters,
    /// What each vCPU does, or did last, and what is delivered to it then.
    plans: Vec<Plan>,
    /// Stops that have not been reported.
    unreported: VecDeque<Stop>,
    /// A vCPU that steps over a patched byte, and the byte's physical address.
    over: Option<(usize, u64)>,
    /// The vCPU that stopped last, whose address space breakpoints are in.
    current: usize,
    /// Whether KVM can keep interrupts away from a vCPU that steps.
    block_interrupts: bool,
}

#[derive(Debug, Clone, Copy)]
struct Plan {
    action: Action,
    deliver: u32,
}

impl Guest {
    /// A guest whose vCPUs are held. `block_interrupts`: KVM supports `KVM_GUESTDBG_BLOCKIRQ`.
    pub(super) fn new(vcpus: Vcpus, ram: GuestRam, block_interrupts: bool) -> Self {
        Guest {
            plans: vec![Plan { action: Action::Run, deliver: 0 }; vcpus.count()],
            vcpus,
            patches: Patches::new(ram.clone()),
            ram,
            registers: DebugRegisters::default(),
            unreported: VecDeque::new(),
            over: None,
            current: 0,
            block_interrupts,
        }
    }

    /// The number of vCPUs.
    pub(super) fn vcpu_count(&self) -> usize {
        self.vcpus.count()
    }

    /// The vCPU that stopped last.
    pub(super) fn current(&self) -> usize {
        self.current
    }

    /// Readable once [`Self::next_stop`] may have one.
    pub(super) fn wake(&self) -> &EventFd {
        self.vcpus.wake()
    }

    /// Stops all vCPUs.
    pub(super) fn hold(&mut self) -> Result<(), DebugError> {
        self.vcpus.hold_all()?;
        let over = self.end_step_over();
        while let Some((vcpu, exit)) = self.vcpus.take_stop()? {
            match self.meaning(vcpu, exit, over == Some(vcpu))? {
                Meaning::Stop(stop @ Stop::Watch { .. }) => self.unreported.push_back(stop),
                Meaning::Deliver(KVM_GUESTDBG_INJECT_DB) => self.plans[vcpu].deliver = KVM_GUESTDBG_INJECT_DB,
                // These vCPUs are before their instructions, or have made a step of their own.
                Meaning::Stop(_) | Meaning::Deliver(_) | Meaning::Alias => {}
            }
        }
        Ok(())
    }

    /// Sets what the vCPUs do when the guest runs on.
    pub(super) fn plan(&mut self, actions: impl Fn(usize) -> Action) {
        for (vcpu, plan) in self.plans.iter_mut().enumerate() {
            plan.action = actions(vcpu);
        }
    }

    /// Lets the vCPUs do what was planned. A stop that was not reported yet comes first.
    pub(super) fn run(&mut self) -> Result<(), DebugError> {
        let registers = &self.registers;
        self.unreported.retain(|stop| match stop {
            Stop::Watch { address, .. } => registers.watches(*address),
            _ => false,
        });
        if self.unreported.is_empty() { self.release() } else { Ok(()) }
    }

    /// The next stop of the guest, if it has stopped. Handles one stop of a vCPU at a time.
    pub(super) fn next_stop(&mut self) -> Result<Option<Stop>, DebugError> {
        // The vCPUs are held while there is one.
        if let Some(stop) = self.unreported.pop_front() {
            return Ok(Some(self.stopped(stop)));
        }
        let Some((vcpu, exit)) = self.vcpus.take_stop()? else { return Ok(None) };
        let over = self.end_step_over() == Some(vcpu);
        match self.meaning(vcpu, exit, over)? {
            Meaning::Stop(Stop::Step(_)) if self.plans[vcpu].action != Action::Step => self.run()?,
            Meaning::Stop(stop) => {
                self.hold()?;
                return Ok(Some(self.stopped(stop)));
            }
            Meaning::Deliver(exception) => {
                self.plans[vcpu].deliver = exception;
                if over { self.run()? } else { self.release_one(vcpu)? }
            }
            Meaning::Alias => self.step_over(vcpu, exit.pc)?,
        }
        // There may be another. A guest that stops all the time must not keep the caller here.
        self.vcpus.wake().signal();
        Ok(None)
    }

    /// Removes all breakpoints and lets all vCPUs run, without a debugger.
    pub(super) fn leave(&mut self) -> Result<(), DebugError> {
        let held = self.hold();
        self.patches.clear();
        self.registers = DebugRegisters::default();
        self.unreported.clear();
        self.plan(|_| Action::Run);
        held.and_then(|()| self.release())
    }

    /// The registers of a vCPU.
    pub(super) fn registers(&mut self, vcpu: usize) -> Result<&CpuRegisters, DebugError> {
        self.vcpus.registers(vcpu)
    }

    /// Sets the registers of a vCPU.
    pub(super) fn set_registers(&mut self, vcpu: usize, new: &CpuRegisters) -> Result<(), DebugError> {
        self.vcpus.set_registers(vcpu, new)
    }

    /// Reads memory in the address space of a vCPU, and returns how many bytes are mapped RAM.
    pub(super) fn read(&mut self, vcpu: usize, linear: u64, data: &mut [u8]) -> Result<usize, DebugError> {
        let space = AddressSpace::of(&self.vcpus.registers(vcpu)?.system);
        let mut done = 0;
        while done < data.len() {
            let Some((physical, len)) = self.piece(space, linear, done, data.len()) else { break };
            let piece = &mut data[done..done + len];
            if self.ram.populate(physical, len as u64).is_err()
                || self.ram.memory().read_slice(piece, GuestAddress(physical)).is_err()
            {
                break;
            }
            self.patches.hide(physical, piece);
            done += len;
        }
        Ok(done)
    }

    /// Writes memory in the address space of a vCPU. False if not all of it is mapped RAM: then the
    /// bytes before the first that is not are written.
    pub(super) fn write(&mut self, vcpu: usize, linear: u64, data: &[u8]) -> Result<bool, DebugError> {
        let space = AddressSpace::of(&self.vcpus.registers(vcpu)?.system);
        let mut done = 0;
        while done < data.len() {
            let Some((physical, len)) = self.piece(space, linear, done, data.len()) else { return Ok(false) };
            if !self.patches.write(physical, &data[done..done + len]) {
                return Ok(false);
            }
            done += len;
        }
        Ok(true)
    }

    /// Adds a software breakpoint. False if it cannot be had.
    pub(super) fn add_software(&mut self, linear: u64) -> Result<bool, DebugError> {
        let physical = self.physical(self.current, linear)?;
        Ok(match physical.filter(|physical| self.ram.contains(*physical, 1)) {
            Some(physical) => self.patches.add(linear, physical),
            None => self.registers.add(linear, 1, Watch::Execute),
        })
    }

    /// Removes a software breakpoint. Returns whether there was one.
    pub(super) fn remove_software(&mut self, linear: u64) -> bool {
        self.patches.remove(linear) || self.registers.remove(linear, 1, Watch::Execute)
    }

    /// Adds a breakpoint or watch point in debug registers. False if too few are free.
    pub(super) fn add_hardware(&mut self, linear: u64, len: u64, watch: Watch) -> bool {
        self.registers.add(linear, len, watch)
    }

    /// Removes such a breakpoint. Returns whether there was one.
    pub(super) fn remove_hardware(&mut self, linear: u64, len: u64, watch: Watch) -> bool {
        self.registers.remove(linear, len, watch)
    }

    /// The physical address of the bytes at `linear` + `done`, and how many of `len` in all are in
    /// that page.
    fn piece(&self, space: AddressSpace, linear: u64, done: usize, len: usize) -> Option<(u64, usize)> {
        let at = linear.checked_add(done as u64)?;
        let in_page = (PAGE - at % PAGE) as usize;
        let physical = space.translate(at, |address, len| self.entry(address, len))?;
        Some((physical, in_page.min(len - done)))
    }

    fn physical(&mut self, vcpu: usize, linear: u64) -> Result<Option<u64>, DebugError> {
        let space = AddressSpace::of(&self.vcpus.registers(vcpu)?.system);
        Ok(space.translate(linear, |address, len| self.entry(address, len)))
    }

    /// An entry of a page table.
    fn entry(&self, address: u64, len: usize) -> Option<u64> {
        let mut bytes = [0; 8];
        self.ram.populate(address, len as u64).ok()?;
        self.ram.memory().read_slice(bytes.get_mut(..len)?, GuestAddress(address)).ok()?;
        Some(u64::from_le_bytes(bytes))
    }

    /// What an exit of a held vCPU means. `over`: it has stepped over a patched byte.
    fn meaning(&mut self, vcpu: usize, exit: DebugExit, over: bool) -> Result<Meaning, DebugError> {
        if exit.exception == BREAKPOINT_EXCEPTION {
            return Ok(if self.patches.contains(exit.pc) {
                Meaning::Stop(Stop::Software(vcpu))
            } else if self.physical(vcpu, exit.pc)?.is_some_and(|at| self.patches.is_patched(at)) {
                Meaning::Alias
            } else {
                Meaning::Deliver(KVM_GUESTDBG_INJECT_BP)
            });
        }
        let stepping = over || self.plans[vcpu].action == Action::Step;
        Ok(match self.registers.hit(exit.dr6) {
            Some(slot) if slot.watch == Watch::Execute => Meaning::Stop(Stop::Hardware(vcpu)),
            Some(slot) => Meaning::Stop(Stop::Watch { vcpu, address: slot.address, watch: slot.watch }),
            None if exit.dr6 & DR6_STEP != 0 && stepping => Meaning::Stop(Stop::Step(vcpu)),
            None => Meaning::Deliver(KVM_GUESTDBG_INJECT_DB),
        })
    }

    fn stopped(&mut self, stop: Stop) -> Stop {
        self.current = stop.vcpu();
        stop
    }

    /// Lets one vCPU execute the instruction at a patched byte, while the others are held.
    fn step_over(&mut self, vcpu: usize, linear: u64) -> Result<(), DebugError> {
        self.hold()?;
        let Some(physical) = self.physical(vcpu, linear)? else { return self.release() };
        self.patches.lift(physical);
        self.over = Some((vcpu, physical));
        let control = KVM_GUESTDBG_ENABLE | KVM_GUESTDBG_SINGLESTEP | self.interrupt_block();
        self.vcpus.release(vcpu, kvm_guest_debug { control, ..Default::default() })
    }

    /// Patches the byte again that a vCPU steps over, and returns that vCPU.
    fn end_step_over(&mut self) -> Option<usize> {
        let (vcpu, physical) = self.over.take()?;
        self.patches.patch_again(physical);
        Some(vcpu)
    }

    /// Releases the vCPUs that are held, as planned.
    fn release(&mut self) -> Result<(), DebugError> {
        let held: Vec<usize> = (0..self.vcpu_count()).filter(|vcpu| self.vcpus.is_held(*vcpu)).collect();
        held.into_iter().try_for_each(|vcpu| self.release_one(vcpu))
    }

    fn release_one(&mut self, vcpu: usize) -> Result<(), DebugError> {
        let plan = &mut self.plans[vcpu];
        if plan.action == Action::Stay {
            return Ok(());
        }
        let mut control = std::mem::take(&mut plan.deliver);
        if plan.action == Action::Step {
            control |= KVM_GUESTDBG_SINGLESTEP | self.interrupt_block();
        }
        if !self.patches.is_empty() {
            control |= KVM_GUESTDBG_USE_SW_BP;
        }
        let mut arch = kvm_guest_debug_arch::default();
        if !self.registers.is_empty() {
            control |= KVM_GUESTDBG_USE_HW_BP;
            arch.debugreg = self.registers.values();
        }
        if control != 0 {
            control |= KVM_GUESTDBG_ENABLE;
        }
        self.vcpus.release(vcpu, kvm_guest_debug { control, pad: 0, arch })
    }

    fn interrupt_block(&self) -> u32 {
        if self.block_interrupts { KVM_GUESTDBG_BLOCKIRQ } else { 0 }
    }
}
