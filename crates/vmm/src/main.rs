//! The binary `vesta-vmm`: one process, one microVM.
//!
//! Thin by design. A microVM itself is in `control` and below. Here are:
//!
//! - [`args`], [`restore`] and [`flags`]: the command line. [`personality`]: under the name
//!   `firecracker` the program answers as Firecracker does.
//! - [`event_loop`]: the main thread's loop, which gives commands to the controller.
//! - [`signals`], [`fatal`], [`line`], [`alt_stack`], [`crash_report`], [`run_error`], [`exit`]:
//!   how the process ends.
//! - [`host`]: this process, as the controller sees it. [`process`], [`child`], [`writer`]: forked
//!   processes.
//! - [`counts`], [`last_line`]: metrics of the process, and at its end.
//! - [`logger`], [`terminal`], [`descriptors`]: what the process has. [`readiness`]: tells a
//!   launcher when it is ready.
//! - [`snapshot_tool`], [`overlay_tool`]: the tools that read and merge snapshots, and that read
//!   and export overlay files. They start no microVM. [`tool_end`]:
//!   how they end.
//! - [`cpu_template_tool`], [`template_file`]: the tools for CPU templates, and templates in files.
//!
//! # The end of the process
//!
//! The process ends in [`main`], in a signal handler, in the fault handler of the event channel, or
//! as a forked child. It restores the terminal, and ends with an [`ExitCode`] that clients of
//! Firecracker know, or by the signal that asked it to end. The sockets of the API and the vsock
//! device are removed, except after a fatal signal or a panic, and under Firecracker's name.

#![cfg_attr(not(test), no_main)]

mod alt_stack;
mod args;
mod child;
mod counts;
mod cpu_template_tool;
mod crash_report;
mod descriptors;
mod event_loop;
mod exit;
mod fatal;
mod flags;
mod host;
mod last_line;
mod line;
mod logger;
mod overlay_tool;
mod personality;
mod process;
mod readiness;
mod restore;
mod run_error;
mod signals;
mod snapshot_tool;
#[cfg(test)]
mod subprocess;
mod template_file;
mod terminal;
mod tool_end;
mod writer;

use std::fs;
use std::io::Write;
use std::mem::ManuallyDrop;
use std::path::Path;
use std::sync::Arc;

use config::{Logger, Metrics, VmConfig};
use control::api::{ApiServer, Limits};
use control::events::EventLog;
use control::metrics::StartupTimes;
use control::{Command, CommandError, Controller, Host, Identity, Instance, Platform};
use machine::event_channel;
use machine::legacy::StartTimes;

use args::{Args, Invocation};
use event_loop::Ended;
use exit::ExitCode;
use host::ProcessHost;
use personality::Personality;
use readiness::Readiness;
use restore::Restore;
use run_error::{RunError, report};
use signals::Signals;
use snapshot_tool::program::Program;

/// The entry point, which the C library calls.
///
/// The standard library's own start-up code does not run: it reads `/proc/self/maps` and makes a
/// dozen more system calls, a fifth of the time until the API answers. What this process needs of
/// it is here: standard descriptors that are open, SIGPIPE harmless, and alternate signal stacks
/// ([`alt_stack`]).
#[cfg_attr(not(test), unsafe(no_mangle))]
extern "C" fn main(_argc: std::ffi::c_int, _argv: *const *const std::ffi::c_char) -> std::ffi::c_int {
    let start = StartTimes::now();
    descriptors::open_standard();
    signals::survive_sigpipe();
    signals::end_init_at_once();
    crash_report::install_panic_hook();
    let personality = Personality::of_this_process();
    let code = match fatal::install() {
        Ok(()) => run_command_line(personality, start),
        Err(error) => report(personality, &RunError::Host(error)),
    };
    exit::exit(code)
}

fn run_command_line(personality: Personality, start: StartTimes) -> ExitCode {
    match args::parse(std::env::args_os()) {
        Ok(Invocation::Help) => print(&args::help(personality)),
        Ok(Invocation::Version) => print(&personality.version_text()),
        Ok(Invocation::SnapshotVersion) => print(&snapshot_tool::version_text()),
        Ok(Invocation::DescribeSnapshot(state)) => snapshot_tool::describe(personality, &state),
        Ok(Invocation::SnapshotTool(tool)) => snapshot_tool::run(&tool),
        Ok(Invocation::OverlayTool(tool)) => overlay_tool::run(&tool),
        Ok(Invocation::CpuTemplateTool(tool)) => cpu_template_tool::run(&tool),
        Ok(Invocation::Run(args)) => run(personality, &args, start),
        Err(error) => {
            let code = report(personality, &RunError::Args(error));
            if cpu_template_tool::args::is_this_program() {
                return ExitCode::Unexpected;
            }
            Program::of_this_process().map_or(code, Program::usage_error_code)
        }
    }
}

/// Prints a text on standard output. A reader that has closed the pipe is no error.
fn print(text: &str) -> ExitCode {
    let mut stdout = std::io::stdout();
    match stdout.write_all(text.as_bytes()).and_then(|()| stdout.flush()) {
        Err(error) if error.kind() != std::io::ErrorKind::BrokenPipe => {
            crash_report::to_stderr(format!("Error: cannot write to standard output: {error}\n").as_bytes());
            ExitCode::Generic
        }
        _ => ExitCode::Ok,
    }
}

fn run(personality: Personality, args: &Args, start: StartTimes) -> ExitCode {
    event_loop::exit_code(personality, set_up_and_serve(personality, args, start))
}

fn set_up_and_serve(personality: Personality, args: &Args, start: StartTimes) -> Result<Ended, RunError> {
    let start = args.start_times(start);
    let readiness = Readiness::take(args.events_fd)?;
    logger::install(&args.id);
    set_up_logger(&args.logger)?;
    personality.log_start();
    args.seccomp_filter.as_deref().map_or(Ok(()), check_seccomp_filter)?;

    // Read before the socket exists: a client that sees the socket may rely on the configuration.
    // And before signals are handled: a read that never ends, such as that of a FIFO without a
    // writer, can still be interrupted.
    let config = args.config_file.as_deref().map(read_config).transpose()?;
    let metadata = args.metadata.as_deref().map(read_metadata).transpose()?;
    let signals = signals::install()?;
    let ended = start_and_serve(personality, args, start, (config, metadata), &signals, readiness);
    unless_signalled(ended, &signals)
}

/// A start that was cancelled by a signal is no error.
fn unless_signalled(ended: Result<Ended, RunError>, signals: &Signals) -> Result<Ended, RunError> {
    ended.or_else(|error| signals.arrived().map(Ended::Signal).ok_or(error))
}

fn start_and_serve(
    personality: Personality,
    args: &Args,
    start: StartTimes,
    (config, metadata): (Option<VmConfig>, Option<serde_json::Value>),
    signals: &Signals,
    mut readiness: Readiness,
) -> Result<Ended, RunError> {
    let limits = Limits { max_payload: args.max_payload, ..Limits::default() };
    let api = args.api_socket.as_deref().map(|path| ApiServer::bind(path, limits)).transpose()?;
    let identity = Identity {
        id: args.id.clone(),
        app_name: personality.app_name(),
        version: personality.version(),
        api_version: personality::API_VERSION,
    };
    let instance = Arc::new(Instance::new(identity));
    let events = EventLog::new(&args.id);
    let requests = api.map(|api| api.spawn(Arc::clone(&instance), events.clone())).transpose()?;
    let startup = startup_times(start);

    let (sink, source) = event_channel()?;
    let sink = sink.with_last_resort(|| {
        last_line::write();
        exit::exit(ExitCode::Generic)
    });
    let platform = Platform {
        boot_timer: args.boot_timer.then_some(start),
        pci: args.pci,
        mmds_size_limit: args.mmds_size_limit,
        max_payload: args.max_payload,
    };
    // Never dropped: the process ends with it, without waiting for its threads.
    let mut controller =
        ManuallyDrop::new(Controller::new(instance, ProcessHost::new(child::run), platform, sink, events));
    descriptors::raise_limit();
    controller.set_requests(requests);
    controller.set_startup_times(startup);
    if controller.requests().is_some() {
        readiness.api_answers();
    }
    let ended = begin(personality, &mut controller, args, (config, metadata))
        .and_then(|()| Ok(event_loop::serve(&mut controller, &source, signals, &mut readiness)?));
    personality.settle_sockets();
    controller.shut_down(event_loop::CLOSE_TIMEOUT);
    let ended = unless_signalled(ended, signals);
    event_loop::publish_exit(&controller, personality, &ended);
    drop(controller.take_requests());
    ended
}

/// The time since the process, or its parent before it, started.
fn startup_times(start: StartTimes) -> StartupTimes {
    let now = StartTimes::now();
    let cpu_us = u64::try_from(now.cpu_us.saturating_sub(start.cpu_us)).unwrap_or(0);
    StartupTimes { wall_us: now.wall_us.saturating_sub(start.wall_us), cpu_us }
}

/// Does what the command line asks for before requests are served: opens the metrics file, fills
/// the metadata service, and starts or restores a microVM.
fn begin<H: Host>(
    personality: Personality,
    controller: &mut Controller<H>,
    args: &Args,
    (config, metadata): (Option<VmConfig>, Option<serde_json::Value>),
) -> Result<(), RunError> {
    if let Some(path) = &args.metrics_path {
        let metrics = Metrics { metrics_path: path.clone(), ..Metrics::default() };
        controller.run(Command::PutMetrics(metrics)).map_err(RunError::Metrics)?;
    }
    if let (Some(contents), Some(path)) = (metadata, &args.metadata) {
        controller
            .run(Command::PutMmds(contents))
            .map_err(|e| RunError::Metadata { path: path.display().to_string(), reason: e.to_string() })?;
        personality.log_metadata_from_file();
    }
    match (config, &args.config_file, &args.restore) {
        (Some(config), Some(path), _) => {
            controller
                .start_from(config)
                .map_err(|e| RunError::Start { path: path.display().to_string(), reason: e.to_string() })?;
            personality.log_start_from_file();
        }
        (_, _, Some(from)) => {
            let path = from.load.snapshot_path.display().to_string();
            restore_microvm(controller, from).map_err(|reason| RunError::Restore { path, reason })?;
        }
        _ => {}
    }
    Ok(())
}

/// Restores a microVM, by the commands that a client of the API would send.
fn restore_microvm<H: Host>(controller: &mut Controller<H>, from: &Restore) -> Result<(), CommandError> {
    if let Some(serial) = &from.serial {
        controller.run(Command::PutSerial(serial.clone()))?;
    }
    controller.run(Command::LoadSnapshot(from.load.clone())).map(drop)
}

/// Applies the log options of the command line.
fn set_up_logger(logger: &Logger) -> Result<(), RunError> {
    logger::set_up(logger).map_err(|source| RunError::Log {
        path: logger.log_path.as_deref().unwrap_or(Path::new("standard output")).display().to_string(),
        source,
    })
}

/// Checks that the file of seccomp filters can be read. Its contents have no effect.
fn check_seccomp_filter(path: &Path) -> Result<(), RunError> {
    let checked = fs::File::open(path).and_then(|file| {
        if file.metadata()?.is_dir() { Err(std::io::ErrorKind::IsADirectory.into()) } else { Ok(()) }
    });
    checked.map_err(|source| RunError::SeccompFilter { path: path.display().to_string(), source })?;
    log::warn!(
        "--seccomp-filter {} is accepted and has no effect: this version installs no filters",
        path.display()
    );
    Ok(())
}

fn read_config(path: &Path) -> Result<VmConfig, RunError> {
    let shown = || path.display().to_string();
    let text = fs::read_to_string(path).map_err(|source| RunError::ReadConfig { path: shown(), source })?;
    let mut config: VmConfig = serde_json::from_str(&text).map_err(|e| {
        let reason = config::json_error::describe(text.as_bytes(), &e);
        RunError::Config { path: shown(), reason }
    })?;
    config.check().map_err(|e| RunError::Config { path: shown(), reason: e.to_string() })?;
    template_file::resolve(&mut config)
        .map_err(|e| RunError::Config { path: shown(), reason: format!("cpu-config: {e}") })?;
    Ok(config)
}

fn read_metadata(path: &Path) -> Result<serde_json::Value, RunError> {
    let shown = || path.display().to_string();
    let text = fs::read_to_string(path).map_err(|source| RunError::ReadMetadata { path: shown(), source })?;
    serde_json::from_str(&text).map_err(|e| RunError::Metadata { path: shown(), reason: e.to_string() })
}
