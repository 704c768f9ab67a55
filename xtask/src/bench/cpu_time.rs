//! Processor time of a monitor's threads.

use anyhow::{Context, Result};

/// Processor time of a monitor's threads other than vCPUs, in nanoseconds.
pub(super) fn cpu_ns(pid: u32) -> Result<u64> {
    let mut sum = 0;
    for entry in std::fs::read_dir(format!("/proc/{pid}/task")).context("the monitor's threads")? {
        let entry = entry?.path();
        // The thread may have ended.
        let Ok(name) = std::fs::read_to_string(entry.join("comm")) else { continue };
        let Ok(times) = std::fs::read_to_string(entry.join("schedstat")) else { continue };
        if !name.starts_with("fc_vcpu") && !name.starts_with("CPU ") {
            sum += times.split(' ').next().and_then(|time| time.parse::<u64>().ok()).context("schedstat")?;
        }
    }
    Ok(sum)
}
