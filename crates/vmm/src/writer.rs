//! A forked process that does one piece of work and ends: the writer of a live snapshot.
//!
//! As in [`child`](crate::child), the frames below it on the stack belong to its parent, and a
//! panic ends the process.

use std::os::fd::RawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};

use crate::exit::ExitCode;
use crate::{last_line, logger, process, signals, terminal};

/// Runs a forked process that does `work` and ends. It keeps the descriptors `kept` and the log's.
pub(crate) fn run(mut kept: Vec<RawFd>, work: Box<dyn FnOnce() -> bool>) -> ! {
    let done = catch_unwind(AssertUnwindSafe(|| {
        last_line::forget();
        logger::start_fork(None);
        kept.extend(logger::descriptors());
        terminal::leave_to_parent();
        signals::restore_default_actions();
        let left = process::detach_standard_io(logger::is_on_standard_output())
            .and_then(|()| process::close_all_but(kept));
        match left {
            Ok(()) => work(),
            Err(error) => {
                log::error!("a fork of this process cannot close its parent's descriptors: {error}");
                false
            }
        }
    }));
    std::process::exit(if done.unwrap_or(false) { ExitCode::Ok as i32 } else { ExitCode::Generic as i32 })
}
