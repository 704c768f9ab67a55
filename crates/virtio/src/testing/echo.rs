//! A device for tests of queues, workers and transports. It copies the readable bytes of a request
//! to the writable ones, at once or when the test says.

use std::collections::VecDeque;
use std::io;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};

use crate::device::{
    ActivateError, Activation, ActiveQueue, Device, DeviceData, DeviceKind, DeviceState, Interrupt,
    read_bytes,
};
use crate::queue::{Chain, QueueError};
use crate::worker::{Context, Event, Interest, Task, Token};
use sync::EventFd;
use sync::locked;

/// Its configuration space in bytes; a driver may write all of it.
const CONFIG_SIZE: usize = 20;

/// Its saved state, which is empty.
#[derive(Debug, Serialize, Deserialize)]
struct EchoState {}

impl DeviceData for EchoState {
    const NAME: &'static str = "Echo";
}

/// The front. One task for all queues.
#[derive(Debug)]
pub struct Echo {
    sizes: Vec<u16>,
    features: u64,
    config: Vec<u8>,
    control: Arc<EchoControl>,
}

/// What a test can do to it and see of it.
#[derive(Debug)]
pub struct EchoControl {
    /// Requests that may complete; None is all.
    credit: Mutex<Option<usize>>,
    wake: EventFd,
    generation: AtomicU32,
    activations: AtomicU32,
    resets: AtomicU32,
    detached: AtomicU32,
}

impl Echo {
    /// A device with queues of these sizes, and with these features of its own.
    pub fn new(sizes: &[u16], features: u64) -> (Self, Arc<EchoControl>) {
        let control = Arc::new(EchoControl {
            credit: Mutex::new(None),
            wake: EventFd::new().expect("an eventfd can be made"),
            generation: AtomicU32::new(0),
            activations: AtomicU32::new(0),
            resets: AtomicU32::new(0),
            detached: AtomicU32::new(0),
        });
        let config = (0..CONFIG_SIZE as u8).map(|i| 0xc0 | i).collect();
        (Echo { sizes: sizes.to_vec(), features, config, control: Arc::clone(&control) }, control)
    }
}

impl EchoControl {
    /// From now on only `credit` more requests complete; the others stay in flight.
    pub fn hold(&self, credit: usize) {
        *locked(&self.credit) = Some(credit);
        self.wake.signal();
    }

    /// Everything completes.
    pub fn release(&self) {
        *locked(&self.credit) = None;
        self.wake.signal();
    }

    /// The configuration space is another one.
    pub fn change_config(&self) {
        self.generation.fetch_add(1, Ordering::SeqCst);
    }

    /// How often it was activated and reset, and how many of its tasks were detached.
    pub fn counts(&self) -> (u32, u32, u32) {
        let count = |counter: &AtomicU32| counter.load(Ordering::SeqCst);
        (count(&self.activations), count(&self.resets), count(&self.detached))
    }
}

impl Device for Echo {
    fn kind(&self) -> DeviceKind {
        DeviceKind::Console
    }

    fn features(&self) -> u64 {
        self.features
    }

    fn queue_sizes(&self) -> &[u16] {
        &self.sizes
    }

    fn read_config(&self, offset: u64, data: &mut [u8]) {
        read_bytes(&self.config, offset, data);
    }

    fn write_config(&mut self, offset: u64, data: &[u8]) {
        let offset = usize::try_from(offset).unwrap_or(usize::MAX);
        for (place, byte) in self.config.iter_mut().skip(offset).zip(data) {
            *place = *byte;
        }
    }

    fn config_generation(&self) -> u32 {
        self.control.generation.load(Ordering::SeqCst)
    }

    fn activate(&mut self, mut activation: Activation) -> Result<Vec<Box<dyn Task>>, ActivateError> {
        let first = activation.take_queue(0)?;
        let mut queues = vec![first];
        queues.append(&mut activation.queues);
        self.control.activations.fetch_add(1, Ordering::SeqCst);
        Ok(vec![Box::new(EchoTask {
            queues,
            interrupt: activation.interrupt,
            control: Arc::clone(&self.control),
            waiting: VecDeque::new(),
            spare: Vec::new(),
            quiet: false,
            dead: false,
        })])
    }

    fn reset(&mut self) {
        self.control.resets.fetch_add(1, Ordering::SeqCst);
    }

    fn save(&self) -> DeviceState {
        DeviceState::of(&EchoState {})
    }
}

struct EchoTask {
    queues: Vec<ActiveQueue>,
    interrupt: Arc<dyn Interrupt>,
    control: Arc<EchoControl>,
    /// In flight: which queue, and the chain.
    waiting: VecDeque<(usize, Chain)>,
    spare: Vec<Chain>,
    quiet: bool,
    dead: bool,
}

const WAKE: Token = 1000;

impl EchoTask {
    fn work(&mut self) {
        if self.dead {
            return;
        }
        if let Err(error) = self.try_work() {
            self.dead = true;
            self.waiting.clear();
            self.interrupt.needs_reset(&error);
        }
    }

    fn try_work(&mut self) -> Result<(), QueueError> {
        loop {
            if !self.quiet {
                self.take()?;
            }
            self.complete()?;
            let mut more = false;
            for ActiveQueue { queue, .. } in &mut self.queues {
                if queue.publish()? {
                    self.interrupt.queue(queue.index());
                }
                more |= !self.quiet && queue.enable_notifications()?;
            }
            if !more {
                return Ok(());
            }
        }
    }

    fn take(&mut self) -> Result<(), QueueError> {
        for (index, ActiveQueue { queue, .. }) in self.queues.iter_mut().enumerate() {
            queue.disable_notifications()?;
            loop {
                let mut chain = self.spare.pop().unwrap_or_default();
                if !queue.pop(&mut chain)? {
                    self.spare.push(chain);
                    break;
                }
                self.waiting.push_back((index, chain));
            }
        }
        Ok(())
    }

    fn complete(&mut self) -> Result<(), QueueError> {
        while let Some((index, chain)) = self.waiting.pop_front() {
            {
                let mut credit = locked(&self.control.credit);
                if *credit == Some(0) {
                    self.waiting.push_front((index, chain));
                    break;
                }
                *credit = credit.map(|credit| credit - 1);
            }
            let queue = &mut self.queues[index].queue;
            let mut data = vec![0; chain.readable().len().min(1 << 16) as usize];
            chain.readable().read(queue.ram(), &mut data)?;
            let written = chain.writable().write(queue.ram(), &data)?;
            queue.add_used(chain.head(), written as u32)?;
            self.spare.push(chain);
        }
        Ok(())
    }
}

impl Task for EchoTask {
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        for (token, queue) in (0..).zip(&self.queues) {
            cx.watch_kick(token, &queue.kick)?;
        }
        cx.watch(WAKE, &self.control.wake, Interest::READ)
    }

    fn kicked(&mut self, _cx: &mut Context<'_>, _token: Token) {
        self.work();
    }

    fn ready(&mut self, _cx: &mut Context<'_>, event: Event) {
        if event.token == WAKE {
            self.control.wake.take();
            self.work();
        }
    }

    fn quiesce(&mut self, _cx: &mut Context<'_>) {
        self.quiet = true;
    }

    fn is_drained(&self) -> bool {
        self.waiting.is_empty()
    }

    fn resume(&mut self, _cx: &mut Context<'_>) {
        self.quiet = false;
        self.work();
    }

    fn detach(self: Box<Self>) {
        self.control.detached.fetch_add(1, Ordering::SeqCst);
    }
}
