//! The monitor's log, in Firecracker's format:
//!
//! ```text
//! 2026-11-24T10:00:00.123456789 [id:thread:LEVEL:file:line] text
//! ```
//!
//! A line that the destination does not take is dropped and counted: a reader that stalls never
//! stalls the monitor. A thread that crashes does not wait long for the log's lock:
//! [`error_without_waiting`] and [`write_if_free`].

use std::io;
use std::os::fd::{AsFd, AsRawFd, RawFd};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Mutex, MutexGuard, TryLockError};
use std::time::{Duration, Instant, SystemTime};

use config::LogLevel;
use log::{LevelFilter, Log, Metadata, Record};
use machine::legacy::Output;
use sync::locked;

use crate::personality::Personality;

/// How long a thread that panics tries to lock the log. Another thread may be writing to it, or the
/// thread may hold the lock itself.
const PANIC_LOCK_TIMEOUT: Duration = Duration::from_millis(200);

/// The one log of this process.
static LOG: LogState = LogState { settings: Mutex::new(None), lost: AtomicU64::new(0) };

struct LogState {
    /// `None` until [`install`].
    settings: Mutex<Option<Settings>>,
    /// Lines that were dropped.
    lost: AtomicU64,
}

struct Settings {
    id: String,
    /// The first line of every file, whatever the level.
    banner: String,
    /// `None` if standard output is closed.
    output: Option<Output>,
    /// Whether `output` is standard output.
    is_standard: bool,
    show_level: bool,
    show_origin: bool,
    module: Option<String>,
}

/// Installs the log of this process, on standard output.
pub(crate) fn install(id: &str, personality: Personality) {
    *LOG.lock() = Some(Settings {
        id: id.to_owned(),
        banner: personality.banner(),
        output: Output::stdout().ok(),
        is_standard: true,
        show_level: false,
        show_origin: false,
        module: None,
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
    log::set_max_level(filter(logger.level.unwrap_or_default()));
    if output.is_some() {
        settings.output = output;
        settings.is_standard = false;
        let banner = settings.banner.clone();
        let origin = Origin { level: log::Level::Info, file: file!(), line: line!() };
        LOG.write(settings, &origin, &banner);
    }
    Ok(())
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
    let settings = loop {
        match LOG.try_lock() {
            Some(settings) => break settings,
            None if Instant::now() > deadline => return,
            // Another thread that is writing a line ends soon.
            None => std::thread::sleep(Duration::from_millis(1)),
        }
    };
    if let Some(settings) = settings.as_ref()
        && log::max_level() >= LevelFilter::Error
    {
        let origin = Origin { level: log::Level::Error, file: file!(), line: line!() };
        LOG.write(settings, &origin, text);
    }
}

/// Writes these bytes unchanged, unless the log is locked. A signal handler may call it: it
/// allocates nothing, and tries the lock once.
pub(crate) fn write_if_free(line: &[u8]) {
    if let Some(settings) = LOG.try_lock()
        && let Some(output) = settings.as_ref().and_then(|settings| settings.output.as_ref())
        && log::max_level() >= LevelFilter::Error
    {
        // If the destination takes no more, the line is lost here. It is on standard error too.
        let _ = output.write(line);
    }
}

/// Sets the microVM's id that lines have from now on.
pub(crate) fn set_id(id: &str) {
    if let Some(settings) = LOG.lock().as_mut() {
        id.clone_into(&mut settings.id);
    }
}

/// The log's descriptors.
pub(crate) fn descriptors() -> Vec<RawFd> {
    let settings = LOG.lock();
    let output = settings.as_ref().and_then(|settings| settings.output.as_ref());
    output.map(|output| output.as_fd().as_raw_fd()).into_iter().collect()
}

/// Whether lines go to standard output.
pub(crate) fn is_on_standard_output() -> bool {
    LOG.lock().as_ref().is_some_and(|settings| settings.is_standard)
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

/// The origin of a line in the source.
struct Origin<'a> {
    level: log::Level,
    file: &'a str,
    line: u32,
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

    fn write(&self, settings: &Settings, origin: &Origin<'_>, text: &str) {
        let Some(output) = &settings.output else { return };
        let line = format_line(settings, origin, SystemTime::now(), text);
        if !output.write(line.as_bytes()).is_ok_and(|written| written == line.len()) {
            self.lost.fetch_add(1, Ordering::Relaxed);
        }
    }
}

fn format_line(settings: &Settings, origin: &Origin<'_>, now: SystemTime, text: &str) -> String {
    let time = humantime::format_rfc3339_nanos(now).to_string();
    let thread = std::thread::current();
    let level = if settings.show_level { format!(":{}", level_name(origin.level)) } else { String::new() };
    let place =
        if settings.show_origin { format!(":{}:{}", origin.file, origin.line) } else { String::new() };
    format!(
        "{} [{}:{}{level}{place}] {text}\n",
        time.trim_end_matches('Z'),
        settings.id,
        thread.name().unwrap_or("main"),
    )
}

fn level_name(level: log::Level) -> &'static str {
    level.as_str()
}

impl Log for LogState {
    fn enabled(&self, metadata: &Metadata<'_>) -> bool {
        // The debugger's protocol: at Info the crate logs packets that it does not know.
        let chatter = metadata.target().starts_with("gdbstub::") && metadata.level() > log::Level::Warn;
        metadata.level() <= log::max_level() && !chatter
    }

    fn log(&self, record: &Record<'_>) {
        if !self.enabled(record.metadata()) {
            return;
        }
        // Before the lock is taken: an argument may log a line itself, or panic.
        let text = record.args().to_string();
        let settings = self.lock();
        let Some(settings) = settings.as_ref() else { return };
        let wanted = settings.module.as_deref().is_none_or(|prefix| record.target().starts_with(prefix));
        if wanted {
            let origin = Origin {
                level: record.level(),
                file: record.file().unwrap_or("-"),
                line: record.line().unwrap_or(0),
            };
            self.write(settings, &origin, &text);
        }
    }

    fn flush(&self) {}
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::time::Duration;

    fn line(show_level: bool, show_origin: bool) -> String {
        let settings = Settings {
            id: "vm-1".to_owned(),
            banner: String::new(),
            output: None,
            is_standard: false,
            show_level,
            show_origin,
            module: None,
        };
        let origin = Origin { level: log::Level::Warn, file: "a.rs", line: 7 };
        let now = SystemTime::UNIX_EPOCH + Duration::new(1_767_225_600, 5);
        let line = format_line(&settings, &origin, now, "text");
        line.replace(std::thread::current().name().unwrap_or("main"), "T")
    }

    #[test]
    fn lines_have_the_format_that_tools_read() {
        assert_eq!(line(false, false), "2026-01-01T00:00:00.000000005 [vm-1:T] text\n");
        assert_eq!(line(true, false), "2026-01-01T00:00:00.000000005 [vm-1:T:WARN] text\n");
        assert_eq!(line(true, true), "2026-01-01T00:00:00.000000005 [vm-1:T:WARN:a.rs:7] text\n");
    }
}
