//! The monitor's log, in Firecracker's format:
//!
//! ```text
//! 2026-11-24T10:00:00.123456789 [id:thread:LEVEL:file:line] text
//! ```
//!
//! - [`line`]: one record as text, which is always one line of at most 4096 bytes.
//! - [`limiter`]: at most 10 lines in 5 s from one place in the source.
//! - [`sink`]: the destination.
//!
//! # Invariants
//!
//! - A line that the destination does not take is lost: a reader that stalls, a FIFO without a
//!   reader and a full disk never stall the monitor. Lost lines are counted, and the next line that
//!   is taken is preceded by their number.
//! - Everything is behind one lock, which no thread holds for longer than a write. A thread that
//!   crashes does not wait long for it: [`error_without_waiting`] and [`write_if_free`].
//!
//! # Targets
//!
//! Lines that clients of Firecracker match have its module paths as their targets: [`UNLIMITED`].
//! They are about the monitor and its API, and no guest causes them at will, so they are not
//! limited.

mod limiter;
mod line;
mod sink;
#[cfg(test)]
mod tests;

use std::io;
use std::os::fd::RawFd;
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant, SystemTime};

use config::LogLevel;
use log::{Level, LevelFilter, Log, Metadata, Record};
use machine::legacy::Output;
use sync::{Counter, locked};

use limiter::{Limiter, MOST, Place, Verdict, WINDOW};
use line::Prefix;
use sink::Sink;

/// How long a thread that panics tries to lock the log. Another thread may be writing to it, or the
/// thread may hold the lock itself.
const PANIC_LOCK_TIMEOUT: Duration = Duration::from_millis(200);

/// Targets whose lines are not limited, with those of their submodules.
const UNLIMITED: [&str; 2] = ["firecracker", "vmm"];

/// The one log of this process.
static LOG: LogState =
    LogState { settings: Mutex::new(None), lost: Counter::new(), suppressed: Counter::new() };

struct LogState {
    /// `None` until [`install`].
    settings: Mutex<Option<Settings>>,
    /// Lines that the destination did not take.
    lost: Counter,
    /// Lines over the limit of their place.
    suppressed: Counter,
}

struct Settings {
    id: String,
    sink: Sink,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
    limiter: Limiter,
    /// The line that is being written. Kept for its capacity.
    line: String,
}

/// Lines that are not in the log of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Missed {
    /// The destination did not take them.
    pub(crate) lost: u64,
    /// They were over the limit of their place in the source.
    pub(crate) suppressed: u64,
}

/// The numbers of lines that are not in the log.
pub(crate) fn missed() -> Missed {
    Missed { lost: LOG.lost.get(), suppressed: LOG.suppressed.get() }
}

/// Installs the log of this process, on standard output.
pub(crate) fn install(id: &str) {
    *LOG.lock() = Some(Settings {
        id: id.to_owned(),
        sink: Sink::standard(),
        show_level: false,
        show_origin: false,
        module: None,
        limiter: Limiter::default(),
        line: String::new(),
    });
    // It fails only if there is a logger already, as in a second call.
    let _ = log::set_logger(&LOG);
    log::set_max_level(LevelFilter::Info);
}

/// Configures the log. Absent fields stay as they are, except the level, which becomes Info.
pub(crate) fn set_up(logger: &config::Logger) -> io::Result<()> {
    let output = logger.log_path.as_deref().map(Output::open).transpose()?;
    let mut settings = LOG.lock();
    let Some(settings) = settings.as_mut() else { return Ok(()) };
    settings.show_level = logger.show_level.unwrap_or(settings.show_level);
    settings.show_origin = logger.show_log_origin.unwrap_or(settings.show_origin);
    if logger.module.is_some() {
        settings.module.clone_from(&logger.module);
    }
    if let Some(output) = output {
        settings.sink.redirect(output);
    }
    log::set_max_level(filter(logger.level.unwrap_or_default()));
    Ok(())
}

/// Writes what is left to say when the process ends: how many lines were suppressed.
pub(crate) fn finish() {
    let mut settings = LOG.lock();
    let Some(settings) = settings.as_mut() else { return };
    while let Some((place, count)) = settings.limiter.take_any() {
        LOG.write_summary(settings, place, count);
    }
}

/// Locks the log as long as the returned value lives, so that no other thread holds the lock at a
/// fork.
pub(crate) fn hold() -> impl Drop {
    struct Held(#[expect(dead_code, reason = "held, not read")] MutexGuard<'static, Option<Settings>>);
    impl Drop for Held {
        fn drop(&mut self) {}
    }
    Held(LOG.lock())
}

/// Writes an error as [`log::error!`] does, unless the log stays locked: the thread that panics may
/// hold it.
pub(crate) fn error_without_waiting(text: &str) {
    let deadline = Instant::now() + PANIC_LOCK_TIMEOUT;
    let mut settings = loop {
        match LOG.try_lock() {
            Some(settings) => break settings,
            None if Instant::now() > deadline => return,
            // Another thread that is writing a line ends soon.
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    if let Some(settings) = settings.as_mut()
        && log::max_level() >= LevelFilter::Error
    {
        LOG.write(settings, Place { file: file!(), line: line!(), level: Level::Error }, text);
    }
}

/// Writes these bytes unchanged, unless the log is locked. A signal handler may call it: it
/// allocates nothing, and tries the lock once.
pub(crate) fn write_if_free(line: &[u8]) {
    let wanted = log::max_level() >= LevelFilter::Error;
    // A line that is lost here is on standard error too.
    let written = match LOG.try_lock() {
        Some(settings) => settings.as_ref().is_none_or(|settings| !wanted || settings.sink.write_now(line)),
        None => !wanted,
    };
    if !written {
        LOG.lost.increment();
    }
}

/// For a forked process: the microVM's id that its lines have, if it is another one. What its
/// parent has not reported yet is the parent's.
pub(crate) fn start_fork(id: Option<&str>) {
    if let Some(settings) = LOG.lock().as_mut() {
        if let Some(id) = id {
            id.clone_into(&mut settings.id);
        }
        settings.limiter = Limiter::default();
        settings.sink.reported();
    }
}

/// The log's descriptors.
pub(crate) fn descriptors() -> Vec<RawFd> {
    LOG.lock().as_ref().and_then(|settings| settings.sink.descriptor()).into_iter().collect()
}

/// Whether lines go to standard output.
pub(crate) fn is_on_standard_output() -> bool {
    LOG.lock().as_ref().is_some_and(|settings| settings.sink.is_standard())
}

fn filter(level: LogLevel) -> LevelFilter {
    match level {
        LogLevel::Off => LevelFilter::Off,
        LogLevel::Trace => LevelFilter::Trace,
        LogLevel::Debug => LevelFilter::Debug,
        LogLevel::Info => LevelFilter::Info,
        LogLevel::Warning => LevelFilter::Warn,
        LogLevel::Error => LevelFilter::Error,
    }
}

/// Whether lines with this target are not limited.
fn is_unlimited(target: &str) -> bool {
    let is_below =
        |name| target.strip_prefix(name).is_some_and(|rest| rest.is_empty() || rest.starts_with("::"));
    UNLIMITED.into_iter().any(is_below)
}

impl Settings {
    /// Whether the module filter lets a record pass, by its target or by its module.
    fn wants(&self, record: &Record<'_>) -> bool {
        let Some(prefix) = &self.module else { return true };
        [Some(record.target()), record.module_path()]
            .into_iter()
            .flatten()
            .any(|path| path.starts_with(prefix))
    }
}

impl LogState {
    fn lock(&self) -> MutexGuard<'_, Option<Settings>> {
        // Each change of the settings is whole at every step.
        locked(&self.settings)
    }

    fn try_lock(&self) -> Option<MutexGuard<'_, Option<Settings>>> {
        match self.settings.try_lock() {
            Ok(settings) => Some(settings),
            Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
            Err(TryLockError::WouldBlock) => None,
        }
    }

    /// Decides whether a record is written. Writes what the limiter has to say.
    fn admits(&self, record: &Record<'_>) -> bool {
        let mut settings = self.lock();
        let Some(settings) = settings.as_mut().filter(|settings| settings.wants(record)) else {
            return false;
        };
        let now = Instant::now();
        while let Some((place, count)) = settings.limiter.take_due(now) {
            self.write_summary(settings, place, count);
        }
        if is_unlimited(record.target()) {
            return true;
        }
        let place = Place::of(record);
        let verdict = settings.limiter.admit(place, now);
        if verdict == Verdict::Notice {
            self.write(settings, place, "more lines like the last one from this place are suppressed");
        }
        if verdict != Verdict::Write {
            self.suppressed.increment();
        }
        verdict == Verdict::Write
    }

    fn write_summary(&self, settings: &mut Settings, place: Place, count: u64) {
        let Place { file, line, .. } = place;
        let text = format!(
            "{count} lines from {file}:{line} were suppressed: at most {MOST} in {} s from one place",
            WINDOW.as_secs()
        );
        self.write(settings, place, &text);
    }

    fn write(&self, settings: &mut Settings, place: Place, text: &str) {
        let lost = settings.sink.unreported();
        if lost > 0 {
            let notice = format!("{lost} lines of the log were lost: their destination took no more");
            let here = Place { file: file!(), line: line!(), level: Level::Error };
            if !self.write_line(settings, here, &notice) {
                return;
            }
            settings.sink.reported();
        }
        self.write_line(settings, place, text);
    }

    fn write_line(&self, settings: &mut Settings, place: Place, text: &str) -> bool {
        let Settings { id, sink, show_level, show_origin, line, .. } = settings;
        let prefix = Prefix {
            id,
            level: show_level.then_some(place.level),
            origin: show_origin.then_some((place.file, place.line)),
        };
        line::put(line, &prefix, SystemTime::now(), text);
        let written = sink.write(line.as_bytes());
        if !written {
            self.lost.increment();
        }
        written
    }
}

impl Log for LogState {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The debugger's protocol: at Info the crate logs packets that it does not know.
        let chatter = metadata.target().starts_with("gdbstub::") && metadata.level() > Level::Warn;
        metadata.level() <= log::max_level() && !chatter
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) || !self.admits(record) {
            return;
        }
        // While the log is not locked: an argument may log a line itself, or panic.
        let text = record.args().to_string();
        if let Some(settings) = self.lock().as_mut() {
            self.write(settings, Place::of(record), &text);
        }
    }

    fn flush(&self) {}
}
