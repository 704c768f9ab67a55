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
//! A paused thread answers `Save` with its vCPU's state and stays paused.
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

/// The buses that all vCPUs of a machine share.
#[derive(Debug)]
pub(crate) struct Buses {
    /// Port I/O.
    pub(crate) ports: Bus,
    /// Memory-mapped I/O.
    pub(crate) mmio: Bus,
}

/// What an owner asks of a vCPU thread.
#[derive(Debug, Clone)]
enum Request {
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
    /// Starts the thread, named `fc_vcpu {id}` (tools look for that), paused. With the vCPU goes the size of the pages that it shares with KVM.
    pub(crate) fn spawn(
        id: u8,
        (fd, run_size): (VcpuFd, usize),
        ram: GuestRam,
        buses: Arc<Buses>,
        events: EventSink,
    ) -> std::io::Result<Self> {
        let (requests, inbox) = channel();
        let (answer, answers) = channel();
        let thread = std::thread::Builder::new().name(format!("fc_vcpu {id}")).spawn(move || {
            let fd = Kickable::new(fd, run_size);
            Vcpu { id, fd, ram, buses, events, inbox, answer, halted: false }.run();
        })?;
        Ok(VcpuHandle { id, requests, answers, pauses: Cell::new(0), thread: Some(thread) })
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
            Ok(Answer::Paused) | Err(_) => Err(VcpuGone(self.id)),
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
        // What it still acknowledges is a pause that nobody waits for any more.
        while self.wait(None).is_ok() {}
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
    /// The guest cannot go on.
    halted: bool,
}

impl Vcpu {
    /// Paused and running by turns, until told to stop.
    fn run(mut self) {
        loop {
            match self.inbox.recv() {
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
                    // Nobody asks a running vCPU for its state, which nothing could be made of.
                    Ok(Request::Resume | Request::Save(_)) | Err(TryRecvError::Empty) => {}
                },
            }
        }
    }

    /// Enters the guest once and answers what it left for.
    fn enter(&mut self) -> Entered {
        match self.fd.run() {
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
            Err(e) => match e.errno() {
                libc::EINTR => self.kicked(),
                libc::EAGAIN => Entered::Again,
                errno => {
                    let reason = format!("KVM_RUN failed: {}", self.run_error(errno));
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
