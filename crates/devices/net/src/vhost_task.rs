//! The task of one queue pair that the kernel's vhost-net serves: it starts and stops the vrings
//! and passes on their interrupts.
//!
//! A kick goes from the guest to the kernel's thread, and the task does not see it. An interrupt
//! arrives as an eventfd, and the task raises it through the transport, which knows whether the
//! guest has masked it.
//!
//! vhost-net does not report that its tap was deleted. So the task of the first queue pair probes
//! the tap once a second.

use std::fmt;
use std::io;
use std::sync::Arc;

use memory::GuestRam;

use crate::backend::tap::{Tap, is_gone};
use crate::backend::vhost::{Vhost, VhostError, VringConfig};
use crate::backend_slot::{BackendParts, BackendSlot};
use crate::pair::PROBE_INTERVAL;
use crate::shared::Shared;
use sync::EventFd;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::worker::{Context, Event, Interest, Nanos, Task, Token};

/// The kernel raises an interrupt of the receive queue. The token of the transmit queue is 1.
const CALL: Token = 0;
/// The kernel found a broken vring.
const ERROR: Token = 2;

/// Controls one queue pair that the kernel serves.
pub(crate) struct VhostTask {
    shared: Arc<Shared>,
    slot: Arc<BackendSlot>,
    memory: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    /// Features that the driver accepted.
    features: u64,
    tap: Arc<Tap>,
    /// Index of the queue pair, and of the tap's queue.
    pair: usize,
    vhost: Option<Arc<Vhost>>,
    /// The receive queue and the transmit queue.
    queues: [ActiveQueue; 2],
    calls: [EventFd; 2],
    error: EventFd,
    /// When to check whether the tap still exists.
    probe_at: Option<Nanos>,
    phase: Phase,
    /// The device needs a reset. The vrings are stopped by `quiesce`, and not started again.
    failed: bool,
}

/// Whether the kernel serves the vrings.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// No.
    Stopped,
    /// No: the tap does not have the driver's settings yet. At this time they are tried again.
    AwaitingTap(Nanos),
    /// Yes, or the start of the vrings has failed half-way.
    Started,
}

/// What a [`VhostTask`] is created from.
pub(crate) struct VhostSetup {
    pub(crate) shared: Arc<Shared>,
    pub(crate) slot: Arc<BackendSlot>,
    pub(crate) queues: [ActiveQueue; 2],
    pub(crate) memory: GuestRam,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    pub(crate) features: u64,
    pub(crate) tap: Arc<Tap>,
    pub(crate) pair: usize,
}

impl VhostTask {
    pub(crate) fn new(setup: VhostSetup) -> io::Result<Self> {
        let VhostSetup { shared, slot, queues, memory, interrupt, features, tap, pair } = setup;
        Ok(VhostTask {
            shared,
            slot,
            memory,
            interrupt,
            features,
            tap,
            pair,
            vhost: None,
            queues,
            calls: [EventFd::new()?, EventFd::new()?],
            error: EventFd::new()?,
            probe_at: None,
            phase: Phase::Stopped,
            failed: false,
        })
    }

    fn fail(&mut self, why: &dyn fmt::Display) {
        if !std::mem::replace(&mut self.failed, true) {
            self.interrupt.needs_reset(why);
        }
    }

    /// Checks whether the tap still exists, and takes the link down if not.
    fn probe(&mut self, cx: &mut Context<'_>) {
        if let Err(at) = self.shared.may_probe(cx.now()) {
            self.probe_at = Some(at);
            return;
        }
        match self.tap.probe() {
            Err(error) if is_gone(error) => {
                self.shared.link_down(&format_args!("{}: {error}", self.tap.name()));
            }
            _ => self.probe_at = Some(cx.now().saturating_add(PROBE_INTERVAL)),
        }
    }

    /// Starts the vrings once the tap has the driver's settings.
    fn try_start(&mut self, cx: &mut Context<'_>) {
        if self.failed || self.phase == Phase::Started {
            return;
        }
        if let Err(at) = self.shared.apply_tap_settings(cx.now()) {
            self.phase = Phase::AwaitingTap(at);
            return;
        }
        self.phase = Phase::Started;
        if let Err(error) = self.start() {
            self.fail(&error);
        }
    }

    fn set_timer(&self, cx: &mut Context<'_>) {
        let start_at = match self.phase {
            Phase::AwaitingTap(at) => Some(at),
            Phase::Stopped | Phase::Started => None,
        };
        match [self.probe_at, start_at].into_iter().flatten().min() {
            Some(at) => cx.set_timer(at),
            None => cx.clear_timer(),
        }
    }

    fn start(&mut self) -> Result<(), VhostError> {
        let Some(vhost) = &self.vhost else { return Ok(()) };
        vhost.configure(self.features, &self.memory)?;
        for (index, (queue, call)) in (0..).zip(self.queues.iter().zip(&self.calls)) {
            let state = queue.queue.state();
            let vring = VringConfig { index, state, kick: &queue.kick, call, error: &self.error };
            vhost.start_vring(&vring, &self.memory, self.tap.queue(self.pair))?;
        }
        // Buffers that the driver made available before the start had no kick for the kernel.
        self.queues.iter().for_each(|queue| queue.kick.signal());
        Ok(())
    }

    /// Stops the vrings, and sets the positions of the queues to theirs.
    fn stop(&mut self) -> Result<(), VhostError> {
        let Some(vhost) = &self.vhost else { return Ok(()) };
        for (index, queue) in (0..).zip(&mut self.queues) {
            let next_avail = vhost.stop_vring(index)?;
            // Only the used ring itself says how many buffers the kernel has used.
            match queue.queue.used_idx() {
                Ok(next_used) => queue.queue.set_position(next_avail, next_used),
                Err(_) => queue.queue.set_position(next_avail, next_avail),
            }
        }
        Ok(())
    }
}

impl Task for VhostTask {
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        self.vhost = self.slot.take().vhost;
        for (token, call) in (CALL..).zip(&self.calls) {
            cx.watch_edge(token, call, Interest::READ)?;
        }
        cx.watch_edge(ERROR, &self.error, Interest::READ)
    }

    fn kicked(&mut self, _cx: &mut Context<'_>, _token: Token) {}

    fn ready(&mut self, _cx: &mut Context<'_>, event: Event) {
        match event.token {
            ERROR => self.fail(&"vhost-net reports a broken queue"),
            call => self.interrupt.queue(self.queues[call as usize & 1].queue.index()),
        }
    }

    fn timer(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        if self.probe_at.take_if(|at| *at <= now).is_some() {
            self.probe(cx);
        }
        if matches!(self.phase, Phase::AwaitingTap(at) if at <= now) {
            self.phase = Phase::Stopped;
            self.try_start(cx);
        }
        self.set_timer(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        self.probe_at = None;
        cx.clear_timer();
        if std::mem::replace(&mut self.phase, Phase::Stopped) == Phase::Started
            && let Err(error) = self.stop()
        {
            self.fail(&error);
        }
    }

    fn is_drained(&self) -> bool {
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        if self.pair == 0 {
            self.probe(cx);
        }
        self.try_start(cx);
        self.set_timer(cx);
    }

    fn detach(self: Box<Self>) {
        self.slot.put(BackendParts { vhost: self.vhost, ..BackendParts::default() });
    }
}
