//! [`Recorder`]: writes lines of what its sources have counted.

use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use super::deltas::Deltas;
use super::error::MetricsError;
use super::line::{self, LineHead};
use super::report::Report;
use super::sink::{LineError, Sink};
use super::sources::{LineCounts, Sources};

/// How often a line is written.
pub(crate) const INTERVAL: Duration = Duration::from_mins(1);

/// How long the rest of a line that was written in part waits until it is tried again.
const RETRY_INTERVAL: Duration = Duration::from_secs(1);

/// The sources of a microVM's counters, and what writes lines of them.
#[derive(Debug)]
pub(super) struct Recorder {
    pub(super) sources: Sources,
    /// `None` until the output is configured.
    pub(super) writer: Option<Writer>,
}

/// Writes lines.
#[derive(Debug)]
pub(super) struct Writer {
    pub(super) config: config::Metrics,
    head: LineHead,
    pub(super) sink: Sink,
    deltas: Deltas,
    lost: LineCounts,
    /// When the next line is due; `None` before the guest starts.
    pub(super) due: Option<Instant>,
}

impl Recorder {
    /// Writes what is due at the time `now`. Returns how long to wait until the next call; `None`
    /// for any time.
    pub(super) fn tick(&mut self, now: Instant) -> Option<Duration> {
        let writer = self.writer.as_mut()?;
        if writer.due.is_some_and(|due| due <= now) {
            self.write_and_schedule();
        } else if writer.sink.has_rest() {
            // If some of it is still left, the next call tries again.
            let _ = writer.sink.write_rest();
        }
        let writer = self.writer.as_ref()?;
        let until_due = writer.due.map(|due| due.saturating_duration_since(now));
        let retry = writer.sink.has_rest().then_some(RETRY_INTERVAL);
        until_due.into_iter().chain(retry).min()
    }

    /// The counters now.
    pub(super) fn report(&self) -> Report {
        let lost = self.writer.as_ref().map(|writer| writer.lost).unwrap_or_default();
        self.sources.report(lost)
    }

    /// Writes a line, and plans the next one.
    pub(super) fn write_and_schedule(&mut self) {
        if let Err(error) = self.write() {
            self.log_lost(&error);
        }
        if let Some(writer) = &mut self.writer {
            writer.due = Some(Instant::now() + INTERVAL);
        }
    }

    /// Logs that a line was lost, but not for each: a reader that is gone may stay away for days.
    pub(super) fn log_lost(&self, error: &MetricsError) {
        let lost = self.writer.as_ref().map_or(0, |writer| writer.lost.missed);
        if lost.is_power_of_two() {
            log::warn!("{error} (lines lost so far: {lost})");
        }
    }

    /// Writes a line, if there is an output. Does not log, because a thread that panics may hold
    /// the log.
    pub(super) fn write(&mut self) -> Result<(), MetricsError> {
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
    /// The first line is due at `due`, if the guest has started.
    pub(super) fn new(config: config::Metrics, head: LineHead, sink: Sink, due: Option<Instant>) -> Self {
        Writer { config, head, sink, deltas: Deltas::default(), lost: LineCounts::default(), due }
    }

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
