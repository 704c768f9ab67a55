//! Workers, with and without threads.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::Duration;

use super::*;
use crate::testing::{CountingInterrupt, TestWorker};
use sync::EventFd;
use sync::locked;

/// For things that take microseconds.
const TIMEOUT: Duration = Duration::from_secs(20);

/// What happened to a task, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Did {
    Attach,
    Kick(Token),
    Ready(Event),
    Timer(Nanos),
    Quiesce,
    Resume,
    Detach,
}

type Act = Box<dyn FnMut(&mut Context<'_>, Did) + Send>;

/// A task that reports its calls, and does what the test says.
struct Probe {
    sender: mpsc::Sender<Did>,
    kick: Arc<EventFd>,
    other: Arc<EventFd>,
    drained: Arc<AtomicBool>,
    placement: Placement,
    /// Called with what happened.
    act: Act,
}

/// The other end of a probe.
struct ProbeHandle {
    events: mpsc::Receiver<Did>,
    kick: Arc<EventFd>,
    other: Arc<EventFd>,
    drained: Arc<AtomicBool>,
}

impl ProbeHandle {
    fn next(&self) -> Did {
        self.events.recv_timeout(TIMEOUT).expect("something happens")
    }

    /// The task runs.
    fn started(&self) {
        assert_eq!((self.next(), self.next()), (Did::Attach, Did::Resume));
    }

    fn all(&self) -> Vec<Did> {
        self.events.try_iter().collect()
    }
}

fn probe(act: impl FnMut(&mut Context<'_>, Did) + Send + 'static) -> (Box<Probe>, ProbeHandle) {
    let (sender, events) = mpsc::channel();
    let event = || Arc::new(EventFd::new().unwrap());
    let (kick, other, drained) = (event(), event(), Arc::new(AtomicBool::new(true)));
    let hand = ProbeHandle {
        events,
        kick: Arc::clone(&kick),
        other: Arc::clone(&other),
        drained: Arc::clone(&drained),
    };
    (Box::new(Probe { sender, kick, other, drained, placement: Placement::Shared, act: Box::new(act) }), hand)
}

impl Probe {
    fn did(&mut self, cx: &mut Context<'_>, did: Did) {
        (self.act)(cx, did);
        // A test that has seen enough receives no more events.
        let _ = self.sender.send(did);
    }
}

impl Task for Probe {
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        cx.watch_kick(1, &self.kick)?;
        cx.watch(2, &self.other, Interest::READ)?;
        self.did(cx, Did::Attach);
        Ok(())
    }

    fn kicked(&mut self, cx: &mut Context<'_>, token: Token) {
        self.did(cx, Did::Kick(token));
    }

    fn ready(&mut self, cx: &mut Context<'_>, event: Event) {
        self.other.take();
        self.did(cx, Did::Ready(event));
    }

    fn timer(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        self.did(cx, Did::Timer(now));
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        self.did(cx, Did::Quiesce);
    }

    fn is_drained(&self) -> bool {
        self.drained.load(Ordering::SeqCst)
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.did(cx, Did::Resume);
    }

    fn placement(&self) -> Placement {
        self.placement
    }

    fn detach(self: Box<Self>) {
        let _ = self.sender.send(Did::Detach);
    }
}

const READABLE: Event = Event { token: 2, readable: true, writable: false, hangup: false };

fn workers(shared: usize) -> Workers {
    Workers::start(shared).unwrap()
}

fn interrupt() -> Arc<CountingInterrupt> {
    CountingInterrupt::new()
}

#[test]
fn a_task_is_attached_resumed_kicked_and_given_back() {
    let workers = workers(1);
    let (task, hand) = probe(|_, _| {});
    let handle = workers.add(task, interrupt());
    assert_eq!((hand.next(), hand.next()), (Did::Attach, Did::Resume));
    for _ in 0..3 {
        hand.kick.signal();
        assert_eq!(hand.next(), Did::Kick(1));
    }
    assert_eq!(hand.kick.take(), 3, "the worker reads no counter");
    hand.other.signal();
    assert_eq!(hand.next(), Did::Ready(READABLE));
    let Removed::Task(task) = handle.remove().wait(TIMEOUT) else { panic!("it is drained") };
    assert_eq!(hand.next(), Did::Quiesce);
    hand.kick.signal();
    task.detach();
    assert_eq!(hand.next(), Did::Detach);
    workers.stop();
    assert_eq!(hand.all(), []);
}

#[test]
fn busy_task_is_drained_first_while_others_run() {
    let mut worker = TestWorker::new();
    let (slow, slow_hand) = probe(|_, _| {});
    let (other, other_hand) = probe(|_, _| {});
    let (slow, _other) = (worker.add(slow, interrupt()), worker.add(other, interrupt()));
    worker.run();
    slow_hand.drained.store(false, Ordering::SeqCst);
    let back = worker.remove(slow);
    slow_hand.kick.signal();
    slow_hand.other.signal();
    other_hand.kick.signal();
    worker.run();
    assert!(back.try_recv().is_err());
    let did = [Did::Attach, Did::Resume, Did::Quiesce, Did::Ready(READABLE)];
    assert_eq!(slow_hand.all(), did, "no kick, but completions");
    assert_eq!(other_hand.all(), [Did::Attach, Did::Resume, Did::Kick(1)]);
    slow_hand.drained.store(true, Ordering::SeqCst);
    slow_hand.other.signal();
    worker.run();
    assert!(back.try_recv().is_ok());
}

#[test]
fn a_pause_waits_for_all_and_a_resume_starts_them_as_if_kicked() {
    let mut worker = TestWorker::new();
    let (first, first_hand) = probe(|_, _| {});
    let (second, second_hand) = probe(|_, _| {});
    worker.add(first, interrupt());
    worker.add(second, interrupt());
    worker.run();
    first_hand.all();
    second_hand.all();
    first_hand.drained.store(false, Ordering::SeqCst);
    let paused = worker.pause();
    assert!(paused.try_recv().is_err());
    // One that comes while all is paused is attached and waits.
    let (third, third_hand) = probe(|_, _| {});
    worker.add(third, interrupt());
    second_hand.kick.signal();
    worker.run();
    assert_eq!(third_hand.all(), [Did::Attach]);
    first_hand.drained.store(true, Ordering::SeqCst);
    first_hand.other.signal();
    worker.run();
    assert!(paused.try_recv().is_ok());
    worker.resume();
    assert_eq!(first_hand.all(), [Did::Quiesce, Did::Ready(READABLE), Did::Resume]);
    assert_eq!(second_hand.all(), [Did::Quiesce, Did::Resume]);
    assert_eq!(third_hand.all(), [Did::Resume]);
}

#[test]
fn pause_timeout_names_the_worker_and_can_be_undone() {
    let workers = workers(2);
    let (task, hand) = probe(|_, _| {});
    workers.add(task, interrupt());
    hand.started();
    hand.drained.store(false, Ordering::SeqCst);
    let error = workers.pause(Duration::from_millis(1)).unwrap_err();
    assert_eq!(error.worker, 0);
    assert!(error.to_string().starts_with("io worker 0: requests are still in flight after"), "{error}");
    workers.resume();
    assert_eq!((hand.next(), hand.next()), (Did::Quiesce, Did::Resume));
    hand.drained.store(true, Ordering::SeqCst);
    assert_eq!(workers.pause(TIMEOUT), Ok(()));
    workers.stop();
}

#[test]
fn timers_come_on_time_once_and_only_while_wanted() {
    let mut worker = TestWorker::new();
    let (task, hand) = probe(|cx, did| match did {
        Did::Kick(_) => {
            let now = cx.now();
            cx.set_timer(now + 500);
        }
        Did::Ready(_) => cx.clear_timer(),
        _ => {}
    });
    worker.add(task, interrupt());
    worker.run();
    assert_eq!((hand.all().len(), worker.next_timer()), (2, None));
    hand.kick.signal();
    worker.run();
    let due = worker.now() + 500;
    assert_eq!(worker.next_timer(), Some(due));
    worker.advance(499);
    assert_eq!(hand.all(), [Did::Kick(1)]);
    worker.advance(1);
    assert_eq!((hand.all(), worker.next_timer()), (vec![Did::Timer(due)], None));
    worker.advance(10_000);
    assert_eq!(hand.all(), []);
    hand.kick.signal();
    worker.run();
    hand.other.signal();
    worker.run();
    assert_eq!(worker.next_timer(), None);
    // A paused task gets no timer.
    hand.kick.signal();
    worker.run();
    hand.all();
    let paused = worker.pause();
    worker.advance(1_000);
    assert!(paused.try_recv().is_ok());
    assert_eq!(hand.all(), [Did::Quiesce]);
}

#[test]
fn real_timers_are_no_earlier_than_asked_for() {
    let workers = workers(1);
    let asked = Arc::new(Mutex::new(0));
    let (task, hand) = probe({
        let asked = Arc::clone(&asked);
        move |cx, did| {
            if matches!(did, Did::Resume | Did::Timer(_)) {
                let at = cx.now() + 300_000;
                *locked(&asked) = at;
                cx.set_timer(at);
            }
        }
    });
    workers.add(task, interrupt());
    hand.started();
    let mut asked_before = *locked(&asked);
    for _ in 0..20 {
        let Did::Timer(now) = hand.next() else { panic!("only timers come") };
        assert!(now >= asked_before);
        asked_before = now + 300_000;
    }
    workers.stop();
}

#[test]
fn a_task_that_wants_more_lets_others_have_their_turn() {
    let mut worker = TestWorker::new();
    let order = Arc::new(Mutex::new(Vec::new()));
    let mut hands = Vec::new();
    for name in ["a", "b"] {
        let (order, mut left) = (Arc::clone(&order), 3);
        let (task, hand) = probe(move |cx, did| {
            if matches!(did, Did::Kick(_) | Did::Timer(_)) {
                locked(&order).push(name);
                left -= 1;
                if left > 0 {
                    cx.reschedule();
                }
            }
        });
        worker.add(task, interrupt());
        hands.push(hand);
    }
    worker.run();
    for hand in &hands {
        hand.kick.signal();
    }
    worker.run();
    assert_eq!(*locked(&order), ["a", "b", "a", "b", "a", "b"]);
}

#[test]
fn tasks_spread_over_shared_workers_only() {
    let names = Arc::new(Mutex::new(Vec::new()));
    let workers = workers(2);
    let dedicated = workers.dedicated().unwrap();
    let mut hands = Vec::new();
    for placement in [Placement::Shared, Placement::Shared, Placement::On(dedicated), Placement::Shared] {
        let names = Arc::clone(&names);
        let (mut task, hand) = probe(move |_, did| {
            if did == Did::Resume {
                let thread = std::thread::current();
                locked(&names).push((placement, thread.name().unwrap().to_owned()));
            }
        });
        task.placement = placement;
        workers.add(task, interrupt());
        assert_eq!((hand.next(), hand.next()), (Did::Attach, Did::Resume));
        hands.push(hand);
    }
    workers.stop();
    let names: Vec<String> = locked(&names).iter().map(|(_, name)| name.clone()).collect();
    assert_eq!(names, ["io 0", "io 1", "io 2", "io 0"]);
}

#[test]
fn each_worker_calls_the_start_hook() {
    static SEEN: Mutex<Vec<String>> = Mutex::new(Vec::new());
    sync::thread::set_start_hook(|name| locked(&SEEN).push(name.to_owned()));
    let workers = Workers::start(2).unwrap();
    workers.dedicated().unwrap();
    workers.stop();
    // Threads of other tests in this process call it too.
    for name in ["io 0", "io 1", "io 2"] {
        assert!(locked(&SEEN).iter().any(|seen| seen == name), "{name}");
    }
}

#[test]
fn task_that_fails_to_attach_can_be_removed() {
    struct Unattachable(OwnedFd);
    impl Task for Unattachable {
        fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
            cx.watch(1, &self.0, Interest::READ)?;
            // A plain file cannot be waited for.
            cx.watch(0, std::fs::File::open("/proc/self/exe")?, Interest::READ)
        }
        fn kicked(&mut self, _: &mut Context<'_>, _: Token) {
            panic!("it is silent")
        }
        fn ready(&mut self, _: &mut Context<'_>, _: Event) {
            panic!("it is silent")
        }
        fn quiesce(&mut self, _: &mut Context<'_>) {
            panic!("it is silent")
        }
        fn is_drained(&self) -> bool {
            true
        }
        fn resume(&mut self, _: &mut Context<'_>) {
            panic!("it is silent")
        }
        fn detach(self: Box<Self>) {}
    }
    let mut worker = TestWorker::new();
    let interrupt = interrupt();
    let (reads, writes) = rustix::pipe::pipe().unwrap();
    rustix::io::write(&writes, b"this is not read").unwrap();
    let task = worker.add(Box::new(Unattachable(reads)), Arc::clone(&interrupt) as Arc<_>);
    assert_eq!(worker.poll_once(), 1, "a letter");
    assert_eq!(interrupt.broken().len(), 1);
    assert_eq!(worker.poll_once(), 0, "what it did watch causes no wake-up");
    assert!(worker.pause().try_recv().is_ok());
    worker.resume();
    assert!(worker.remove(task).try_recv().is_ok());
}

#[test]
fn descriptors_of_a_removed_task_wake_no_task() {
    let mut worker = TestWorker::new();
    let (task, hand) = probe(|_, _| {});
    let key = worker.add(task, interrupt());
    worker.run();
    let task = worker.remove(key).try_recv().unwrap();
    hand.other.signal();
    hand.kick.signal();
    // Another task takes its place.
    let (next, next_hand) = probe(|_, _| {});
    worker.add(next, interrupt());
    worker.run();
    assert_eq!(next_hand.all(), [Did::Attach, Did::Resume]);
    assert_eq!(hand.all(), [Did::Attach, Did::Resume, Did::Quiesce]);
    task.detach();
}

#[test]
fn tokens_are_watched_once_and_can_be_changed_and_dropped() {
    let mut worker = TestWorker::new();
    let checked = Arc::new(AtomicBool::new(false));
    // An eventfd can always be written: the event comes again and again until it is not wanted any
    // more.
    let (watcher, watcher_hand) = probe({
        let mut count = 0;
        move |cx, did| {
            if let Did::Ready(Event { token: 3, writable, .. }) = did {
                assert!(writable);
                count += 1;
                if count == 3 {
                    cx.unwatch(3);
                }
            } else if did == Did::Attach {
                cx.watch(3, EventFd::new().unwrap(), Interest::WRITE).unwrap();
            }
        }
    });
    worker.add(watcher, interrupt());
    worker.run();
    assert_eq!(watcher_hand.all().len(), 2 + 3);

    let (task, hand) = probe({
        let checked = Arc::clone(&checked);
        move |cx, did| {
            if did != Did::Attach {
                return;
            }
            let event = EventFd::new().unwrap();
            let again = cx.watch(2, &event, Interest::READ).unwrap_err();
            assert_eq!(again.kind(), io::ErrorKind::AlreadyExists);
            let too_large = cx.watch(MAX_TOKEN + 1, &event, Interest::READ).unwrap_err();
            assert_eq!(too_large.kind(), io::ErrorKind::InvalidInput);
            cx.watch(3, &event, Interest::READ).unwrap();
            cx.change_interest(3, Interest { read: true, write: false }).unwrap();
            assert!(cx.change_interest(4, Interest::READ).is_err());
            checked.store(true, Ordering::SeqCst);
        }
    });
    worker.add(task, interrupt());
    worker.run();
    assert!(checked.load(Ordering::SeqCst) && hand.all().len() == 2);
}

#[test]
fn stopping_drains_and_detaches_what_is_left() {
    let workers = workers(1);
    let (task, hand) = probe(|_, _| {});
    let handle = workers.add(task, interrupt());
    hand.started();
    workers.clone().stop();
    assert_eq!((hand.next(), hand.next()), (Did::Quiesce, Did::Detach));
    assert!(matches!(handle.remove().wait(TIMEOUT), Removed::Ended));
    let (late, late_hand) = probe(|_, _| {});
    let interrupt = interrupt();
    workers.add(late, Arc::clone(&interrupt) as Arc<_>);
    assert_eq!(late_hand.all(), [Did::Detach]);
    assert_eq!(interrupt.broken(), ["its io worker has ended"]);
    assert_eq!(workers.pause(TIMEOUT), Ok(()));
}

#[test]
fn dropping_the_workers_ends_their_threads() {
    let (task, hand) = probe(|_, _| {});
    workers(1).add(task, interrupt());
    let did: Vec<Did> = (0..4).map(|_| hand.next()).collect();
    assert_eq!(did, [Did::Attach, Did::Resume, Did::Quiesce, Did::Detach]);
}

#[test]
fn a_worker_with_nothing_to_do_uses_no_cpu() {
    fn cpu_time() -> Duration {
        let usage = rustix::time::clock_gettime(rustix::time::ClockId::ThreadCPUTime);
        Duration::new(usage.tv_sec.cast_unsigned(), usage.tv_nsec.cast_unsigned() as u32)
    }
    let workers = workers(1);
    let times = Arc::new(Mutex::new(Vec::new()));
    let (task, hand) = probe({
        let times = Arc::clone(&times);
        move |cx, did| match did {
            Did::Resume => {
                locked(&times).push(cpu_time());
                // Comes after 200 ms, in which nothing happens.
                let at = cx.now() + 200_000_000;
                cx.set_timer(at);
            }
            Did::Timer(_) => locked(&times).push(cpu_time()),
            _ => {}
        }
    });
    workers.add(task, interrupt());
    hand.started();
    assert!(matches!(hand.next(), Did::Timer(_)));
    workers.stop();
    let times = locked(&times);
    assert!(times[1] < times[0] + Duration::from_millis(5), "{times:?}");
}

#[test]
fn sleeping_worker_misses_no_request() {
    use crate::device::{Activation, ActiveQueue, Device, Interrupt, feature};
    use crate::queue::Queue;
    use crate::testing::{DriverQueue, Echo, guest_ram};
    use rustix::event::{PollFd, PollFlags, Timespec, poll};
    use std::os::fd::AsFd;

    struct Irq(EventFd);
    impl Interrupt for Irq {
        fn queue(&self, _: u16) {
            self.0.signal();
        }
        fn config(&self) {}
        fn needs_reset(&self, why: &dyn std::fmt::Display) {
            panic!("{why}");
        }
    }

    for features in [0, feature::RING_EVENT_IDX] {
        let ram = guest_ram(4);
        let mut driver = DriverQueue::new(&ram, 0x1000, 8, features);
        let queue = Queue::new(0, 8, &driver.state(), features, &ram, Arc::default()).unwrap();
        let kick = Arc::new(EventFd::new().unwrap());
        let irq = Arc::new(Irq(EventFd::new().unwrap()));
        let (mut device, _control) = Echo::new(&[8], 0);
        let activation = Activation {
            memory: ram.clone(),
            queues: vec![ActiveQueue { queue, kick: Arc::clone(&kick) }],
            interrupt: Arc::clone(&irq) as Arc<dyn Interrupt>,
            features,
            restored: false,
        };
        let workers = Workers::start(1).unwrap();
        for task in device.activate(activation).unwrap() {
            workers.add(task, Arc::clone(&irq) as Arc<dyn Interrupt>);
        }
        let mut kicks = 0;
        for request in 0..3_000u32 {
            // Some come at once, some after the worker has gone to sleep, most about when it does.
            for _ in 0..request % 64 * 100 {
                std::hint::spin_loop();
            }
            driver.enable_interrupts();
            driver.add(&[(0x10_0000, 16)], &[(0x10_1000, 16)]).unwrap();
            if driver.publish() {
                kicks += 1;
                kick.signal();
            }
            let mut fds = [PollFd::from_borrowed_fd(irq.0.as_fd(), PollFlags::IN)];
            let timeout = Timespec { tv_sec: 20, tv_nsec: 0 };
            assert_eq!(poll(&mut fds, Some(&timeout)), Ok(1), "request {request} is lost");
            irq.0.take();
            driver.take_used().unwrap();
        }
        assert!(kicks > 0);
        workers.stop();
    }
}
