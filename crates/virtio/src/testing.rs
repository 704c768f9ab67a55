//! For tests and fuzz targets: the driver's side of a queue, an interrupt that counts, and a worker
//! without a thread.

mod driver;
mod echo;
mod guest;

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, mpsc};

use config::HugePages;
use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::device::Interrupt;
use crate::worker::testing::{Clock, Command, EventLoop, Mailbox};
use crate::worker::{Nanos, Task, WorkerId, Workers};
use sync::locked;

pub use driver::{DriverQueue, INDIRECT, NEXT, Used, WRITE, write_descriptor};
pub use echo::{Echo, EchoControl};
pub use guest::{
    BAR, FakeIoEventFds, Guest, Interrupts, Kind, MMIO, RUNNING, TransportState, WINDOW, find_capability,
};

/// The id of the worker `index`, for a device that is given workers of its own.
pub fn worker(index: usize) -> WorkerId {
    WorkerId(index)
}

/// RAM of a guest, for a test.
pub fn guest_ram(mib: u32) -> GuestRam {
    GuestRam::map(mib, HugePages::None, false).expect("a little memory can be mapped")
}

thread_local! {
    static REUSED: RefCell<BTreeMap<u32, GuestRam>> = const { RefCell::new(BTreeMap::new()) };
}

/// As [`guest_ram`], for tests that need it thousands of times: the same RAM each time on this
/// thread, full of zeros again. The test that had it before must be done with it.
pub fn reused_ram(mib: u32) -> GuestRam {
    static ZEROS: [u8; 1 << 16] = [0; 1 << 16];
    let ram = REUSED.with_borrow_mut(|reused| reused.entry(mib).or_insert_with(|| guest_ram(mib)).clone());
    for region in ram.regions() {
        for at in (region.guest_addr..region.guest_addr + region.size).step_by(ZEROS.len()) {
            ram.memory().write_slice(&ZEROS, GuestAddress(at)).expect("it is in the region");
        }
    }
    ram
}

/// As [`guest_ram`], with a bitmap of the pages that the monitor writes.
pub fn tracked_guest_ram(mib: u32) -> GuestRam {
    GuestRam::map(mib, HugePages::None, true).expect("a little memory can be mapped")
}

/// An [`Interrupt`] that counts.
#[derive(Debug, Default)]
pub struct CountingInterrupt {
    queues: Mutex<Vec<u32>>,
    configs: AtomicU32,
    broken: Mutex<Vec<String>>,
}

impl CountingInterrupt {
    /// A new one at 0.
    pub fn new() -> Arc<Self> {
        Arc::default()
    }

    /// Interrupts of queue `index` since this was last asked.
    pub fn take_queue(&self, index: u16) -> u32 {
        let mut queues = locked(&self.queues);
        queues.get_mut(usize::from(index)).map_or(0, std::mem::take)
    }

    /// Configuration interrupts so far.
    pub fn configs(&self) -> u32 {
        self.configs.load(Ordering::SeqCst)
    }

    /// Why the device said it needs a reset, each time.
    pub fn broken(&self) -> Vec<String> {
        locked(&self.broken).clone()
    }
}

impl Interrupt for CountingInterrupt {
    fn queue(&self, index: u16) {
        let mut queues = locked(&self.queues);
        let index = usize::from(index);
        if queues.len() <= index {
            queues.resize(index + 1, 0);
        }
        queues[index] += 1;
    }

    fn config(&self) {
        self.configs.fetch_add(1, Ordering::SeqCst);
    }

    fn needs_reset(&self, why: &dyn fmt::Display) {
        locked(&self.broken).push(why.to_string());
    }
}

thread_local! {
    static NOW: Cell<Nanos> = const { Cell::new(1) };
}

/// A worker that runs on the thread of its test, one step at a time, with a clock that the test
/// sets.
pub struct TestWorker {
    event_loop: EventLoop,
    mailbox: Arc<Mailbox>,
    tasks: u64,
}

impl TestWorker {
    /// A worker at time 1 with nothing to do.
    pub fn new() -> Self {
        NOW.set(1);
        let mailbox = Mailbox::new().expect("an eventfd can be made");
        let clock = Clock::manual(|| NOW.get());
        let event_loop = EventLoop::new(Arc::clone(&mailbox), clock).expect("an epoll can be made");
        TestWorker { event_loop, mailbox, tasks: 0 }
    }

    /// Adds a task; it runs with the next [`TestWorker::run`]. Returns its number for
    /// [`TestWorker::remove`].
    pub fn add(&mut self, task: Box<dyn Task>, interrupt: Arc<dyn Interrupt>) -> u64 {
        self.tasks += 1;
        self.post(Command::Add { key: self.tasks, task, interrupt });
        self.tasks
    }

    /// This worker, in the form in which a transport takes it.
    pub fn workers(&self) -> Workers {
        Workers::unthreaded(Arc::clone(&self.mailbox))
    }

    /// Handles all events and timers that are due, and those that come of them.
    pub fn run(&mut self) {
        loop {
            self.event_loop.run_timers();
            let handled = self.event_loop.poll_once(false);
            let due = self.next_timer().is_some_and(|at| at <= self.now());
            if handled == 0 && !due && !self.event_loop.has_rescheduled() {
                break;
            }
        }
    }

    /// Handles the events that there are now, once. Returns how many.
    #[cfg(test)]
    pub(crate) fn poll_once(&mut self) -> usize {
        self.event_loop.poll_once(false)
    }

    /// Handles the events and timers that are due, once: what comes of them waits.
    pub fn step(&mut self) {
        self.event_loop.run_timers();
        self.event_loop.poll_once(false);
    }

    /// Handles what there is until `done`; sleeps in between until something happens.
    pub fn run_until(&mut self, mut done: impl FnMut() -> bool) {
        self.run();
        while !done() {
            self.event_loop.poll_once(true);
            self.run();
        }
    }

    /// Moves the clock by `by` and runs the timers that are due.
    pub fn advance(&mut self, by: Nanos) {
        NOW.set(NOW.get() + by);
        self.run();
    }

    /// The clock.
    pub fn now(&self) -> Nanos {
        NOW.get()
    }

    /// When a task wants to be called, the first of them.
    pub fn next_timer(&self) -> Option<Nanos> {
        self.event_loop.next_timer()
    }

    /// Quiesces all tasks. The answer comes when all are quiesced.
    pub fn pause(&mut self) -> mpsc::Receiver<()> {
        let (reply, quiesced) = mpsc::sync_channel(1);
        self.post(Command::Pause { reply });
        self.run();
        quiesced
    }

    /// Lets all tasks work again.
    pub fn resume(&mut self) {
        self.post(Command::Resume);
        self.run();
    }

    /// Asks for a task back. It comes when it has drained.
    pub fn remove(&mut self, task: u64) -> mpsc::Receiver<Box<dyn Task>> {
        let (reply, task_back) = mpsc::sync_channel(1);
        self.post(Command::Remove { key: task, reply });
        self.run();
        task_back
    }

    fn post(&self, command: Command) {
        assert!(self.mailbox.post(command).is_ok(), "a test's worker does not end");
    }
}

impl Default for TestWorker {
    fn default() -> Self {
        Self::new()
    }
}
