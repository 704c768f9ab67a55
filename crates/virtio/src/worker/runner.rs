//! The loop of a worker.

use std::io;
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::SyncSender;

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec};

use super::context::{Clock, Context, Event, EventKey, Seat};
use super::mailbox::{Command, Mailbox, TaskKey};
use super::phase::{Course, Halt, Leave, Settled};
use super::{Nanos, Task};
use crate::device::Interrupt;

/// Events that the worker's own descriptors give; no task has this slot.
const OWN_SLOT: u16 = u16::MAX;
const MAIL: u32 = 0;
const TIMER: u32 = 1;

/// Events that are taken from the kernel at once.
const BATCH: usize = 64;

struct Occupant {
    key: TaskKey,
    task: Box<dyn Task>,
    course: Course,
    /// Who gets it when it is drained.
    leaving: Option<SyncSender<Box<dyn Task>>>,
    interrupt: Arc<dyn Interrupt>,
}

#[derive(Default)]
struct Slot {
    seat: Seat,
    occupant: Option<Occupant>,
}

/// A worker's state. One thread owns it and calls [`Runner::run`].
pub(crate) struct Runner {
    epoll: OwnedFd,
    timer: OwnedFd,
    /// What the timer is set to.
    armed: Option<Nanos>,
    mailbox: Arc<Mailbox>,
    slots: Vec<Slot>,
    halt: Halt,
    /// Who waits until all tasks are still.
    pausers: Vec<SyncSender<()>>,
    clock: Clock,
}

impl Runner {
    pub(crate) fn new(mailbox: Arc<Mailbox>, clock: Clock) -> io::Result<Self> {
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC)?;
        let timer = rustix::time::timerfd_create(
            TimerfdClockId::Monotonic,
            TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK,
        )?;
        // Edge-triggered: neither is ever read.
        for (fd, token) in [(mailbox.wake.as_fd(), MAIL), (timer.as_fd(), TIMER)] {
            let key = EventKey { slot: OWN_SLOT, life: 0, kick: false, token };
            epoll::add(&epoll, fd, EventData::new_u64(key.to_bits()), EventFlags::IN | EventFlags::ET)?;
        }
        Ok(Runner {
            epoll,
            timer,
            armed: None,
            mailbox,
            slots: Vec::new(),
            halt: Halt::default(),
            pausers: Vec::new(),
            clock,
        })
    }

    /// Works until it is told to stop and every task has drained.
    pub(super) fn run(&mut self) {
        while !self.is_finished() {
            self.turn(!self.again_wanted());
        }
        self.finish();
    }

    /// Takes what events there are (or, to `wait`, at least one) and calls the tasks that they are for. Returns how many.
    pub(crate) fn turn(&mut self, wait: bool) -> usize {
        let mut buffer = [MaybeUninit::uninit(); BATCH];
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        let events: &[epoll::Event] =
            match epoll::wait(&self.epoll, &mut buffer[..], (!wait).then_some(&zero)) {
                Ok((events, _)) => events,
                // The only error that a wait can give here: it was interrupted.
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
        self.run_again();
        self.rearm();
        count
    }

    /// Whether it was stopped and all tasks are still.
    pub(super) fn is_finished(&self) -> bool {
        self.halt.ends(self.courses())
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
        let Some(Slot { seat, occupant: Some(occupant) }) = self.slots.get(at) else { return };
        // An event of a task that had the place before, or one that was in the same batch as its end.
        if seat.life != key.life || !occupant.course.hears_events() {
            return;
        }
        if key.kick {
            if occupant.course.is_running() {
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
        if seat.is_watching(key.token) {
            self.call(at, |task, cx| task.ready(cx, event));
        }
    }

    /// Calls the task at `at`, then sees whether that was the last it had in flight.
    fn call<R>(&mut self, at: usize, f: impl FnOnce(&mut dyn Task, &mut Context<'_>) -> R) -> Option<R> {
        let Slot { seat, occupant } = self.slots.get_mut(at)?;
        let occupant = occupant.as_mut()?;
        let mut cx = Context { epoll: self.epoll.as_fd(), seat, clock: &mut self.clock };
        let result = f(occupant.task.as_mut(), &mut cx);
        match occupant.course.called(|| occupant.task.is_drained()) {
            None => {}
            Some(Settled::Stays) => self.answer_pausers(),
            Some(Settled::Leaves) => self.give_back(at),
        }
        Some(result)
    }

    /// The task at `at` is still, and goes to who wants it back.
    fn give_back(&mut self, at: usize) {
        let Some(Slot { seat, occupant: place }) = self.slots.get_mut(at) else { return };
        let mut cx = Context { epoll: self.epoll.as_fd(), seat, clock: &mut self.clock };
        cx.unwatch_all();
        seat.vacate();
        if let Some(Occupant { task, leaving: Some(reply), .. }) = place.take() {
            self.mailbox.load.fetch_sub(1, Ordering::Relaxed);
            // Nobody waits for it any more: then it ends here.
            if let Err(unsent) = reply.send(task) {
                unsent.0.detach();
            }
        }
        self.answer_pausers();
    }

    fn answer_pausers(&mut self) {
        if self.halt.is_over(self.courses()) {
            for pauser in self.pausers.drain(..) {
                // Who gave up waiting does not need the answer.
                let _ = pauser.send(());
            }
        }
    }

    fn courses(&self) -> impl Iterator<Item = Course> {
        self.slots.iter().filter_map(|slot| slot.occupant.as_ref()).map(|occupant| occupant.course)
    }

    fn read_mail(&mut self) {
        while let Some(command) = self.mailbox.take() {
            match command {
                Command::Add { key, task, interrupt } => self.add(key, task, interrupt),
                Command::Remove { key, reply } => self.remove(key, reply),
                Command::Pause { reply } => {
                    self.pausers.push(reply);
                    self.halt.pause();
                    self.quiesce_all();
                }
                Command::Resume => self.resume(),
                Command::Stop => {
                    self.halt.stop();
                    self.quiesce_all();
                }
            }
        }
    }

    fn add(&mut self, key: TaskKey, task: Box<dyn Task>, interrupt: Arc<dyn Interrupt>) {
        let at = self.slots.iter().position(|slot| slot.occupant.is_none()).unwrap_or_else(|| {
            self.slots.push(Slot::default());
            self.slots.len() - 1
        });
        let occupant = Occupant { key, task, course: Course::new(), leaving: None, interrupt };
        self.slots[at].occupant = Some(occupant);
        let attached = match u16::try_from(at) {
            Ok(slot) if slot != OWN_SLOT => {
                self.slots[at].seat.slot = slot;
                self.call(at, |task, cx| task.attach(cx)).unwrap_or(Ok(()))
            }
            _ => Err(io::Error::other("too many tasks on one worker")),
        };
        if let (Err(error), Some(occupant)) = (attached, self.slots[at].occupant.as_mut()) {
            occupant.course.fail();
            occupant.interrupt.needs_reset(&format_args!("cannot wait for its events: {error}"));
            // Nobody would hear what it did register, and some of it would come over and over.
            let seat = &mut self.slots[at].seat;
            Context { epoll: self.epoll.as_fd(), seat, clock: &mut self.clock }.unwatch_all();
        } else if self.halt.lets_work() {
            self.start(at);
        }
    }

    /// Lets the task at `at` work.
    fn start(&mut self, at: usize) {
        if let Some(occupant) = &mut self.slots[at].occupant
            && occupant.course.start()
        {
            self.call(at, |task, cx| task.resume(cx));
        }
    }

    /// Asks the task at `at` to drain.
    fn quiesce(&mut self, at: usize) {
        if let Some(occupant) = &mut self.slots[at].occupant
            && occupant.course.quiesce()
        {
            self.call(at, |task, cx| task.quiesce(cx));
        }
    }

    fn remove(&mut self, key: TaskKey, reply: SyncSender<Box<dyn Task>>) {
        let found = self.slots.iter().position(|slot| slot.occupant.as_ref().is_some_and(|o| o.key == key));
        let Some(at) = found else { return };
        let Some(occupant) = &mut self.slots[at].occupant else { return };
        occupant.leaving = Some(reply);
        match occupant.course.leave() {
            Leave::Quiesce => self.quiesce(at),
            Leave::Wait => {}
            Leave::Now => self.give_back(at),
        }
    }

    fn quiesce_all(&mut self) {
        for at in 0..self.slots.len() {
            self.quiesce(at);
        }
        self.answer_pausers();
    }

    fn resume(&mut self) {
        if !self.halt.resume() {
            return;
        }
        // A pause that was overtaken is not answered: its reply is dropped.
        self.pausers.clear();
        for at in 0..self.slots.len() {
            self.start(at);
        }
    }

    fn finish(&mut self) {
        for slot in &mut self.slots {
            if let Some(occupant) = slot.occupant.take() {
                occupant.task.detach();
            }
        }
        for command in self.mailbox.close() {
            if let Command::Add { task, .. } = command {
                task.detach();
            }
        }
    }

    /// Calls the tasks whose time has come.
    pub(crate) fn run_timers(&mut self) {
        self.armed = None;
        for at in 0..self.slots.len() {
            let due = self.slots[at].is_running()
                && self.slots[at].seat.timer.is_some_and(|when| when <= self.clock.now());
            if due {
                self.slots[at].seat.timer = None;
                self.call(at, |task, cx| task.timer(cx));
            }
        }
    }

    pub(crate) fn again_wanted(&self) -> bool {
        self.slots.iter().any(|slot| slot.seat.again && slot.is_running())
    }

    /// Calls the tasks that asked to be called again, once each.
    fn run_again(&mut self) {
        for at in 0..self.slots.len() {
            if self.slots[at].seat.again && self.slots[at].is_running() {
                self.slots[at].seat.again = false;
                self.call(at, |task, cx| task.timer(cx));
            }
        }
    }

    /// The first time that a running task waits for.
    pub(crate) fn next_timer(&self) -> Option<Nanos> {
        self.slots.iter().filter(|slot| slot.is_running()).filter_map(|slot| slot.seat.timer).min()
    }

    /// Sets the timer to it.
    fn rearm(&mut self) {
        let first = self.next_timer();
        if first == self.armed || !self.clock.ticks {
            return;
        }
        self.armed = first;
        // Time 0 would disarm it; a time in the past fires at once.
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
        self.occupant.as_ref().is_some_and(|occupant| occupant.course.is_running())
    }
}
