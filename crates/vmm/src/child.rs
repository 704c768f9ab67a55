//! A child of a fork, from fork(2) to its end.
//!
//! It runs on the stack of the command that forked it and never returns there: the frames below
//! belong to its parent. The child keeps the memory of its guest, its API socket, its
//! networks and the log, and creates everything else again. It leaves its parent's session, process
//! group and standard streams, except standard output and error if its log is there.
//!
//! A panic here ends the process. (Where panics unwind, as in tests, they are caught, because the
//! frames below are the parent's.) Either way the parent sees that the child ended without a
//! report.

use std::mem::ManuallyDrop;
use std::os::fd::AsRawFd;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::Arc;

use control::api::{ApiServer, Requests};
use control::events::{Event, EventLog, ExitReason};
use control::fork::{ChildSpec, ForkPlan, ParentState};
use control::{Controller, Instance};
use machine::event_channel;

use crate::event_loop;
use crate::exit::{self, ExitCode};
use crate::host::ProcessHost;
use crate::personality::Personality;
use crate::process::{self, ForkResult, fork};
use crate::readiness::Readiness;
use crate::run_error::RunError;
use crate::{counts, last_line, logger, signals, terminal};

/// Runs the first child of a fork, which forks the others.
pub(crate) fn run(mut plan: ForkPlan) -> ! {
    let code = catch_unwind(AssertUnwindSafe(|| {
        let spec = loop {
            let Some(spec) = plan.children.pop() else { return ExitCode::Generic };
            if plan.children.is_empty() {
                break spec;
            }
            match fork() {
                // The next child forks the rest.
                Ok(ForkResult::Child) => {
                    drop_sibling(spec);
                }
                Ok(ForkResult::Parent) => {
                    plan.children.drain(..).for_each(drop_sibling);
                    break spec;
                }
                Err(error) => {
                    for mut other in plan.children.drain(..) {
                        // It never exists, so its socket is removed here.
                        adopt_socket(&mut other);
                        other.reporter.report(Err(&format_args!("cannot fork this process: {error}")));
                    }
                    break spec;
                }
            }
        };
        run_one(spec, plan.parent)
    }));
    exit::exit(code.unwrap_or(ExitCode::Generic))
}

/// Drops the specification of another child, which has its own copy. Its API socket stays.
fn drop_sibling(spec: ChildSpec) {
    if let Some(api) = spec.api {
        api.leave_to_fork();
    }
}

/// Makes this process the one that removes the API socket of a child.
fn adopt_socket(spec: &mut ChildSpec) {
    spec.api.iter_mut().for_each(ApiServer::adopt);
}

/// Runs one child, until its guest ends.
fn run_one(mut spec: ChildSpec, parent: ParentState) -> ExitCode {
    // First, so that the socket is removed even if the start fails.
    adopt_socket(&mut spec);
    // Without a reporter, the parent sees that this child has ended.
    let Ok(reporter) = spec.reporter.take_over() else { return ExitCode::Generic };
    spec.reporter = reporter;
    last_line::forget();
    counts::reset();
    terminal::leave_to_parent();
    logger::start_fork(Some(&spec.identity.id));
    let instance = Arc::new(Instance::new(spec.identity.clone()));
    let events = EventLog::new(&spec.identity.id);
    let begun =
        detach(&spec, &parent).and_then(|()| set_up(&mut spec, &instance, &events)).and_then(|process| {
            let (sink, source) = event_channel()?;
            Ok((process, sink, source))
        });
    let ((signals, requests), sink, source) = match begun {
        Ok(begun) => begun,
        Err(error) => {
            spec.reporter.report(Err(&error));
            return ExitCode::Generic;
        }
    };
    let (reporter, started) =
        Controller::start_child(ProcessHost::new(run), instance, spec, parent, sink, events.clone());
    let controller = match started {
        Ok(controller) => controller,
        Err(error) => {
            log::error!("{error}");
            reporter.report(Err(&error));
            last_line::write();
            let (reason, code) = (ExitReason::Error(error.to_string()), ExitCode::Generic);
            events.publish(&Event::Exit { reason, code: code as i32 });
            return code;
        }
    };
    reporter.report(Ok(()));
    // Never dropped: the process ends with it, without waiting for its threads.
    let mut controller = ManuallyDrop::new(controller);
    controller.set_requests(requests);
    let ended = event_loop::serve(&mut controller, &source, &signals, &mut Readiness::default());
    let (ended, personality) = (ended.map_err(RunError::from), Personality::of_this_process());
    personality.settle_sockets();
    controller.shut_down(event_loop::CLOSE_TIMEOUT);
    event_loop::publish_exit(&controller, personality, &ended);
    drop(controller.take_requests());
    event_loop::exit_code(personality, ended)
}

/// Closes all descriptors that are the parent's, and leaves its session.
fn detach(spec: &ChildSpec, parent: &ParentState) -> std::io::Result<()> {
    let mut kept = logger::descriptors();
    kept.extend(spec.descriptors());
    kept.extend(signals::descriptor().map(|fd| fd.as_raw_fd()));
    kept.extend(parent.descriptors());
    process::close_all_but(kept)?;
    process::new_session()
}

/// What a child needs before it has a machine.
type Process = (signals::Signals, Option<Requests>);

/// Moves to the cgroup, opens the log, and starts to handle signals and to serve the API.
fn set_up(spec: &mut ChildSpec, instance: &Arc<Instance>, events: &EventLog) -> std::io::Result<Process> {
    if let Some(cgroup) = &spec.cgroup {
        let named = |e: std::io::Error| {
            std::io::Error::new(e.kind(), format!("cannot move to the cgroup {}: {e}", cgroup.display()))
        };
        std::fs::write(cgroup.join("cgroup.procs"), std::process::id().to_string()).map_err(named)?;
    }
    if let Some(logger) = &spec.logger {
        logger::set_up(logger)
            .map_err(|e| std::io::Error::new(e.kind(), format!("cannot open the log: {e}")))?;
    }
    process::detach_standard_io(logger::is_on_standard_output())?;
    let signals = signals::renew()?;
    let requests = spec.api.take().map(|api| api.spawn(Arc::clone(instance), events.clone())).transpose()?;
    Ok((signals, requests))
}
