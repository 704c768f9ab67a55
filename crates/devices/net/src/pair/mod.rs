//! The task of one queue pair: frames from the guest to the network, and back.
//!
//! # One call
//!
//! ```text
//! transmit  transmit queue -> interceptor? source MAC? limiter -> writev to the tap
//! replies   interceptor -> receive queue
//! receive   readv from the tap -> receive queue's buffers
//! ```
//!
//! Each step ends when it has nothing left, when something delays it, or at
//! [`BYTES_PER_CALL`](context::BYTES_PER_CALL). The used ring is published, and the driver
//! interrupted, once per batch of frames.
//!
//! # What the task waits for
//!
//! - Frames from the network: its descriptor is watched edge-triggered. It is read until it is
//!   empty, and the kernel reports when there is more.
//! - Receive buffers: the driver is asked to kick only after it has run out of them. Frames wait in
//!   the kernel's queue meanwhile, and the kernel drops what does not fit there.
//! - Space in the network: the descriptor is watched for writing.
//! - The rate limiter, a frame that waits for receive buffers, and the interceptor: a timer.
//!
//! # When the network is gone
//!
//! When a tap was deleted or a peer has closed its connection, the link goes down and the guest is
//! notified once. Frames that it sends are dropped and counted.

mod context;
mod guest_io;
mod network;
mod queue_age;
mod receive;
mod rx_queue;
mod transmit;
mod tx_queue;

use std::fmt;
use std::io;
use std::sync::Arc;

use memory::GuestRam;

use crate::backend_slot::{BackendParts, BackendSlot};
use crate::config_space::feature;
use crate::interceptor::FrameInterceptor;
use crate::shared::Shared;
use context::{PairContext, PairError, Progress};
pub(crate) use network::PROBE_INTERVAL;
use network::{Network, WRITABLE};
use receive::Receiver;
#[cfg(test)]
pub(crate) use rx_queue::BUFFER_TIMEOUT;
use sync::EventFd;
use transmit::Transmitter;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::worker::{Context, Event, Nanos, Task, Token};

// The tokens 0 and 1 are the network's.
const RX_KICK: Token = 2;
const TX_KICK: Token = 3;

/// What a [`PairTask`] is created from.
pub(crate) struct PairSetup {
    pub(crate) shared: Arc<Shared>,
    pub(crate) slot: Arc<BackendSlot>,
    pub(crate) rx: ActiveQueue,
    pub(crate) tx: ActiveQueue,
    pub(crate) memory: GuestRam,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    /// Features that the driver accepted.
    pub(crate) features: u64,
    /// Source MAC addresses that the guest may use. Empty: any.
    pub(crate) allowed_src_macs: Vec<[u8; 6]>,
}

/// Serves one queue pair.
pub(crate) struct PairTask {
    pair: PairContext,
    slot: Arc<BackendSlot>,
    rx_kick: Arc<EventFd>,
    tx_kick: Arc<EventFd>,
    phase: Phase,
    network: Network,
    interceptor: Option<Box<dyn FrameInterceptor>>,
    rx: Receiver,
    tx: Transmitter,
    /// When to check whether the network still exists.
    probe_at: Option<Nanos>,
}

/// Whether the task serves its queues.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No: from `quiesce` to `resume`, and before the first `resume`.
    Quiesced,
    /// No: the tap does not have the driver's settings yet. At this time they are tried again.
    AwaitingTap(Nanos),
    /// Yes.
    Running,
    /// No, until the driver resets the device.
    Failed,
}

impl PairTask {
    pub(crate) fn new(setup: PairSetup) -> Self {
        let PairSetup { shared, slot, rx, tx, memory, interrupt, features, allowed_src_macs } = setup;
        let mergeable = features & feature::MRG_RXBUF != 0;
        let large = features & feature::GUEST_LARGE != 0;
        PairTask {
            pair: PairContext { shared, memory, interrupt },
            slot,
            rx_kick: rx.kick,
            tx_kick: tx.kick,
            phase: Phase::Quiesced,
            network: Network::new(None),
            interceptor: None,
            rx: Receiver::new(rx.queue, mergeable, large),
            tx: Transmitter::new(tx.queue, allowed_src_macs),
            probe_at: None,
        }
    }

    /// Serves both directions, if the task is running.
    fn work(&mut self, cx: &mut Context<'_>) {
        match self.phase {
            Phase::Quiesced | Phase::Failed => {}
            Phase::AwaitingTap(_) => self.set_timer(cx),
            Phase::Running => match self.serve(cx) {
                Ok(progress) => {
                    self.set_timer(cx);
                    if progress == Progress::MoreWork {
                        cx.reschedule();
                    }
                }
                Err(error) => self.fail(cx, &error),
            },
        }
    }

    fn serve(&mut self, cx: &mut Context<'_>) -> Result<Progress, PairError> {
        let mut progress = Progress::Waiting;
        if self.tx.is_ready(&self.network) {
            progress = self.tx.serve(&self.pair, &mut self.network, &mut self.interceptor, cx)?;
        }
        if let Some(interceptor) = &mut self.interceptor {
            self.rx.deliver_replies(&self.pair, &mut **interceptor, cx)?;
        }
        if self.rx.is_ready() && self.rx.serve(&self.pair, &mut self.network, cx)? == Progress::MoreWork {
            progress = Progress::MoreWork;
        }
        // Frames that waited for a network that is gone now are dropped in the next call.
        Ok(if self.tx.is_ready(&self.network) { Progress::MoreWork } else { progress })
    }

    /// Stops the task until the driver resets the device.
    fn fail(&mut self, cx: &mut Context<'_>, why: &dyn fmt::Display) {
        self.phase = Phase::Failed;
        cx.clear_timer();
        self.network.unwatch(cx);
        self.pair.interrupt.needs_reset(why);
    }

    fn set_timer(&mut self, cx: &mut Context<'_>) {
        let settings_at = match self.phase {
            Phase::AwaitingTap(at) => Some(at),
            Phase::Quiesced | Phase::Running | Phase::Failed => None,
        };
        let timers = [self.rx.timer(), self.tx.timer(), self.probe_at, settings_at];
        match timers.into_iter().flatten().min() {
            Some(at) => cx.set_timer(at),
            None => cx.clear_timer(),
        }
    }

    /// Applies the driver's settings to the tap, and returns the phase that follows.
    fn apply_tap_settings(&self, now: Nanos) -> Phase {
        match self.pair.shared.apply_tap_settings(now) {
            Ok(()) => Phase::Running,
            Err(at) => Phase::AwaitingTap(at),
        }
    }
}

impl Task for PairTask {
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let BackendParts { link, interceptor, .. } = self.slot.take();
        (self.network, self.interceptor) = (Network::new(link), interceptor);
        cx.watch_kick(RX_KICK, &self.rx_kick)?;
        cx.watch_kick(TX_KICK, &self.tx_kick)
    }

    fn kicked(&mut self, cx: &mut Context<'_>, token: Token) {
        // A change of the rate limits arrives as a kick, too.
        if token == RX_KICK {
            self.pair.shared.stats.rx_queue_event_count.add(1);
            self.rx.kicked();
            return self.work(cx);
        }
        self.pair.shared.stats.tx_queue_event_count.add(1);
        self.tx.kicked();
        let taken = self.tx.taken();
        self.work(cx);
        if self.tx.taken() == taken && self.tx.is_idle() {
            self.pair.shared.stats.no_tx_avail_buffer.add(1);
        }
    }

    fn ready(&mut self, cx: &mut Context<'_>, event: Event) {
        if event.token == WRITABLE {
            self.tx.unblock();
            if let Err(error) = self.network.writable(&self.pair.shared, cx) {
                return self.fail(cx, &error);
            }
        } else {
            self.pair.shared.stats.rx_tap_event_count.add(1);
            self.rx.readable();
            if matches!(self.phase, Phase::Quiesced | Phase::Failed) || !self.rx.is_ready() {
                // No more events until the task can receive again.
                self.network.unwatch_readable(cx);
                return;
            }
        }
        self.work(cx);
    }

    fn timer(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        let stats = &self.pair.shared.stats;
        if self.rx.expire(now) {
            stats.rx_rate_limiter_event_count.add(1);
        }
        if self.tx.expire(now) {
            stats.tx_rate_limiter_event_count.add(1);
        }
        self.rx.expire_frame(&self.pair, &mut self.network, now);
        if self.probe_at.take_if(|at| *at <= now).is_some() {
            self.probe_at = self.network.probe(&self.pair.shared, cx);
        }
        if let Phase::AwaitingTap(at) = self.phase
            && at <= now
        {
            self.phase = self.apply_tap_settings(now);
        }
        self.work(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        cx.clear_timer();
        self.probe_at = None;
        self.tx.quiesce();
        // The limiters are saved as of the time of the pause.
        self.pair.shared.rx_limiter.set_time(cx.now());
        self.pair.shared.tx_limiter.set_time(cx.now());
        let quiesced = self.rx.quiesce(&self.pair);
        if self.phase != Phase::Failed {
            self.phase = Phase::Quiesced;
            if let Err(error) = quiesced {
                self.fail(cx, &error);
            }
        }
    }

    fn is_drained(&self) -> bool {
        // No frame is ever half done, and `quiesce` has put popped chains back.
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.rx.resume();
        self.tx.resume();
        // Each pair does this: the task of another one may run later, on another worker.
        let phase = self.apply_tap_settings(cx.now());
        if self.phase != Phase::Failed {
            self.phase = phase;
        }
        self.probe_at = self.network.probe(&self.pair.shared, cx);
        self.work(cx);
    }

    fn detach(self: Box<Self>) {
        let link = self.network.into_link();
        self.slot.put(BackendParts { link, interceptor: self.interceptor, vhost: None });
    }
}
