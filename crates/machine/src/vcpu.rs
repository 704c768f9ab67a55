//! A vCPU and the thread that runs it.
//!
//! # Protocol
//!
//! A thread begins paused. Its owner sends [`Request`]s; the thread looks at them only when `KVM_RUN` has returned `EINTR`, which a
//! [`kick`] brings about. By then KVM has finished any port or memory access that this process had answered, so that a vCPU
//! that has acknowledged a pause is *still*: its registers can be read and mean what they say.
//!
//! ```text
//!            Resume                 kick -> EINTR -> Pause
//!  Paused -----------> Running --------------------------------> Paused (acknowledged)
//!    |                    |  the guest cannot go on: event posted
//!    | Stop               +-------------------------------------> Halted: as Paused, and Resume does nothing
//!    v
//!  ended
//! ```
//!
//! A paused thread answers `Save` with its vCPU's state and stays paused. One that never ran
//! answers `Restore` when its vCPU has its saved state: that may wait for guest memory, which only
//! this thread does. `Connect` gives it the buses, which are filled after the vCPUs have their
//! state. Both come before the first `Resume`.
//!
//! # Errors of `KVM_RUN`
//!
//! - `EINTR`: a kick.
//! - `EAGAIN`: the vCPU was not ready to run (it waited for its start-up interrupt); entered again.
//! - `ENOMEM`: see [`ENTRY_RETRIES`]; entered again a bounded number of times.
//! - everything else ends the guest. `EFAULT` among them: KVM cannot access a page of guest memory
//!   (a bad sector under a memory file, no free huge page), and would fail again.
//!
//! On an exit the thread finds the address on a bus and touches registers only; nothing here waits for anything but the guest (and,
//! for a bounded time, for a reset on virtio-mmio).

use std::cell::Cell;
use std::sync::Arc;
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, TryRecvError, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use config::HugePages;
use kvm_ioctls::{VcpuExit, VcpuFd};
use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::bus::Bus;
use crate::cpu::{StateFormat, VcpuState};
use crate::events::{EventSink, MachineEvent, VcpuFault};
use crate::kick::{self, Kickable};
use crate::kvm::KvmError;

/// Longest x86 instruction in bytes.
const MAX_INSTRUCTION: u64 = 15;

/// How long a kick is given before the next.
const KICK_AGAIN: Duration = Duration::from_millis(2);

/// How often in a row `KVM_RUN` may answer `ENOMEM` before the guest ends.
///
/// Linux 6.11 to 6.13 answer so at a VM's first entry if a signal is pending while KVM makes its
/// huge page recovery thread, and a kick is such a signal. The signal is gone at the next try. A
/// host that is out of memory answers so every time.
const ENTRY_RETRIES: u32 = 32;

/// The buses that all vCPUs of a machine share.
#[derive(Debug, Default)]
pub(crate) struct Buses {
    /// Port I/O.
    pub(crate) ports: Bus,
    /// Memory-mapped I/O.
    pub(crate) mmio: Bus,
}

/// What an owner asks of a vCPU thread.
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

/// Why a pause did not come about.
#[derive(Debug, thiserror::Error)]
pub(crate) enum WaitError {
    /// The vCPU is within the kernel, where a kick does not reach it: it waits for a page.
    #[error("vCPU {0} does not stand still")]
    Busy(u8),
    /// A bug in this monitor.
    #[error(transparent)]
    Gone(#[from] VcpuGone),
}

/// A vCPU thread ended, which only a bug makes it do.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("the thread of vCPU {0} ended unexpectedly")]
pub struct VcpuGone(pub u8);

/// The owner's end of a vCPU thread. Dropping it stops the thread.
#[derive(Debug)]
pub(crate) struct VcpuHandle {
    id: u8,
    requests: Sender<Request>,
    answers: Receiver<Answer>,
    /// Pauses that were asked for and are not acknowledged yet.
    pauses: Cell<u32>,
    thread: Option<JoinHandle<()>>,
}

impl VcpuHandle {
    /// Starts the thread, named `fc_vcpu {id}` (tools look for that), paused and without buses.
    /// With the vCPU goes the size of the pages that it shares with KVM.
    pub(crate) fn spawn(
        id: u8,
        (fd, run_size): (VcpuFd, usize),
        ram: GuestRam,
        events: EventSink,
    ) -> std::io::Result<Self> {
        let (requests, inbox) = channel();
        let (answer, answers) = channel();
        let thread = std::thread::Builder::new().name(format!("fc_vcpu {id}")).spawn(move || {
            let fd = Kickable::new(fd, run_size);
            let buses = Arc::default();
            let entry_errors = EntryErrors::default();
            Vcpu { id, fd, ram, buses, events, inbox, answer, entry_errors, halted: false }.run();
        })?;
        Ok(VcpuHandle { id, requests, answers, pauses: Cell::new(0), thread: Some(thread) })
    }

    /// Asks a fresh vCPU, which is prepared, to take its saved state; [`Self::poll_restored`] says
    /// when it has. (Ask all, then wait for all.)
    pub(crate) fn request_restore(
        &self,
        state: VcpuState,
        format: &Arc<StateFormat>,
    ) -> Result<(), VcpuGone> {
        let request = Request::Restore(Box::new(state), Arc::clone(format));
        self.requests.send(request).map_err(|_| VcpuGone(self.id))
    }

    /// Waits at most `limit` for the answer to a restore request. `None` if there is none yet.
    pub(crate) fn poll_restored(&self, limit: Duration) -> Result<Option<Result<(), KvmError>>, VcpuGone> {
        match self.answers.recv_timeout(limit) {
            Ok(Answer::Restored(result)) => Ok(Some(result)),
            Err(RecvTimeoutError::Timeout) => Ok(None),
            // A vCPU is restored before anything else is asked.
            Ok(_) | Err(RecvTimeoutError::Disconnected) => Err(VcpuGone(self.id)),
        }
    }

    /// Gives it the buses, before it runs.
    pub(crate) fn connect(&self, buses: &Arc<Buses>) -> Result<(), VcpuGone> {
        self.requests.send(Request::Connect(Arc::clone(buses))).map_err(|_| VcpuGone(self.id))
    }

    /// Lets go of a thread that waits for guest memory which may never come. It ends by itself if
    /// the memory comes, or with the process.
    pub(crate) fn abandon(mut self) {
        self.request_stop();
        drop(self.thread.take());
    }

    /// Lets it run.
    pub(crate) fn resume(&self) -> Result<(), VcpuGone> {
        self.requests.send(Request::Resume).map_err(|_| VcpuGone(self.id))
    }

    /// Asks it to pause; [`Self::wait_paused`] waits until it has. (Ask all, then wait for all.)
    pub(crate) fn request_pause(&self) -> Result<(), VcpuGone> {
        self.requests.send(Request::Pause).map_err(|_| VcpuGone(self.id))?;
        self.pauses.set(self.pauses.get() + 1);
        self.kick();
        Ok(())
    }

    /// Waits until the pause that was asked for has come about, at most until `deadline`. After that it is still to come; whoever does not want it any more
    /// resumes the vCPU, which then goes on when it has come.
    pub(crate) fn wait_paused(&self, deadline: Instant) -> Result<(), WaitError> {
        // An earlier one that was given up is acknowledged before.
        while self.pauses.get() > 0 {
            match self.wait(Some(deadline)) {
                Ok(_) => self.pauses.set(self.pauses.get() - 1),
                Err(RecvTimeoutError::Timeout) => return Err(WaitError::Busy(self.id)),
                Err(RecvTimeoutError::Disconnected) => return Err(VcpuGone(self.id).into()),
            }
        }
        Ok(())
    }

    /// Asks it to end, running or not; dropping the handle waits for that.
    pub(crate) fn request_stop(&self) {
        // A thread that is gone has stopped.
        let _ = self.requests.send(Request::Stop);
        self.kick();
    }

    /// Asks it, which is paused, for its state; [`Self::take_state`] waits for it. (Ask all, then wait for all.)
    pub(crate) fn request_state(&self, format: &Arc<StateFormat>) -> Result<(), VcpuGone> {
        self.requests.send(Request::Save(Arc::clone(format))).map_err(|_| VcpuGone(self.id))
    }

    /// The state that was asked for.
    pub(crate) fn take_state(&self) -> Result<Result<VcpuState, KvmError>, VcpuGone> {
        match self.answers.recv() {
            Ok(Answer::State(state)) => Ok(*state),
            // A pause is waited for before anything else is asked.
            Ok(Answer::Paused | Answer::Restored(_)) | Err(_) => Err(VcpuGone(self.id)),
        }
    }

    /// Waits until the thread answers or has ended, or the deadline is over, and kicks it again and again meanwhile: a software KVM goes on
    /// from one exit to the next without a look at `immediate_exit`, and sees a signal only if it comes while it interprets.
    fn wait(&self, deadline: Option<Instant>) -> Result<Answer, RecvTimeoutError> {
        loop {
            match self.answers.recv_timeout(KICK_AGAIN) {
                Err(RecvTimeoutError::Timeout) if deadline.is_none_or(|end| Instant::now() < end) => {
                    self.kick();
                }
                answer => return answer,
            }
        }
    }

    fn kick(&self) {
        if let Some(thread) = &self.thread {
            kick::kick(thread);
        }
    }
}

impl Drop for VcpuHandle {
    fn drop(&mut self) {
        self.request_stop();
        // Answers to requests that were given up may still come.
        while self.thread.is_some() && self.wait(None).is_ok() {}
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "vCPU threads do not panic");
        }
    }
}

/// What the thread owns.
struct Vcpu {
    id: u8,
    fd: Kickable,
    ram: GuestRam,
    buses: Arc<Buses>,
    events: EventSink,
    inbox: Receiver<Request>,
    answer: Sender<Answer>,
    entry_errors: EntryErrors,
    /// The guest cannot go on.
    halted: bool,
}

impl Vcpu {
    /// Paused and running by turns, until told to stop.
    fn run(mut self) {
        loop {
            match self.inbox.recv() {
                Ok(Request::Restore(state, format)) => self.restore_state(&state, &format),
                Ok(Request::Connect(buses)) => self.buses = buses,
                Ok(Request::Resume) if self.halted => {}
                Ok(Request::Resume) => {
                    if self.run_guest().is_break() {
                        return;
                    }
                }
                Ok(Request::Pause) => self.acknowledge_pause(),
                Ok(Request::Save(format)) => self.send_state(&format),
                Ok(Request::Stop) | Err(_) => return,
            }
        }
    }

    /// Runs the guest until a pause or its end. Breaks when the thread is to end.
    fn run_guest(&mut self) -> std::ops::ControlFlow<()> {
        use std::ops::ControlFlow::{Break, Continue};
        loop {
            match self.enter() {
                Entered::Again => {}
                Entered::CannotGoOn(event) => {
                    self.halted = true;
                    self.events.post(event);
                    return Continue(());
                }
                // Looked at now, when nothing that the guest began is half done.
                Entered::Kicked => match self.inbox.try_recv() {
                    Ok(Request::Pause) => {
                        self.acknowledge_pause();
                        return Continue(());
                    }
                    Ok(Request::Stop) | Err(TryRecvError::Disconnected) => return Break(()),
                    // The others are for paused vCPUs, and the owner sends them to no other.
                    Ok(Request::Resume | Request::Save(_) | Request::Restore(..) | Request::Connect(_))
                    | Err(TryRecvError::Empty) => {}
                },
            }
        }
    }

    /// Enters the guest once and answers what it left for.
    fn enter(&mut self) -> Entered {
        let exit = self.fd.run();
        if exit.is_ok() {
            self.entry_errors = EntryErrors::default();
        }
        match exit {
            Ok(VcpuExit::IoOut(port, data)) => {
                self.buses.ports.write(port.into(), data);
                Entered::Again
            }
            Ok(VcpuExit::IoIn(port, data)) => {
                self.buses.ports.read(port.into(), data);
                Entered::Again
            }
            Ok(VcpuExit::MmioWrite(addr, data)) => {
                self.buses.mmio.write(addr, data);
                Entered::Again
            }
            Ok(VcpuExit::MmioRead(addr, data)) => {
                self.buses.mmio.read(addr, data);
                Entered::Again
            }
            Ok(VcpuExit::Intr) => self.kicked(),
            Ok(VcpuExit::Shutdown) => {
                Entered::CannotGoOn(MachineEvent::TripleFault(self.fault("shutdown (triple fault)")))
            }
            // Known from other hypervisors' guests; KVM on x86 gives it for nothing that this monitor turns on.
            Ok(VcpuExit::SystemEvent(kind, _)) => {
                let reason = format!("unexpected KVM_EXIT_SYSTEM_EVENT of type {kind}");
                Entered::CannotGoOn(MachineEvent::Fatal(self.fault(reason)))
            }
            Ok(VcpuExit::InternalError) => {
                let reason = internal_error(self.fd.internal_suberror());
                Entered::CannotGoOn(MachineEvent::Fatal(self.fault(reason)))
            }
            Ok(VcpuExit::FailEntry(reason, cpu)) => {
                let reason = format!("KVM_EXIT_FAIL_ENTRY: hardware reason {reason:#x} on host CPU {cpu}");
                Entered::CannotGoOn(MachineEvent::Fatal(self.fault(reason)))
            }
            Ok(exit) => {
                let reason = format!("unexpected exit from KVM_RUN: {exit:?}");
                Entered::CannotGoOn(MachineEvent::Fatal(self.fault(reason)))
            }
            Err(e) => match self.entry_errors.next(e.errno()) {
                EntryError::Kicked => self.kicked(),
                EntryError::Transient => Entered::Again,
                EntryError::Fatal => {
                    let reason = format!("KVM_RUN failed: {}", self.run_error(e.errno()));
                    Entered::CannotGoOn(MachineEvent::Fatal(self.fault(reason)))
                }
            },
        }
    }

    /// Why KVM does not run the guest any more, in words.
    fn run_error(&self, errno: i32) -> String {
        if errno == libc::EFAULT && self.ram.huge_pages() == HugePages::Hugetlbfs2M {
            return "the host gives no huge page for memory that the guest uses (huge_pages 2M): the limit \
                    hugetlb.2MB.max of the monitor's cgroup is reached"
                .to_owned();
        }
        std::io::Error::from_raw_os_error(errno).to_string()
    }

    fn kicked(&mut self) -> Entered {
        self.fd.set_kvm_immediate_exit(0);
        Entered::Kicked
    }

    fn acknowledge_pause(&self) {
        // Tells the guest's watchdogs that time will jump. KVM refuses it for a guest that has set up no such clock.
        let _ = self.fd.kvmclock_ctrl();
        // An owner that is gone does not wait.
        let _ = self.answer.send(Answer::Paused);
    }

    fn restore_state(&self, state: &VcpuState, format: &StateFormat) {
        let restored = state.restore(&self.fd, format);
        // The pause before the save told the watchdogs of the vCPU that was saved. KVM refuses it
        // for a guest without such a clock.
        let _ = self.fd.kvmclock_ctrl();
        let _ = self.answer.send(Answer::Restored(restored));
    }

    fn send_state(&self, format: &StateFormat) {
        let state = VcpuState::save(&self.fd, format);
        let _ = self.answer.send(Answer::State(Box::new(state)));
    }

    fn fault(&self, reason: impl Into<String>) -> VcpuFault {
        VcpuFault { vcpu: self.id, reason: reason.into(), place: place(&self.fd, &self.ram) }
    }
}

/// How a stay in the guest ended.
enum Entered {
    /// Enter again.
    Again,
    /// Somebody wants something of this thread.
    Kicked,
    /// The guest cannot go on.
    CannotGoOn(MachineEvent),
}

/// What an error of `KVM_RUN` means.
#[derive(Debug, PartialEq, Eq)]
enum EntryError {
    /// A signal came.
    Kicked,
    /// The next try may succeed.
    Transient,
    /// The guest cannot run.
    Fatal,
}

/// The errors of `KVM_RUN` in a row.
#[derive(Debug, Default)]
struct EntryErrors {
    out_of_memory: u32,
}

impl EntryErrors {
    /// Judges one more error. An entry that succeeds begins a new row; a kick does not, since KVM
    /// may answer it before it allocates anything.
    fn next(&mut self, errno: i32) -> EntryError {
        match errno {
            libc::EINTR => EntryError::Kicked,
            libc::EAGAIN => EntryError::Transient,
            libc::ENOMEM if self.out_of_memory < ENTRY_RETRIES => {
                self.out_of_memory += 1;
                EntryError::Transient
            }
            _ => EntryError::Fatal,
        }
    }
}

/// What KVM says of an internal error.
pub(crate) fn internal_error(suberror: u32) -> String {
    let words = match suberror {
        1 => "an instruction that KVM had to emulate and cannot",
        2 => "simultaneous exceptions",
        3 => "an exit while an event was being delivered",
        4 => "an exit that KVM does not know",
        _ => "unknown to this monitor",
    };
    format!("KVM_EXIT_INTERNAL_ERROR, suberror {suberror} ({words})")
}

/// Where a vCPU is: its instruction pointer, and the bytes there as far as they are mapped and are RAM.
fn place(vcpu: &VcpuFd, ram: &GuestRam) -> Option<(u64, Vec<u8>)> {
    let rip = vcpu.get_regs().ok()?.rip;
    let cs_base = vcpu.get_sregs().ok()?.cs.base;
    let mut bytes = Vec::new();
    for offset in 0..MAX_INSTRUCTION {
        let linear = cs_base.wrapping_add(rip).wrapping_add(offset);
        let byte = vcpu
            .translate_gva(linear)
            .ok()
            // A huge page that the host refuses cannot be read either.
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
    fn an_entry_without_memory_is_retried_within_a_bound() {
        let mut errors = EntryErrors::default();
        assert_eq!(errors.next(libc::ENOMEM), EntryError::Transient);
        for _ in 1..ENTRY_RETRIES {
            // A kick in between does not make it endless.
            assert_eq!(errors.next(libc::EINTR), EntryError::Kicked);
            assert_eq!(errors.next(libc::ENOMEM), EntryError::Transient);
        }
        assert_eq!(errors.next(libc::ENOMEM), EntryError::Fatal);
    }

    #[test]
    fn only_interruptions_and_not_ready_are_free_of_a_bound() {
        let mut errors = EntryErrors::default();
        for _ in 0..10 * ENTRY_RETRIES {
            assert_eq!(errors.next(libc::EINTR), EntryError::Kicked);
            assert_eq!(errors.next(libc::EAGAIN), EntryError::Transient);
        }
        for errno in [libc::EFAULT, libc::EIO, libc::EINVAL, libc::ENOENT] {
            assert_eq!(errors.next(errno), EntryError::Fatal);
        }
    }
}
