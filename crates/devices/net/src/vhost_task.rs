//! A pair of queues that the kernel serves: started, stopped, and its interrupts passed on.
//!
//! A kick goes from the guest to the kernel's thread and nothing here sees it. An interrupt comes as an event and is raised through the
//! transport, which knows whether the guest has masked it.
//!
//! A tap that is deleted says so together with each frame that comes, or not at all. So it is looked at, once a second.

use std::fmt;
use std::io;
use std::sync::Arc;

use memory::GuestRam;

use super::device::Shared;
use super::port::{Parts, Port};
use super::tap::{Tap, is_gone};
use super::task::LOOK_EVERY;
use super::vhost::{Ring, Vhost, VhostError};
use sync::EventFd;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::worker::{Context, Event, Interest, Nanos, Task, Token};

/// The kernel has interrupts for the receive queue; for the other one the token is one more.
const CALL: Token = 0;
/// The kernel found a broken ring.
const ERROR: Token = 2;

/// A pair of queues that the kernel serves.
pub(super) struct VhostTask {
    shared: Arc<Shared>,
    port: Arc<Port>,
    memory: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    features: u64,
    tap: Arc<Tap>,
    /// Which queue of the tap.
    pair: usize,
    vhost: Option<Arc<Vhost>>,
    /// Receive and transmit.
    queues: [ActiveQueue; 2],
    calls: [EventFd; 2],
    error: EventFd,
    /// When it is looked whether the tap is still there.
    look_at: Option<Nanos>,
    /// When the kernel can be started.
    start_at: Option<Nanos>,
    running: bool,
    dead: bool,
}

/// What the task is made of.
pub(super) struct Setup {
    pub(super) shared: Arc<Shared>,
    pub(super) port: Arc<Port>,
    pub(super) queues: [ActiveQueue; 2],
    pub(super) memory: GuestRam,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) features: u64,
    pub(super) tap: Arc<Tap>,
    pub(super) pair: usize,
}

impl VhostTask {
    pub(super) fn new(setup: Setup) -> io::Result<Self> {
        let Setup { shared, port, queues, memory, interrupt, features, tap, pair } = setup;
        Ok(VhostTask {
            shared,
            port,
            memory,
            interrupt,
            features,
            tap,
            pair,
            vhost: None,
            queues,
            calls: [EventFd::new()?, EventFd::new()?],
            error: EventFd::new()?,
            look_at: None,
            start_at: None,
            running: false,
            dead: false,
        })
    }

    fn die(&mut self, why: &dyn fmt::Display) {
        if !std::mem::replace(&mut self.dead, true) {
            self.interrupt.needs_reset(why);
        }
    }

    /// Sees whether the tap is still there.
    fn look(&mut self, cx: &mut Context<'_>) {
        if let Err(at) = self.shared.may_look(cx.now()) {
            self.look_at = Some(at);
            return;
        }
        match self.tap.look() {
            Err(error) if is_gone(error) => {
                self.shared.link_down(&format_args!("{}: {error}", self.tap.name()));
            }
            _ => self.look_at = Some(cx.now().saturating_add(LOOK_EVERY)),
        }
    }

    /// Starts the kernel, once the tap has the driver's settings.
    fn try_start(&mut self, cx: &mut Context<'_>) {
        if self.dead || self.running {
            return;
        }
        if let Err(at) = self.shared.tell_tap(cx.now()) {
            self.start_at = Some(at);
            return;
        }
        self.running = true;
        if let Err(error) = self.start() {
            self.die(&error);
        }
    }

    fn set_timer(&self, cx: &mut Context<'_>) {
        match [self.look_at, self.start_at].into_iter().flatten().min() {
            Some(at) => cx.set_timer(at),
            None => cx.clear_timer(),
        }
    }

    fn start(&mut self) -> Result<(), VhostError> {
        let Some(vhost) = &self.vhost else { return Ok(()) };
        vhost.prepare(self.features, &self.memory)?;
        for (index, (queue, call)) in (0..).zip(self.queues.iter().zip(&self.calls)) {
            let ring =
                Ring { index, state: queue.queue.state(), kick: &queue.kick, call, error: &self.error };
            vhost.start(&ring, &self.memory, self.tap.queue(self.pair))?;
        }
        // What was made available while nobody looked.
        self.queues.iter().for_each(|queue| queue.kick.signal());
        Ok(())
    }

    /// Stops the kernel, and takes over how far it came.
    fn stop(&mut self) -> Result<(), VhostError> {
        let Some(vhost) = &self.vhost else { return Ok(()) };
        for (index, queue) in (0..).zip(&mut self.queues) {
            let next_avail = vhost.stop(index)?;
            // What it has used stands in the ring itself, and nowhere else.
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
        self.vhost = self.port.take().vhost;
        for (token, call) in (CALL..).zip(&self.calls) {
            cx.watch_edge(token, call, Interest::READ)?;
        }
        cx.watch_edge(ERROR, &self.error, Interest::READ)
    }

    fn kicked(&mut self, _cx: &mut Context<'_>, _token: Token) {}

    fn ready(&mut self, _cx: &mut Context<'_>, event: Event) {
        match event.token {
            ERROR => self.die(&"the kernel found one of its queues broken"),
            call => self.interrupt.queue(self.queues[call as usize & 1].queue.index()),
        }
    }

    fn timer(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        if self.look_at.take_if(|at| *at <= now).is_some() {
            self.look(cx);
        }
        if self.start_at.take_if(|at| *at <= now).is_some() {
            self.try_start(cx);
        }
        self.set_timer(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        (self.look_at, self.start_at) = (None, None);
        cx.clear_timer();
        if std::mem::take(&mut self.running)
            && let Err(error) = self.stop()
        {
            self.die(&error);
        }
    }

    fn is_drained(&self) -> bool {
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        if self.pair == 0 {
            self.look(cx);
        }
        self.try_start(cx);
        self.set_timer(cx);
    }

    fn detach(self: Box<Self>) {
        self.port.put(Parts { vhost: self.vhost, ..Parts::default() });
    }
}
