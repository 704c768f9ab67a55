//! The device's work: filling buffers with random bytes.

use std::io;
use std::sync::Arc;

use rustix::rand::GetRandomFlags;

use super::{MAX_REQUEST, Shared};
use sync::EventFd;
use sync::locked;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::{Context, Event, Task, Token};

/// Bytes after which other tasks of the worker get their turn: a fraction of a millisecond.
pub(super) const TURN: u64 = 128 << 10;

/// The kernel is asked for so many bytes at once.
const PIECE: usize = 4096;

const KICK: Token = 0;

pub(super) struct EntropyTask {
    queue: Queue,
    kick: Arc<EventFd>,
    interrupt: Arc<dyn Interrupt>,
    shared: Arc<Shared>,
    chain: Chain,
    piece: Box<[u8; PIECE]>,
    /// It was said that the device needs a reset.
    dead: bool,
}

/// Why the device cannot go on.
#[derive(Debug, thiserror::Error)]
enum Fault {
    #[error(transparent)]
    Queue(#[from] QueueError),
    #[error("the host has no random numbers: {0}")]
    Source(io::Error),
}

/// Why the task stopped taking requests.
enum Stop {
    /// There are no more, and the driver will kick.
    Empty,
    /// The limiter holds the next one back; its timer is set.
    Throttled,
    /// It had its turn.
    Turn,
}

impl EntropyTask {
    pub(super) fn new(queue: ActiveQueue, interrupt: Arc<dyn Interrupt>, shared: Arc<Shared>) -> Self {
        let ActiveQueue { queue, kick } = queue;
        EntropyTask {
            queue,
            kick,
            interrupt,
            shared,
            chain: Chain::new(),
            piece: Box::new([0; PIECE]),
            dead: false,
        }
    }

    fn work(&mut self, cx: &mut Context<'_>) {
        if self.dead {
            return;
        }
        match self.serve(cx) {
            Ok(Stop::Empty | Stop::Throttled) => {}
            Ok(Stop::Turn) => cx.reschedule(),
            Err(fault) => {
                self.dead = true;
                cx.clear_timer();
                self.interrupt.needs_reset(&fault);
            }
        }
    }

    fn serve(&mut self, cx: &mut Context<'_>) -> Result<Stop, Fault> {
        let mut served = 0;
        loop {
            self.queue.disable_notifications()?;
            let stop = self.serve_available(cx, &mut served)?;
            if self.queue.publish()? {
                self.interrupt.queue(self.queue.index());
            }
            match stop {
                Stop::Empty if self.queue.enable_notifications()? => {}
                stop => return Ok(stop),
            }
        }
    }

    fn serve_available(&mut self, cx: &mut Context<'_>, served: &mut u64) -> Result<Stop, Fault> {
        loop {
            if *served >= TURN {
                return Ok(Stop::Turn);
            }
            if !self.queue.pop(&mut self.chain)? {
                return Ok(Stop::Empty);
            }
            let len = self.chain.writable().len().min(MAX_REQUEST);
            if !self.allowed(cx, len) {
                self.queue.rewind(&self.chain)?;
                return Ok(Stop::Throttled);
            }
            self.fill(len)?;
            self.queue.add_used(self.chain.head(), len)?;
            // A request for nothing is work, too.
            *served += u64::from(len).max(PIECE as u64);
        }
    }

    /// Whether the limiter lets `len` bytes pass; if not, the timer is set to when it will.
    fn allowed(&self, cx: &mut Context<'_>, len: u32) -> bool {
        let mut limits = locked(&self.shared.limits);
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

    /// Fills the first `len` writable bytes of the chain.
    fn fill(&mut self, len: u32) -> Result<(), Fault> {
        let Some((mut todo, _)) = self.chain.writable().split_at(len) else { return Ok(()) };
        while !todo.is_empty() {
            let piece = &mut self.piece[..PIECE.min(todo.len() as usize)];
            random(piece).map_err(Fault::Source)?;
            todo.write(self.queue.ram(), piece)?;
            let Some((_, rest)) = todo.split_at(piece.len() as u32) else { break };
            todo = rest;
        }
        Ok(())
    }
}

/// Fills `bytes` from the kernel's generator.
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
        self.work(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        // What is saved from now on is as of now.
        locked(&self.shared.limits).now = cx.now();
    }

    fn is_drained(&self) -> bool {
        // A request is served whole or given back.
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.work(cx);
    }

    fn detach(self: Box<Self>) {}
}
