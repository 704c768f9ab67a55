//! The host's side of the serial port: a pump between the guest's registers and a terminal, pipe or file.
//!
//! # Invariant
//!
//! A vCPU never waits for the host's side. What the guest writes goes into a bounded buffer; a thread of its own carries it
//! out, and when nobody takes it the newest bytes are dropped and counted. The thread is woken a millisecond after the first byte
//! (a real port would have sent eleven), so that a line costs one write and not eighty.
//!
//! # Errors
//!
//! A destination that fails is given up with one line in the log, an input that ends is closed. The guest notices neither.

use std::collections::VecDeque;
use std::io::{self, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::time::{
    Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime,
};

use virtio::rate_limiter::{RateLimiter, RateLimiterConfig};
use virtio::worker::monotonic;

use super::{Output, SerialPort};

/// Bytes of output that are held while nobody takes them.
const OUTPUT_MAX: usize = 64 * 1024;
/// So many bytes are carried out at once without waiting for more.
const OUTPUT_MANY: usize = 4096;
/// How long the first byte waits for others.
const GATHER: Duration = Duration::from_millis(1);
/// Most bytes of input that are read at once; a 16550 holds 64.
const INPUT_MAX: usize = 64;

/// Where the serial port leads.
#[derive(Debug)]
pub struct SerialSetup {
    /// Where its output goes; `None` for nowhere.
    pub output: Option<Output>,
    /// Where its input comes from; `None` for none.
    pub input: Option<SerialInput>,
    /// How many bytes may be written; what is above is dropped.
    pub limit: RateLimiterConfig,
}

/// Where input comes from: anything that can be read and polled.
pub type SerialInput = OwnedFd;

/// What the guest's side and the pump share.
#[derive(Debug)]
pub(crate) struct Console {
    state: Mutex<State>,
    /// Signalled when all output has been carried out.
    drained: Condvar,
    /// Whether the pump has been told that there is output.
    told: AtomicBool,
    /// Bytes that were dropped because nobody took them.
    dropped: AtomicU64,
    /// Bytes that were dropped because they were more than the limit.
    limited: AtomicU64,
    /// Tells the pump that there is output, soon or at once.
    timer: OwnedFd,
    /// Tells the pump that the guest wants input, or that it should end.
    wake: OwnedFd,
}

#[derive(Debug, Default)]
struct State {
    /// What the guest wrote and nobody has taken yet.
    output: VecDeque<u8>,
    /// Whether there is a destination.
    open: bool,
    /// Whether the pump is to end.
    end: bool,
    /// How much the guest may write.
    limiter: RateLimiter,
}

impl Console {
    /// Called when the guest has read all its input.
    pub(crate) fn guest_wants_input(&self) {
        signal(&self.wake);
    }

    /// Waits until the output is out, or `limit` has passed. Says whether it is out.
    pub(crate) fn drain(&self, limit: Duration) -> bool {
        self.tell(Duration::ZERO);
        let deadline = Instant::now() + limit;
        let mut state = self.lock();
        while state.open && !state.output.is_empty() {
            let left = deadline.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return false;
            }
            state = self.drained.wait_timeout(state, left).expect("no holder of this lock panics").0;
        }
        true
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().expect("no holder of this lock panics")
    }

    /// Wakes the pump in `delay`.
    fn tell(&self, delay: Duration) {
        // A timer of zero would be a timer switched off.
        let delay = delay.max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: 0, tv_nsec: delay.subsec_nanos().into() };
        let once = Itimerspec { it_interval: Timespec { tv_sec: 0, tv_nsec: 0 }, it_value: value };
        let set = timerfd_settime(&self.timer, TimerfdTimerFlags::empty(), &once);
        debug_assert!(set.is_ok(), "a timer takes any time below a second: {set:?}");
    }

    /// Takes what the guest sends; keeps as many bytes as there is room for.
    fn take(&self, bytes: &[u8]) {
        let mut state = self.lock();
        if !state.open {
            return;
        }
        if !state.limiter.is_unlimited() && !state.limiter.try_take(bytes.len() as u64, monotonic()) {
            drop(state);
            self.limited.fetch_add(bytes.len() as u64, Ordering::Relaxed);
            return;
        }
        let kept = bytes.len().min(OUTPUT_MAX - state.output.len());
        let before = state.output.len();
        state.output.extend(&bytes[..kept]);
        let many = before < OUTPUT_MANY && state.output.len() >= OUTPUT_MANY;
        drop(state);
        self.dropped.fetch_add((bytes.len() - kept) as u64, Ordering::Relaxed);
        if !self.told.swap(true, Ordering::AcqRel) {
            self.tell(GATHER);
        } else if many {
            self.tell(Duration::ZERO);
        }
    }
}

/// The end that the serial port writes to.
pub(crate) struct ConsoleWriter(pub(crate) Arc<Console>);

impl Write for ConsoleWriter {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.take(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// The pump's owner: ends it when dropped.
#[derive(Debug)]
pub(crate) struct Pump {
    console: Arc<Console>,
    thread: Option<JoinHandle<()>>,
}

/// A console that leads where `setup` says, and the serial port before it. The pump runs until the returned owner is dropped.
pub(crate) fn start(
    setup: SerialSetup,
    port: impl FnOnce(Arc<Console>) -> io::Result<SerialPort>,
) -> io::Result<(Pump, Arc<SerialPort>)> {
    let console = Arc::new(Console {
        state: Mutex::new(State {
            open: setup.output.is_some(),
            limiter: RateLimiter::new(setup.limit, monotonic()),
            ..State::default()
        }),
        drained: Condvar::new(),
        told: AtomicBool::new(false),
        dropped: AtomicU64::new(0),
        limited: AtomicU64::new(0),
        timer: timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::CLOEXEC | TimerfdFlags::NONBLOCK)?,
        wake: eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?,
    });
    let port = Arc::new(port(console.clone())?);
    let worker =
        Worker { console: console.clone(), port: port.clone(), output: setup.output, input: setup.input };
    let thread = std::thread::Builder::new().name("serial".to_owned()).spawn(move || worker.run())?;
    Ok((Pump { console, thread: Some(thread) }, port))
}

impl Pump {
    /// See [`Console::drain`].
    pub(crate) fn drain(&self, limit: Duration) -> bool {
        self.console.drain(limit)
    }
}

impl Drop for Pump {
    fn drop(&mut self) {
        self.console.lock().end = true;
        signal(&self.console.wake);
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "the pump does not panic");
        }
    }
}

/// What the pump's thread owns.
struct Worker {
    console: Arc<Console>,
    port: Arc<SerialPort>,
    output: Option<Output>,
    input: Option<SerialInput>,
}

impl Worker {
    fn run(mut self) {
        let mut blocked = false;
        let mut dropped_before = 0;
        loop {
            let ready = self.wait(blocked);
            if self.console.lock().end {
                return;
            }
            if ready.input {
                self.take_input();
            }
            blocked = self.carry_out();
            let dropped = self.console.dropped.load(Ordering::Relaxed);
            if dropped != dropped_before && dropped_before == 0 {
                log::warn!("nobody takes the serial port's output: {dropped} bytes dropped so far");
            }
            dropped_before = dropped;
        }
    }

    /// Waits for something to do: output, the guest wanting input, input where the guest has room, or a destination that
    /// takes bytes again.
    fn wait(&mut self, blocked: bool) -> Ready {
        let wants_input = self.input.as_ref().filter(|_| self.port.input_room() > 0);
        let wants_output = self.output.as_ref().filter(|_| blocked);
        let mut fds = vec![
            PollFd::new(&self.console.timer, PollFlags::IN),
            PollFd::new(&self.console.wake, PollFlags::IN),
        ];
        fds.extend(wants_output.map(|output| PollFd::from_borrowed_fd(output.as_fd(), PollFlags::OUT)));
        if let Some(input) = wants_input {
            fds.push(PollFd::new(input, PollFlags::IN));
        }
        match poll(&mut fds, None) {
            Ok(_) => {}
            Err(rustix::io::Errno::INTR) => return Ready::default(),
            Err(e) => {
                log::error!("cannot wait for the serial port's input and output: {e}; it is cut off");
                (self.input, self.output) = (None, None);
                return Ready::default();
            }
        }
        let input = wants_input.is_some() && fds.last().is_some_and(|fd| !fd.revents().is_empty());
        // Emptied so that they can become readable again; what they told is looked for anyway.
        let _ = rustix::io::read(&self.console.timer, &mut [0; 8]);
        let _ = rustix::io::read(&self.console.wake, &mut [0; 8]);
        Ready { input }
    }

    fn take_input(&mut self) {
        let Some(input) = &self.input else { return };
        let mut bytes = [0; INPUT_MAX];
        let room = self.port.input_room().min(INPUT_MAX);
        match rustix::io::read(input, &mut bytes[..room]) {
            Ok(0) => self.input = None,
            Ok(n) => {
                self.port.input(&bytes[..n]);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(e) => {
                log::warn!("the serial port's input failed ({e}); it is closed");
                self.input = None;
            }
        }
    }

    /// Writes what there is. Says whether some of it has to wait.
    fn carry_out(&mut self) -> bool {
        let Some(output) = &self.output else { return false };
        // Told again from here on: a byte that comes while this writes is not missed.
        self.console.told.store(false, Ordering::Release);
        loop {
            let chunk = {
                let state = self.console.lock();
                state.output.as_slices().0.iter().take(OUTPUT_MANY).copied().collect::<Vec<_>>()
            };
            if chunk.is_empty() {
                self.console.drained.notify_all();
                return false;
            }
            match output.write(&chunk) {
                Ok(n) => drop(self.console.lock().output.drain(..n)),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.console.told.store(true, Ordering::Release);
                    return true;
                }
                Err(e) => {
                    log::warn!("the serial port's output failed ({e}); it is closed");
                    let mut state = self.console.lock();
                    state.open = false;
                    state.output = VecDeque::new();
                    drop(state);
                    self.console.drained.notify_all();
                    self.output = None;
                    return false;
                }
            }
        }
    }
}

/// What [`Worker::wait`] found.
#[derive(Debug, Default)]
struct Ready {
    input: bool,
}

fn signal(eventfd: &OwnedFd) {
    // Its counter can only be full when it is readable anyway.
    let _ = rustix::io::write(eventfd, &1u64.to_ne_bytes());
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice;
    use std::io::Read;
    use std::os::unix::net::UnixStream;
    use sync::EventFd;
    use virtio::rate_limiter::BucketConfig;

    const DATA: u64 = 0;
    const LINE_STATUS: u64 = 5;

    fn start_on(output: Option<Output>, input: Option<OwnedFd>) -> (Pump, Arc<SerialPort>) {
        start_limited(output, input, RateLimiterConfig::default())
    }

    fn start_limited(
        output: Option<Output>,
        input: Option<OwnedFd>,
        limit: RateLimiterConfig,
    ) -> (Pump, Arc<SerialPort>) {
        let interrupt = EventFd::new().unwrap();
        start(SerialSetup { output, input, limit }, |console| Ok(SerialPort::new(interrupt, console)))
            .unwrap()
    }

    fn file_output() -> (tempfile::TempDir, std::path::PathBuf, Output) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let output = Output::open(&path).unwrap();
        (dir, path, output)
    }

    #[test]
    fn output_arrives_in_order_and_whole() {
        let (_dir, path, output) = file_output();
        let (pump, port) = start_on(Some(output), None);
        let text: Vec<u8> = (0..50_000u32).map(|i| b'a' + (i % 26) as u8).collect();
        for byte in &text {
            port.write(DATA, &[*byte]);
        }
        assert!(pump.drain(Duration::from_secs(10)));
        assert_eq!(std::fs::read(path).unwrap(), text);
    }

    #[test]
    fn output_that_nobody_takes_is_dropped_and_never_waited_for() {
        let (reader, writer) = io::pipe().unwrap();
        let fd: OwnedFd = writer.into();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let (pump, port) = start_on(Some(Output::open(path.as_ref()).unwrap()), None);
        for _ in 0..300_000 {
            port.write(DATA, b"x");
        }
        assert!(!pump.drain(Duration::ZERO));
        assert!(pump.console.dropped.load(Ordering::Relaxed) > 0);
        drop(reader);
    }

    #[test]
    fn what_is_above_the_limit_is_dropped() {
        let (_dir, path, output) = file_output();
        let bucket = BucketConfig { size: 100, refill_time_ms: 3_600_000, one_time_burst: 20 };
        let limit = RateLimiterConfig { bandwidth: Some(bucket), ops: None };
        let (pump, port) = start_limited(Some(output), None, limit);
        for _ in 0..1000 {
            port.write(DATA, b"x");
        }
        assert!(pump.drain(Duration::from_secs(10)));
        assert_eq!(std::fs::read(path).unwrap(), [b'x'; 120]);
        assert_eq!(pump.console.limited.load(Ordering::Relaxed), 880);
    }

    #[test]
    fn a_destination_that_fails_is_given_up() {
        let (pump, port) = start_on(Some(Output::open("/dev/full".as_ref()).unwrap()), None);
        port.write(DATA, b"x");
        assert!(pump.drain(Duration::from_secs(10)));
        assert!(!pump.console.lock().open);
    }

    #[test]
    fn more_input_than_the_port_holds_waits_for_the_guest() {
        let (mut user, input) = UnixStream::pair().unwrap();
        let text: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
        user.write_all(&text).unwrap();
        let (_pump, port) = start_on(None, Some(input.into()));
        let mut received = Vec::new();
        let deadline = Instant::now() + Duration::from_secs(10);
        while received.len() < text.len() && Instant::now() < deadline {
            let mut byte = [0];
            port.read(LINE_STATUS, &mut byte);
            if byte[0] & 1 == 0 {
                std::thread::yield_now();
                continue;
            }
            port.read(DATA, &mut byte);
            received.push(byte[0]);
        }
        assert_eq!(received, text);
        user.shutdown(std::net::Shutdown::Write).unwrap();
        assert_eq!(user.read(&mut [0; 8]).unwrap(), 0, "the input is closed after its end");
    }
}
