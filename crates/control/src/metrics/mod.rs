//! [`Metrics`]: counters for operators, as lines in a file and as Prometheus text.
//!
//! ```text
//!  counters of devices, vCPUs, API, process, operations      each owned by its part
//!       |  sources          reads them into a Report; device_groups, requests, operations, process
//!       v                   say which has which name
//!    report ---- deltas --> line --> sink        lines: what changed since the last line
//!       |
//!       '------- prometheus                      GET /metrics: totals
//! ```
//!
//! A line is written when the guest starts, every [`INTERVAL`] from then on, at `FlushMetrics`, at
//! the end of the process, and by a thread that panics. Between these nothing is collected and no
//! thread runs: the main thread's loops wait no longer than [`Metrics::tick`] says.
//!
//! # Invariants
//!
//! - Nothing waits for a reader. A line that the destination does not take is lost and counted, and
//!   what it had is in the next one.
//! - A line in the destination is whole before another one begins ([`sink`]).
//! - Reading Prometheus text changes no line.
//! - Counters of a part are read without a lock. The lock here is held for one line by the main
//!   thread or by a thread that panics, which tries it once.
//!
//! # Errors
//!
//! [`MetricsError`]. A line that is lost is an error only of the command that asked for it.
//!
//! # Callers
//!
//! The controller configures the output and flushes it. The loops of the main thread call
//! [`Metrics::tick`]. The process keeps a [`LastLine`] for its end by a panic or a fatal signal.

mod deltas;
mod device_groups;
mod line;
mod operations;
mod process;
mod prometheus;
mod report;
mod requests;
mod sink;
mod sources;

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use machine::MachineStats;
use machine::legacy::Output;
use sync::locked;

use deltas::Deltas;
use line::LineHead;
pub(crate) use operations::{Operation, OperationStats};
pub use process::{ProcessCounts, SignalCounts};
pub(crate) use prometheus::CONTENT_TYPE;
pub(crate) use report::{Group, Of, Value};
pub(crate) use requests::{ApiStats, CountedRequest};
pub use sources::StartupTimes;

use report::Report;
use sink::{LineError, Sink};
use sources::{LineCounts, Sources};

/// How often a line is written.
pub(crate) const INTERVAL: Duration = Duration::from_mins(1);

/// How long the rest of a line that was written in part waits until it is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// Why metrics cannot be configured, or a line was not written.
#[derive(Debug, thiserror::Error)]
pub enum MetricsError {
    /// The output is set already.
    #[error("metrics: the output is {} already; it can be set once", path.display())]
    AlreadySet {
        /// The output.
        path: PathBuf,
    },
    /// The output cannot be opened.
    #[error("metrics: cannot open the output {}: {source}", path.display())]
    Open {
        /// The output.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The line that a command asked for is lost. The next one has its counters.
    #[error("metrics: the line was not written to {}: {reason}", path.display())]
    Lost {
        /// The output.
        path: PathBuf,
        /// Why.
        reason: String,
    },
}

/// The metrics of a microVM. Clones are handles of the same.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    recorder: Arc<Mutex<Recorder>>,
    operations: Arc<OperationStats>,
}

#[derive(Debug)]
struct Recorder {
    sources: Sources,
    /// `None` until the output is configured.
    writer: Option<Writer>,
}

/// Writes lines.
#[derive(Debug)]
struct Writer {
    config: config::Metrics,
    head: LineHead,
    sink: Sink,
    deltas: Deltas,
    lost: LineCounts,
    /// When the next line is due; `None` before the guest starts.
    due: Option<Instant>,
}

impl Metrics {
    /// Metrics without an output.
    pub(crate) fn new() -> Self {
        let operations = Arc::<OperationStats>::default();
        let sources = Sources {
            api: None,
            operations: Arc::clone(&operations),
            process: ProcessCounts::default,
            machine: None,
            startup: StartupTimes::default(),
        };
        Metrics { recorder: Arc::new(Mutex::new(Recorder { sources, writer: None })), operations }
    }

    /// The counters of the main thread.
    pub(crate) fn operations(&self) -> &OperationStats {
        &self.operations
    }

    /// Sets what counts API requests.
    pub(crate) fn set_api(&self, api: Option<Arc<ApiStats>>) {
        self.lock().sources.api = api;
    }

    /// Sets what reads the counters of the process. A panicking thread may call it.
    pub(crate) fn set_process(&self, process: fn() -> ProcessCounts) {
        self.lock().sources.process = process;
    }

    /// Sets the time that the process took to start.
    pub(crate) fn set_startup(&self, startup: StartupTimes) {
        self.lock().sources.startup = startup;
    }

    /// Opens the output, for the microVM `id`. Possible once. Returns what the process keeps for
    /// its end.
    pub(crate) fn configure(&self, config: &config::Metrics, id: &str) -> Result<LastLine, MetricsError> {
        let mut recorder = self.lock();
        if let Some(writer) = &recorder.writer {
            return Err(MetricsError::AlreadySet { path: writer.config.metrics_path.clone() });
        }
        let path = &config.metrics_path;
        let failed = |source| MetricsError::Open { path: path.clone(), source };
        let sink = Sink::new(Output::open(path).map_err(failed)?);
        let head = LineHead::new(config.emit_id.then_some(id), &config.properties);
        let last = LastLine::new(self, &sink, &head).map_err(failed)?;
        let due = recorder.sources.machine.is_some().then(|| Instant::now() + INTERVAL);
        let (deltas, lost) = (Deltas::default(), LineCounts::default());
        recorder.writer = Some(Writer { config: config.clone(), head, sink, deltas, lost, due });
        Ok(last)
    }

    /// The configuration, once it is set.
    pub(crate) fn config(&self) -> Option<config::Metrics> {
        self.lock().writer.as_ref().map(|writer| writer.config.clone())
    }

    /// Notes that a guest starts on a machine with these counters, and writes the first line.
    pub(crate) fn guest_starts(&self, machine: MachineStats) {
        let mut recorder = self.lock();
        recorder.sources.machine = Some(machine);
        recorder.write_and_schedule();
    }

    /// Counts an update of a drive that failed.
    pub(crate) fn count_failed_update(&self, drive_id: &str) {
        let recorder = self.lock();
        let drives = recorder.sources.machine.iter().flat_map(|machine| &machine.devices.drives);
        drives.filter(|drive| drive.id == drive_id).for_each(|drive| drive.stats.update_fails.add(1));
    }

    /// Writes a line now, if there is an output.
    pub(crate) fn flush(&self) -> Result<(), MetricsError> {
        let mut recorder = self.lock();
        recorder.write().inspect_err(|error| recorder.log_lost(error))
    }

    /// Writes what is due. Returns how long to wait until the next call; `None` for any time.
    pub(crate) fn tick(&self) -> Option<Duration> {
        let mut recorder = self.lock();
        let now = Instant::now();
        let writer = recorder.writer.as_mut()?;
        if writer.due.is_some_and(|due| due <= now) {
            recorder.write_and_schedule();
        } else if writer.sink.has_rest() {
            // If some of it is still left, the next call tries again.
            let _ = writer.sink.write_rest();
        }
        let writer = recorder.writer.as_ref()?;
        let until_due = writer.due.map(|due| due.saturating_duration_since(now));
        let retry = writer.sink.has_rest().then_some(RETRY_INTERVAL);
        until_due.into_iter().chain(retry).min()
    }

    /// The totals of all counters as Prometheus text, with `own` groups besides those known here.
    pub(crate) fn prometheus(&self, info: &[(&str, &str)], own: Vec<Group>) -> String {
        let recorder = self.lock();
        let mut groups = recorder.sources.own_groups();
        groups.extend(own);
        prometheus::render(info, &[&recorder.report(), &Report { groups }])
    }

    fn lock(&self) -> MutexGuard<'_, Recorder> {
        // Each change is whole at every step.
        locked(&self.recorder)
    }
}

impl Recorder {
    fn report(&self) -> Report {
        let lost = self.writer.as_ref().map(|writer| writer.lost).unwrap_or_default();
        self.sources.report(lost)
    }

    /// Writes a line, and plans the next one.
    fn write_and_schedule(&mut self) {
        if let Err(error) = self.write() {
            self.log_lost(&error);
        }
        if let Some(writer) = &mut self.writer {
            writer.due = Some(Instant::now() + INTERVAL);
        }
    }

    /// Logs that a line was lost, but not for each: a reader that is gone may stay away for days.
    fn log_lost(&self, error: &MetricsError) {
        let lost = self.writer.as_ref().map_or(0, |writer| writer.lost.missed);
        if lost.is_power_of_two() {
            log::warn!("{error} (lines lost so far: {lost})");
        }
    }

    /// Writes a line, if there is an output. Does not log, because a thread that panics may hold
    /// the log.
    fn write(&mut self) -> Result<(), MetricsError> {
        if self.writer.is_none() {
            return Ok(());
        }
        let report = self.report();
        let Some(writer) = &mut self.writer else { return Ok(()) };
        let line = line::render(utc_ms(), &writer.head, &writer.deltas.next(&report));
        match writer.sink.write(line.as_bytes()) {
            Ok(()) => {
                writer.deltas.commit(&report);
                Ok(())
            }
            Err(error) => Err(writer.count_lost(&error)),
        }
    }
}

impl Writer {
    fn count_lost(&mut self, error: &LineError) -> MetricsError {
        self.lost.missed += 1;
        self.lost.failed += u64::from(matches!(error, LineError::Write(_)));
        MetricsError::Lost { path: self.config.metrics_path.clone(), reason: error.to_string() }
    }
}

/// The time in milliseconds since 1970.
fn utc_ms() -> u64 {
    let since = SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default();
    u64::try_from(since.as_millis()).unwrap_or(u64::MAX)
}

/// Writes the last line of a process that a panic or a fatal signal ends.
#[derive(Debug)]
pub struct LastLine {
    metrics: Metrics,
    output: Output,
    mid_line: Arc<AtomicBool>,
    /// The line, for which there is memory already.
    buffer: Vec<u8>,
    head: LineHead,
}

/// Memory for what a caller of [`LastLine::write_short`] adds to the head.
const SHORT_LINE: usize = 512;

impl LastLine {
    fn new(metrics: &Metrics, sink: &Sink, head: &LineHead) -> std::io::Result<Self> {
        let buffer = Vec::with_capacity(head.as_bytes().len() + SHORT_LINE);
        let head = head.clone();
        Ok(LastLine {
            metrics: metrics.clone(),
            output: sink.output()?,
            mid_line: sink.mid_line(),
            buffer,
            head,
        })
    }

    /// Writes a line with all counters, unless another thread is writing one. Returns whether it
    /// was written. Not for a signal handler.
    pub fn write(&self) -> bool {
        let mut recorder = match self.metrics.recorder.try_lock() {
            Ok(recorder) => recorder,
            Err(TryLockError::Poisoned(poisoned)) => poisoned.into_inner(),
            Err(TryLockError::WouldBlock) => return false,
        };
        recorder.write().is_ok()
    }

    /// Writes a line of this time and these groups, which are JSON members without a comma at the
    /// end, at most 400 bytes. A signal handler may call it: it allocates nothing and takes no
    /// lock. A longer line, or one that the destination does not take, is lost.
    pub fn write_short(&mut self, time: &[u8], groups: &[u8]) {
        let LastLine { output, mid_line, buffer, head, .. } = self;
        buffer.clear();
        // A line that was written in part stays so, and is one bad line of its own.
        let end: &[u8] = if mid_line.load(Ordering::Acquire) { b"\n" } else { b"" };
        let parts = [end, b"{\"utc_timestamp_ms\":", time, b",", head.as_bytes(), groups, b"}\n"];
        if parts.iter().map(|part| part.len()).sum::<usize>() > buffer.capacity() {
            return;
        }
        for part in parts {
            buffer.extend_from_slice(part);
        }
        let _ = output.write(buffer);
    }
}

#[cfg(test)]
mod tests;
