//! The work of one pair of queues: frames from the guest to the network, and back.
//!
//! # A turn
//!
//! ```text
//! send     transmit queue -> interceptor?  spoofed?  limiter -> writev to the tap     used ring, interrupt: once per batch
//! answer   interceptor -> receive queue
//! receive  readv from the tap into the receive queue's buffers                   used ring, interrupt: once per batch
//! ```
//!
//! Each goes on until there is nothing more, until something holds it back, or until it had its share ([`TURN`]) and others get theirs.
//!
//! # What is waited for
//!
//! - The tap is watched edge-triggered: it is read until it is empty, and then the kernel says when there is more.
//! - A guest without receive buffers is asked to kick; one with buffers is not. The tap is not watched meanwhile: what comes waits in the
//!   kernel's queue, and beyond that is dropped there.
//! - A limiter's timer is set while it holds something back.
//!
//! # When the network is gone
//!
//! A tap that was deleted or a server that hung up takes the link down: the guest is told, once; what it sends is dropped and counted.

use std::fmt;
use std::io;
use std::sync::Arc;

use memory::GuestRam;
use rustix::io::Errno;

use super::backend::Link;
use super::config_space::feature;
use super::device::Shared;
use super::interceptor::FrameInterceptor;
use super::late::Lateness;
use super::port::{Parts, Port};
use super::rx::{PATIENCE, Received, Rx};
use super::tap::is_gone;
use super::tx::{Outgoing, Tx};
use sync::EventFd;
use virtio::device::{ActiveQueue, Interrupt};
use virtio::queue::QueueError;
use virtio::worker::{Context, Event, Interest, Nanos, Task, Token};

/// Bytes after which another direction or task gets its turn.
const TURN: usize = 1 << 20;
/// What a frame counts for that, at least.
const FRAME_COST: usize = 4 << 10;
/// How often a network is looked at that would go without a word.
pub(super) const LOOK_EVERY: Nanos = 1_000_000_000;
/// Most frames that the guest is told of at once.
const BATCH: u32 = 16;

/// The network has something, or went away.
const LINK: Token = 0;
/// The network takes more.
const LINK_OUT: Token = 1;
const RX_KICK: Token = 2;
const TX_KICK: Token = 3;

/// What a task is made of.
pub(super) struct Setup {
    pub(super) shared: Arc<Shared>,
    pub(super) port: Arc<Port>,
    pub(super) rx: ActiveQueue,
    pub(super) tx: ActiveQueue,
    pub(super) memory: GuestRam,
    pub(super) interrupt: Arc<dyn Interrupt>,
    /// What the driver accepted.
    pub(super) features: u64,
    /// Addresses that the guest may send from; none at all: any.
    pub(super) senders: Vec<[u8; 6]>,
}

/// Serves one pair of queues.
#[expect(
    clippy::struct_excessive_bools,
    reason = "what either direction waits for is independent of the other"
)]
pub(super) struct PairTask {
    shared: Arc<Shared>,
    port: Arc<Port>,
    memory: GuestRam,
    interrupt: Arc<dyn Interrupt>,
    rx_kick: Arc<EventFd>,
    tx_kick: Arc<EventFd>,
    /// None: it is gone, or the task is not attached.
    link: Option<Link>,
    interceptor: Option<Box<dyn FrameInterceptor>>,
    /// A frame of the interceptor that the guest has no room for yet; empty if there is none.
    answer: Vec<u8>,
    rx: Rx,
    tx: Tx,
    senders: Vec<[u8; 6]>,
    /// The network may have frames.
    rx_ready: bool,
    /// The guest has no receive buffers; it was asked to kick.
    rx_blocked: bool,
    /// There may be frames to send.
    tx_ready: bool,
    /// The network takes none; the descriptor is watched.
    tx_blocked: bool,
    watches_link: bool,
    watches_out: bool,
    /// When the limiter lets the next frame pass.
    rx_at: Option<Nanos>,
    tx_at: Option<Nanos>,
    /// How long the receive limit has kept frames waiting.
    lateness: Lateness,
    /// When a frame is dropped that waits for room.
    drop_at: Option<Nanos>,
    /// When the interceptor wants to be asked.
    detour_at: Option<Nanos>,
    /// When it is looked whether the network is still there.
    look_at: Option<Nanos>,
    /// When the tap can be given the driver's settings. Until then no queue is served.
    settings_at: Option<Nanos>,
    /// From `quiesce` to `resume`.
    quiet: bool,
    /// It was said that the device needs a reset.
    dead: bool,
}

/// Why one direction stopped.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Stop {
    /// There is nothing more, or something is waited for.
    Waits,
    /// It had its turn.
    Turn,
}

impl PairTask {
    pub(super) fn new(setup: Setup) -> Self {
        let Setup { shared, port, rx, tx, memory, interrupt, features, senders } = setup;
        let mergeable = features & feature::MRG_RXBUF != 0;
        let large = features & feature::GUEST_LARGE != 0;
        PairTask {
            shared,
            port,
            memory,
            interrupt,
            rx_kick: rx.kick,
            tx_kick: tx.kick,
            link: None,
            interceptor: None,
            answer: Vec::new(),
            rx: Rx::new(rx.queue, mergeable, large),
            tx: Tx::new(tx.queue),
            senders,
            rx_ready: true,
            rx_blocked: false,
            tx_ready: true,
            tx_blocked: false,
            watches_link: false,
            watches_out: false,
            rx_at: None,
            tx_at: None,
            lateness: Lateness::default(),
            drop_at: None,
            detour_at: None,
            look_at: None,
            settings_at: None,
            quiet: true,
            dead: false,
        }
    }

    /// Does what there is to do.
    fn work(&mut self, cx: &mut Context<'_>) {
        if self.quiet || self.dead {
            return;
        }
        if self.settings_at.is_some() {
            return self.set_timer(cx);
        }
        match self.serve(cx) {
            Ok(Stop::Waits) => self.set_timer(cx),
            Ok(Stop::Turn) => {
                self.set_timer(cx);
                cx.reschedule();
            }
            Err(error) => self.die(cx, &error),
        }
    }

    fn serve(&mut self, cx: &mut Context<'_>) -> Result<Stop, QueueError> {
        let mut stop = Stop::Waits;
        if self.may_send() {
            stop = self.send(cx)?;
        }
        if self.interceptor.is_some() {
            self.answer(cx)?;
        }
        if self.rx_ready && !self.rx_blocked && self.rx_at.is_none() {
            let received = self.receive(cx)?;
            stop = if received == Stop::Turn { received } else { stop };
        }
        // The network went away while frames waited for it: they are dropped in the next turn. The
        // driver does not kick again.
        Ok(if self.may_send() { Stop::Turn } else { stop })
    }

    /// Whether the transmit queue can be served: nothing holds back what may be in it.
    fn may_send(&self) -> bool {
        self.tx_ready && !self.tx_blocked && self.tx_at.is_none()
    }

    /// The device is broken until it is reset.
    fn die(&mut self, cx: &mut Context<'_>, why: &dyn fmt::Display) {
        self.dead = true;
        cx.clear_timer();
        cx.unwatch(LINK);
        cx.unwatch(LINK_OUT);
        (self.watches_link, self.watches_out) = (false, false);
        self.interrupt.needs_reset(why);
    }

    fn set_timer(&mut self, cx: &mut Context<'_>) {
        let times = [self.rx_at, self.tx_at, self.drop_at, self.detour_at, self.look_at, self.settings_at];
        match times.into_iter().flatten().min() {
            Some(at) => cx.set_timer(at),
            None => cx.clear_timer(),
        }
    }

    /// Sends what the guest has made available.
    fn send(&mut self, cx: &mut Context<'_>) -> Result<Stop, QueueError> {
        let (mut done, mut batch) = (0, 0);
        loop {
            self.tx.queue.disable_notifications()?;
            let mut empty = false;
            while done < TURN {
                if !self.tx.queue.pop(&mut self.tx.chain)? {
                    empty = true;
                    break;
                }
                let Some(cost) = self.send_one(cx)? else { break };
                done += cost.max(FRAME_COST);
                batch += 1;
                if batch == BATCH {
                    self.publish_sent()?;
                    batch = 0;
                }
            }
            self.flush(cx);
            self.publish_sent()?;
            if !empty {
                return Ok(if done >= TURN { Stop::Turn } else { Stop::Waits });
            }
            if !self.tx.queue.enable_notifications()? {
                self.tx_ready = false;
                return Ok(Stop::Waits);
            }
        }
    }

    /// Sends the frame that was popped. None if it has to wait; else its length.
    fn send_one(&mut self, cx: &mut Context<'_>) -> Result<Option<usize>, QueueError> {
        let shared = Arc::clone(&self.shared);
        let stats = &shared.stats;
        let interceptors = self.interceptor.is_some();
        let len = match self.tx.look(&self.memory, interceptors || !self.senders.is_empty())? {
            Outgoing::Frame(len) => len,
            Outgoing::Malformed => {
                stats.tx_malformed_frames.add(1);
                self.tx.done()?;
                return Ok(Some(0));
            }
        };
        if let Some(interceptor) = &mut self.interceptor
            && interceptor.wants(self.tx.head())
        {
            interceptor.push(self.tx.whole_frame(), cx.now());
            stats.detour_tx_count.add(1);
            self.tx.done()?;
            return Ok(Some(len));
        }
        let known = |mac| self.senders.contains(&mac);
        if !self.senders.is_empty() && !self.tx.source_mac().is_some_and(known) {
            let times = stats.tx_spoofed_mac_count.increment();
            if times.is_power_of_two() {
                log::warn!(
                    "network interface {}: a frame from an address that is not the guest's was dropped ({times})",
                    shared.id
                );
            }
            self.tx.done()?;
            return Ok(Some(len));
        }
        if shared.tx_limits.are_set() {
            match self.tx.paid() {
                None => {
                    if let Err(at) = shared.tx_limits.take(len, cx.now()) {
                        stats.tx_rate_limiter_throttled.add(1);
                        self.tx_at = Some(at);
                        self.tx.hold()?;
                        return Ok(None);
                    }
                }
                // The driver made it longer while it waited for the network.
                Some(paid) if paid < len => shared.tx_limits.owe(len - paid),
                Some(_) => {}
            }
            self.tx.set_paid(len.max(self.tx.paid().unwrap_or(0)));
        }
        let sent = match &mut self.link {
            Some(link) => self.tx.send_on(link),
            None => Err(Errno::NETDOWN),
        };
        match sent {
            Ok(()) => {
                stats.tx_packets_count.add(1);
                stats.tx_bytes_count.add(len as u64);
            }
            Err(Errno::AGAIN) => {
                self.tx.hold()?;
                self.wait_until_writable(cx);
                return Ok(None);
            }
            Err(error) => {
                stats.tap_write_fails.add(1);
                if is_gone(error) {
                    self.link_is_gone(cx, error);
                }
            }
        }
        self.tx.done()?;
        Ok(Some(len))
    }

    fn publish_sent(&mut self) -> Result<(), QueueError> {
        if self.tx.queue.publish()? {
            self.interrupt.queue(self.tx.queue.index());
        }
        Ok(())
    }

    fn publish_received(&mut self) -> Result<(), QueueError> {
        if self.rx.queue.publish()? {
            self.interrupt.queue(self.rx.queue.index());
        }
        Ok(())
    }

    /// Lets go what the link has gathered.
    fn flush(&mut self, cx: &mut Context<'_>) {
        let Some(link) = &mut self.link else { return };
        if let Err(error) = link.flush() {
            self.link_is_gone(cx, error);
        } else if link.has_unsent() {
            self.watch_out(cx);
        }
    }

    fn wait_until_writable(&mut self, cx: &mut Context<'_>) {
        self.tx_blocked = true;
        self.watch_out(cx);
    }

    fn watch_out(&mut self, cx: &mut Context<'_>) {
        if self.watches_out {
            return;
        }
        let Some(link) = &self.link else { return };
        match cx.watch_edge(LINK_OUT, link.fd(), Interest::WRITE) {
            Ok(()) => self.watches_out = true,
            Err(error) => self.die(cx, &format_args!("cannot wait for its network: {error}")),
        }
    }

    /// Gives the guest what the interceptor has for it.
    fn answer(&mut self, cx: &mut Context<'_>) -> Result<(), QueueError> {
        let now = cx.now();
        let mut done = 0;
        while let Some(interceptor) = &mut self.interceptor {
            if self.answer.is_empty() && !interceptor.pop(&mut self.answer, now) {
                self.answer.clear();
                self.detour_at = interceptor.deadline(now);
                break;
            }
            if self.rx_blocked || done >= TURN {
                // Soon: when the guest has room again, or others had their turn.
                self.detour_at = (!self.rx_blocked).then_some(now);
                break;
            }
            done += self.answer.len().max(FRAME_COST);
            match self.rx.deliver(&self.memory, &self.answer)? {
                Received::NoRoom => {
                    if !self.out_of_buffers(cx)? {
                        self.detour_at = None;
                        break;
                    }
                }
                Received::Frame(_) => {
                    self.shared.stats.detour_rx_count.add(1);
                    self.answer.clear();
                    self.drop_at = None;
                }
                _ => {
                    self.shared.stats.rx_fails.add(1);
                    self.answer.clear();
                    self.drop_at = None;
                }
            }
        }
        self.publish_received()
    }

    /// Receives what the network has.
    fn receive(&mut self, cx: &mut Context<'_>) -> Result<Stop, QueueError> {
        if !self.watches_link {
            self.watch_link(cx);
        }
        self.rx.queue.disable_notifications()?;
        let (mut done, mut batch) = (0, 0);
        while done < TURN && !self.dead {
            let limited = self.shared.rx_limits.are_set();
            if limited
                && !self.rx.has_waiting()
                && let Err(at) = self.shared.rx_limits.may_come(cx.now())
            {
                self.shared.stats.rx_rate_limiter_throttled.add(1);
                // What is held back waits for its time, not for room.
                (self.rx_at, self.drop_at) = (Some(at), None);
                self.lateness.held(cx.now());
                self.publish_received()?;
                return Ok(Stop::Waits);
            }
            if limited && !self.rx.has_waiting() && !self.drop_late(cx) {
                self.publish_received()?;
                return Ok(Stop::Waits);
            }
            match self.receive_one()? {
                Received::Frame(len) => {
                    if limited {
                        self.shared.rx_limits.owe(len);
                        self.lateness.passed();
                    }
                    self.shared.stats.rx_packets_count.add(1);
                    self.shared.stats.rx_bytes_count.add(len as u64);
                    self.drop_at = None;
                    done += len.max(FRAME_COST);
                    batch += 1;
                    if batch == BATCH {
                        self.publish_received()?;
                        batch = 0;
                    }
                }
                Received::TooLarge => {
                    self.shared.stats.rx_fails.add(1);
                    self.drop_at = None;
                    done += FRAME_COST;
                }
                Received::Nothing => {
                    self.rx_ready = false;
                    self.lateness.clear();
                    self.publish_received()?;
                    return Ok(Stop::Waits);
                }
                Received::NoRoom => {
                    self.lateness.clear();
                    self.publish_received()?;
                    if !self.out_of_buffers(cx)? {
                        return Ok(Stop::Waits);
                    }
                }
                Received::Failed(error) if is_gone(error) => self.link_is_gone(cx, error),
                Received::Failed(_) => {
                    self.shared.stats.tap_read_fails.add(1);
                    done += FRAME_COST;
                }
            }
        }
        self.publish_received()?;
        Ok(if self.dead { Stop::Waits } else { Stop::Turn })
    }

    /// Drops frames that the receive limit would deliver too late. False if the network has no
    /// frame left.
    fn drop_late(&mut self, cx: &mut Context<'_>) -> bool {
        for _ in 0..self.lateness.take_late(cx.now()) {
            let Some(link) = &mut self.link else { break };
            match link.discard() {
                Ok(()) => _ = self.shared.stats.rx_late_frames.add(1),
                Err(Errno::AGAIN) => {
                    self.lateness.clear();
                    self.rx_ready = false;
                    return false;
                }
                Err(error) if is_gone(error) => {
                    self.link_is_gone(cx, error);
                    break;
                }
                Err(_) => _ = self.shared.stats.tap_read_fails.add(1),
            }
        }
        true
    }

    /// One frame from the network to the guest.
    fn receive_one(&mut self) -> Result<Received, QueueError> {
        match &mut self.link {
            None => Ok(Received::Nothing),
            Some(Link::Tap(tap, queue)) => self.rx.receive(&self.memory, tap.queue(*queue)),
            Some(Link::Stream(stream)) => {
                let received = match stream.frame() {
                    Ok(frame) => self.rx.deliver(&self.memory, frame)?,
                    Err(Errno::AGAIN) => return Ok(Received::Nothing),
                    Err(error) => return Ok(Received::Failed(error)),
                };
                if received != Received::NoRoom {
                    stream.consume();
                }
                Ok(received)
            }
        }
    }

    /// Asks the guest to kick when it gives receive buffers. True if it has given some meanwhile.
    fn out_of_buffers(&mut self, cx: &mut Context<'_>) -> Result<bool, QueueError> {
        if self.rx.queue.enable_notifications()? {
            self.rx.queue.disable_notifications()?;
            return Ok(true);
        }
        self.shared.stats.no_rx_avail_buffer.add(1);
        self.rx_blocked = true;
        // A guest that has given none gives some sooner or later. One that has given too few for a frame may have no more.
        if self.rx.has_room() && self.drop_at.is_none() {
            self.drop_at = Some(cx.now().saturating_add(PATIENCE));
        }
        Ok(false)
    }

    /// The guest gave no room for a frame for too long.
    fn drop_what_waits(&mut self) {
        let mut dropped = self.rx.drop_waiting();
        if !dropped && !self.answer.is_empty() {
            self.answer.clear();
            dropped = true;
        }
        if !dropped
            && let Some(Link::Stream(stream)) = &mut self.link
            && stream.frame().is_ok()
        {
            stream.consume();
            dropped = true;
        }
        if dropped {
            self.shared.stats.rx_fails.add(1);
        }
        self.rx_blocked = false;
    }

    fn watch_link(&mut self, cx: &mut Context<'_>) {
        let Some(link) = &self.link else { return };
        match cx.watch_edge(LINK, link.fd(), Interest::READ) {
            Ok(()) => self.watches_link = true,
            Err(error) => self.die(cx, &format_args!("cannot wait for its network: {error}")),
        }
    }

    fn unwatch_link(&mut self, cx: &mut Context<'_>) {
        if std::mem::take(&mut self.watches_link) {
            cx.unwatch(LINK);
        }
    }

    /// The network has gone and will not come back to this descriptor.
    fn link_is_gone(&mut self, cx: &mut Context<'_>, error: Errno) {
        self.unwatch_link(cx);
        if std::mem::take(&mut self.watches_out) {
            cx.unwatch(LINK_OUT);
        }
        self.tx_blocked = false;
        if let Some(link) = self.link.take() {
            self.shared.link_down(&format_args!("{}: {error}", link.name()));
            link.close();
        }
    }

    /// A network that does not say by itself that it is gone is looked at now and then.
    fn look(&mut self, cx: &mut Context<'_>) {
        let Some(Link::Tap(tap, _)) = &self.link else { return };
        if !tap.is_silent() {
            return;
        }
        if let Err(at) = self.shared.may_look(cx.now()) {
            self.look_at = Some(at);
            return;
        }
        match tap.look() {
            Err(error) if is_gone(error) => self.link_is_gone(cx, error),
            _ => self.look_at = Some(cx.now().saturating_add(LOOK_EVERY)),
        }
    }
}

impl Task for PairTask {
    fn attach(&mut self, cx: &mut Context<'_>) -> io::Result<()> {
        let Parts { link, interceptor, .. } = self.port.take();
        (self.link, self.interceptor) = (link, interceptor);
        cx.watch_kick(RX_KICK, &self.rx_kick)?;
        cx.watch_kick(TX_KICK, &self.tx_kick)
    }

    fn kicked(&mut self, cx: &mut Context<'_>, token: Token) {
        // Limits that were changed come as a kick, too: they are asked again.
        if token == RX_KICK {
            self.shared.stats.rx_queue_event_count.add(1);
            self.rx_blocked = false;
            self.rx_at = None;
        } else {
            self.shared.stats.tx_queue_event_count.add(1);
            self.tx_ready = true;
            self.tx_at = None;
        }
        self.work(cx);
    }

    fn ready(&mut self, cx: &mut Context<'_>, event: Event) {
        if event.token == LINK_OUT {
            self.tx_blocked = false;
            self.flush(cx);
            if std::mem::take(&mut self.watches_out)
                && self.link.as_ref().is_none_or(|link| !link.has_unsent())
            {
                cx.unwatch(LINK_OUT);
            } else {
                self.watches_out = self.link.is_some();
            }
        } else {
            self.shared.stats.rx_tap_event_count.add(1);
            self.rx_ready = true;
            if self.quiet || self.dead || self.rx_blocked || self.rx_at.is_some() {
                // Not again before there is something to be done about it.
                self.unwatch_link(cx);
                return;
            }
        }
        self.work(cx);
    }

    fn timer(&mut self, cx: &mut Context<'_>) {
        let now = cx.now();
        for at in [&mut self.rx_at, &mut self.tx_at] {
            if at.take_if(|at| *at <= now).is_some() {
                self.shared.stats.rate_limiter_event_count.add(1);
            }
        }
        if self.drop_at.take_if(|at| *at <= now).is_some() && self.rx_blocked {
            self.drop_what_waits();
        }
        if self.look_at.take_if(|at| *at <= now).is_some() {
            self.look(cx);
        }
        if self.settings_at.take_if(|at| *at <= now).is_some() {
            self.settings_at = self.shared.tell_tap(now).err();
        }
        self.work(cx);
    }

    fn quiesce(&mut self, cx: &mut Context<'_>) {
        self.quiet = true;
        cx.clear_timer();
        (self.rx_at, self.tx_at, self.drop_at, self.detour_at, self.look_at) = (None, None, None, None, None);
        // A pause makes nothing late.
        self.lateness.clear();
        // What is saved from now on is as of now.
        self.shared.rx_limits.hold(cx.now());
        self.shared.tx_limits.hold(cx.now());
        match self.rx.give_back() {
            Ok(true) => {
                self.shared.stats.rx_fails.add(1);
            }
            Err(error) if !self.dead => self.die(cx, &error),
            Ok(false) | Err(_) => {}
        }
    }

    fn is_drained(&self) -> bool {
        // A frame is moved whole or not at all, and chains that were taken ahead are given back.
        true
    }

    fn resume(&mut self, cx: &mut Context<'_>) {
        self.quiet = false;
        (self.rx_ready, self.tx_ready) = (true, true);
        (self.rx_blocked, self.tx_blocked) = (false, false);
        // Every pair sees to it: another one's task may run on another worker, later.
        self.settings_at = self.shared.tell_tap(cx.now()).err();
        self.look(cx);
        self.work(cx);
    }

    fn detach(self: Box<Self>) {
        self.port.put(Parts { link: self.link, interceptor: self.interceptor, vhost: None });
    }
}
