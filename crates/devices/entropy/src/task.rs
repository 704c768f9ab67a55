//! The task of the queue: fills the buffers of requests with random bytes.

use std::io;
use std::sync::Arc;

use rustix::rand::GetRandomFlags;

use crate::shared::Shared;
use sync::EventFd;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::{Context, Event, Task, Token};

/// Most bytes that one request gets.
pub const MAX_REQUEST: u32 = 64 << 10;

/// Bytes after which the task yields to other tasks of the worker: a fraction of a millisecond.
const BYTES_PER_CALL: u64 = 128 << 10;

/// Bytes of one `getrandom` call.
const CHUNK: usize = 4096;

const KICK: Token = 0;

/// Serves the queue of the device.
pub(crate) struct EntropyTask {
    queue: Queue,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    shared: Arc<Shared>,
    chain: Chain,
    chunk: Box<[u8; CHUNK]>,
    /// The rate limiter holds a request back.
    throttled: bool,
    /// The device needs a reset.
    failed: bool,
}

/// Why the device needs a reset.
#[derive(Debug, thiserror::Error)]
enum TaskError {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("cannot get random bytes of the host: {0}")]
    Random(io::Error),
}

/// Why a call ended.
enum Progress {
    /// The queue is empty, and the driver kicks when it adds a request.
    Empty,
    /// The rate limiter delays the next request. Its timer is set.
    Throttled,
    /// The queue may have more requests, for the next call.
    MoreWork,
}

impl EntropyTask {
    pub(crate) fn new(queue: ActiveQueue, interrupt: Arc<dyn Interrupt>, shared: Arc<Shared>) -> Self {
        let ActiveQueue { queue, kick } = queue;
        EntropyTask {
            queue,
            kick,
            interrupt,
            shared,
            chain: Chain::new(),
            chunk: Box::new([0; CHUNK]),
            throttled: false,
            failed: false,
        }
    }

    fn work(&mut self, cx: &mut Context<'_>) {
        if self.failed {
            return;
        }
        match self.serve(cx) {
            Ok(Progress::Empty | Progress::Throttled) => {}
            Ok(Progress::MoreWork) => cx.reschedule(),
            Err(error) => {
                let stats = &self.shared.stats;
                stats.entropy_event_fails.add(1);
                if matches!(error, TaskError::Random(_)) {
                    stats.host_rng_fails.add(1);
                }
                self.failed = true;
                cx.clear_timer();
                self.interrupt.needs_reset(&error);
            }
        }
    }

    fn serve(&mut self, cx: &mut Context<'_>) -> Result<Progress, TaskError> {
        let mut served = 0;
        loop {
            self.queue.disable_notifications()?;
            let progress = self.serve_available(cx, &mut served)?;
            if self.queue.publish()? {
                self.interrupt.queue(self.queue.index());
            }
            match progress {
                Progress::Empty if self.queue.enable_notifications()? => {}
                progress => return Ok(progress),
            }
        }
    }

    fn serve_available(&mut self, cx: &mut Context<'_>, served: &mut u64) -> Result<Progress, TaskError> {
        loop {
            if *served >= BYTES_PER_CALL {
                return Ok(Progress::MoreWork);
            }
            if !self.queue.pop(&mut self.chain)? {
                return Ok(Progress::Empty);
            }
            let len = self.chain.writable().len().min(MAX_REQUEST);
            self.throttled = !self.take_tokens(cx, len);
            if self.throttled {
                self.shared.stats.entropy_rate_limiter_throttled.add(1);
                self.queue.rewind(&self.chain)?;
                return Ok(Progress::Throttled);
            }
            self.fill(len)?;
            self.queue.add_used(self.chain.head(), len)?;
            self.shared.stats.entropy_event_count.add(1);
            self.shared.stats.entropy_bytes.add(len.into());
            // An empty request costs something, too.
            *served += u64::from(len).max(CHUNK as u64);
        }
    }

    /// Takes `len` bytes from the rate limiter. False: it has too few, and the timer is set to when
    /// it has enough.
    fn take_tokens(&self, cx: &mut Context<'_>, len: u32) -> bool {
        let mut limits = self.shared.limits();
        if limits.limiter.is_unlimited() {
            return true;
        }
        let now = cx.now();
        limits.now = now;
        if limits.limiter.try_take(len.into(), now) {
            return true;
        }
        if let Some(at) = limits.limiter.next_allowed_at(len.into(), now) {
            cx.set_timer(at);
        }
        false
    }

    /// Fills the first `len` bytes of the chain's buffers.
    fn fill(&mut self, len: u32) -> Result<(), TaskError> {
        let Some((mut todo, _)) = self.chain.writable().split_at(len) else { return Ok(()) };
        while !todo.is_empty() {
            let chunk = &mut self.chunk[..CHUNK.min(todo.len() as usize)];
            random(chunk).map_err(TaskError::Random)?;
            todo.write(self.queue.ram(), chunk)?;
            let Some((_, rest)) = todo.split_at(chunk.len() as u32) else { break };
            todo = rest;
        }
        Ok(())
    }
}

/// Fills `bytes` from the kernel's random number generator.
fn random(bytes: &mut [u8]) -> io::Result<()> {
    let mut done = 0;
    while done < bytes.len() {
        done += rustix::io::retry_on_intr(|| {
            rustix::rand::getrandom(&mut bytes[done..], GetRandomFlags::empty())
        })?;
    }
    Ok(())
}

impl Task for EntropyTask {
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        cx.watch_kick(KICK, &self.kick)
    }

    fn kicked(&mut self, cx: &mut Context<'_>, _token: Token) {
        self.work(cx);
    }

    fn ready(&mut self, _cx: &mut Context<'_>, _event: Event) {}

    fn timer(&mut self, cx: &mut Context<'_>) {
        // A reschedule arrives here too.
        if std::mem::take(&mut self.throttled) {
            self.shared.stats.rate_limiter_event_count.add(1);
        }
        self.work(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        // The limiter is saved as of the time of the pause.
        self.shared.limits().now = cx.now();
    }

    fn is_drained(&self) -> bool {
        // No request is ever half done.
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.work(cx);
    }

    fn detach(self: Box<Self>) {}
}
