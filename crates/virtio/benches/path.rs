//! What a request costs on its way: the queue alone, and from the kick to the interrupt through a
//! worker.
//!
//! `cargo bench -p vesta-virtio --features testing`. Numbers mean something on an idle machine
//! only.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, poll};
use sync::EventFd;
use vesta_virtio::device::{Activation, ActiveQueue, Device, Interrupt, feature};
use vesta_virtio::queue::{Chain, Queue};
use vesta_virtio::testing::{DriverQueue, Echo, guest_ram};
use vesta_virtio::worker::Workers;

const DATA: u64 = 0x10_0000;
const FEATURES: u64 = feature::VERSION_1 | feature::RING_EVENT_IDX | feature::RING_INDIRECT_DESC;

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

fn main() {
    for batch in [1, 32] {
        println!("queue, {batch:2} at once: {:6.1} ns for each request of three buffers", queue_alone(batch));
    }
    let mut times = round_trips();
    times.sort();
    let at = |percent: usize| times[times.len() * percent / 100].as_nanos();
    println!("kick to interrupt: median {} ns, 99% {} ns", at(50), at(99));
}

/// Nanoseconds for a request through the device's side of a queue, nothing done with it.
fn queue_alone(batch: u32) -> f64 {
    const ROUNDS: u32 = 30_000;
    let ram = guest_ram(4);
    let mut driver = DriverQueue::new(&ram, 0x1000, 256, FEATURES);
    let mut queue = Queue::new(0, 256, &driver.state(), FEATURES, &ram, Arc::default()).expect("it fits");
    let mut chain = Chain::new();
    let mut spent = Duration::ZERO;
    for _ in 0..ROUNDS {
        for i in 0..u64::from(batch) {
            let table = DATA + 0x1000 * i;
            driver
                .add_indirect(table, &[(table + 0x100, 16)], &[(DATA, 4096), (table + 0x200, 1)])
                .expect("the ring has a free descriptor");
        }
        driver.publish();
        let begun = Instant::now();
        queue.disable_notifications().expect("the driver is good");
        while queue.pop(&mut chain).expect("the driver is good") {
            std::hint::black_box(chain.writable().len());
            queue.add_used(chain.head(), 1).expect("the driver is good");
        }
        std::hint::black_box(queue.publish().expect("the driver is good"));
        queue.enable_notifications().expect("the driver is good");
        spent += begun.elapsed();
        while driver.take_used().is_some() {}
    }
    #[expect(clippy::cast_precision_loss, reason = "it is printed with four digits")]
    let nanos = spent.as_nanos() as f64;
    nanos / f64::from(ROUNDS * batch)
}

/// One request at a time: from the driver's kick until it has its interrupt.
fn round_trips() -> Vec<Duration> {
    let ram = guest_ram(4);
    let mut driver = DriverQueue::new(&ram, 0x1000, 256, FEATURES);
    let queue = Queue::new(0, 256, &driver.state(), FEATURES, &ram, Arc::default()).expect("it fits");
    let kick = Arc::new(EventFd::new().expect("an eventfd can be made"));
    let irq = Arc::new(Irq(EventFd::new().expect("an eventfd can be made")));
    let (mut device, _control) = Echo::new(&[256], 0);
    let activation = Activation {
        memory: ram.clone(),
        queues: vec![ActiveQueue { queue, kick: Arc::clone(&kick) }],
        interrupt: Arc::clone(&irq) as Arc<dyn Interrupt>,
        features: FEATURES,
        restored: false,
    };
    let workers = Workers::start(1).expect("a thread can be made");
    for task in device.activate(activation).expect("it has its queue") {
        workers.add(task, Arc::clone(&irq) as Arc<dyn Interrupt>);
    }
    let mut times = Vec::new();
    for _ in 0..20_000 {
        driver.enable_interrupts();
        driver.add(&[(DATA, 16)], &[(DATA + 64, 16)]).expect("the ring has a free descriptor");
        let begun = Instant::now();
        if driver.publish() {
            kick.signal();
        }
        let mut fds = [PollFd::from_borrowed_fd(irq.0.as_fd(), PollFlags::IN)];
        poll(&mut fds, None).expect("it can be waited for");
        irq.0.take();
        times.push(begun.elapsed());
        driver.take_used().expect("it was used");
    }
    workers.stop();
    times
}
