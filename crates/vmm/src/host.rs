//! [`ProcessHost`]: what this process does for the controller.

use std::io;
use std::os::fd::{AsFd, BorrowedFd, RawFd};

use control::Host;
use control::api::ApiServer;
use control::fork::ForkPlan;
use control::metrics::{LastLine, ProcessCounts};
use machine::legacy::{Output, SerialSetup};
use virtio::rate_limiter::RateLimiterConfig;

use crate::process::{self, ForkResult};
use crate::{counts, last_line, logger, signals, terminal, writer};

/// This process, as the controller sees it.
#[derive(Debug)]
pub(crate) struct ProcessHost {
    run_child: RunChild,
}

/// Runs the children of a fork, in the forked process.
type RunChild = fn(ForkPlan) -> !;

impl ProcessHost {
    pub(crate) fn new(run_child: RunChild) -> Self {
        ProcessHost { run_child }
    }
}

impl Host for ProcessHost {
    fn set_up_logger(&mut self, wanted: &config::Logger) -> io::Result<()> {
        logger::set_up(wanted)
    }

    fn keep_last_line(&mut self, last: LastLine) {
        last_line::keep(last);
    }

    fn process_counts(&self) -> fn() -> ProcessCounts {
        counts::read
    }

    fn standard_io(&mut self) -> io::Result<SerialSetup> {
        Ok(SerialSetup {
            output: Some(Output::stdout()?),
            input: Some(rustix::stdio::stdin().as_fd().try_clone_to_owned()?),
            limit: RateLimiterConfig::default(),
        })
    }

    fn fork(&mut self, plan: ForkPlan) -> io::Result<()> {
        process::reap_automatically();
        let _signals = signals::block();
        let log = logger::hold();
        match process::fork()? {
            ForkResult::Child => {
                drop(log);
                // `_signals` is never dropped here: signals stay blocked until the child handles
                // them itself.
                (self.run_child)(plan)
            }
            ForkResult::Parent => {
                plan.children.into_iter().filter_map(|child| child.api).for_each(ApiServer::leave_to_fork);
                Ok(())
            }
        }
    }

    fn fork_writer(&mut self, kept: Vec<RawFd>, work: Box<dyn FnOnce() -> bool>) -> io::Result<()> {
        process::reap_automatically();
        let _signals = signals::block();
        let log = logger::hold();
        match process::fork()? {
            ForkResult::Child => {
                drop(log);
                writer::run(kept, work)
            }
            ForkResult::Parent => Ok(()),
        }
    }

    fn asked_to_end(&self) -> Option<BorrowedFd<'_>> {
        signals::descriptor()
    }

    fn guest_starts(&mut self, with_standard_io: bool) {
        if with_standard_io {
            terminal::set_raw();
        }
    }
}
