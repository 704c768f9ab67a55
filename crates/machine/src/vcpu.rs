//! A vCPU and the thread that runs it.
//!
//! # Protocol
//!
//! A thread starts paused. Its owner sends [`Request`]s. A running thread reads them only when
//! `KVM_RUN` has returned `EINTR`, which a [signal](vcpu_signal) causes. By then KVM has completed
//! any port or MMIO access that this process had answered. So the registers of a vCPU that has
//! acknowledged a pause are consistent.
//!
//! ```text
//!            Resume                signal -> EINTR -> Pause
//!  Paused -----------> Running --------------------------------> Paused (acknowledged)
//!    |                    |  KVM cannot run the guest: event posted
//!    | Stop               +-------------------------------------> Halted (ignores Resume)
//!    v
//!  ended
//! ```
//!
//! A paused thread answers `Save` with its vCPU's state and stays paused. One that never ran
//! answers `Restore` when its vCPU has its saved state, for which it may wait for guest memory.
//! `Connect` gives it the buses, which are filled after the vCPUs have their state. Both come
//! before the first `Resume`.
//!
//! A debugger has requests of its own ([`debug`]), from another thread. It can hold a vCPU, which
//! then does not run until it is released, and answers its owner as a paused one does.
//!
//! # Exits
//!
//! On a port or MMIO exit the thread finds the address on a bus and accesses registers. It waits
//! for nothing else, but for one bounded wait: a driver's reset of a device on virtio-mmio.
//!
//! # Errors of `KVM_RUN`
//!
//! - `EINTR`: a signal.
//! - `EAGAIN`: the vCPU was not ready to run (it waited for its start-up interrupt). The thread
//!   enters the guest again.
//! - `ENOMEM`: see [`ENTRY_RETRIES`]. The thread enters again, a bounded number of times.
//! - Any other error ends the guest. `EFAULT` is one: KVM cannot access a page of guest memory (a
//!   bad sector under a memory file, no free huge page), and would fail again.

pub(crate) mod debug;

use std::cell::Cell;
use std::ops::ControlFlow;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use config::HugePages;
use kvm_ioctls::{VcpuExit, VcpuFd};
use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::bus::Buses;
use crate::cpu::{StateFormat, VcpuState};
use crate::events::{EventSink, MachineEvent, VcpuFault};
use crate::kvm::KvmError;
use crate::stats::VcpuStats;
use crate::vcpu_signal::{self, ThreadVcpu};
use debug::{BREAKPOINT_EXCEPTION, DebugExit, DebugPort, DebugRequest};

/// Longest x86 instruction in bytes.
const MAX_INSTRUCTION: u64 = 15;

/// How long a signal may take to have an effect before the next is sent.
const SIGNAL_INTERVAL: Duration = Duration::from_millis(2);

/// How often in a row `KVM_RUN` may return `ENOMEM` before the guest ends.
///
/// Linux 6.11 to 6.13 return it at a VM's first entry if a signal is pending while KVM creates its
/// huge page recovery thread. The signal that stops a vCPU may be that signal; it has passed at the
/// next try. A host that is out of memory returns `ENOMEM` every time.
const ENTRY_RETRIES: u32 = 32;

/// `KVM_INTERNAL_ERROR_EMULATION`: KVM cannot emulate an instruction.
const CANNOT_EMULATE: u32 = 1;

/// What the owner asks of a vCPU thread.
#[derive(Debug, Clone)]
enum Request {
    /// Only before the first `Resume`.
    Restore(Box<VcpuState>, Arc<StateFormat>),
    /// Only before the first `Resume`.
    Connect(Arc<Buses>),
    Resume,
    Pause,
    /// Only while paused.
    Save(Arc<StateFormat>),
    /// From a debugger, at any time.
    Debug(DebugRequest),
    Stop,
}

/// What a vCPU thread answers.
#[derive(Debug)]
enum Answer {
    /// It has paused.
    Paused,
    /// It has its saved state, or what KVM refused.
    Restored(Result<(), KvmError>),
    /// Its state.
    State(Box<Result<VcpuState, KvmError>>),
}

/// Why a vCPU has not paused.
#[derive(Debug, thiserror::Error)]
pub(crate) enum PauseWaitError {
    /// The vCPU waits for a page in the kernel, where a signal does not reach it.
    #[error("vCPU {0} did not pause in time")]
    Busy(u8),
    /// A bug in this monitor.
    #[error(transparent)]
    ThreadDied(#[from] VcpuThreadDied),
}

/// A vCPU thread ended though it was not asked to: a bug in this monitor.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the thread of vCPU {0} ended unexpectedly")]
pub struct VcpuThreadDied(pub u8);

/// The owner's end of a vCPU thread. Dropping it stops the thread.
#[derive(Debug)]
pub(crate) struct VcpuHandle {
    id: u8,
    requests: Sender<Request>,
    answers: Receiver<Answer>,
    /// Pauses that were requested and are not acknowledged yet.
    pauses: Cell<u32>,
    /// Shared with the [`DebugLink`] of a debugger, which ends first.
    thread: Option<Arc<JoinHandle<()>>>,
    stats: Arc<VcpuStats>,
}

/// A debugger's end of a vCPU thread.
#[derive(Debug)]
pub(crate) struct DebugLink {
    requests: Sender<Request>,
    thread: Arc<JoinHandle<()>>,
}

impl DebugLink {
    /// Sends a request to the vCPU. A vCPU that runs reads it at the next [signal](Self::signal).
    pub(crate) fn send(&self, request: DebugRequest) -> bool {
        self.requests.send(Request::Debug(request)).is_ok()
    }

    /// Makes a vCPU that runs read its requests. One signal may not be enough with a software KVM.
    pub(crate) fn signal(&self) {
        vcpu_signal::send(&self.thread);
    }
}

impl VcpuHandle {
    /// Starts the thread, paused and without buses. Its name is `fc_vcpu {id}`, which tools look
    /// for. `run_size` is the size of the mapping that the vCPU shares with KVM (`kvm_run`), in
    /// bytes.
    pub(crate) fn spawn(
        id: u8,
        (fd, run_size): (VcpuFd, usize),
        ram: GuestRam,
        events: EventSink,
    ) -> std::io::Result<Self> {
        let (requests, inbox) = channel();
        let (answer, answers) = channel();
        let stats = Arc::<VcpuStats>::default();
        let of_thread = Arc::clone(&stats);
        let thread = sync::thread::spawn(format!("fc_vcpu {id}"), None, move || {
            let fd = ThreadVcpu::new(fd, run_size);
            let buses = Arc::default();
            let entry_errors = EntryErrors::default();
            let stats = of_thread;
            let (resumed, halted, debug) = (false, false, None);
            Vcpu { id, fd, ram, buses, events, inbox, answer, entry_errors, resumed, halted, stats, debug }
                .run();
        })?;
        let thread = Some(Arc::new(thread));
        Ok(VcpuHandle { id, requests, answers, pauses: Cell::new(0), thread, stats })
    }

    /// The counters of the vCPU.
    pub(crate) fn stats(&self) -> Arc<VcpuStats> {
        Arc::clone(&self.stats)
    }

    /// Another sender of requests, for a debugger. `None` once the thread was abandoned.
    pub(crate) fn debug_link(&self) -> Option<DebugLink> {
        let thread = Arc::clone(self.thread.as_ref()?);
        Some(DebugLink { requests: self.requests.clone(), thread })
    }

    /// Asks a new vCPU, which is [prepared](VcpuState::prepare), to take its saved state.
    /// [`Self::poll_restored`] returns when it has. (Ask all, then wait for all.)
    pub(crate) fn request_restore(
        &self,
        state: VcpuState,
        format: &Arc<StateFormat>,
    ) -> Result<(), VcpuThreadDied> {
        let request = Request::Restore(Box::new(state), Arc::clone(format));
        self.requests.send(request).map_err(|_| VcpuThreadDied(self.id))
    }

    /// Waits at most `limit` for the answer to a restore request. `None` if there is none yet.
    pub(crate) fn poll_restored(
        &self,
        limit: Duration,
    ) -> Result<Option<Result<(), KvmError>>, VcpuThreadDied> {
        match self.answers.recv_timeout(limit) {
            Ok(Answer::Restored(result)) => Ok(Some(result)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            // A vCPU is restored before anything else is requested.
            Ok(_) | Err(RecvTimeoutError::Disconnected) => Err(VcpuThreadDied(self.id)),
        }
    }

    /// Gives the vCPU the buses, before it runs.
    pub(crate) fn connect(&self, buses: &Arc<Buses>) -> Result<(), VcpuThreadDied> {
        self.requests.send(Request::Connect(Arc::clone(buses))).map_err(|_| VcpuThreadDied(self.id))
    }

    /// Abandons a thread that waits for guest memory which may never arrive. The thread ends when
    /// the memory arrives, or with the process.
    pub(crate) fn abandon(mut self) {
        self.request_stop();
        drop(self.thread.take());
    }

    /// Resumes the vCPU.
    pub(crate) fn resume(&self) -> Result<(), VcpuThreadDied> {
        self.requests.send(Request::Resume).map_err(|_| VcpuThreadDied(self.id))
    }

    /// Asks the vCPU to pause; [`Self::wait_paused`] waits until it has. (Ask all, then wait for
    /// all.)
    pub(crate) fn request_pause(&self) -> Result<(), VcpuThreadDied> {
        self.requests.send(Request::Pause).map_err(|_| VcpuThreadDied(self.id))?;
        self.pauses.set(self.pauses.get() + 1);
        self.send_signal();
        Ok(())
    }

    /// Waits until the vCPU has paused as requested, at most until `deadline`. After the deadline
    /// it still pauses later. A caller that gives up resumes the vCPU, which then runs on after
    /// that pause.
    pub(crate) fn wait_paused(&self, deadline: Instant) -> Result<(), PauseWaitError> {
        // Pauses that earlier callers gave up are acknowledged first.
        while self.pauses.get() > 0 {
            match self.wait(Some(deadline)) {
                Ok(_) => self.pauses.set(self.pauses.get() - 1),
                Err(RecvTimeoutError::Timeout) => return Err(PauseWaitError::Busy(self.id)),
                Err(RecvTimeoutError::Disconnected) => return Err(VcpuThreadDied(self.id).into()),
            }
        }
        Ok(())
    }

    /// Asks the thread to end, whether the vCPU runs or not. Dropping the handle waits for that.
    pub(crate) fn request_stop(&self) {
        // If the thread has ended, nothing is left to stop.
        let _ = self.requests.send(Request::Stop);
        self.send_signal();
    }

    /// Asks the paused vCPU for its state; [`Self::take_state`] waits for it. (Ask all, then wait
    /// for all.)
    pub(crate) fn request_state(&self, format: &Arc<StateFormat>) -> Result<(), VcpuThreadDied> {
        self.requests.send(Request::Save(Arc::clone(format))).map_err(|_| VcpuThreadDied(self.id))
    }

    /// Waits for the state that was requested.
    pub(crate) fn take_state(&self) -> Result<Result<VcpuState, KvmError>, VcpuThreadDied> {
        match self.answers.recv() {
            Ok(Answer::State(state)) => Ok(*state),
            // A pause is waited for before anything else is requested.
            Ok(Answer::Paused | Answer::Restored(_)) | Err(_) => Err(VcpuThreadDied(self.id)),
        }
    }

    /// Waits until the thread answers or has ended, at most until `deadline`, and keeps sending
    /// signals. One is not enough with a software KVM (PVM): it continues from one exit to the next
    /// without reading `immediate_exit`, and notices a signal only while it interprets
    /// instructions.
    fn wait(&self, deadline: Option<Instant>) -> Result<Answer, RecvTimeoutError> {
        loop {
            match self.answers.recv_timeout(SIGNAL_INTERVAL) {
                Err(RecvTimeoutError::Timeout) if deadline.is_none_or(|end| Instant::now() < end) => {
                    self.send_signal();
                }
                answer => return answer,
            }
        }
    }

    fn send_signal(&self) {
        if let Some(thread) = &self.thread {
            vcpu_signal::send(thread);
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.request_stop();
        // Answers to requests that were given up may still arrive.
        while self.thread.is_some() && self.wait(None).is_ok() {}
        // A debugger's thread ends before the handles of its vCPUs.
        if let Some(thread) = self.thread.take().and_then(Arc::into_inner) {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "vCPU threads do not panic");
        }
    }
}

/// What the thread owns.
struct Vcpu {
    id: u8,
    fd: ThreadVcpu,
    ram: GuestRam,
    buses: Arc<Buses>,
    events: EventSink,
    inbox: Receiver<Request>,
    answer: Sender<Answer>,
    entry_errors: EntryErrors,
    /// The owner has resumed the vCPU and not paused it since.
    resumed: bool,
    /// KVM cannot run the guest any more.
    halted: bool,
    stats: Arc<VcpuStats>,
    /// The debugger, if the guest has one.
    debug: Option<Box<DebugPort>>,
}

impl Vcpu {
    /// Serves requests, and runs the guest between `Resume` and `Pause`, until `Stop`.
    fn run(mut self) {
        loop {
            if self.may_run() && self.run_guest().is_break() {
                return;
            }
            match self.inbox.recv().map(|request| self.serve(request)) {
                Ok(ControlFlow::Continue(())) => {}
                Ok(ControlFlow::Break(())) | Err(_) => return,
            }
        }
    }

    /// Whether the guest runs now.
    fn may_run(&self) -> bool {
        self.resumed && !self.halted && !self.debug.as_ref().is_some_and(|debug| debug.holds())
    }

    /// Serves one request. Breaks if the thread is to end. The owner sends most requests to paused
    /// vCPUs only.
    fn serve(&mut self, request: Request) -> ControlFlow<()> {
        match request {
            Request::Restore(state, format) => self.restore_state(&state, &format),
            Request::Connect(buses) => self.buses = buses,
            Request::Resume => self.resumed = true,
            Request::Pause => {
                self.resumed = false;
                self.acknowledge_pause();
            }
            Request::Save(format) => self.send_state(&format),
            Request::Debug(DebugRequest::Attach(reports)) => {
                self.debug = Some(Box::new(DebugPort::new(reports)));
            }
            Request::Debug(request) => {
                if let Some(debug) = &mut self.debug {
                    debug.serve(&self.fd, &request);
                }
            }
            Request::Stop => return ControlFlow::Break(()),
        }
        ControlFlow::Continue(())
    }

    /// Runs the guest until a pause, a hold or its end. Breaks if the thread is to end.
    fn run_guest(&mut self) -> ControlFlow<()> {
        while self.may_run() {
            match self.run_once() {
                RunOutcome::Continue => {}
                RunOutcome::Halted(event) => {
                    self.halted = true;
                    if matches!(event, MachineEvent::Fatal(_)) {
                        self.stats.failures.add(1);
                    }
                    self.events.post(event);
                }
                // Requests are read here, where no access of the guest is half done.
                RunOutcome::Interrupted => match self.inbox.try_recv() {
                    Ok(request) => self.serve(request)?,
                    Err(TryRecvError::Disconnected) => return ControlFlow::Break(()),
                    Err(TryRecvError::Empty) => {}
                },
                RunOutcome::Trapped(exit) => {
                    if let Some(debug) = &mut self.debug {
                        debug.stop(&self.fd, exit);
                    }
                }
            }
        }
        ControlFlow::Continue(())
    }

    /// Enters the guest once, and handles its exit.
    fn run_once(&mut self) -> RunOutcome {
        let exit = self.fd.run();
        if exit.is_ok() {
            self.entry_errors = EntryErrors::default();
        }
        match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                self.stats.io_out.measure(|| _ = self.buses.ports.write(port.into(), data));
                RunOutcome::Continue
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.stats.io_in.measure(|| _ = self.buses.ports.read(port.into(), data));
                RunOutcome::Continue
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                self.stats.mmio_write.measure(|| _ = self.buses.mmio.write(addr, data));
                RunOutcome::Continue
            }
            Ok(VcpuExit::MmioRead(addr, data)) => {
                self.stats.mmio_read.measure(|| _ = self.buses.mmio.read(addr, data));
                RunOutcome::Continue
            }
            Ok(VcpuExit::Intr) => self.interrupted(),
            Ok(VcpuExit::Shutdown) => {
                RunOutcome::Halted(MachineEvent::TripleFault(self.fault("shutdown (triple fault)")))
            }
            // KVM on x86 exits with it only for features that this monitor does not turn on.
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                let reason = format!("unexpected KVM_EXIT_SYSTEM_EVENT of type {kind}");
                RunOutcome::Halted(MachineEvent::Fatal(self.fault(reason)))
            }
            Ok(VcpuExit::Debug(exit)) if self.debug.is_some() => {
                RunOutcome::Trapped(DebugExit { exception: exit.exception, pc: exit.pc, dr6: exit.dr6 })
            }
            Ok(VcpuExit::InternalError) => {
                let suberror = self.fd.internal_suberror();
                if let Some(exit) = self.breakpoint_not_emulated(suberror) {
                    return RunOutcome::Trapped(exit);
                }
                let reason = internal_error(suberror);
                RunOutcome::Halted(MachineEvent::Fatal(self.fault(reason)))
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let reason = format!("KVM_EXIT_FAIL_ENTRY: hardware reason {reason:#x} on host CPU {cpu}");
                RunOutcome::Halted(MachineEvent::Fatal(self.fault(reason)))
            }
            Ok(exit) => {
                let reason = format!("unexpected exit from KVM_RUN: {exit:?}");
                RunOutcome::Halted(MachineEvent::Fatal(self.fault(reason)))
            }
            Err(e) => match self.entry_errors.next(e.errno()) {
                EntryError::Interrupted => self.interrupted(),
                EntryError::Transient => RunOutcome::Continue,
                EntryError::Fatal => {
                    let reason = format!("KVM_RUN failed: {}", self.run_error(e.errno()));
                    RunOutcome::Halted(MachineEvent::Fatal(self.fault(reason)))
                }
            },
        }
    }

    /// The exit for a debugger's `int3` that a software KVM (PVM) interpreted: it reports an
    /// instruction that it cannot emulate.
    fn breakpoint_not_emulated(&self, suberror: u32) -> Option<DebugExit> {
        const INT3: u8 = 0xcc;
        if suberror != CANNOT_EMULATE || !self.debug.as_ref().is_some_and(|debug| debug.traps_int3()) {
            return None;
        }
        let (rip, bytes) = current_instruction(&self.fd, &self.ram)?;
        let trapped = bytes.first() == Some(&INT3);
        trapped.then_some(DebugExit { exception: BREAKPOINT_EXCEPTION, pc: rip, dr6: 0 })
    }

    /// The text of an error of `KVM_RUN`.
    fn run_error(&self, errno: i32) -> String {
        if errno == libc::EFAULT && self.ram.huge_pages() == HugePages::Hugetlbfs2M {
            return "the host has no huge page for memory that the guest uses (huge_pages 2M): the limit \
                    hugetlb.2MB.max of the monitor's cgroup is reached"
                .to_owned();
        }
        std::io::Error::from_raw_os_error(errno).to_string()
    }

    fn interrupted(&mut self) -> RunOutcome {
        self.fd.set_kvm_immediate_exit(0);
        RunOutcome::Interrupted
    }

    fn acknowledge_pause(&self) {
        // Notifies the guest's watchdogs that time will jump. KVM refuses it for a guest that has
        // set up no such clock.
        if self.fd.kvmclock_ctrl().is_err() {
            self.stats.kvmclock_ctrl_fails.add(1);
        }
        // If the owner is gone, no one waits for the answer.
        let _ = self.answer.send(Answer::Paused);
    }

    fn restore_state(&self, state: &VcpuState, format: &StateFormat) {
        let restored = state.restore(&self.fd, format);
        // The pause before the save notified the watchdogs of the saved vCPU only. KVM refuses it
        // for a guest without such a clock.
        let _ = self.fd.kvmclock_ctrl();
        let _ = self.answer.send(Answer::Restored(restored));
    }

    fn send_state(&self, format: &StateFormat) {
        let state = VcpuState::save(&self.fd, format);
        let _ = self.answer.send(Answer::State(Box::new(state)));
    }

    fn fault(&self, reason: impl Into<String>) -> VcpuFault {
        VcpuFault {
            vcpu: self.id,
            reason: reason.into(),
            instruction: current_instruction(&self.fd, &self.ram),
        }
    }
}

/// The outcome of one entry into the guest (`KVM_RUN`).
enum RunOutcome {
    /// The guest is entered again.
    Continue,
    /// A signal came: there may be a request.
    Interrupted,
    /// The guest stops for its debugger.
    Trapped(DebugExit),
    /// KVM cannot run the guest any more.
    Halted(MachineEvent),
}

/// What an error of `KVM_RUN` means.
#[derive(Debug, PartialEq, Eq)]
enum EntryError {
    /// A signal came.
    Interrupted,
    /// The next try may succeed.
    Transient,
    /// KVM cannot run the guest.
    Fatal,
}

/// Counts errors of `KVM_RUN` in a row.
#[derive(Debug, Default)]
struct EntryErrors {
    out_of_memory: u32,
}

impl EntryErrors {
    /// Classifies one more error. An entry that succeeds starts a new row. A signal does not: KVM
    /// may return `EINTR` before it allocates anything.
    fn next(&mut self, errno: i32) -> EntryError {
        match errno {
            libc::EINTR => EntryError::Interrupted,
            libc::EAGAIN => EntryError::Transient,
            libc::ENOMEM if self.out_of_memory < ENTRY_RETRIES => {
                self.out_of_memory += 1;
                EntryError::Transient
            }
            _ => EntryError::Fatal,
        }
    }
}

/// The text of a `KVM_EXIT_INTERNAL_ERROR`.
pub(crate) fn internal_error(suberror: u32) -> String {
    let words = match suberror {
        CANNOT_EMULATE => "an instruction that KVM cannot emulate",
        2 => "simultaneous exceptions",
        3 => "an exit while an event was being delivered",
        4 => "an exit that KVM does not know",
        _ => "unknown",
    };
    format!("KVM_EXIT_INTERNAL_ERROR, suberror {suberror} ({words})")
}

/// The instruction pointer of a vCPU, and the bytes there as far as they are mapped and are RAM.
fn current_instruction(vcpu: &VcpuFd, ram: &GuestRam) -> Option<(u64, Vec<u8>)> {
    let rip = vcpu.get_regs().ok()?.rip;
    let cs_base = vcpu.get_sregs().ok()?.cs.base;
    let mut bytes = Vec::new();
    for offset in 0..MAX_INSTRUCTION {
        let linear = cs_base.wrapping_add(rip).wrapping_add(offset);
        let byte = vcpu
            .translate_gva(linear)
            .ok()
            // A page that the host cannot allocate would end this process by SIGBUS.
            .filter(|t| t.valid == 1 && ram.populate(t.physical_address, 1).is_ok())
            .and_then(|t| ram.memory().read_obj::<u8>(GuestAddress(t.physical_address)).ok());
        match byte {
            Some(byte) => bytes.push(byte),
            None => break,
        }
    }
    Some((rip, bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn enomem_is_retried_a_bounded_number_of_times() {
        let mut errors = EntryErrors::default();
        assert_eq!(errors.next(libc::ENOMEM), EntryError::Transient);
        for _ in 1..ENTRY_RETRIES {
            // A signal in between does not start the count again.
            assert_eq!(errors.next(libc::EINTR), EntryError::Interrupted);
            assert_eq!(errors.next(libc::ENOMEM), EntryError::Transient);
        }
        assert_eq!(errors.next(libc::ENOMEM), EntryError::Fatal);
    }

    #[test]
    fn only_eintr_and_eagain_are_retried_without_a_bound() {
        let mut errors = EntryErrors::default();
        for _ in 0..10 * ENTRY_RETRIES {
            assert_eq!(errors.next(libc::EINTR), EntryError::Interrupted);
            assert_eq!(errors.next(libc::EAGAIN), EntryError::Transient);
        }
        for errno in [libc::EFAULT, libc::EIO, libc::EINVAL, libc::ENOENT] {
            assert_eq!(errors.next(errno), EntryError::Fatal);
        }
    }
}
