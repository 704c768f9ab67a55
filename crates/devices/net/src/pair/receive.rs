//! The receive direction of a queue pair: frames from the network and replies of the interceptor
//! to the guest.

use rustix::io::Errno;

use super::context::{BYTES_PER_CALL, FRAMES_PER_PUBLISH, MIN_FRAME_COST, PairContext, PairError, Progress};
use super::network::Network;
use super::queue_age::QueueAge;
use super::rx_queue::{BUFFER_TIMEOUT, Received, RxQueue};
use crate::backend::Link;
use crate::backend::tap::is_gone;
use crate::interceptor::FrameInterceptor;
use virtio::queue::{Queue, QueueError};
use virtio::worker::{Context, Nanos};

/// What the receive direction waits for on the side of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum RxState {
    /// An event of the network: it has no frames.
    Idle,
    /// Nothing: the network may have frames.
    Ready,
    /// This time: the rate limiter delays the next frame.
    Throttled(Nanos),
}

/// Receive buffers of the guest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Buffers {
    /// The queue may have buffers.
    Available,
    /// The guest has too few. The driver was asked to kick when it adds some.
    Exhausted,
}

/// Delivers frames to one receive queue.
pub(super) struct Receiver {
    queue: RxQueue,
    state: RxState,
    buffers: Buffers,
    /// How long the rate limiter has kept frames in the network's queue.
    age: QueueAge,
    /// When a frame is dropped that waits for more receive buffers.
    drop_at: Option<Nanos>,
    /// A frame of the interceptor that waits for receive buffers. Empty: there is none.
    reply: Vec<u8>,
    /// When the interceptor must be asked for frames.
    reply_at: Option<Nanos>,
}

impl Receiver {
    pub(super) fn new(queue: Queue, mergeable: bool, large: bool) -> Self {
        Receiver {
            queue: RxQueue::new(queue, mergeable, large),
            state: RxState::Ready,
            buffers: Buffers::Available,
            age: QueueAge::default(),
            drop_at: None,
            reply: Vec::new(),
            reply_at: None,
        }
    }

    /// Whether the network may have frames, and neither the rate limiter nor a lack of receive
    /// buffers delays them.
    pub(super) fn is_ready(&self) -> bool {
        self.state == RxState::Ready && self.buffers == Buffers::Available
    }

    /// The driver has kicked the queue, or the rate limits have changed.
    pub(super) fn kicked(&mut self) {
        self.buffers = Buffers::Available;
        self.stop_throttling();
    }

    /// The network has frames, or is gone.
    pub(super) fn readable(&mut self) {
        if self.state == RxState::Idle {
            self.state = RxState::Ready;
        }
    }

    fn throttled_until(&self) -> Option<Nanos> {
        match self.state {
            RxState::Throttled(at) => Some(at),
            RxState::Idle | RxState::Ready => None,
        }
    }

    fn stop_throttling(&mut self) {
        if self.throttled_until().is_some() {
            self.state = RxState::Ready;
        }
    }

    /// Time of the next timer.
    pub(super) fn timer(&self) -> Option<Nanos> {
        [self.throttled_until(), self.drop_at, self.reply_at].into_iter().flatten().min()
    }

    /// Ends the delay by the rate limiter if its time has come. True if it ended.
    pub(super) fn expire(&mut self, now: Nanos) -> bool {
        let expired = self.throttled_until().is_some_and(|at| at <= now);
        if expired {
            self.state = RxState::Ready;
        }
        expired
    }

    /// Drops the frame that waits for more receive buffers if its time has come.
    pub(super) fn expire_frame(&mut self, pair: &PairContext, network: &mut Network, now: Nanos) {
        if self.drop_at.take_if(|at| *at <= now).is_some() && self.buffers == Buffers::Exhausted {
            self.drop_waiting_frame(pair, network);
        }
    }

    /// Cancels all timers and puts the popped chains back into the queue.
    pub(super) fn quiesce(&mut self, pair: &PairContext) -> Result<(), QueueError> {
        self.stop_throttling();
        (self.drop_at, self.reply_at) = (None, None);
        // The time of a pause does not count as delay.
        self.age.clear();
        if self.queue.unpop_all()? {
            pair.shared.stats.rx_fails.add(1);
        }
        Ok(())
    }

    pub(super) fn resume(&mut self) {
        (self.state, self.buffers) = (RxState::Ready, Buffers::Available);
    }

    /// Delivers the frames that the interceptor has for the guest.
    pub(super) fn deliver_replies(
        &mut self,
        pair: &PairContext,
        interceptor: &mut dyn FrameInterceptor,
        cx: &mut Context<'_>,
    ) -> Result<(), PairError> {
        let now = cx.now();
        let mut done = 0;
        loop {
            if self.reply.is_empty() && !interceptor.pop(&mut self.reply, now) {
                self.reply.clear();
                self.reply_at = interceptor.deadline(now);
                break;
            }
            if self.buffers == Buffers::Exhausted || done >= BYTES_PER_CALL {
                // A kick continues when the guest has buffers again, the timer in the next call.
                self.reply_at = (self.buffers == Buffers::Available).then_some(now);
                break;
            }
            done += self.reply.len().max(MIN_FRAME_COST);
            match self.queue.deliver(&pair.memory, &self.reply)? {
                Received::NoBuffers => {
                    if !self.await_buffers(pair, cx)? {
                        self.reply_at = None;
                        break;
                    }
                }
                Received::Frame(_) => {
                    pair.shared.stats.intercepted_rx_count.add(1);
                    self.reply.clear();
                    self.drop_at = None;
                }
                _ => {
                    pair.shared.stats.rx_fails.add(1);
                    self.reply.clear();
                    self.drop_at = None;
                }
            }
        }
        Ok(pair.publish(&mut self.queue.queue)?)
    }

    /// Delivers the frames that the network has for the guest.
    pub(super) fn serve(
        &mut self,
        pair: &PairContext,
        network: &mut Network,
        cx: &mut Context<'_>,
    ) -> Result<Progress, PairError> {
        let stats = &pair.shared.stats;
        network.watch_readable(cx)?;
        self.queue.queue.disable_notifications()?;
        let (mut done, mut batch) = (0, 0);
        while done < BYTES_PER_CALL {
            let limited = pair.shared.rx_limiter.is_limited();
            if limited && !self.queue.has_partial() && !self.may_receive(pair, network, cx) {
                pair.publish(&mut self.queue.queue)?;
                return Ok(Progress::Waiting);
            }
            match self.receive_one(pair, network)? {
                Received::Frame(len) => {
                    if limited {
                        pair.shared.rx_limiter.charge(len);
                        self.age.passed();
                    }
                    stats.rx_packets_count.add(1);
                    stats.rx_bytes_count.add(len as u64);
                    self.drop_at = None;
                    done += len.max(MIN_FRAME_COST);
                    batch += 1;
                    if batch == FRAMES_PER_PUBLISH {
                        pair.publish(&mut self.queue.queue)?;
                        batch = 0;
                    }
                }
                Received::TooLarge => {
                    stats.rx_fails.add(1);
                    self.drop_at = None;
                    done += MIN_FRAME_COST;
                }
                Received::Nothing => {
                    self.state = RxState::Idle;
                    self.age.clear();
                    pair.publish(&mut self.queue.queue)?;
                    return Ok(Progress::Waiting);
                }
                Received::NoBuffers => {
                    self.age.clear();
                    pair.publish(&mut self.queue.queue)?;
                    if !self.await_buffers(pair, cx)? {
                        return Ok(Progress::Waiting);
                    }
                }
                Received::Failed(error) if is_gone(error) => network.close(&pair.shared, cx, error),
                Received::Failed(_) => {
                    stats.tap_read_fails.add(1);
                    done += MIN_FRAME_COST;
                }
            }
        }
        pair.publish(&mut self.queue.queue)?;
        Ok(Progress::MoreWork)
    }

    /// Whether the rate limiter lets the next frame pass, and the network has one that is not too
    /// late. If not, the state says what is waited for.
    fn may_receive(&mut self, pair: &PairContext, network: &mut Network, cx: &mut Context<'_>) -> bool {
        if let Err(at) = pair.shared.rx_limiter.check(cx.now()) {
            pair.shared.stats.rx_rate_limiter_throttled.add(1);
            // The frame waits for the rate limiter now, and not for receive buffers.
            (self.state, self.drop_at) = (RxState::Throttled(at), None);
            self.age.held(cx.now());
            return false;
        }
        self.drop_late_frames(pair, network, cx)
    }

    /// Drops frames that the rate limiter would deliver too late. False: the network has no frame
    /// left.
    fn drop_late_frames(&mut self, pair: &PairContext, network: &mut Network, cx: &mut Context<'_>) -> bool {
        for _ in 0..self.age.take_late(cx.now()) {
            let Some(link) = network.link() else { break };
            match link.discard() {
                Ok(()) => pair.shared.stats.rx_late_frames.add(1),
                Err(Errno::AGAIN) => {
                    self.age.clear();
                    self.state = RxState::Idle;
                    return false;
                }
                Err(error) if is_gone(error) => {
                    network.close(&pair.shared, cx, error);
                    break;
                }
                Err(_) => pair.shared.stats.tap_read_fails.add(1),
            }
        }
        true
    }

    /// Receives one frame from the network.
    fn receive_one(&mut self, pair: &PairContext, network: &mut Network) -> Result<Received, QueueError> {
        match network.link() {
            None => Ok(Received::Nothing),
            Some(Link::Tap(tap, queue)) => self.queue.receive(&pair.memory, tap.queue(*queue)),
            Some(Link::Stream(stream)) => {
                let received = match stream.frame() {
                    Ok(frame) => self.queue.deliver(&pair.memory, frame)?,
                    Err(Errno::AGAIN) => return Ok(Received::Nothing),
                    Err(error) => return Ok(Received::Failed(error)),
                };
                if received != Received::NoBuffers {
                    stream.consume();
                }
                Ok(received)
            }
        }
    }

    /// Asks the driver to kick when it adds receive buffers. True: it has added some meanwhile.
    fn await_buffers(&mut self, pair: &PairContext, cx: &mut Context<'_>) -> Result<bool, QueueError> {
        if self.queue.queue.enable_notifications()? {
            self.queue.queue.disable_notifications()?;
            return Ok(true);
        }
        pair.shared.stats.no_rx_avail_buffer.add(1);
        self.buffers = Buffers::Exhausted;
        // A driver without any buffers will add some. One whose buffers are too small for the frame
        // may have no more.
        if self.queue.has_buffers() && self.drop_at.is_none() {
            self.drop_at = Some(cx.now().saturating_add(BUFFER_TIMEOUT));
        }
        Ok(false)
    }

    /// Drops the frame for which the guest has not added enough receive buffers in time.
    fn drop_waiting_frame(&mut self, pair: &PairContext, network: &mut Network) {
        let mut dropped = self.queue.drop_partial();
        if !dropped && !self.reply.is_empty() {
            self.reply.clear();
            dropped = true;
        }
        if !dropped
            && let Some(Link::Stream(stream)) = network.link()
            && stream.frame().is_ok()
        {
            stream.consume();
            dropped = true;
        }
        if dropped {
            pair.shared.stats.rx_fails.add(1);
        }
        self.buffers = Buffers::Available;
    }
}
