//! The buffer between the guest's serial port and the thread that serves its host side.
//!
//! # Invariant
//!
//! A vCPU never waits for the host side. The guest's output goes into a buffer of [`OUTPUT_MAX`]
//! bytes, which a [thread](super::console_thread) writes to its destination. While the destination
//! takes nothing and the buffer is full, new bytes are dropped and counted. The thread is woken a
//! millisecond after the first byte (at 115200 baud a real port would have sent eleven), so that a
//! line costs one write and not eighty.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};
use sync::{EventFd, locked};
use virtio::rate_limiter::{RateLimiter, RateLimiterConfig};
use virtio::worker::monotonic;

use crate::stats::SerialStats;

/// Bytes of output that are buffered while the destination takes none.
const OUTPUT_MAX: usize = 64 * 1024;
/// Bytes of output that are written at once, without waiting for more.
pub(super) const OUTPUT_CHUNK: usize = 4096;
/// How long the first byte of output waits for others.
const GATHER_TIME: Duration = Duration::from_millis(1);

/// What the serial port and the console thread share.
#[derive(Debug)]
pub(crate) struct Console {
    state: Mutex<State>,
    /// Signalled when all output has been written.
    drained: Condvar,
    /// Whether the timer is set for the output in the buffer.
    notified: AtomicBool,
    /// What the guest read and wrote, and what was dropped.
    pub(super) stats: Arc<SerialStats>,
    /// Wakes the thread when there is output.
    pub(super) timer: OwnedFd,
    /// Wakes the thread when the guest wants input, and when the thread is to end.
    pub(super) wake: EventFd,
}

#[derive(Debug, Default)]
struct State {
    /// The guest's output that is not written yet.
    output: VecDeque<u8>,
    /// Whether there is a destination.
    open: bool,
    /// Whether the thread is to end.
    end: bool,
    /// How many bytes the guest may write.
    limiter: RateLimiter,
}

impl Console {
    /// A console with an empty buffer. `open`: whether its output has a destination.
    pub(super) fn new(open: bool, limit: RateLimiterConfig) -> io::Result<Self> {
        let limiter = RateLimiter::new(limit, monotonic());
        Ok(Console {
            state: Mutex::new(State { open, limiter, ..State::default() }),
            drained: Condvar::new(),
            notified: AtomicBool::new(false),
            stats: Arc::default(),
            timer: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?,
            wake: EventFd::new()?,
        })
    }

    /// Counts a byte that the guest read.
    pub(super) fn count_read(&self) {
        self.stats.read.add(1);
    }

    /// Counts a byte that the guest wrote.
    pub(super) fn count_written(&self) {
        self.stats.written.add(1);
    }

    /// Called when the guest has read all its input.
    pub(crate) fn guest_wants_input(&self) {
        self.wake.signal();
    }

    /// Waits until the output is written, at most `limit`. Returns whether it is.
    pub(super) fn drain(&self, limit: Duration) -> bool {
        self.notify_in(Duration::ZERO);
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.open && !state.output.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            let waited = self.drained.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        locked(&self.state)
    }

    /// Wakes the thread after `delay`, which is less than a second.
    fn notify_in(&self, delay: Duration) {
        // A timer of zero would be a timer switched off.
        let delay = delay.max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: 0, tv_nsec: delay.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        debug_assert!(set.is_ok(), "a timer takes any time below a second: {set:?}");
    }

    /// Buffers the guest's output. Drops bytes that exceed the rate limit or the buffer.
    fn push(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if !state.open {
            return;
        }
        if !state.limiter.is_unlimited() && !state.limiter.try_take(bytes.len() as u64, monotonic()) {
            drop(state);
            self.stats.limited.add(bytes.len() as u64);
            return;
        }
        let kept = bytes.len().min(OUTPUT_MAX - state.output.len());
        let before = state.output.len();
        state.output.extend(&bytes[..kept]);
        let chunk_full = before < OUTPUT_CHUNK && state.output.len() >= OUTPUT_CHUNK;
        drop(state);
        self.stats.dropped.add((bytes.len() - kept) as u64);
        if !self.notified.swap(true, Ordering::AcqRel) {
            self.notify_in(GATHER_TIME);
        } else if chunk_full {
            self.notify_in(Duration::ZERO);
        }
    }

    /// The next chunk of output, which stays in the buffer; empty if there is none.
    pub(super) fn peek_output(&self) -> Vec<u8> {
        self.lock().output.as_slices().0.iter().take(OUTPUT_CHUNK).copied().collect()
    }

    /// Removes `count` bytes of output, which were written.
    pub(super) fn remove_output(&self, count: usize) {
        self.lock().output.drain(..count);
    }

    /// From now on, the next byte of output wakes the thread (`true`), or none does.
    pub(super) fn notify_on_output(&self, notify: bool) {
        self.notified.store(!notify, Ordering::Release);
    }

    /// Wakes the threads that wait in [`Console::drain`].
    pub(super) fn notify_drained(&self) {
        self.drained.notify_all();
    }

    /// Drops the output in the buffer and all output to come.
    pub(super) fn close_output(&self) {
        let mut state = self.lock();
        state.open = false;
        state.output = VecDeque::new();
        drop(state);
        self.drained.notify_all();
    }

    /// Asks the thread to end.
    pub(super) fn request_end(&self) {
        self.lock().end = true;
        self.wake.signal();
    }

    /// Whether the thread is to end.
    pub(super) fn should_end(&self) -> bool {
        self.lock().end
    }

    /// Whether output has a destination.
    #[cfg(test)]
    pub(super) fn is_open(&self) -> bool {
        self.lock().open
    }
}

/// Writes to a [`Console`], for the registers of the serial port. Never waits.
pub(crate) struct ConsoleWriter(pub(crate) Arc<Console>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.push(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}
