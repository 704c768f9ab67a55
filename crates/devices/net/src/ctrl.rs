//! The control queue (5.1.6.5): how many queues are used, what may be left to the guest, that it has announced itself.

use std::io;
use std::sync::Arc;

use memory::GuestRam;

use super::config_space::feature;
use super::device::Shared;
use sync::EventFd;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::{Context, Event, Nanos, Task, Token};

/// `VIRTIO_NET_CTRL_ANNOUNCE`, `_ACK`
const ANNOUNCE_ACK: [u8; 2] = [3, 0];
/// `VIRTIO_NET_CTRL_MQ`, `_VQ_PAIRS_SET`
const MQ_PAIRS_SET: [u8; 2] = [4, 0];
/// `VIRTIO_NET_CTRL_GUEST_OFFLOADS`, `_SET`
const OFFLOADS_SET: [u8; 2] = [5, 0];

/// `VIRTIO_NET_OK`
const OK: u8 = 0;
/// `VIRTIO_NET_ERR`
const ERR: u8 = 1;

/// Commands in one call: each may ask the kernel something.
const TURN: u32 = 16;

const KICK: Token = 0;

/// How serving the queue ended.
enum Served {
    /// It is empty.
    All,
    /// There may be more, and other tasks get their turn.
    Turn,
    /// The next command would make the host's kernel take RTNL too often before then.
    Until(Nanos),
}

/// Serves the control queue.
pub(super) struct CtrlTask {
    shared: Arc<Shared>,
    memory: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    queue: Queue,
    kick: Arc<EventFd>,
    features: u64,
    chain: Chain,
    quiet: bool,
    dead: bool,
}

impl CtrlTask {
    pub(super) fn new(
        shared: Arc<Shared>,
        queue: ActiveQueue,
        memory: GuestRam,
        interrupt: Arc<dyn Interrupt>,
        features: u64,
    ) -> Self {
        let ActiveQueue { queue, kick } = queue;
        let chain = Chain::new();
        CtrlTask { shared, memory, interrupt, queue, kick, features, chain, quiet: true, dead: false }
    }

    fn work(&mut self, cx: &mut Context<'_>) {
        if self.quiet || self.dead {
            return;
        }
        let now = cx.now();
        match self.serve(now) {
            Ok(Served::All) => cx.clear_timer(),
            Ok(Served::Turn) => cx.reschedule(),
            Ok(Served::Until(at)) => cx.set_timer(at),
            Err(error) => {
                self.dead = true;
                cx.clear_timer();
                self.interrupt.needs_reset(&error);
            }
        }
    }

    fn serve(&mut self, now: Nanos) -> Result<Served, QueueError> {
        let mut served = 0;
        loop {
            self.queue.disable_notifications()?;
            let mut held_until = None;
            while served < TURN && self.queue.pop(&mut self.chain)? {
                served += 1;
                let answer = match self.carry_out(now)? {
                    Ok(answer) => answer,
                    Err(at) => {
                        self.queue.rewind(&self.chain)?;
                        held_until = Some(at);
                        break;
                    }
                };
                let written = self.chain.writable().write(&self.memory, &[answer])?;
                self.queue.add_used(self.chain.head(), written as u32)?;
            }
            if self.queue.publish()? {
                self.interrupt.queue(self.queue.index());
            }
            if let Some(at) = held_until {
                return Ok(Served::Until(at));
            }
            if served >= TURN {
                return Ok(Served::Turn);
            }
            if !self.queue.enable_notifications()? {
                return Ok(Served::All);
            }
        }
    }

    /// Carries out the command that was popped. Its answer, or the time to try it again.
    fn carry_out(&self, now: Nanos) -> Result<Result<u8, Nanos>, QueueError> {
        let mut command = [0; 10];
        let len = self.chain.readable().read(&self.memory, &mut command)?;
        let (what, data) = command[..len].split_at(len.min(2));
        let done = match (<[u8; 2]>::try_from(what), data) {
            (Ok(ANNOUNCE_ACK), _) if self.features & feature::GUEST_ANNOUNCE != 0 => {
                self.shared.announced();
                Ok(true)
            }
            (Ok(MQ_PAIRS_SET), &[low, high, ..]) if self.features & feature::MQ != 0 => {
                self.shared.use_pairs(u16::from_le_bytes([low, high]), now)
            }
            (Ok(OFFLOADS_SET), data) if self.features & feature::CTRL_GUEST_OFFLOADS != 0 => {
                let wanted = <[u8; 8]>::try_from(data).map(u64::from_le_bytes);
                let may = self.features & feature::GUEST_OFFLOADS;
                match wanted {
                    Ok(wanted) if wanted & !may == 0 => self.shared.set_offloads(wanted, now),
                    _ => Ok(false),
                }
            }
            _ => Ok(false),
        };
        if done == Ok(false) {
            self.shared.stats.ctrl_fails.add(1);
        }
        Ok(done.map(|done| if done { OK } else { ERR }))
    }
}

impl Task for CtrlTask {
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
        self.quiet = true;
        cx.clear_timer();
    }

    fn is_drained(&self) -> bool {
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.quiet = false;
        self.work(cx);
    }

    fn detach(self: Box<Self>) {}
}
