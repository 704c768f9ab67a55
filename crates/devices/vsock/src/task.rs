//! The task of the device: its queues, the order of work, and the transport reset.

use std::io;
use std::sync::Arc;
use std::sync::atomic::Ordering;

use memory::GuestRam;
use sync::{EventFd, locked};
use virtio::device::{ActiveQueue, Interrupt};
use virtio::queue::{Chain, Queue, QueueError};
use virtio::worker::{Context, Event, Nanos, Task, Token};
use zerocopy::{FromZeros, IntoBytes};

use crate::host_sockets::HostSockets;
use crate::muxer::{FIRST_LISTENER, MS, Muxer};
use crate::packet::{HEADER_LEN, Header};
use crate::shared::Shared;
use crate::to_guest::{FillOutcome, PACKET_COST, ToGuest};

/// Index of the queue of packets to the guest.
pub(crate) const RX: u16 = 0;
/// Index of the queue of packets from the guest.
pub(crate) const TX: u16 = 1;
/// Index of the queue of events.
pub(crate) const EVENT: u16 = 2;

/// Bytes in each direction after which other tasks of the worker run.
const BUDGET: u32 = 1 << 20;

/// How long host clients whose connections the guest has accepted wait for the driver to handle a
/// transport reset.
const RESET_ACK_TIMEOUT: Nanos = 10_000 * MS;

/// How long connection requests of host clients wait for the driver to handle a transport reset. A
/// driver that is not busy handles it within this time. Then no connection is requested twice.
const REQUEST_DELAY: Nanos = 250 * MS;

/// `VIRTIO_VSOCK_EVENT_TRANSPORT_RESET`, as `struct virtio_vsock_event`.
const TRANSPORT_RESET: [u8; 4] = [0; 4];

/// Token of the first queue's kick. Smaller tokens are connections and listeners.
const FIRST_KICK: Token = FIRST_LISTENER + 1024;

/// Progress of a transport reset: the reset of all connections.
#[derive(Debug, Default)]
struct TransportReset {
    /// The event waits for a buffer of the driver.
    event_due: bool,
    /// The event was sent, and the driver had this many more event buffers then. It has handled the
    /// event once it has returned the buffer.
    sent_with_buffers: Option<u16>,
    /// Until the driver has handled the event, or until this time, connections that the guest
    /// accepts are held: the driver may reset them, too.
    hold_until: Option<Nanos>,
    /// Until the driver has handled the event, or until this time, the guest is sent no connection
    /// requests.
    request_at: Option<Nanos>,
}

/// The task of the device.
pub(crate) struct VsockTask {
    to_guest: ToGuest,
    from_guest: Queue,
    events: Queue,
    kicks: [Arc<EventFd>; 3],
    interrupt: Arc<dyn Interrupt>,
    muxer: Muxer,
    chain: Chain,
    reset: TransportReset,
    /// The RX queue ran out of buffers.
    rx_starved: bool,
    running: bool,
    /// The time at which the task was quiesced.
    paused_at: Option<Nanos>,
    /// A queue is broken.
    dead: bool,
}

/// What a task is made from besides its queues.
pub(crate) struct VsockContext {
    pub(crate) memory: GuestRam,
    pub(crate) interrupt: Arc<dyn Interrupt>,
    pub(crate) shared: Arc<Shared>,
    pub(crate) sockets: HostSockets,
    pub(crate) guest_cid: u32,
    /// `VIRTIO_VSOCK_F_SEQPACKET` was negotiated.
    pub(crate) seqpacket: bool,
}

impl VsockTask {
    pub(crate) fn new([rx, tx, event]: [ActiveQueue; 3], context: VsockContext) -> Self {
        let VsockContext { memory, interrupt, shared, sockets, guest_cid, seqpacket } = context;
        VsockTask {
            to_guest: ToGuest::new(rx.queue),
            from_guest: tx.queue,
            events: event.queue,
            kicks: [rx.kick, tx.kick, event.kick],
            interrupt,
            muxer: Muxer::new(guest_cid, shared, sockets, memory, seqpacket),
            chain: Chain::new(),
            reset: TransportReset::default(),
            rx_starved: false,
            running: false,
            paused_at: None,
            dead: false,
        }
    }

    /// Does all work that is due, unless the task is paused.
    fn poll(&mut self, cx: &mut Context<'_>) {
        if !self.running {
            return;
        }
        if !self.dead
            && let Err(error) = self.process(cx)
        {
            self.dead = true;
            self.reset = TransportReset::default();
            self.muxer.clear(cx);
            self.muxer.is_closed = true;
            self.interrupt.needs_reset(&error);
        }
        if self.dead {
            self.reject_clients(cx);
        }
        match self.next_timer() {
            Some(at) => cx.set_timer(at),
            None => cx.clear_timer(),
        }
    }

    /// Accepts the host clients of a broken device, which closes them.
    fn reject_clients(&mut self, cx: &mut Context<'_>) {
        self.muxer.run_timers(cx);
        if self.muxer.accept(cx) {
            cx.reschedule();
        }
    }

    fn next_timer(&self) -> Option<Nanos> {
        [self.reset.hold_until, self.reset.request_at, self.muxer.next_timer()].into_iter().flatten().min()
    }

    /// Processes timers, host clients and queues until nothing is left or the budget is spent.
    fn process(&mut self, cx: &mut Context<'_>) -> Result<(), QueueError> {
        let (mut from_guest, mut to_guest) = (BUDGET, BUDGET);
        loop {
            self.muxer.run_timers(cx);
            self.process_reset(cx)?;
            let more_clients = self.reset.request_at.is_none() && self.muxer.accept(cx);
            self.from_guest.disable_notifications()?;
            self.take_packets(cx, &mut from_guest)?;
            self.to_guest.queue.disable_notifications()?;
            let filled = self.to_guest.fill(&mut self.muxer, cx, &mut to_guest)?;
            self.publish()?;
            self.rx_starved = filled == FillOutcome::NoBuffers;
            if from_guest == 0 || to_guest == 0 || more_clients || filled == FillOutcome::Yield {
                cx.reschedule();
                return Ok(());
            }
            if !self.enable_notifications()? {
                return Ok(());
            }
        }
    }

    /// Enables notifications of the queues that have work to wait for. True if there is some
    /// already.
    fn enable_notifications(&mut self) -> Result<bool, QueueError> {
        let mut more = self.from_guest.enable_notifications()?;
        if self.rx_starved {
            more |= self.to_guest.queue.enable_notifications()?;
        }
        Ok(more)
    }

    /// Publishes used chains to the driver, and interrupts it if it wants that.
    fn publish(&mut self) -> Result<(), QueueError> {
        // Events first, so that Linux handles a transport reset before the connection requests that
        // follow it.
        for queue in [&mut self.events, &mut self.to_guest.queue, &mut self.from_guest] {
            if queue.publish()? {
                self.interrupt.queue(queue.index());
            }
        }
        Ok(())
    }

    /// Handles the guest's packets.
    fn take_packets(&mut self, cx: &mut Context<'_>, budget: &mut u32) -> Result<(), QueueError> {
        while *budget > 0 && self.from_guest.pop(&mut self.chain)? {
            // Checked after the packet was popped: a driver that has handled the reset before it
            // sent the packet has returned the event buffer by now.
            self.check_reset_handled(cx)?;
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
            Some((data, _)) => self.muxer.handle_packet(cx, &header, &data),
            None => {
                stats.malformed_count.add(1);
                self.muxer.handle_truncated_packet(cx, &header);
                Ok(())
            }
        }
    }

    /// Starts a reset of all connections if one is wanted, and continues one that is in progress.
    fn process_reset(&mut self, cx: &mut Context<'_>) -> Result<(), QueueError> {
        if self.muxer.shared.reset_wanted.swap(false, Ordering::Acquire) {
            self.muxer.clear(cx);
            let hold_until = Some(cx.now().saturating_add(RESET_ACK_TIMEOUT));
            let request_at = Some(cx.now().saturating_add(REQUEST_DELAY));
            self.reset = TransportReset { event_due: true, sent_with_buffers: None, hold_until, request_at };
        }
        if self.reset.event_due && self.events.pop(&mut self.chain)? {
            let written = self.chain.writable().write(self.events.ram(), &TRANSPORT_RESET)?;
            self.events.add_used(self.chain.head(), written as u32)?;
            self.reset.event_due = false;
            self.reset.sent_with_buffers = Some(self.events.available()?);
        }
        if self.reset.event_due || self.reset.sent_with_buffers.is_some() {
            // Enabled before the check below, so that no kick is missed.
            self.events.enable_notifications_of_more()?;
        }
        self.check_reset_handled(cx)?;
        self.reset.request_at.take_if(|at| cx.now() >= *at);
        if self.reset.hold_until.is_some_and(|until| cx.now() >= until) {
            self.reset.hold_until = None;
            self.muxer.establish_held(cx);
        }
        // Not before the event was sent: until then the driver cannot handle it.
        self.muxer.is_reset_pending =
            self.reset.sent_with_buffers.is_some() && self.reset.hold_until.is_some();
        Ok(())
    }

    /// Ends a transport reset if the driver has handled its event.
    fn check_reset_handled(&mut self, cx: &mut Context<'_>) -> Result<(), QueueError> {
        if let Some(buffers) = self.reset.sent_with_buffers
            && self.events.available()? != buffers
        {
            self.reset = TransportReset::default();
            self.muxer.is_reset_pending = false;
            self.muxer.request_held_again(cx);
        }
        Ok(())
    }

    fn count_kick(&self, token: Token) {
        let stats = &self.muxer.shared.stats;
        let counter = match token - FIRST_KICK {
            index if index == u32::from(RX) => &stats.rx_queue_event_count,
            index if index == u32::from(TX) => &stats.tx_queue_event_count,
            _ => return,
        };
        counter.add(1);
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
        self.poll(cx);
    }

    fn ready(&mut self, cx: &mut Context<'_>, event: Event) {
        // A paused task looks at all sockets when it is resumed.
        if self.running {
            self.muxer.ready(cx, event);
            // Poll once for all events of this wake-up.
            cx.reschedule();
        }
    }

    fn timer(&mut self, cx: &mut Context<'_>) {
        self.poll(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        self.running = false;
        self.paused_at = Some(cx.now());
    }

    fn is_drained(&self) -> bool {
        // Each call handles and publishes all that it has taken.
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.running = true;
        if let Some(paused_at) = self.paused_at.take() {
            // The duration of a pause does not count for deadlines.
            let pause = cx.now().saturating_sub(paused_at);
            self.muxer.table.postpone(pause);
            for at in [&mut self.reset.hold_until, &mut self.reset.request_at] {
                *at = at.map(|at| at.saturating_add(pause));
            }
        }
        self.muxer.poll_all(cx);
        self.poll(cx);
    }

    fn detach(self: Box<Self>) {
        let VsockTask { muxer, .. } = *self;
        let Muxer { shared, sockets, .. } = muxer;
        *locked(&shared.sockets) = Some(sockets);
    }
}
