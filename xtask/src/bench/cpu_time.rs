//! Processor time of a monitor's threads.

use std::collections::BTreeMap;

use anyhow::{Context, Result};

/// What a thread has used.
#[derive(Debug, Clone, Copy)]
pub(super) struct ThreadTime {
    pub(super) is_vcpu: bool,
    pub(super) nanos: u64,
}

/// The times of a monitor's threads, by thread id.
pub(super) fn thread_times(pid: u32) -> Result<BTreeMap<String, ThreadTime>> {
    let mut threads = BTreeMap::new();
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).context("the monitor's threads")? {
        let entry = entry?;
        // The thread may have ended.
        let Ok(name) = std::fs::read_to_string(entry.path().join("comm")) else { continue };
        let Ok(times) = std::fs::read_to_string(entry.path().join("schedstat")) else { continue };
        let nanos = times.split(' ').next().and_then(|time| time.parse().ok()).context("schedstat")?;
        let is_vcpu = name.starts_with("fc_vcpu") || name.starts_with("CPU ");
        let thread = entry.file_name().to_string_lossy().into_owned();
        threads.insert(thread, ThreadTime { is_vcpu, nanos });
    }
    Ok(threads)
}

/// Processor time of a monitor's threads other than vCPUs, in nanoseconds.
pub(super) fn cpu_ns(pid: u32) -> Result<u64> {
    let threads = thread_times(pid)?;
    Ok(threads.values().filter(|thread| !thread.is_vcpu).map(|thread| thread.nanos).sum())
}
