//! A child of a fork, from its first moment to its end.
//!
//! It runs on the stack of the command that made it and never goes back there: what lies beneath belongs to its parent. It keeps the memory of its
//! guest, its API socket and the log, makes everything else anew, and ends with the process. It leaves its parent's session, process group and standard
//! streams, but for standard output and error where its log goes there.
//!
//! A panic here ends the process. (Where panics unwind, as in tests, they are caught: the stack beneath is the parent's.) Its parent sees either way that
//! it has ended without a report.

use std::mem::ManuallyDrop;
use std::os::fd::{AsRawFd, RawFd};
use std::panic::{AssertUnwindSafe, catch_unwind};

use control::Controller;
use control::fork::{Family, Inheritance, Seed};
use machine::event_channel;

use crate::event_loop::{self, ProcessHost};
use crate::exit::{self, ExitCode};
use crate::personality::Personality;
use crate::process::{self, Side, fork};
use crate::{end_of, logger, signals, terminal};

/// The first child: it makes the others, and lives.
pub(crate) fn live(mut family: Family) -> ! {
    let code = catch_unwind(AssertUnwindSafe(|| {
        let seed = loop {
            let Some(seed) = family.seeds.pop() else { return ExitCode::Generic };
            if family.seeds.is_empty() {
                break seed;
            }
            match fork() {
                // The next child makes the rest.
                Ok(Side::Child) => {
                    leave(seed);
                }
                Ok(Side::Parent) => {
                    family.seeds.drain(..).for_each(leave);
                    break seed;
                }
                Err(error) => {
                    for unborn in family.seeds.drain(..) {
                        unborn.reporter.report(Err(&format_args!("cannot fork this process: {error}")));
                    }
                    break seed;
                }
            }
        };
        be(seed, family.inheritance)
    }));
    exit::exit(code.unwrap_or(ExitCode::Generic))
}

/// A child that is there for one piece of work: with these descriptors, the log and the signals' own, and no thread but this one.
pub(crate) fn write(mut kept: Vec<RawFd>, work: Box<dyn FnOnce() -> bool>) -> ! {
    let done = catch_unwind(AssertUnwindSafe(|| {
        kept.extend(logger::descriptors());
        terminal::forget();
        signals::take_their_course();
        let left = process::leave_standard_io(logger::is_on_standard_output())
            .and_then(|()| process::close_all_but(kept));
        match left {
            Ok(()) => work(),
            Err(error) => {
                log::error!("a fork of this process cannot let go of what is its parent's: {error}");
                false
            }
        }
    }));
    std::process::exit(if done.unwrap_or(false) { ExitCode::Ok as i32 } else { ExitCode::Generic as i32 })
}

/// Another child's seed: that child has it.
fn leave(seed: Seed) {
    if let Some(api) = seed.api {
        api.leave_to_fork();
    }
}

fn be(mut seed: Seed, inheritance: Inheritance) -> ExitCode {
    // Without one, the parent sees that it has ended.
    let Ok(reporter) = seed.reporter.take_over() else { return ExitCode::Generic };
    seed.reporter = reporter;
    terminal::forget();
    logger::rename(&seed.identity.id);
    let begun = let_go(&seed, &inheritance).and_then(|()| begin(&mut seed)).and_then(|process| {
        let (sink, source) = event_channel()?;
        Ok((process, sink, source))
    });
    let ((signals, requests), sink, source) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            seed.reporter.report(Err(&error));
            return ExitCode::Generic;
        }
    };
    let (controller, reporter) = match Controller::born(ProcessHost, seed, inheritance, sink) {
        Ok(born) => born,
        Err((error, reporter)) => {
            log::error!("{error}");
            reporter.report(Err(&error));
            return ExitCode::Generic;
        }
    };
    reporter.report(Ok(()));
    // Never dropped: the process ends with it, and its end waits for no thread.
    let mut controller = ManuallyDrop::new(controller);
    controller.set_requests(requests);
    let ended = event_loop::serve(&mut controller, &source, &signals);
    drop(controller.take_requests());
    event_loop::end(&mut controller);
    end_of(Personality::of_this_process(), ended.map_err(crate::RunError::from))
}

/// Lets go of all that is the parent's.
fn let_go(seed: &Seed, inheritance: &Inheritance) -> std::io::Result<()> {
    let mut kept = logger::descriptors();
    kept.extend(seed.descriptors());
    kept.extend(signals::descriptor().map(|fd| fd.as_raw_fd()));
    kept.extend(inheritance.descriptors());
    process::close_all_but(kept)?;
    process::leave_session()
}

/// What a process needs before it has a machine.
type Process = (signals::Signals, Option<control::api::Requests>);

fn begin(seed: &mut Seed) -> std::io::Result<Process> {
    if let Some(cgroup) = &seed.cgroup {
        let named = |e: std::io::Error| {
            std::io::Error::new(e.kind(), format!("cannot move to the cgroup {}: {e}", cgroup.display()))
        };
        std::fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).map_err(named)?;
    }
    if let Some(logger) = &seed.logger {
        logger::set_up(logger)
            .map_err(|e| std::io::Error::new(e.kind(), format!("cannot open the log: {e}")))?;
    }
    process::leave_standard_io(logger::is_on_standard_output())?;
    let signals = signals::renew()?;
    let requests = seed.api.take().map(control::api::ApiServer::spawn).transpose()?;
    Ok((signals, requests))
}
