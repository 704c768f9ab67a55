//! A model of one queue under pauses, saves, forks and removals, checked in every order of events.
//!
//! The decisions are made by production code: the device's side of the rings ([`Ring`]) and the
//! states of a task ([`TaskState`]) and of its worker ([`WorkerState`]). The model adds a driver, a
//! disk that completes requests in any order, and the thread that pauses the machine with the steps
//! of `machine`: it stops the vCPUs, asks the workers to pause, and saves when they have answered.
//! A child is built from the saved state alone. The task is a minimal one that keeps the rules of
//! [`crate::worker`].
//!
//! Parent and child share nothing after the fork. So a fork is a choice of which one to follow, and
//! the checker follows both.
//!
//! # What is checked
//!
//! Each request of the driver completes exactly once, and the driver is notified of it. A machine
//! whose pause was answered is drained. A saved state has nothing in flight. Tests with deliberate
//! mistakes show that the checker finds them.

use std::cell::Cell;
use std::fmt;
use std::time::Duration;

use stateright::{Checker, Model, Property};

use crate::queue::QueueError;
use crate::queue::ring::{Ring, RingMemory};
use crate::worker::phase::{DrainOutcome, RemoveAction, TaskState, WorkerState};

/// Requests that the driver makes.
const REQUESTS: usize = 3;
/// Entries of the queue.
const SIZE: u16 = 2;

/// Mistakes to be found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Mistake {
    None,
    /// The machine is saved as soon as it was asked to pause.
    SavesBeforeTheAnswer,
    /// A task that is restored waits for a kick.
    ResumesWithoutALook,
    /// Completions are not handled while a task drains.
    IgnoresCompletionsWhileDraining,
    /// A restored device waits for its next completion to interrupt its driver.
    RestoresSilently,
}

#[derive(Debug)]
struct Life {
    event_idx: bool,
    mistake: Mistake,
    pauses: u8,
    forks: u8,
    removals: u8,
}

/// The rings, in the guest's memory.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
struct Memory {
    avail_flags: u16,
    avail_idx: u16,
    avail: [u16; SIZE as usize],
    used_event: u16,
    used_flags: u16,
    used_idx: u16,
    used: [u16; SIZE as usize],
    avail_event: u16,
}

/// The shared memory for [`Ring`], which changes it through a shared reference. Each step of the
/// model is one thread's alone; the orders of single accesses are what `loom` looks at, beside the
/// ring.
struct View(Cell<Memory>);

impl View {
    #[expect(clippy::unnecessary_wraps, reason = "what the ring expects of memory")]
    fn change(&self, change: impl FnOnce(&mut Memory)) -> Result<(), QueueError> {
        let mut memory = self.0.get();
        change(&mut memory);
        self.0.set(memory);
        Ok(())
    }
}

impl RingMemory for View {
    fn avail_flags(&self) -> Result<u16, QueueError> {
        Ok(self.0.get().avail_flags)
    }

    fn avail_idx(&self) -> Result<u16, QueueError> {
        Ok(self.0.get().avail_idx)
    }

    fn avail_entry(&self, slot: u16) -> Result<u16, QueueError> {
        Ok(self.0.get().avail[usize::from(slot)])
    }

    fn used_event(&self) -> Result<u16, QueueError> {
        Ok(self.0.get().used_event)
    }

    fn set_used_flags(&self, flags: u16) -> Result<(), QueueError> {
        self.change(|memory| memory.used_flags = flags)
    }

    fn set_used_idx(&self, idx: u16) -> Result<(), QueueError> {
        self.change(|memory| memory.used_idx = idx)
    }

    fn set_used_entry(&self, slot: u16, head: u16, _written: u32) -> Result<(), QueueError> {
        self.change(|memory| memory.used[usize::from(slot)] = head)
    }

    fn set_avail_event(&self, idx: u16) -> Result<(), QueueError> {
        self.change(|memory| memory.avail_event = idx)
    }

    fn full_fence(&self) {}
}

/// The guest's driver.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash)]
struct Driver {
    /// Requests that it made.
    made: u8,
    /// How far it has looked at the used ring.
    seen: u16,
    /// How often it learned of each request's completion.
    notified: [u8; REQUESTS],
}

/// A device's task, with what it has in flight.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Task {
    ring: Ring,
    quiet: bool,
    /// Requests that the disk has.
    with_disk: Vec<u16>,
    /// Requests that the disk is done with, of which the task has not heard.
    done: Vec<u16>,
    /// Requests that are in the used ring and not published yet.
    unpublished: u8,
}

impl Task {
    fn new(event_idx: bool, (next_avail, next_used): (u16, u16)) -> Self {
        let ring = Ring::new(SIZE, event_idx, next_avail, next_used);
        Task { ring, quiet: true, with_disk: Vec::new(), done: Vec::new(), unpublished: 0 }
    }

    fn in_flight(&self) -> usize {
        self.with_disk.len() + self.done.len()
    }

    fn is_drained(&self) -> bool {
        self.with_disk.is_empty() && self.done.is_empty() && self.unpublished == 0
    }

    /// All there is to do. True if the driver is to be interrupted.
    fn work(&mut self, memory: &View) -> Result<bool, QueueError> {
        let mut interrupt = false;
        self.ring.disable_notifications(memory)?;
        loop {
            let in_flight = self.in_flight() as u16;
            if !self.quiet
                && let Some(head) = self.ring.pop(memory, in_flight)?
            {
                self.with_disk.push(head);
                continue;
            }
            for head in std::mem::take(&mut self.done) {
                self.ring.add_used(memory, head, 0)?;
                self.unpublished += 1;
            }
            if self.unpublished > 0 {
                self.unpublished = 0;
                interrupt |= self.ring.publish(memory)?;
                continue;
            }
            if self.quiet || !self.ring.enable_notifications(memory, in_flight)? {
                return Ok(interrupt);
            }
        }
    }
}

/// The thread that owns the machine.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Owner {
    /// The vCPUs run.
    Runs,
    /// The vCPUs are stopped, and the worker was asked to pause.
    Waits,
    /// The worker has answered.
    Quiesced,
    /// The worker was asked to resume; the vCPUs come next.
    Resumes,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Mail {
    /// The pause of that number.
    Pause(u8),
    Resume,
    Remove,
    Add,
}

/// A machine with one device of one queue, on one worker.
#[expect(clippy::struct_excessive_bools, reason = "each is a fact of its own")]
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Vm {
    memory: Memory,
    driver: Driver,
    /// An interrupt that the guest has not taken yet.
    interrupt: bool,
    owner: Owner,

    worker_state: WorkerState,
    mail: Vec<Mail>,
    /// Pauses whose callers wait for an answer, by their number.
    pause_waiters: Vec<u8>,
    /// The last pause was answered.
    answered: bool,
    task: Option<(TaskState, Task)>,
    /// The progress of the queue while its task is on no worker.
    back: Option<(u16, u16)>,
    /// Events that the worker has not heard of yet.
    kicked: bool,
    completed: bool,

    pauses: u8,
    forks: u8,
    removals: u8,
    /// Something went wrong that no property names.
    broken: Option<&'static str>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Step {
    /// The driver makes a request.
    Request,
    /// The guest takes its interrupt.
    Interrupt,
    /// The disk is done with a request.
    Complete(u16),
    /// The worker handles a kick.
    HandleKick,
    /// The worker handles completions of its disk.
    HandleCompletions,
    /// The worker handles its oldest command.
    Read,
    Pause,
    /// The owner has its answer.
    Answered,
    /// The owner waits no longer.
    GiveUp,
    /// The owner saves the machine and from here on the child is followed.
    Follow,
    Resume,
    Go,
    /// The device's task is wanted back, and given to a worker again.
    Remove,
    Add,
}

impl Vm {
    /// The task is called; then the worker sees whether that was what it waited for.
    fn call(&mut self, call: impl FnOnce(&mut Task)) {
        let Some((state, task)) = &mut self.task else { return };
        call(task);
        let view = View(Cell::new(self.memory));
        match task.work(&view) {
            Ok(interrupt) => self.interrupt |= interrupt,
            Err(_) => self.broken = Some("the device finds its queue broken"),
        }
        self.memory = view.0.get();
        match state.called(|| task.is_drained()) {
            None => {}
            Some(DrainOutcome::Stays) => self.answer(),
            Some(DrainOutcome::Leaves) => self.give_back(),
        }
    }

    fn give_back(&mut self) {
        if let Some((_, task)) = self.task.take() {
            if task.in_flight() > 0 {
                self.broken = Some("a task with requests in flight is given back");
            }
            self.back = Some(task.ring.progress());
            // It watches nothing any more.
            (self.kicked, self.completed) = (false, false);
        }
        self.answer();
    }

    fn answer(&mut self) {
        if self.worker_state.pause_is_complete(self.task.iter().map(|(state, _)| *state)) {
            // A waiter that timed out is not answered.
            self.answered |= std::mem::take(&mut self.pause_waiters).contains(&self.pauses);
        }
    }

    fn start(&mut self, life: &Life) {
        if let Some((state, task)) = &mut self.task
            && state.start()
        {
            if life.mistake == Mistake::ResumesWithoutALook {
                task.quiet = false;
            } else {
                self.call(|task| task.quiet = false);
            }
        }
    }

    fn quiesce(&mut self) {
        if let Some((state, _)) = &mut self.task
            && state.quiesce()
        {
            self.call(|task| task.quiet = true);
        }
    }

    fn read(&mut self, life: &Life, mail: Mail) {
        match mail {
            Mail::Pause(number) => {
                self.pause_waiters.push(number);
                self.worker_state.pause();
                self.quiesce();
                self.answer();
            }
            Mail::Resume => {
                if self.worker_state.resume() {
                    self.pause_waiters.clear();
                    self.start(life);
                }
            }
            Mail::Remove => {
                let Some((state, _)) = &mut self.task else { return };
                match state.request_removal() {
                    RemoveAction::Quiesce => self.quiesce(),
                    RemoveAction::Wait => {}
                    RemoveAction::Now => self.give_back(),
                }
            }
            Mail::Add => {
                let Some(position) = self.back.take() else { return };
                self.task = Some((TaskState::new(), Task::new(life.event_idx, position)));
                if self.worker_state.may_run() {
                    self.start(life);
                }
            }
        }
    }

    /// Another machine, of what is saved of this one: its memory, its driver's mind, positions. An
    /// interrupt that was on its way is in no state (`transport::common`), so a restored device
    /// gives its driver one.
    fn child(&self, life: &Life) -> Vm {
        let mut worker_state = WorkerState::default();
        // Its worker is paused before it gets its tasks.
        worker_state.pause();
        let (mut task, mut broken) = (None, self.broken);
        if let Some((_, parents)) = &self.task {
            if parents.in_flight() > 0 {
                broken = Some("a task with requests in flight is saved");
            }
            let (avail, used) = parents.ring.progress();
            task = Some((TaskState::new(), Task::new(life.event_idx, (avail, used))));
        }
        Vm {
            worker_state,
            task,
            broken,
            mail: Vec::new(),
            pause_waiters: Vec::new(),
            answered: false,
            kicked: false,
            completed: false,
            interrupt: life.mistake != Mistake::RestoresSilently,
            forks: self.forks + 1,
            ..self.clone()
        }
    }

    /// Whether all came to a good end.
    fn is_done(&self) -> bool {
        self.driver.notified == [1; REQUESTS] && self.owner == Owner::Runs
    }
}

impl Model for Life {
    type State = Vm;
    type Action = Step;

    fn init_states(&self) -> Vec<Vm> {
        let mut vm = Vm {
            memory: Memory::default(),
            driver: Driver::default(),
            interrupt: false,
            owner: Owner::Runs,
            worker_state: WorkerState::default(),
            mail: Vec::new(),
            pause_waiters: Vec::new(),
            answered: false,
            task: None,
            back: Some((0, 0)),
            kicked: false,
            completed: false,
            pauses: 0,
            forks: 0,
            removals: 0,
            broken: None,
        };
        vm.read(self, Mail::Add);
        vec![vm]
    }

    fn actions(&self, vm: &Vm, steps: &mut Vec<Step>) {
        let outstanding = u16::from(vm.driver.made) - vm.driver.seen;
        let mut may = |may: bool, step: Step| {
            if may {
                steps.push(step);
            }
        };
        if vm.owner == Owner::Runs {
            may(usize::from(vm.driver.made) < REQUESTS && outstanding < SIZE, Step::Request);
            may(vm.interrupt, Step::Interrupt);
            may(vm.pauses < self.pauses, Step::Pause);
            may(vm.task.is_some() && vm.removals < self.removals, Step::Remove);
        }
        if let Some((_, task)) = &vm.task {
            for &head in &task.with_disk {
                may(true, Step::Complete(head));
            }
        }
        may(vm.kicked, Step::HandleKick);
        may(vm.completed, Step::HandleCompletions);
        may(!vm.mail.is_empty(), Step::Read);
        may(vm.back.is_some() && !vm.mail.contains(&Mail::Add), Step::Add);
        match vm.owner {
            Owner::Runs => {}
            Owner::Waits => {
                let early = self.mistake == Mistake::SavesBeforeTheAnswer;
                may(vm.answered || early, Step::Answered);
                may(!vm.answered, Step::GiveUp);
            }
            Owner::Quiesced => {
                may(vm.forks < self.forks && vm.back.is_none(), Step::Follow);
                may(true, Step::Resume);
            }
            Owner::Resumes => may(true, Step::Go),
        }
    }

    fn next_state(&self, vm: &Vm, step: Step) -> Option<Vm> {
        let mut vm = vm.clone();
        match step {
            Step::Request => {
                let (memory, id) = (&mut vm.memory, vm.driver.made);
                memory.avail[usize::from(memory.avail_idx % SIZE)] = id.into();
                let wants = if self.event_idx {
                    memory.avail_event == memory.avail_idx
                } else {
                    memory.used_flags == 0
                };
                memory.avail_idx += 1;
                vm.driver.made += 1;
                // The kick of a queue without a task is lost: a task that is added polls the queue.
                vm.kicked |= wants && vm.task.is_some();
            }
            Step::Interrupt => {
                vm.interrupt = false;
                while vm.driver.seen != vm.memory.used_idx {
                    let id = vm.memory.used[usize::from(vm.driver.seen % SIZE)];
                    vm.driver.seen += 1;
                    vm.memory.used_event = vm.driver.seen;
                    let notified = &mut vm.driver.notified[usize::from(id)];
                    *notified = notified.saturating_add(1);
                    if u16::from(vm.driver.made) < vm.driver.seen {
                        vm.broken = Some("more is completed than was asked for");
                        return Some(vm);
                    }
                }
            }
            Step::Complete(head) => {
                let (_, task) = vm.task.as_mut()?;
                task.with_disk.retain(|&other| other != head);
                task.done.push(head);
                vm.completed = true;
            }
            Step::HandleKick => {
                vm.kicked = false;
                if vm.task.as_ref().is_some_and(|(state, _)| state.is_running()) {
                    vm.call(|_| {});
                }
            }
            Step::HandleCompletions => {
                vm.completed = false;
                let ignores = self.mistake == Mistake::IgnoresCompletionsWhileDraining;
                let handles =
                    |state: TaskState| if ignores { state.is_running() } else { state.gets_backend_events() };
                if vm.task.as_ref().is_some_and(|(state, _)| handles(*state)) {
                    vm.call(|_| {});
                }
            }
            Step::Read => {
                let mail = vm.mail.remove(0);
                vm.read(self, mail);
            }
            Step::Pause => {
                vm.owner = Owner::Waits;
                vm.pauses += 1;
                vm.answered = false;
                vm.mail.push(Mail::Pause(vm.pauses));
            }
            Step::Answered => vm.owner = Owner::Quiesced,
            Step::GiveUp | Step::Resume => {
                vm.owner = Owner::Resumes;
                vm.mail.push(Mail::Resume);
            }
            Step::Follow => vm = vm.child(self),
            Step::Go => vm.owner = Owner::Runs,
            Step::Remove => {
                vm.removals += 1;
                vm.mail.push(Mail::Remove);
            }
            Step::Add => vm.mail.push(Mail::Add),
        }
        Some(vm)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        vec![
            Property::always("no completion is delivered twice", |_, vm: &Vm| {
                vm.driver.notified.iter().all(|&notified| notified <= 1)
            }),
            // The model has no cycles: who can do nothing more has come to the end.
            Property::always("no completion is lost", |life: &Life, vm: &Vm| {
                let mut steps = Vec::new();
                life.actions(vm, &mut steps);
                !steps.is_empty() || vm.is_done()
            }),
            Property::always("a paused machine does not change", |_, vm: &Vm| {
                vm.owner != Owner::Quiesced
                    || vm.task.as_ref().is_none_or(|(state, task)| {
                        state.is_quiesced() && task.in_flight() == 0 && task.unpublished == 0
                    })
            }),
            Property::always("nothing breaks", |_, vm: &Vm| vm.broken.is_none()),
            // That there is something to check.
            Property::sometimes("a child finds a request that its parent did not take", |_, vm: &Vm| {
                vm.forks > 0 && vm.owner == Owner::Quiesced && {
                    let next = vm.task.as_ref().map(|(_, task)| task.ring.progress().0);
                    next.is_some_and(|next| next != vm.memory.avail_idx)
                }
            }),
            Property::sometimes(
                "a child has a completion of which only its parent was notified",
                |_, vm: &Vm| {
                    vm.forks > 0 && vm.owner == Owner::Quiesced && vm.driver.seen != vm.memory.used_idx
                },
            ),
            Property::sometimes("a machine is resumed while its task still drains", |_, vm: &Vm| {
                vm.owner == Owner::Runs
                    && vm.task.as_ref().is_some_and(|(state, _)| !state.is_running() && !state.is_quiesced())
            }),
            Property::sometimes("a task is given back in a pause", |_, vm: &Vm| {
                vm.owner == Owner::Waits && vm.back.is_some()
            }),
            Property::sometimes("all is done after all of it", |life: &Life, vm: &Vm| {
                let all = vm.pauses == life.pauses && vm.forks == life.forks;
                vm.is_done() && all && vm.removals == life.removals
            }),
        ]
    }
}

fn life(event_idx: bool) -> Life {
    Life { event_idx, mistake: Mistake::None, pauses: 2, forks: 2, removals: 1 }
}

fn no_completion_is_lost_or_delivered_twice(event_idx: bool) {
    let checker = life(event_idx).checker().timeout(Duration::from_mins(2)).spawn_dfs().join();
    checker.assert_properties();
    println!("{} states, {} of them different", checker.state_count(), checker.unique_state_count());
    assert!(checker.is_done(), "not all states were looked at");
}

#[test]
fn each_completion_is_delivered_once_with_event_idx() {
    no_completion_is_lost_or_delivered_twice(true);
}

#[test]
fn each_completion_is_delivered_once_with_flags() {
    no_completion_is_lost_or_delivered_twice(false);
}

/// Looks for what a mistake does.
fn found(mistake: Mistake) -> Vec<String> {
    let checker = Life { mistake, ..life(true) }.checker().spawn_bfs().join();
    let discoveries = checker.discoveries();
    let sometimes = ["a child", "a machine is resumed", "a task is given", "all is done"];
    let wrong = discoveries.into_keys().filter(|name| !sometimes.iter().any(|begin| name.starts_with(begin)));
    wrong.map(ToOwned::to_owned).collect()
}

/// A mistake and the property that it breaks.
struct Breaks(Mistake, &'static str);

impl fmt::Display for Breaks {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} breaks {:?}", self.0, self.1)
    }
}

#[test]
fn the_checker_finds_mistakes() {
    for breaks in [
        Breaks(Mistake::SavesBeforeTheAnswer, "a paused machine does not change"),
        Breaks(Mistake::ResumesWithoutALook, "no completion is lost"),
        Breaks(Mistake::IgnoresCompletionsWhileDraining, "no completion is lost"),
        Breaks(Mistake::RestoresSilently, "no completion is lost"),
    ] {
        let found = found(breaks.0);
        assert!(found.iter().any(|name| name == breaks.1), "{breaks}: {found:?}");
    }
}
