//! What the monitor answers, where that is not one of the structs of its configuration.
//!
//! Unknown fields are ignored, so that a newer monitor can be asked.

use std::fmt;
use std::path::PathBuf;

use config::{InstanceId, SnapshotType};
use serde::Deserialize;

/// The answer to `GET /`: what the microVM is.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct InstanceInfo {
    /// The id of the microVM.
    pub id: InstanceId,
    /// Its state.
    pub state: InstanceState,
    /// The version of the monitor.
    pub vmm_version: String,
    /// The name of the monitor.
    pub app_name: String,
}

/// State of a microVM. There is none for a stopped one: its process ends.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum InstanceState {
    /// It is being configured. There is no guest yet.
    #[serde(rename = "Not started")]
    NotStarted,
    /// The guest runs.
    Running,
    /// The guest is paused.
    Paused,
}

/// The answer to `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
pub(crate) struct Version {
    pub(crate) firecracker_version: String,
}

/// The answer to `PUT /fork`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct ForkReport {
    /// How long the parent's guest was paused, in microseconds.
    pub pause_us: u64,
    /// The children, in the order of the request. At least one has started.
    pub children: Vec<ForkedChild>,
}

/// One child in the answer to `PUT /fork`.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(untagged)]
pub enum ForkedChild {
    /// The child has started.
    Started(StartedChild),
    /// The child has not started. The others are not affected.
    Failed(FailedChild),
}

/// A child that has started: a process of its own, which outlives its parent.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct StartedChild {
    /// The id of the child.
    pub id: InstanceId,
    /// Its process id.
    pub pid: u32,
    /// Its API socket, if it has an API.
    pub api_socket: Option<PathBuf>,
    /// Whether its guest runs or is paused.
    pub state: InstanceState,
    /// Time from the request until the child was ready, in microseconds.
    pub ready_us: u64,
}

/// A child that has not started.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct FailedChild {
    /// The id of the child.
    pub id: InstanceId,
    /// Why it has not started.
    pub error: String,
}

impl ForkedChild {
    /// The child, or why it has not started.
    pub fn started(self) -> Result<StartedChild, FailedChild> {
        match self {
            ForkedChild::Started(child) => Ok(child),
            ForkedChild::Failed(child) => Err(child),
        }
    }
}

impl fmt::Display for FailedChild {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "child {}: {}", self.id, self.error)
    }
}

impl std::error::Error for FailedChild {}

/// The answer to `GET /snapshot/job`: a live snapshot.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[non_exhaustive]
pub struct SnapshotJob {
    /// Whether the files are being written, or how that ended.
    pub state: JobState,
    /// The state file.
    pub snapshot_path: PathBuf,
    /// The memory file.
    pub mem_file_path: PathBuf,
    /// Which pages of memory are written.
    pub snapshot_type: SnapshotType,
    /// Bytes of memory that are written.
    pub bytes_done: u64,
    /// Bytes of memory to write.
    pub bytes_total: u64,
    /// How long the guest was paused, in microseconds.
    pub pause_us: u64,
    /// Time since the request, until the end of the job, in microseconds.
    pub elapsed_us: u64,
    /// Why the job failed.
    pub error: Option<String>,
}

/// State of a live snapshot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
pub enum JobState {
    /// The files are being written.
    Running,
    /// Both files are there.
    Done,
    /// The job was cancelled. There are no files of it.
    Cancelled,
    /// The job failed; see [`SnapshotJob::error`]. There are no files of it.
    Failed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fork_report_tells_started_children_from_failed_ones() {
        let report: ForkReport = serde_json::from_str(
            r#"{"pause_us":7,"children":[
                {"id":"a","pid":5,"api_socket":null,"state":"Paused","ready_us":9},
                {"id":"b","error":"no memory"}]}"#,
        )
        .unwrap();
        let [first, second] = <[ForkedChild; 2]>::try_from(report.children).unwrap();
        let started = first.started().unwrap();
        assert_eq!((started.pid, started.state, started.ready_us), (5, InstanceState::Paused, 9));
        assert_eq!(second.started().unwrap_err().to_string(), "child b: no memory");
    }

    #[test]
    fn answers_may_have_more_fields() {
        let info: InstanceInfo = serde_json::from_str(
            r#"{"id":"a","state":"Not started","vmm_version":"1","app_name":"n","new":1}"#,
        )
        .unwrap();
        assert_eq!(info.state, InstanceState::NotStarted);
    }
}
