//! The task of the control queue (5.1.6.5): commands for the number of queue pairs, the offloads,
//! and the acknowledgement of an announcement.

use std::io;
use std::sync::Arc;

use memory::GuestRam;

use crate::config_space::feature;
use crate::shared::Shared;
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

/// Most commands in one call, because each may take an ioctl.
const COMMANDS_PER_CALL: u32 = 16;

const KICK: Token = 0;

/// Why a call ended.
enum Progress {
    /// The queue is empty.
    Waiting,
    /// The queue may have more commands, for the next call.
    MoreWork,
    /// The budget of RTNL ioctls delays the next command until this time.
    Delayed(Nanos),
}

/// Serves the control queue.
pub(crate) struct ControlTask {
    shared: Arc<Shared>,
    memory: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    queue: Queue,
    kick: Arc<EventFd>,
    features: u64,
    chain: Chain,
    phase: Phase,
}

/// Whether the task serves its queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No: from `quiesce` to `resume`, and before the first `resume`.
    Quiesced,
    /// Yes.
    Running,
    /// No, until the driver resets the device.
    Failed,
}

impl ControlTask {
    pub(crate) fn new(
        shared: Arc<Shared>,
        queue: ActiveQueue,
        memory: GuestRam,
        interrupt: Arc<dyn Interrupt>,
        features: u64,
    ) -> Self {
        let ActiveQueue { queue, kick } = queue;
        let chain = Chain::new();
        let phase = Phase::Quiesced;
        ControlTask { shared, memory, interrupt, queue, kick, features, chain, phase }
    }

    fn work(&mut self, cx: &mut Context<'_>) {
        if self.phase != Phase::Running {
            return;
        }
        let now = cx.now();
        match self.serve(now) {
            Ok(Progress::Waiting) => cx.clear_timer(),
            Ok(Progress::MoreWork) => cx.reschedule(),
            Ok(Progress::Delayed(at)) => cx.set_timer(at),
            Err(error) => {
                self.phase = Phase::Failed;
                cx.clear_timer();
                self.interrupt.needs_reset(&error);
            }
        }
    }

    fn serve(&mut self, now: Nanos) -> Result<Progress, QueueError> {
        let mut served = 0;
        loop {
            self.queue.disable_notifications()?;
            let mut delayed_until = None;
            while served < COMMANDS_PER_CALL && self.queue.pop(&mut self.chain)? {
                served += 1;
                let status = match self.execute(now)? {
                    Ok(status) => status,
                    Err(at) => {
                        self.queue.rewind(&self.chain)?;
                        delayed_until = Some(at);
                        break;
                    }
                };
                let written = self.chain.writable().write(&self.memory, &[status])?;
                self.queue.add_used(self.chain.head(), written as u32)?;
            }
            if self.queue.publish()? {
                self.interrupt.queue(self.queue.index());
            }
            if let Some(at) = delayed_until {
                return Ok(Progress::Delayed(at));
            }
            if served >= COMMANDS_PER_CALL {
                return Ok(Progress::MoreWork);
            }
            if !self.queue.enable_notifications()? {
                return Ok(Progress::Waiting);
            }
        }
    }

    /// Executes the command that was popped. Returns its status, or the time at which to try again.
    fn execute(&self, now: Nanos) -> Result<Result<u8, Nanos>, QueueError> {
        let mut command = [0; 10];
        let len = self.chain.readable().read(&self.memory, &mut command)?;
        let (class, data) = command[..len].split_at(len.min(2));
        let done = match (<[u8; 2]>::try_from(class), data) {
            (Ok(ANNOUNCE_ACK), _) if self.features & feature::GUEST_ANNOUNCE != 0 => {
                self.shared.acknowledge_announce();
                Ok(true)
            }
            (Ok(MQ_PAIRS_SET), &[low, high, ..]) if self.features & feature::MQ != 0 => {
                self.shared.set_active_pairs(u16::from_le_bytes([low, high]), now)
            }
            (Ok(OFFLOADS_SET), data) if self.features & feature::CTRL_GUEST_OFFLOADS != 0 => {
                let wanted = <[u8; 8]>::try_from(data).map(u64::from_le_bytes);
                let allowed = self.features & feature::GUEST_OFFLOADS;
                match wanted {
                    Ok(wanted) if wanted & !allowed == 0 => self.shared.set_offloads(wanted, now),
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

impl Task for ControlTask {
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
        if self.phase == Phase::Running {
            self.phase = Phase::Quiesced;
        }
        cx.clear_timer();
    }

    fn is_drained(&self) -> bool {
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        if self.phase == Phase::Quiesced {
            self.phase = Phase::Running;
        }
        self.work(cx);
    }

    fn detach(self: Box<Self>) {}
}
