//! A pair of queues that the kernel serves: started, stopped, and its interrupts passed on.
//!
//! A kick goes from the guest to the kernel's thread and nothing here sees it. An interrupt comes as an event and is raised through the
//! transport, which knows whether the guest has masked it.

use std::fmt;
use std::io;
use std::sync::Arc;

use memory::GuestRam;

use super::device::Shared;
use super::port::{Parts, Port};
use super::tap::Tap;
use super::vhost::{Ring, Vhost, VhostError};
use crate::device::{ActiveQueue, Interrupt};
use crate::eventfd::EventFd;
use crate::worker::{Context, Event, Interest, Task, Token};

/// The kernel has interrupts for the receive queue; for the other one the token is one more.
const CALL: Token = 0;
/// The kernel found a broken ring.
const ERROR: Token = 2;
/// The tap went away. (Frames are the kernel's business.)
const TAP: Token = 3;

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
            running: false,
            dead: false,
        })
    }

    fn die(&mut self, why: &dyn fmt::Display) {
        if !std::mem::replace(&mut self.dead, true) {
            self.interrupt.needs_reset(why);
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
        cx.watch_edge(ERROR, &self.error, Interest::READ)?;
        cx.watch_edge(TAP, self.tap.queue(self.pair), Interest { read: false, write: false })
    }

    fn kicked(&mut self, _cx: &mut Context<'_>, _token: Token) {}

    fn ready(&mut self, cx: &mut Context<'_>, event: Event) {
        match event.token {
            ERROR => self.die(&"the kernel found one of its queues broken"),
            TAP => {
                if event.hangup {
                    cx.unwatch(TAP);
                    self.shared.link_down(&format_args!("{}: it is gone", self.tap.name()));
                }
            }
            call => self.interrupt.queue(self.queues[call as usize & 1].queue.index()),
        }
    }

    fn quiesce(&mut self, _cx: &mut Context<'_>) {
        if std::mem::take(&mut self.running)
            && let Err(error) = self.stop()
        {
            self.die(&error);
        }
    }

    fn is_drained(&self) -> bool {
        true
    }

    fn resume(&mut self, _cx: &mut Context<'_>) {
        if self.dead || std::mem::replace(&mut self.running, true) {
            return;
        }
        if let Err(error) = self.start() {
            self.die(&error);
        }
    }

    fn detach(self: Box<Self>) {
        self.port.put(Parts { vhost: self.vhost, ..Parts::default() });
    }
}
