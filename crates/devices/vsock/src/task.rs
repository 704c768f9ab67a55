//! The queues, and the order of work.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::GuestRam;
use zerocopy::FromZeros;
use zerocopy::IntoBytes;

use super::packet::{HEADER_LEN, Header};
use super::listener::HostSockets;
use super::muxer::{FIRST_LISTENER, Muxer};
use super::to_guest::{FillOutcome, ToGuest};
use super::{Shared, TX};
use sync::EventFd;
use sync::locked;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::{Context, Event, Nanos, Task, Token};

/// Bytes, each way, after which other tasks of the worker get their turn.
const TURN: u32 = 1 << 20;
/// A packet of the guest counts as so many bytes at least.
const PACKET_COST: u32 = 1 << 10;

/// How long host clients whose connections the driver took wait for it to take note of a reset.
const RESET_ACK_TIMEOUT: Nanos = 10_000_000_000;

/// How long host clients wait for the driver to take note of a reset before the guest is asked for
/// their connections all the same. A driver that is not busy takes note in this time, and then no
/// connection has to be asked for twice.
const REQUEST_DELAY: Nanos = 250_000_000;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as it stands in an event.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Tokens of kicks, after those of connections and listeners.
const FIRST_KICK: Token = FIRST_LISTENER + 1024;

/// How far the driver is with a reset of all connections.
#[derive(Debug, Default)]
struct TransportReset {
    /// It is to be told, as soon as it has a buffer for events.
    due: bool,
    /// It was told, and had so many more buffers then; it puts the buffer back when it has taken note.
    told: Option<u16>,
    /// Until it has taken note, or until then, host clients whose connections it takes are not
    /// answered: it may reset these, too.
    hold_until: Option<Nanos>,
    /// Until it has taken note, or until then, the guest is not asked for connections.
    request_at: Option<Nanos>,
}

pub(super) struct VsockTask {
    to_guest: ToGuest,
    from_guest: Queue,
    events: Queue,
    kicks: [Arc<EventFd>; 3],
    interrupt: Arc<dyn Interrupt>,
    muxer: Muxer,
    chain: Chain,
    note: TransportReset,
    /// The guest has no buffers for what there is.
    starved: bool,
    running: bool,
    /// When it was quiesced.
    paused_at: Option<Nanos>,
    dead: bool,
}

/// What a task is made from besides its queues.
pub(super) struct VsockContext {
    pub(super) memory: GuestRam,
    pub(super) interrupt: Arc<dyn Interrupt>,
    pub(super) shared: Arc<Shared>,
    pub(super) sockets: HostSockets,
    pub(super) guest_cid: u32,
    pub(super) seqpacket: bool,
}

impl VsockTask {
    pub(super) fn new([rx, tx, event]: [ActiveQueue; 3], with: VsockContext) -> Self {
        let VsockContext { memory, interrupt, shared, sockets, guest_cid, seqpacket } = with;
        VsockTask {
            to_guest: ToGuest::new(rx.queue),
            from_guest: tx.queue,
            events: event.queue,
            kicks: [rx.kick, tx.kick, event.kick],
            interrupt,
            muxer: Muxer::new(guest_cid, shared, sockets, memory, seqpacket),
            chain: Chain::new(),
            note: TransportReset::default(),
            starved: false,
            running: false,
            paused_at: None,
            dead: false,
        }
    }

    fn work(&mut self, cx: &mut Context<'_>) {
        if !self.running {
            return;
        }
        if !self.dead
            && let Err(fault) = self.pump(cx)
        {
            self.dead = true;
            self.note = TransportReset::default();
            self.muxer.clear(cx);
            self.muxer.is_closed = true;
            self.interrupt.needs_reset(&fault);
        }
        if self.dead {
            self.reject_clients(cx);
        }
        match self.next_timer() {
            Some(at) => cx.set_timer(at),
            None => cx.clear_timer(),
        }
    }

    /// Host clients of a device that is broken hear of it by being closed.
    fn reject_clients(&mut self, cx: &mut Context<'_>) {
        self.muxer.timers(cx);
        if self.muxer.accept(cx) {
            cx.reschedule();
        }
    }

    fn next_timer(&self) -> Option<Nanos> {
        [self.note.hold_until, self.note.request_at, self.muxer.next_timer()].into_iter().flatten().min()
    }

    /// Everything that there is to do, until there is nothing or it has had its turn.
    fn pump(&mut self, cx: &mut Context<'_>) -> Result<(), QueueError> {
        let (mut from_guest, mut to_guest) = (TURN, TURN);
        loop {
            self.muxer.timers(cx);
            self.reset_if_wanted(cx)?;
            let waiting = self.note.request_at.is_none() && self.muxer.accept(cx);
            self.from_guest.disable_notifications()?;
            self.take_packets(cx, &mut from_guest)?;
            self.to_guest.queue.disable_notifications()?;
            let filled = self.to_guest.fill(&mut self.muxer, cx, &mut to_guest)?;
            self.publish()?;
            self.starved = filled == FillOutcome::NoBuffers;
            if from_guest == 0 || to_guest == 0 || waiting || filled == FillOutcome::Yield {
                cx.reschedule();
                return Ok(());
            }
            if !self.arm_queues()? {
                return Ok(());
            }
        }
    }

    /// Asks for kicks where one would be of use. True if there is something already.
    fn arm_queues(&mut self) -> Result<bool, QueueError> {
        let mut more = self.from_guest.enable_notifications()?;
        if self.starved {
            more |= self.to_guest.queue.enable_notifications()?;
        }
        Ok(more)
    }

    /// Shows the driver what was used.
    fn publish(&mut self) -> Result<(), QueueError> {
        // Events first: Linux then handles a reset before the requests for connections that follow
        // it.
        for queue in [&mut self.events, &mut self.to_guest.queue, &mut self.from_guest] {
            if queue.publish()? {
                self.interrupt.queue(queue.index());
            }
        }
        Ok(())
    }

    /// Takes the guest's packets.
    fn take_packets(&mut self, cx: &mut Context<'_>, budget: &mut u32) -> Result<(), QueueError> {
        while *budget > 0 && self.from_guest.pop(&mut self.chain)? {
            // After the packet was seen: a driver that handled the reset before it sent this has
            // shown so.
            self.check_acknowledged(cx)?;
            self.take_packet(cx)?;
            *budget = budget.saturating_sub(self.chain.readable().len().max(PACKET_COST));
            self.from_guest.add_used(self.chain.head(), 0)?;
        }
        Ok(())
    }

    fn take_packet(&mut self, cx: &mut Context<'_>) -> Result<(), QueueError> {
        let stats = &self.muxer.shared.stats;
        stats.tx_packets_count.add(1);
        let mut header = Header::new_zeroed();
        let parts = self.chain.readable().split_at(HEADER_LEN);
        let Some((head, data)) = parts else {
            stats.malformed_count.add(1);
            return Ok(());
        };
        head.read(self.from_guest.ram(), header.as_mut_bytes())?;
        match data.split_at(header.len.get()) {
            Some((data, _)) => self.muxer.packet(cx, &header, &data),
            None => {
                stats.malformed_count.add(1);
                self.muxer.broken_packet(cx, &header);
                Ok(())
            }
        }
    }

    /// Ends all connections if that is wanted, and sees to it that the driver takes note.
    fn reset_if_wanted(&mut self, cx: &mut Context<'_>) -> Result<(), QueueError> {
        if self.muxer.shared.reset_wanted.swap(false, Ordering::Acquire) {
            self.muxer.clear(cx);
            let hold_until = Some(cx.now().saturating_add(RESET_ACK_TIMEOUT));
            let request_at = Some(cx.now().saturating_add(REQUEST_DELAY));
            self.note = TransportReset { due: true, told: None, hold_until, request_at };
        }
        if self.note.due && self.events.pop(&mut self.chain)? {
            let written = self.chain.writable().write(self.events.ram(), &TRANSPORT_RESET)?;
            self.events.add_used(self.chain.head(), written as u32)?;
            self.note.due = false;
            self.note.told = Some(self.events.available()?);
        }
        if self.note.due || self.note.told.is_some() {
            // Asked for before it is looked, so that none is missed.
            self.events.enable_notifications_of_more()?;
        }
        self.check_acknowledged(cx)?;
        self.note.request_at.take_if(|at| cx.now() >= *at);
        if self.note.hold_until.is_some_and(|until| cx.now() >= until) {
            self.note.hold_until = None;
            self.muxer.release_held(cx);
        }
        // A driver that has no buffer for the event handles none for now.
        self.muxer.is_reset_pending = self.note.told.is_some() && self.note.hold_until.is_some();
        Ok(())
    }

    /// Sees whether the driver has taken note of a reset.
    fn check_acknowledged(&mut self, cx: &mut Context<'_>) -> Result<(), QueueError> {
        if let Some(buffers) = self.note.told
            && self.events.available()? != buffers
        {
            self.note = TransportReset::default();
            self.muxer.is_reset_pending = false;
            self.muxer.request_again(cx);
        }
        Ok(())
    }

    fn count_kick(&self, token: Token) {
        let stats = &self.muxer.shared.stats;
        match token.checked_sub(FIRST_KICK) {
            Some(index) if index == u32::from(TX) => stats.tx_queue_event_count.add(1),
            Some(0) => stats.rx_queue_event_count.add(1),
            _ => {}
        }
    }
}

impl Task for VsockTask {
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        for (token, kick) in (FIRST_KICK..).zip(&self.kicks) {
            cx.watch_kick(token, kick)?;
        }
        self.muxer.attach(cx)
    }

    fn kicked(&mut self, cx: &mut Context<'_>, token: Token) {
        self.count_kick(token);
        self.work(cx);
    }

    fn ready(&mut self, cx: &mut Context<'_>, event: Event) {
        // All is looked at when it goes on.
        if self.running {
            self.muxer.ready(cx, event);
            // Once for all events of this wake-up.
            cx.reschedule();
        }
    }

    fn timer(&mut self, cx: &mut Context<'_>) {
        self.work(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        self.running = false;
        self.paused_at = Some(cx.now());
    }

    fn is_drained(&self) -> bool {
        // What was taken was carried out and published.
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.running = true;
        if let Some(since) = self.paused_at.take() {
            let still = cx.now().saturating_sub(since);
            self.muxer.postpone(still);
            for at in [&mut self.note.hold_until, &mut self.note.request_at] {
                *at = at.map(|at| at.saturating_add(still));
            }
        }
        self.muxer.poll_all(cx);
        self.work(cx);
    }

    fn detach(self: Box<Self>) {
        let VsockTask { muxer, .. } = *self;
        let Muxer { shared, sockets, .. } = muxer;
        *locked(&shared.sockets) = Some(sockets);
    }
}
