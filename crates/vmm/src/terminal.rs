//! The terminal on standard input: raw while a guest has it, and restored when the process ends.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The terminal's settings before they were changed. Reading them takes no lock, so a signal
/// handler may.
static ORIGINAL: OnceLock<Termios> = OnceLock::new();
/// Whether this is a forked process, whose parent restores the terminal.
static IS_PARENTS: AtomicBool = AtomicBool::new(false);

/// Gives the guest every key: no line editing, no echo, no signals. Does nothing if standard input
/// is no terminal.
pub(crate) fn set_raw() {
    let stdin = rustix::stdio::stdin();
    if !isatty(stdin) {
        return;
    }
    let Ok(original) = tcgetattr(stdin) else { return };
    let mut raw = original.clone();
    raw.make_raw();
    // Output keeps its line endings: the log is written to the same terminal.
    raw.output_modes = original.output_modes;
    if ORIGINAL.set(original).is_ok()
        && let Err(error) = tcsetattr(stdin, OptionalActions::Now, &raw)
    {
        log::warn!("the terminal stays as it is: {error}");
    }
}

/// Restores the terminal's settings, if they were changed. A signal handler may call it, and it may
/// be called more than once.
pub(crate) fn restore() {
    if let Some(original) = ORIGINAL.get()
        && !IS_PARENTS.load(Ordering::Relaxed)
    {
        // The terminal may be gone; ignore the error.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, original);
    }
}

/// Leaves the terminal to the parent of this forked process.
pub(crate) fn leave_to_parent() {
    IS_PARENTS.store(true, Ordering::Relaxed);
}
