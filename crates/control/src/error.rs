//! Why a command was not carried out.
//!
//! Each text names the thing, what is wrong with it, and the value or the bound. The API renders an
//! error in one place ([`api`](crate::api)): HTTP status 413 for [`CommandError::TooLarge`] and 400
//! for all others, with the text as `fault_message`.

use std::path::{Path, PathBuf};

use config::ConfigError;
use machine::legacy::KeyboardFull;
use memory::ForkError;
use memory::image::ImageError;
use mmds::store::StoreError;

use crate::metrics::MetricsError;
use crate::phase::PhaseError;
use crate::token::TaskError;

/// The cause of an error: an error of a crate below, or a text.
pub type Source = Box<dyn std::error::Error + Send + Sync>;

/// A command that was not carried out.
///
/// The microVM is as it was before, unless the command's own documentation says what may have
/// changed.
#[derive(Debug, thiserror::Error)]
pub enum CommandError {
    /// The command is not possible in this phase.
    #[error(transparent)]
    Phase(#[from] PhaseError),
    /// A value is out of bounds, or does not fit the rest of the configuration.
    #[error(transparent)]
    Config(#[from] ConfigError),
    /// The command's task was cancelled or could not be started.
    #[error(transparent)]
    Task(#[from] TaskError),
    /// The main thread dropped the command, because the process ends.
    #[error("the command got no answer: the microVM is ending")]
    NoAnswer,
    /// The answer cannot be written as JSON: a path is not UTF-8.
    #[error("cannot write the answer as JSON: {0}")]
    Json(#[source] serde_json::Error),
    /// The log's destination cannot be opened.
    #[error("cannot open the log {}: {source}", path.display())]
    Log {
        /// The destination.
        path: PathBuf,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The output of metrics cannot be set, or lost a line.
    #[error(transparent)]
    Metrics(#[from] MetricsError),
    /// A file that the configuration names cannot be opened.
    #[error("cannot open the {what} {}: {source}", path.display())]
    OpenFile {
        /// The file's role in the microVM.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why not.
        source: Source,
    },
    /// There is no drive with this id.
    #[error("drive {0}: there is no such drive")]
    NoSuchDrive(String),
    /// An update of this drive changes nothing.
    #[error("drive {0}: PATCH names no field to change; give path_on_host, rate_limiter or overlay")]
    EmptyDriveUpdate(String),
    /// Something is wrong with a drive's disk or overlay.
    #[error("drive {id}: {source}")]
    Drive {
        /// The drive's id.
        id: String,
        /// What is wrong.
        source: Source,
    },
    /// A drive's device does not take another disk. The source names the drive.
    #[error(transparent)]
    DriveSwap(Source),
    /// There is no network interface with this id.
    #[error("network interface {0}: there is no such interface")]
    NoSuchNetwork(String),
    /// A network interface has no backend.
    #[error(transparent)]
    Network(#[from] net::OpenError),
    /// A child of a fork is to have a descriptor of its parent's tap.
    #[error("network interface {id}: descriptor {fd} is that of the parent's tap; open another one")]
    ParentTap {
        /// The interface's id.
        id: String,
        /// The descriptor.
        fd: i32,
    },
    /// The sockets of the vsock device cannot be created.
    #[error(transparent)]
    VsockSocket(#[from] vsock::BindError),
    /// A command overrides the sockets of a vsock device, and the microVM has none.
    #[error("vsock_override: the microVM has no vsock device")]
    NoVsock,
    /// The metadata store does not accept the contents.
    #[error(transparent)]
    Metadata(StoreError),
    /// The contents exceed the size limit of the metadata store.
    #[error(transparent)]
    TooLarge(StoreError),
    /// The guest has no interface through which it could read metadata.
    #[error("the guest cannot reach MMDS: PUT /mmds/config named no network interface before it started")]
    NoMmds,
    /// The host end of the serial port cannot be opened.
    #[error("cannot open the host end of the serial port: {0}")]
    Serial(#[source] std::io::Error),
    /// The guest is to start without a kernel.
    #[error("there is nothing to boot: no boot source has been set")]
    NoBootSource,
    /// The machine cannot be built or resumed.
    #[error("cannot start the microVM: {0}")]
    Start(#[source] Source),
    /// The guest's keyboard buffer is full.
    #[error(transparent)]
    CtrlAltDel(#[from] KeyboardFull),
    /// A vCPU or a device did not stop in time. The microVM keeps running.
    #[error("the microVM cannot be paused now: {0}")]
    Pause(String),
    /// A bug in this monitor left no machine.
    #[error("there is no machine any more")]
    NoMachine,
    /// A vCPU thread died, which is a bug in this monitor.
    #[error("{0}")]
    VcpuDied(String),
    /// A live snapshot is still being written.
    #[error("a live snapshot is being written: GET /snapshot/job tells how far it is")]
    SnapshotJobRunning,
    /// There has been no live snapshot yet.
    #[error("there has been no live snapshot of this microVM")]
    NoSnapshotJob,
    /// A snapshot that is not live was requested in another phase than Paused.
    #[error(
        "PUT /snapshot/create needs a paused microVM, and it is {phase} (live snapshots need not: \"live\": true)"
    )]
    SnapshotNotPaused {
        /// The name of the phase.
        phase: &'static str,
    },
    /// A file of the snapshot is a file of a drive.
    #[error("{field} {}: it is {role} drive {drive_id}; name another file", path.display())]
    SnapshotTarget {
        /// The field that names the file.
        field: &'static str,
        /// The file.
        path: PathBuf,
        /// What the file is to the drive.
        role: &'static str,
        /// The drive.
        drive_id: String,
    },
    /// Saving or loading failed. The source names the file or the KVM call.
    #[error(transparent)]
    Snapshot(Source),
    /// A snapshot is to be loaded into a process that has a microVM to boot.
    #[error(
        "PUT /snapshot/load: {command} has configured a microVM to boot; load the snapshot in a new process"
    )]
    LoadAfterConfiguration {
        /// The first command that described the microVM to boot.
        command: &'static str,
    },
    /// A load overrides a device that the saved microVM does not have.
    #[error("{0}")]
    NotInSnapshot(String),
    /// The machine cannot be restored from its saved state.
    #[error("cannot restore the saved microVM: {0}")]
    Restore(#[source] Source),
    /// A snapshot or fork was requested while a debugger is attached.
    #[error(transparent)]
    DebuggerAttached(#[from] machine::debug::DebuggerAttached),
    /// The guest's memory cannot be forked.
    #[error(transparent)]
    ForkMemory(#[from] ForkError),
    /// A step of a fork or of a live snapshot failed.
    #[error("cannot {step}: {source}")]
    Fork {
        /// The step.
        step: &'static str,
        /// Why it failed.
        source: Source,
    },
    /// One child of a fork cannot be created.
    #[error("child {id}: {source}")]
    Child {
        /// The child's id.
        id: String,
        /// What is wrong.
        source: Source,
    },
}

impl CommandError {
    /// An error of the drive `id`.
    pub(crate) fn drive(id: &str, source: impl Into<Source>) -> Self {
        CommandError::Drive { id: id.to_owned(), source: source.into() }
    }

    /// An error of the child `id` of a fork.
    pub(crate) fn child(id: &str, source: impl Into<Source>) -> Self {
        CommandError::Child { id: id.to_owned(), source: source.into() }
    }

    /// A failure to open `path`, which is the `what` of the microVM.
    pub(crate) fn open(what: &'static str, path: &Path, source: impl Into<Source>) -> Self {
        CommandError::OpenFile { what, path: path.to_owned(), source: source.into() }
    }

    /// A failure to start the microVM.
    pub(crate) fn start(source: impl Into<Source>) -> Self {
        CommandError::Start(source.into())
    }

    /// A failure to save or load, whose source says all.
    pub(crate) fn snapshot(source: impl Into<Source>) -> Self {
        CommandError::Snapshot(source.into())
    }

    /// A failed step of a fork, for `map_err`.
    pub(crate) fn fork<E: Into<Source>>(step: &'static str) -> impl FnOnce(E) -> Self {
        move |source| CommandError::Fork { step, source: source.into() }
    }

    /// Whether the command was cancelled, by a client or because the process ends.
    pub(crate) fn is_cancelled(&self) -> bool {
        match self {
            CommandError::Task(error) => matches!(error, TaskError::Cancelled | TaskError::Abandoned),
            CommandError::Snapshot(source) => {
                matches!(source.downcast_ref(), Some(ImageError::Cancelled { .. }))
            }
            _ => false,
        }
    }

    /// Whether the HTTP status is 413 instead of 400.
    pub fn is_too_large(&self) -> bool {
        matches!(self, CommandError::TooLarge(_))
    }
}

impl From<StoreError> for CommandError {
    fn from(error: StoreError) -> Self {
        match error {
            StoreError::TooLarge { .. } => CommandError::TooLarge(error),
            StoreError::NotInitialized | StoreError::NotAnObject(_) => CommandError::Metadata(error),
        }
    }
}
