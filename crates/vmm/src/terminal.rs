//! The terminal on standard input, raw while a guest has it, and as it was found on every way out.

use std::sync::OnceLock;
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::termios::{OptionalActions, Termios, isatty, tcgetattr, tcsetattr};

/// The terminal's settings before they were changed. Reading it takes no lock, so a signal handler may.
static FOUND: OnceLock<Termios> = OnceLock::new();
/// In a fork the terminal is the parent's to put back.
static FORGOTTEN: AtomicBool = AtomicBool::new(false);

/// Gives the guest every key: no line editing, no echo, no signals. Does nothing where standard input is no terminal.
pub(crate) fn set_raw() {
    let stdin = rustix::stdio::stdin();
    if !isatty(stdin) {
        return;
    }
    let Ok(found) = tcgetattr(stdin) else { return };
    let mut raw = found.clone();
    raw.make_raw();
    // Output keeps its line ends: the log is written to the same terminal.
    raw.output_modes = found.output_modes;
    if FOUND.set(found).is_ok()
        && let Err(error) = tcsetattr(stdin, OptionalActions::Now, &raw)
    {
        log::warn!("the terminal stays as it is: {error}");
    }
}

/// Puts the terminal back as it was found, if it was changed. Safe to call from a signal handler, and more than once.
pub(crate) fn restore() {
    if let Some(found) = FOUND.get()
        && !FORGOTTEN.load(Ordering::Relaxed)
    {
        // There is nothing to be done about a terminal that is gone.
        let _ = tcsetattr(rustix::stdio::stdin(), OptionalActions::Now, found);
    }
}

/// From now on the terminal is none of this process's business.
pub(crate) fn forget() {
    FORGOTTEN.store(true, Ordering::Relaxed);
}
