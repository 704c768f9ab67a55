//! The transmit direction of a queue pair: frames from the guest to the network.

use rustix::io::Errno;

use super::context::{BYTES_PER_CALL, FRAMES_PER_PUBLISH, MIN_FRAME_COST, PairContext, PairError, Progress};
use super::network::Network;
use super::tx_queue::{TxFrame, TxQueue};
use crate::backend::tap::is_gone;
use crate::interceptor::FrameInterceptor;
use virtio::queue::Queue;
use virtio::worker::{Context, Nanos};

/// What the transmit direction waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum TxState {
    /// A kick: the queue is empty.
    Idle,
    /// Nothing: the queue may have frames.
    Ready,
    /// This time: the rate limiter delays the next frame.
    Throttled(Nanos),
    /// Space in the network, which is watched. Ends when the network is gone, too.
    Blocked,
}

/// Sends the frames of one transmit queue.
pub(super) struct Transmitter {
    queue: TxQueue,
    state: TxState,
    /// Source MAC addresses that the guest may use. Empty: any.
    allowed_src_macs: Vec<[u8; 6]>,
    /// Frames that were taken from the queue.
    taken: u64,
    /// Frames that were passed on to the network.
    sent: u64,
}

impl Transmitter {
    pub(super) fn new(queue: Queue, allowed_src_macs: Vec<[u8; 6]>) -> Self {
        Transmitter { queue: TxQueue::new(queue), state: TxState::Ready, allowed_src_macs, taken: 0, sent: 0 }
    }

    /// Whether the queue may have frames and nothing delays them.
    pub(super) fn is_ready(&self, network: &Network) -> bool {
        match self.state {
            TxState::Ready => true,
            // Frames for a network that is gone are dropped. The driver does not kick again.
            TxState::Blocked => !network.is_open(),
            TxState::Idle | TxState::Throttled(_) => false,
        }
    }

    /// The driver has kicked the queue, or the rate limits have changed.
    pub(super) fn kicked(&mut self) {
        if self.state != TxState::Blocked {
            self.state = TxState::Ready;
        }
    }

    /// The network accepts more frames.
    pub(super) fn unblock(&mut self) {
        if self.state == TxState::Blocked {
            self.state = TxState::Ready;
        }
    }

    /// Frames that were taken from the queue so far.
    pub(super) fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether the queue was empty when it was last served.
    pub(super) fn is_idle(&self) -> bool {
        matches!(self.state, TxState::Idle)
    }

    /// Time of the next timer.
    pub(super) fn timer(&self) -> Option<Nanos> {
        match self.state {
            TxState::Throttled(at) => Some(at),
            TxState::Idle | TxState::Ready | TxState::Blocked => None,
        }
    }

    /// Ends the delay by the rate limiter if its time has come. True if it ended.
    pub(super) fn expire(&mut self, now: Nanos) -> bool {
        let expired = self.timer().is_some_and(|at| at <= now);
        if expired {
            self.state = TxState::Ready;
        }
        expired
    }

    /// Cancels the delay by the rate limiter.
    pub(super) fn quiesce(&mut self) {
        if self.timer().is_some() {
            self.state = TxState::Ready;
        }
    }

    pub(super) fn resume(&mut self) {
        self.state = TxState::Ready;
    }

    /// Sends the frames that the driver has made available.
    pub(super) fn serve(
        &mut self,
        pair: &PairContext,
        network: &mut Network,
        interceptor: &mut Option<Box<dyn FrameInterceptor>>,
        cx: &mut Context<'_>,
    ) -> Result<Progress, PairError> {
        self.state = TxState::Ready;
        let (mut done, mut batch) = (0, 0);
        loop {
            self.queue.queue.disable_notifications()?;
            let mut empty = false;
            let (mut begun, sent) = (None, self.sent);
            while done < BYTES_PER_CALL {
                if !self.queue.pop()? {
                    empty = true;
                    break;
                }
                begun.get_or_insert_with(|| cx.read_clock());
                let Some(len) = self.send_one(pair, network, interceptor, cx)? else {
                    let left = self.queue.queue.available()?;
                    pair.shared.stats.tx_remaining_reqs_count.add(left.into());
                    break;
                };
                self.taken += 1;
                done += len.max(MIN_FRAME_COST);
                batch += 1;
                if batch == FRAMES_PER_PUBLISH {
                    pair.publish(&mut self.queue.queue)?;
                    batch = 0;
                }
            }
            network.flush(&pair.shared, cx)?;
            if let Some(begun) = begun.filter(|_| self.sent > sent) {
                let elapsed = cx.read_clock().saturating_sub(begun);
                pair.shared.stats.tap_write_latency.record_many(elapsed, self.sent - sent);
            }
            pair.publish(&mut self.queue.queue)?;
            if !empty {
                return Ok(if done >= BYTES_PER_CALL { Progress::MoreWork } else { Progress::Waiting });
            }
            if !self.queue.queue.enable_notifications()? {
                self.state = TxState::Idle;
                return Ok(Progress::Waiting);
            }
        }
    }

    /// Sends the frame that was popped, and returns its length. None: it has to wait.
    fn send_one(
        &mut self,
        pair: &PairContext,
        network: &mut Network,
        interceptor: &mut Option<Box<dyn FrameInterceptor>>,
        cx: &mut Context<'_>,
    ) -> Result<Option<usize>, PairError> {
        let stats = &pair.shared.stats;
        let copy_head = interceptor.is_some() || !self.allowed_src_macs.is_empty();
        let len = match self.queue.load(&pair.memory, copy_head)? {
            TxFrame::Frame(len) => len,
            TxFrame::Malformed => {
                stats.tx_malformed_frames.add(1);
                self.queue.complete()?;
                return Ok(Some(0));
            }
        };
        if let Some(interceptor) = interceptor
            && interceptor.wants(self.queue.head())
        {
            interceptor.push(self.queue.whole_frame(), cx.now());
            stats.intercepted_tx_count.add(1);
            self.queue.complete()?;
            return Ok(Some(len));
        }
        if !self.is_source_allowed() {
            let times = stats.tx_spoofed_mac_count.increment();
            if times.is_power_of_two() {
                log::warn!(
                    "network interface {}: dropped a frame whose source MAC is not the guest's ({times} times)",
                    pair.shared.id
                );
            }
            self.queue.complete()?;
            return Ok(Some(len));
        }
        if let Err(at) = self.take_tokens(pair, len, cx.now()) {
            stats.tx_rate_limiter_throttled.add(1);
            self.state = TxState::Throttled(at);
            self.queue.rewind()?;
            return Ok(None);
        }
        let sent = match network.link() {
            Some(link) => self.queue.send(link),
            None => Err(Errno::NETDOWN),
        };
        match sent {
            Ok(()) => {
                self.sent += 1;
                stats.tx_packets_count.add(1);
                stats.tx_bytes_count.add(len as u64);
            }
            Err(Errno::AGAIN) => {
                self.queue.rewind()?;
                self.state = TxState::Blocked;
                network.watch_writable(cx)?;
                return Ok(None);
            }
            Err(error) => {
                stats.tap_write_fails.add(1);
                if is_gone(error) {
                    network.close(&pair.shared, cx, error);
                }
            }
        }
        self.queue.complete()?;
        Ok(Some(len))
    }

    fn is_source_allowed(&self) -> bool {
        let is_known = |mac| self.allowed_src_macs.contains(&mac);
        self.allowed_src_macs.is_empty() || self.queue.source_mac().is_some_and(is_known)
    }

    /// Takes tokens for the loaded frame from the rate limiter. The error is the time at which to
    /// try again.
    fn take_tokens(&mut self, pair: &PairContext, len: usize, now: Nanos) -> Result<(), Nanos> {
        let limiter = &pair.shared.tx_limiter;
        if !limiter.is_limited() {
            return Ok(());
        }
        match self.queue.charged() {
            None => limiter.take(len, now)?,
            // The driver made the frame longer while it waited for the network.
            Some(charged) if charged < len => limiter.charge(len - charged),
            Some(_) => {}
        }
        self.queue.set_charged(len.max(self.queue.charged().unwrap_or(0)));
        Ok(())
    }
}
