//! What the API answers, apart from the configuration itself. The other direction of the structs of
//! this crate: the monitor writes them, and clients read them.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::snapshot::SnapshotType;

/// What `GET /` answers: who this microVM is, and its state.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct InstanceInfo {
    /// Name of the monitor.
    pub app_name: String,
    /// Id of the microVM.
    pub id: String,
    /// State of the microVM.
    pub state: InstanceState,
    /// Version of the monitor.
    pub vmm_version: String,
}

/// State of a microVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum InstanceState {
    /// The microVM is being configured. There is no guest yet.
    #[serde(rename = "Not started")]
    NotStarted,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
}

/// What `GET /version` answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Version {
    /// Version of Firecracker whose API this is.
    pub firecracker_version: String,
}

/// A refused request. Nothing was changed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct Fault {
    /// What is wrong: the thing, the value and the bound.
    pub fault_message: String,
}

/// A request that is not readable as HTTP, is too large, or came over too many connections.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct HttpError {
    /// What is wrong.
    pub error: String,
}

/// What `PUT /fork` answers when at least one child has started. An extension.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct ForkOutcome {
    /// How long the guest was paused, in microseconds.
    pub pause_us: u64,
    /// The children, in the order of the request.
    pub children: Vec<ChildOutcome>,
}

/// What became of one child of a fork.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(untagged)]
pub enum ChildOutcome {
    /// The child has started.
    Started {
        /// Id of the child.
        id: String,
        /// Id of its process.
        pid: u32,
        /// Its API socket; null if it has no API.
        api_socket: Option<PathBuf>,
        /// Whether its guest runs.
        state: ChildState,
        /// When the child was ready, in microseconds since the fork began.
        ready_us: u64,
    },
    /// The child could not start.
    Failed {
        /// Id of the child.
        id: String,
        /// Why it could not start.
        error: String,
    },
}

/// State of a child after its start.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum ChildState {
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
}

/// What `GET /snapshot/job` answers: progress of a snapshot or load. An extension.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub struct SnapshotJob {
    /// State of the job.
    pub state: SnapshotJobState,
    /// State file.
    pub snapshot_path: PathBuf,
    /// Memory file, or socket of the page server.
    pub mem_file_path: PathBuf,
    /// Which pages a live snapshot has; absent for other jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub snapshot_type: Option<SnapshotType>,
    /// Bytes of memory written or read so far.
    pub bytes_done: u64,
    /// Bytes of memory to write or read; 0 as long as that is not known.
    pub bytes_total: u64,
    /// How long the guest was paused for a live snapshot, in microseconds; absent for other jobs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pause_us: Option<u64>,
    /// How long the job has taken so far, or took, in microseconds.
    pub elapsed_us: u64,
    /// Why the job failed; absent if it did not.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
}

/// State of a snapshot job.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum SnapshotJobState {
    /// The files are being written or read.
    Running,
    /// The files are complete.
    Done,
    /// The job was cancelled and left no files.
    Cancelled,
    /// The job failed and left no files.
    Failed,
}
