//! [`Metrics`]: counters for operators, as lines in a file and as Prometheus text.
//!
//! ```text
//!  counters of devices, vCPUs, API, process, operations      each owned by its part
//!       |  sources          reads them into a Report; device_groups, requests, operations, process
//!       v                   say which has which name
//!    report ---- deltas --> line --> sink        lines, by the recorder: what changed since the last
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
mod error;
mod last_line;
mod line;
mod operations;
mod process;
mod prometheus;
mod recorder;
mod report;
mod requests;
mod sink;
mod sources;

use std::sync::{Arc, Mutex, MutexGuard};
use std::time::{Duration, Instant};

use machine::MachineStats;
use machine::legacy::Output;
use sync::locked;

pub use error::MetricsError;
pub use last_line::LastLine;
pub(crate) use operations::{Operation, OperationStats};
pub use process::{ProcessCounts, SignalCounts};
pub(crate) use prometheus::CONTENT_TYPE;
pub(crate) use report::{Group, Of, Value};
pub(crate) use requests::{ApiStats, CountedRequest};
pub use sources::StartupTimes;

use line::LineHead;
use recorder::{INTERVAL, Recorder, Writer};
use report::Report;
use sink::Sink;
use sources::Sources;

/// The metrics of a microVM. Clones are handles of the same.
#[derive(Debug, Clone)]
pub(crate) struct Metrics {
    recorder: Arc<Mutex<Recorder>>,
    operations: Arc<OperationStats>,
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
        let last = LastLine::new(&self.recorder, &sink, &head).map_err(failed)?;
        let due = recorder.sources.machine.is_some().then(|| Instant::now() + INTERVAL);
        recorder.writer = Some(Writer::new(config.clone(), head, sink, due));
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
        self.lock().tick(Instant::now())
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

#[cfg(test)]
mod tests;
