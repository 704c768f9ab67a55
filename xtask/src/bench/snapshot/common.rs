//! What both tables of `bench snapshot` share.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow};
use serde::{Deserialize, Serialize};
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::vmm::{Vmm, VmmBuilder};

use super::super::monitor::Monitor;
use super::super::rounds::Entry;
use super::super::serving_guest::ServingGuest;

/// Longest wait for anything.
pub(super) const TIMEOUT: Duration = Duration::from_mins(1);
/// Fewest runs that a median is taken over.
pub(super) const FEWEST_RUNS: usize = 5;

/// What to measure on the host.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct RunSpec {
    pub(super) monitors: Vec<Monitor>,
    pub(super) runs: usize,
    /// The directory for snapshots.
    pub(super) dir: PathBuf,
    /// The Linux guest; `None` for guests of a few instructions.
    pub(super) linux: Option<ServingGuest>,
}

pub(super) fn pause(api: &mut ApiClient) -> Result<()> {
    api.patch("/vm", &json!({"state": "Paused"}))?.ok().map(drop)
}

pub(super) fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1000.0
}

/// An entry for each of these monitors.
pub(super) fn entries<'a>(monitors: impl IntoIterator<Item = &'a Monitor>) -> Vec<Entry<&'a Monitor>> {
    let entry = |monitor: &'a Monitor| Entry {
        name: monitor.name.clone(),
        may_fail: monitor.peer,
        contestant: monitor,
    };
    monitors.into_iter().map(entry).collect()
}

/// Private memory of a process, in KiB.
pub(super) fn private_kib(pid: u64) -> Result<f64> {
    let text = fs::read_to_string(format!("/proc/{pid}/smaps_rollup"))?;
    let kib = text
        .lines()
        .filter(|line| line.starts_with("Private_"))
        .filter_map(|line| line.split_whitespace().nth(1)?.parse::<u32>().ok())
        .sum::<u32>();
    Ok(kib.into())
}

/// Starts so many monitors, and calls `each` for all of them at once.
pub(super) fn all_at_once(
    program: &Path,
    count: usize,
    each: impl Fn(&Vmm) -> Result<()> + Sync,
) -> Result<Vec<Vmm>> {
    // Started from this thread: they are killed when the thread that started them ends.
    let spawn = |_| VmmBuilder::new(program)?.quiet().with_api().stdout_to_file()?.spawn();
    let monitors = (0..count).map(spawn).collect::<Result<Vec<_>>>()?;
    std::thread::scope(|scope| {
        let threads: Vec<_> = monitors.iter().map(|monitor| scope.spawn(|| each(monitor))).collect();
        threads.into_iter().try_for_each(|thread| thread.join().map_err(|_| anyhow!("a thread failed"))?)
    })?;
    Ok(monitors)
}
