//! The event loop of a worker.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::clock::{Clock, Nanos};
use super::context::{Context, Event, EventKey, Registrations};
use super::mailbox::{Command, Mailbox, TaskKey};
use super::phase::{DrainOutcome, RemoveAction, TaskState, WorkerState};
use super::task::Task;
use crate::interrupt::Interrupt;

/// The slot of the worker's own descriptors. No task has it.
const OWN_SLOT: u16 = u16::MAX;
const MAIL: u32 = 0;
const TIMER: u32 = 1;

/// The most events of one `epoll_wait`.
const BATCH: usize = 64;

struct TaskEntry {
    key: TaskKey,
    task: Box<dyn Task>,
    state: TaskState,
    /// Receives the task when it is drained.
    leaving: Option<SyncSender<Box<dyn Task>>>,
    interrupt: Arc<dyn Interrupt>,
}

#[derive(Default)]
struct Slot {
    registrations: Registrations,
    entry: Option<TaskEntry>,
}

/// The event loop of a worker. One thread owns it and calls [`EventLoop::run`].
pub(crate) struct EventLoop {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// The time that `timer` is set to.
    armed: Option<Nanos>,
    mailbox: Arc<Mailbox>,
    slots: Vec<Slot>,
    worker_state: WorkerState,
    /// Callers that wait for a pause.
    pause_waiters: Vec<SyncSender<()>>,
    clock: Clock,
}

impl EventLoop {
    pub(crate) fn new(mailbox: Arc<Mailbox>, clock: Clock) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        // Edge-triggered, so that neither has to be read.
        for (fd, token) in [(mailbox.wake.as_fd(), MAIL), (timer.as_fd(), TIMER)] {
            let key = EventKey { slot: OWN_SLOT, life: 0, kick: false, token };
            epoll::add(&epoll, fd, EventData::new_u64(key.to_bits()), EventFlags::IN | EventFlags::ET)?;
        }
        Ok(EventLoop {
            epoll,
            timer,
            armed: None,
            mailbox,
            slots: Vec::new(),
            worker_state: WorkerState::default(),
            pause_waiters: Vec::new(),
            clock,
        })
    }

    /// Runs until the worker is stopped and every task has drained.
    pub(super) fn run(&mut self) {
        while !self.is_finished() {
            self.poll_once(!self.has_rescheduled());
        }
        self.finish();
    }

    /// Handles the events that are there, or waits for one first (`wait`). Returns their number.
    pub(crate) fn poll_once(&mut self, wait: bool) -> usize {
        let mut buffer = [MaybeUninit::uninit(); BATCH];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let events: &[epoll::Event] =
            match epoll::wait(&self.epoll, &mut buffer[..], (!wait).then_some(&zero)) {
                Ok((events, _)) => events,
                // EINTR is the only error that is possible here.
                Err(error) => {
                    debug_assert_eq!(error, rustix::io::Errno::INTR);
                    &[]
                }
            };
        self.clock.forget();
        for event in events {
            self.dispatch(EventKey::from_bits(event.data.u64()), event.flags);
        }
        let count = events.len();
        self.run_rescheduled();
        self.rearm();
        count
    }

    /// Whether the worker was stopped and all tasks are drained.
    pub(super) fn is_finished(&self) -> bool {
        self.worker_state.ends(self.task_states())
    }

    fn dispatch(&mut self, key: EventKey, flags: EventFlags) {
        if key.slot == OWN_SLOT {
            match key.token {
                MAIL => self.read_mail(),
                _ => self.run_timers(),
            }
            return;
        }
        let at = usize::from(key.slot);
        let Some(Slot { registrations, entry: Some(entry) }) = self.slots.get(at) else { return };
        // An event of a former task in this slot, or one of the batch in which the task was
        // removed.
        if registrations.life != key.life || !entry.state.gets_backend_events() {
            return;
        }
        if key.kick {
            if entry.state.is_running() {
                self.call(at, |task, cx| task.kicked(cx, key.token));
            }
            return;
        }
        let event = Event {
            token: key.token,
            readable: flags.intersects(EventFlags::IN),
            writable: flags.intersects(EventFlags::OUT),
            hangup: flags.intersects(EventFlags::HUP | EventFlags::RDHUP | EventFlags::ERR),
        };
        if registrations.is_watching(key.token) {
            self.call(at, |task, cx| task.ready(cx, event));
        }
    }

    /// Calls the task at `at`, then checks whether it has drained.
    fn call<R>(&mut self, at: usize, f: impl FnOnce(&mut dyn Task, &mut Context<'_>) -> R) -> Option<R> {
        let Slot { registrations, entry } = self.slots.get_mut(at)?;
        let entry = entry.as_mut()?;
        let mut cx = Context { epoll: self.epoll.as_fd(), registrations, clock: &mut self.clock };
        let result = f(entry.task.as_mut(), &mut cx);
        match entry.state.called(|| entry.task.is_drained()) {
            None => {}
            Some(DrainOutcome::Stays) => self.answer_pause_waiters(),
            Some(DrainOutcome::Leaves) => self.give_back(at),
        }
        Some(result)
    }

    /// Gives the drained task at `at` back to the caller that removes it.
    fn give_back(&mut self, at: usize) {
        let Some(Slot { registrations, entry: place }) = self.slots.get_mut(at) else { return };
        let mut cx = Context { epoll: self.epoll.as_fd(), registrations, clock: &mut self.clock };
        cx.unwatch_all();
        registrations.clear();
        if let Some(TaskEntry { task, leaving: Some(reply), .. }) = place.take() {
            self.mailbox.load.fetch_sub(1, Ordering::Relaxed);
            // The caller has stopped waiting: the task ends here.
            if let Err(unsent) = reply.send(task) {
                unsent.0.detach();
            }
        }
        self.answer_pause_waiters();
    }

    fn answer_pause_waiters(&mut self) {
        if self.worker_state.pause_is_complete(self.task_states()) {
            for waiter in self.pause_waiters.drain(..) {
                // The waiter may have timed out; ignore the send error.
                let _ = waiter.send(());
            }
        }
    }

    fn task_states(&self) -> impl Iterator<Item = TaskState> {
        self.slots.iter().filter_map(|slot| slot.entry.as_ref()).map(|entry| entry.state)
    }

    fn read_mail(&mut self) {
        while let Some(command) = self.mailbox.take() {
            match command {
                Command::Add { key, task, interrupt } => self.add(key, task, interrupt),
                Command::Remove { key, reply } => self.remove(key, reply),
                Command::Pause { reply } => {
                    self.pause_waiters.push(reply);
                    self.worker_state.pause();
                    self.quiesce_all();
                }
                Command::Resume => self.resume(),
                Command::Stop => {
                    self.worker_state.stop();
                    self.quiesce_all();
                }
            }
        }
    }

    fn add(&mut self, key: TaskKey, task: Box<dyn Task>, interrupt: Arc<dyn Interrupt>) {
        let at = self.slots.iter().position(|slot| slot.entry.is_none()).unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let entry = TaskEntry { key, task, state: TaskState::new(), leaving: None, interrupt };
        self.slots[at].entry = Some(entry);
        let attached = match u16::try_from(at) {
            Ok(slot) if slot != OWN_SLOT => {
                self.slots[at].registrations.slot = slot;
                self.call(at, |task, cx| task.attach(cx)).unwrap_or(Ok(()))
            }
            _ => Err(io::Error::other("too many tasks on one worker")),
        };
        if let (Err(error), Some(entry)) = (attached, self.slots[at].entry.as_mut()) {
            entry.state.fail();
            entry.interrupt.needs_reset(&format_args!("cannot wait for its events: {error}"));
            // The task is not called again, so level-triggered events would repeat for ever.
            let registrations = &mut self.slots[at].registrations;
            Context { epoll: self.epoll.as_fd(), registrations, clock: &mut self.clock }.unwatch_all();
        } else if self.worker_state.may_run() {
            self.start(at);
        }
    }

    /// Lets the task at `at` run.
    fn start(&mut self, at: usize) {
        if let Some(entry) = &mut self.slots[at].entry
            && entry.state.start()
        {
            self.call(at, |task, cx| task.resume(cx));
        }
    }

    /// Asks the task at `at` to drain.
    fn quiesce(&mut self, at: usize) {
        if let Some(entry) = &mut self.slots[at].entry
            && entry.state.quiesce()
        {
            self.call(at, |task, cx| task.quiesce(cx));
        }
    }

    fn remove(&mut self, key: TaskKey, reply: SyncSender<Box<dyn Task>>) {
        let found = self.slots.iter().position(|slot| slot.entry.as_ref().is_some_and(|o| o.key == key));
        let Some(at) = found else { return };
        let Some(entry) = &mut self.slots[at].entry else { return };
        entry.leaving = Some(reply);
        match entry.state.request_removal() {
            RemoveAction::Quiesce => self.quiesce(at),
            RemoveAction::Wait => {}
            RemoveAction::Now => self.give_back(at),
        }
    }

    fn quiesce_all(&mut self) {
        for at in 0..self.slots.len() {
            self.quiesce(at);
        }
        self.answer_pause_waiters();
    }

    fn resume(&mut self) {
        if !self.worker_state.resume() {
            return;
        }
        // A pause that was resumed before it was complete fails: its reply channel is dropped.
        self.pause_waiters.clear();
        for at in 0..self.slots.len() {
            self.start(at);
        }
    }

    fn finish(&mut self) {
        for slot in &mut self.slots {
            if let Some(entry) = slot.entry.take() {
                entry.task.detach();
            }
        }
        for command in self.mailbox.close() {
            if let Command::Add { task, .. } = command {
                task.detach();
            }
        }
    }

    /// Calls the tasks whose timer has expired.
    pub(crate) fn run_timers(&mut self) {
        self.armed = None;
        for at in 0..self.slots.len() {
            let due = self.slots[at].is_running()
                && self.slots[at].registrations.timer.is_some_and(|when| when <= self.clock.now());
            if due {
                self.slots[at].registrations.timer = None;
                self.call(at, |task, cx| task.timer(cx));
            }
        }
    }

    pub(crate) fn has_rescheduled(&self) -> bool {
        self.slots.iter().any(|slot| slot.registrations.again && slot.is_running())
    }

    /// Calls each task that asked to be called again.
    fn run_rescheduled(&mut self) {
        for at in 0..self.slots.len() {
            if self.slots[at].registrations.again && self.slots[at].is_running() {
                self.slots[at].registrations.again = false;
                self.call(at, |task, cx| task.timer(cx));
            }
        }
    }

    /// The earliest timer of a running task.
    pub(crate) fn next_timer(&self) -> Option<Nanos> {
        self.slots.iter().filter(|slot| slot.is_running()).filter_map(|slot| slot.registrations.timer).min()
    }

    /// Sets the timerfd to the earliest timer.
    fn rearm(&mut self) {
        let first = self.next_timer();
        if first == self.armed || !self.clock.ticks {
            return;
        }
        self.armed = first;
        // 0 would disarm it. A time in the past expires at once.
        let at = first.map_or(0, |at| at.max(1));
        let (tv_sec, tv_nsec) = ((at / 1_000_000_000).cast_signed(), (at % 1_000_000_000).cast_signed());
        let it_value = Timespec { tv_sec, tv_nsec };
        let it_interval = Timespec { tv_sec: 0, tv_nsec: 0 };
        let set = rustix::time::timerfd_settime(
            &self.timer,
            TimerfdTimerFlags::ABSTIME,
            &Itimerspec { it_interval, it_value },
        );
        debug_assert!(set.is_ok(), "a timer takes any time: {set:?}");
    }
}

impl Slot {
    fn is_running(&self) -> bool {
        self.entry.as_ref().is_some_and(|entry| entry.state.is_running())
    }
}
