//! The thread that connects the serial port to a terminal, pipe or file on the host.
//!
//! # Errors
//!
//! A destination that fails is closed with a line in the log. Input that ends or fails is closed.
//! The guest notices neither.

use std::io;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use rustix::event::{PollFd, PollFlags, poll};
use virtio::rate_limiter::RateLimiterConfig;

use super::console::Console;
use super::output::Output;
use super::serial::SerialPort;
use crate::stats::SerialStats;

/// The most bytes of input that are read at once; a 16550 holds 64.
const INPUT_MAX: usize = 64;

/// The host side of the serial port.
#[derive(Debug)]
pub struct SerialSetup {
    /// Where output goes; `None` drops it.
    pub output: Option<Output>,
    /// Where input comes from; `None` for no input.
    pub input: Option<SerialInput>,
    /// How many bytes the guest may write; bytes above that are dropped.
    pub limit: RateLimiterConfig,
}

/// A source of input: anything that can be read and polled.
pub type SerialInput = OwnedFd;

/// The owner's handle of the console thread. Dropping it ends the thread.
#[derive(Debug)]
pub(crate) struct ConsoleThread {
    console: Arc<Console>,
    thread: Option<JoinHandle<()>>,
}

impl ConsoleThread {
    /// Creates a console as `setup` says, lets `port` create the serial port on it, and starts the
    /// thread, whose name is `serial`.
    pub(crate) fn start(
        setup: SerialSetup,
        port: impl FnOnce(Arc<Console>) -> io::Result<SerialPort>,
    ) -> io::Result<(Self, Arc<SerialPort>)> {
        let console = Arc::new(Console::new(setup.output.is_some(), setup.limit)?);
        let port = Arc::new(port(console.clone())?);
        let worker =
            Worker { console: console.clone(), port: port.clone(), output: setup.output, input: setup.input };
        let thread = sync::thread::spawn("serial", None, move || worker.run())?;
        Ok((ConsoleThread { console, thread: Some(thread) }, port))
    }

    /// The counters of the serial port.
    pub(crate) fn stats(&self) -> Arc<SerialStats> {
        Arc::clone(&self.console.stats)
    }

    /// Waits until the output is written, at most `limit`. Returns whether it is.
    pub(crate) fn drain(&self, limit: Duration) -> bool {
        self.console.drain(limit)
    }
}

impl Drop for ConsoleThread {
    fn drop(&mut self) {
        self.console.request_end();
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "the console thread does not panic");
        }
    }
}

/// What the thread owns.
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
            if self.console.should_end() {
                return;
            }
            if ready.input {
                self.read_input();
            }
            blocked = self.write_output();
            let dropped = self.console.stats.dropped.get();
            if dropped != dropped_before && dropped_before == 0 {
                log::warn!("serial port: its output is not read: {dropped} bytes dropped so far");
            }
            dropped_before = dropped;
        }
    }

    /// Waits for output, for the guest to want input, for input if the guest can take it, and, if
    /// `blocked`, for the destination to take bytes again.
    fn wait(&mut self, blocked: bool) -> Ready {
        let wants_input = self.input.as_ref().filter(|_| self.port.input_space() > 0);
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
                log::error!("serial port: cannot wait for input and output: {e}; both are closed");
                (self.input, self.output) = (None, None);
                return Ready::default();
            }
        }
        let input = wants_input.is_some() && fds.last().is_some_and(|fd| !fd.revents().is_empty());
        // Reset, so that they can become readable again. The loop looks for work in any case.
        let _ = rustix::io::read(&self.console.timer, &mut [0; 8]);
        self.console.wake.take();
        Ready { input }
    }

    /// Reads as much input as the serial port can take.
    fn read_input(&mut self) {
        let Some(input) = &self.input else { return };
        let mut bytes = [0; INPUT_MAX];
        let space = self.port.input_space().min(INPUT_MAX);
        match rustix::io::read(input, &mut bytes[..space]) {
            Ok(0) => self.input = None,
            Ok(n) => {
                self.port.input(&bytes[..n]);
            }
            Err(rustix::io::Errno::INTR | rustix::io::Errno::AGAIN) => {}
            Err(e) => {
                log::warn!("serial port: cannot read input: {e}; it is closed");
                self.input = None;
            }
        }
    }

    /// Writes the output in the buffer. Returns whether some of it has to wait for the destination.
    fn write_output(&mut self) -> bool {
        let Some(output) = &self.output else { return false };
        // Before the buffer is read: a byte that arrives during a write wakes the thread again.
        self.console.notify_on_output(true);
        loop {
            let chunk = self.console.peek_output();
            if chunk.is_empty() {
                self.console.notify_drained();
                return false;
            }
            match output.write(&chunk) {
                Ok(n) => self.console.remove_output(n),
                Err(e) if e.kind() == io::ErrorKind::Interrupted => {}
                Err(e) if e.kind() == io::ErrorKind::WouldBlock => {
                    self.console.notify_on_output(false);
                    return true;
                }
                Err(e) => {
                    log::warn!("serial port: cannot write output: {e}; it is closed");
                    self.console.close_output();
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

#[cfg(test)]
mod tests {
    use super::*;
    use crate::bus::BusDevice;
    use std::io::{Read, Write};
    use std::os::unix::net::UnixStream;
    use std::time::Instant;
    use sync::EventFd;
    use virtio::rate_limiter::BucketConfig;

    const DATA: u64 = 0;
    const LINE_STATUS: u64 = 5;

    fn start_on(output: Option<Output>, input: Option<OwnedFd>) -> (ConsoleThread, Arc<SerialPort>) {
        start_limited(output, input, RateLimiterConfig::default())
    }

    fn start_limited(
        output: Option<Output>,
        input: Option<OwnedFd>,
        limit: RateLimiterConfig,
    ) -> (ConsoleThread, Arc<SerialPort>) {
        let interrupt = EventFd::new().unwrap();
        let setup = SerialSetup { output, input, limit };
        ConsoleThread::start(setup, |console| Ok(SerialPort::new(interrupt, console))).unwrap()
    }

    fn file_output() -> (tempfile::TempDir, std::path::PathBuf, Output) {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("serial");
        let output = Output::open(&path).unwrap();
        (dir, path, output)
    }

    #[test]
    fn output_is_written_in_order_and_complete() {
        let (_dir, path, output) = file_output();
        let (thread, port) = start_on(Some(output), None);
        let text: Vec<u8> = (0..50_000u32).map(|i| b'a' + (i % 26) as u8).collect();
        for byte in &text {
            port.write(DATA, &[*byte]);
        }
        assert!(thread.drain(Duration::from_secs(10)));
        assert_eq!(std::fs::read(path).unwrap(), text);
    }

    #[test]
    fn output_to_a_full_pipe_is_dropped_without_waiting() {
        let (reader, writer) = io::pipe().unwrap();
        let fd: OwnedFd = writer.into();
        let path = format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&fd));
        let (thread, port) = start_on(Some(Output::open(path.as_ref()).unwrap()), None);
        for _ in 0..300_000 {
            port.write(DATA, b"x");
        }
        assert!(!thread.drain(Duration::ZERO));
        assert!(thread.console.stats.dropped.get() > 0);
        drop(reader);
    }

    #[test]
    fn output_above_the_rate_limit_is_dropped() {
        let (_dir, path, output) = file_output();
        let bucket = BucketConfig { size: 100, refill_time_ms: 3_600_000, one_time_burst: 20 };
        let limit = RateLimiterConfig { bandwidth: Some(bucket), ops: None };
        let (thread, port) = start_limited(Some(output), None, limit);
        for _ in 0..1000 {
            port.write(DATA, b"x");
        }
        assert!(thread.drain(Duration::from_secs(10)));
        assert_eq!(std::fs::read(path).unwrap(), [b'x'; 120]);
        assert_eq!(thread.console.stats.limited.get(), 880);
    }

    #[test]
    fn failed_destination_is_closed() {
        let (thread, port) = start_on(Some(Output::open("/dev/full".as_ref()).unwrap()), None);
        port.write(DATA, b"x");
        assert!(thread.drain(Duration::from_secs(10)));
        assert!(!thread.console.is_open());
    }

    #[test]
    fn input_waits_until_the_guest_reads_it() {
        let (mut user, input) = UnixStream::pair().unwrap();
        let text: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
        user.write_all(&text).unwrap();
        let (_thread, port) = start_on(None, Some(input.into()));
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
