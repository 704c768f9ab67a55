//! The last line of metrics of a process that a panic or a fatal signal ends.
//!
//! Nothing here waits: a lock that is held is left alone, and the line is lost.

use std::sync::{Mutex, MutexGuard, TryLockError};

use control::metrics::{LastLine, ProcessCounts};

use crate::counts;
use crate::line::Line;

/// What writes the line; `None` without an output of metrics.
static LAST: Mutex<Option<LastLine>> = Mutex::new(None);

/// Keeps what writes the line.
pub(crate) fn keep(last: LastLine) {
    if let Some(mut kept) = try_lock() {
        *kept = Some(last);
    }
}

/// Drops it, in a forked process: the output is its parent's.
pub(crate) fn forget() {
    if let Some(mut kept) = try_lock() {
        *kept = None;
    }
}

/// Writes a line with all counters, or a short one where a lock is held.
pub(crate) fn write() {
    if let Some(mut kept) = try_lock()
        && let Some(last) = kept.as_mut()
        && !last.write()
    {
        put_short(last);
    }
}

/// Writes a line with the groups of this process. A signal handler may call it: it allocates
/// nothing, and tries the lock once.
pub(crate) fn write_short() {
    if let Some(mut kept) = try_lock()
        && let Some(last) = kept.as_mut()
    {
        put_short(last);
    }
}

fn put_short(last: &mut LastLine) {
    let (mut time, mut groups) = (Line::default(), Line::default());
    time.push_number(utc_ms());
    put_groups(&mut groups, &counts::read());
    last.write_short(time.as_bytes(), groups.as_bytes());
}

/// The groups of the process, as members of a JSON object.
fn put_groups(line: &mut Line, counts: &ProcessCounts) {
    let signals = counts.signals;
    put_group(line, "seccomp", &[("num_faults", counts.seccomp_faults)]);
    line.push(b",");
    put_group(line, "vmm", &[("panic_count", counts.panics)]);
    line.push(b",");
    let fields = [
        ("sigbus", signals.sigbus),
        ("sigsegv", signals.sigsegv),
        ("sigxfsz", signals.sigxfsz),
        ("sigxcpu", signals.sigxcpu),
        ("sigpipe", signals.sigpipe),
        ("sighup", signals.sighup),
        ("sigill", signals.sigill),
    ];
    put_group(line, "signals", &fields);
}

fn put_group(line: &mut Line, name: &str, fields: &[(&str, u64)]) {
    put_name(line, name);
    line.push(b"{");
    for (at, (field, count)) in fields.iter().enumerate() {
        if at > 0 {
            line.push(b",");
        }
        put_name(line, field);
        line.push_number(*count);
    }
    line.push(b"}");
}

fn put_name(line: &mut Line, name: &str) {
    line.push(b"\"");
    line.push(name.as_bytes());
    line.push(b"\":");
}

/// The time in milliseconds since 1970.
fn utc_ms() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime);
    now.tv_sec.unsigned_abs() * 1000 + now.tv_nsec.unsigned_abs() / 1_000_000
}

fn try_lock() -> Option<MutexGuard<'static, Option<LastLine>>> {
    match LAST.try_lock() {
        Ok(kept) => Some(kept),
        Err(TryLockError::Poisoned(poisoned)) => Some(poisoned.into_inner()),
        Err(TryLockError::WouldBlock) => None,
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::Arc;

    use control::events::EventLog;
    use control::metrics::SignalCounts;
    use control::{Command, Controller, Identity, Instance, Platform};
    use serde_json::Value;

    use super::*;
    use crate::host::ProcessHost;
    use crate::{child, crash_report, fatal, logger, subprocess};

    /// Configures metrics as a client of the API does, in a subprocess.
    fn configure() {
        logger::install("a");
        let identity = Identity { id: "vm-1".to_owned(), app_name: "vesta", version: "0", api_version: "0" };
        let platform = Platform { boot_timer: None, pci: false, mmds_size_limit: 1, max_payload: 1 };
        let (sink, _source) = machine::event_channel().unwrap();
        let mut controller = Controller::new(
            Arc::new(Instance::new(identity)),
            ProcessHost::new(child::run),
            platform,
            sink,
            EventLog::new("a"),
        );
        let metrics = config::Metrics {
            metrics_path: std::env::var_os("METRICS").unwrap().into(),
            emit_id: true,
            ..config::Metrics::default()
        };
        controller.run(Command::PutMetrics(metrics)).unwrap();
    }

    fn only_line(path: &Path) -> Value {
        let text = std::fs::read_to_string(path).unwrap();
        assert_eq!(text.matches('\n').count(), 1, "{text}");
        serde_json::from_str(&text).unwrap()
    }

    #[test]
    fn panic_writes_a_line_with_all_groups() {
        if subprocess::is_one() {
            configure();
            crash_report::install_panic_hook();
            panic!("with metrics");
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        let ended =
            subprocess::again_with("last_line::tests::panic_writes_a_line_with_all_groups", "METRICS", &path);
        assert_eq!(ended.status.code(), Some(101), "{ended:?}");
        let line = only_line(&path);
        assert_eq!((&line["vmm"]["panic_count"], &line["id"]), (&1.into(), &"vm-1".into()));
        assert_eq!(line["memory_hotplug"]["state_fails"], 0, "the last field of the last group");
    }

    #[test]
    fn fatal_signal_writes_a_line_that_names_it() {
        if subprocess::is_one() {
            configure();
            fatal::install().unwrap();
            // SAFETY: raising a signal has no precondition.
            unsafe { libc::raise(libc::SIGXCPU) };
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m");
        let name = "last_line::tests::fatal_signal_writes_a_line_that_names_it";
        let ended = subprocess::again_with(name, "METRICS", &path);
        assert_eq!(ended.status.code(), Some(154), "{ended:?}");
        let line = only_line(&path);
        assert_eq!((&line["signals"]["sigxcpu"], &line["id"]), (&1.into(), &"vm-1".into()));
        assert_eq!((&line["signals"]["sigbus"], &line["vmm"]["panic_count"]), (&0.into(), &0.into()));
        let seconds = line["utc_timestamp_ms"].as_u64().unwrap() / 1000;
        assert!(seconds > 1_700_000_000, "{line}");
    }

    #[test]
    fn groups_of_the_process_fit_into_a_line() {
        let max = u64::MAX;
        let signals = SignalCounts {
            sigbus: max,
            sigsegv: max,
            sigxfsz: max,
            sigxcpu: max,
            sigpipe: max,
            sighup: max,
            sigill: max,
        };
        let counts = ProcessCounts { panics: max, seccomp_faults: max, signals, ..ProcessCounts::default() };
        let mut line = Line::default();
        put_groups(&mut line, &counts);
        let text = format!("{{{}}}", str::from_utf8(line.as_bytes()).unwrap());
        let value: serde_json::Value = serde_json::from_str(&text).unwrap();
        assert_eq!(value["signals"]["sigill"], max);
        assert_eq!(value["vmm"]["panic_count"], max);
        assert_eq!(value["seccomp"]["num_faults"], max);
    }
}
