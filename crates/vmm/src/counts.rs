//! What signal handlers and the panic hook of this process count, for metrics.
//!
//! They are statics because a handler has nothing else.

use std::sync::atomic::{AtomicU64, Ordering};

use control::metrics::{ProcessCounts, SignalCounts};

use crate::logger;

static PANICS: AtomicU64 = AtomicU64::new(0);
static SIGBUS: AtomicU64 = AtomicU64::new(0);
static SIGHUP: AtomicU64 = AtomicU64::new(0);
static SIGILL: AtomicU64 = AtomicU64::new(0);
static SIGPIPE: AtomicU64 = AtomicU64::new(0);
static SIGSEGV: AtomicU64 = AtomicU64::new(0);
static SIGSYS: AtomicU64 = AtomicU64::new(0);
static SIGXCPU: AtomicU64 = AtomicU64::new(0);
static SIGXFSZ: AtomicU64 = AtomicU64::new(0);

/// Lines of the log that were missed before this process was forked: they are the parent's.
static LINES_LOST_BEFORE: AtomicU64 = AtomicU64::new(0);
static LINES_SUPPRESSED_BEFORE: AtomicU64 = AtomicU64::new(0);

/// Counts a panic.
pub(crate) fn panicked() {
    PANICS.fetch_add(1, Ordering::Relaxed);
}

/// Counts a signal, if it is one that is counted. A signal handler may call it.
pub(crate) fn signal(signal: libc::c_int) {
    let count = match signal {
        libc::SIGBUS => &SIGBUS,
        libc::SIGHUP => &SIGHUP,
        libc::SIGILL => &SIGILL,
        libc::SIGPIPE => &SIGPIPE,
        libc::SIGSEGV => &SIGSEGV,
        libc::SIGSYS => &SIGSYS,
        libc::SIGXCPU => &SIGXCPU,
        libc::SIGXFSZ => &SIGXFSZ,
        _ => return,
    };
    count.fetch_add(1, Ordering::Relaxed);
}

/// The counts. A signal handler may call it.
pub(crate) fn read() -> ProcessCounts {
    let get = |count: &AtomicU64| count.load(Ordering::Relaxed);
    let missed = logger::missed();
    ProcessCounts {
        missed_log_lines: missed.lost - get(&LINES_LOST_BEFORE),
        suppressed_log_lines: missed.suppressed - get(&LINES_SUPPRESSED_BEFORE),
        panics: get(&PANICS),
        seccomp_faults: get(&SIGSYS),
        signals: SignalCounts {
            sigbus: get(&SIGBUS),
            sigsegv: get(&SIGSEGV),
            sigxfsz: get(&SIGXFSZ),
            sigxcpu: get(&SIGXCPU),
            sigpipe: get(&SIGPIPE),
            sighup: get(&SIGHUP),
            sigill: get(&SIGILL),
        },
    }
}

/// Starts at zero, in the child of a fork.
pub(crate) fn reset() {
    for count in [&PANICS, &SIGBUS, &SIGHUP, &SIGILL, &SIGPIPE, &SIGSEGV, &SIGSYS, &SIGXCPU, &SIGXFSZ] {
        count.store(0, Ordering::Relaxed);
    }
    let missed = logger::missed();
    LINES_LOST_BEFORE.store(missed.lost, Ordering::Relaxed);
    LINES_SUPPRESSED_BEFORE.store(missed.suppressed, Ordering::Relaxed);
}
