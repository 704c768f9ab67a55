//! One boot of one monitor, measured.

use std::path::Path;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::json;
use vesta_tests::guest::Guest;
use vesta_tests::vmm::{Vmm, VmmBuilder};

use super::monitor::{Monitor, MonitorKind};
use super::qemu;

/// Longest wait for a step of the boot.
const TIMEOUT: Duration = Duration::from_mins(1);
/// The boot timer's line, in every monitor with Firecracker's interface.
pub(super) const BOOT_TIMER: &str = "Guest-boot-time";
/// What the guest's first process prints.
pub(super) const INIT: &str = "vesta-bench: init";

/// The times of one boot. `None` where the monitor has no such step.
#[derive(Debug, Default, Clone, Copy)]
pub(super) struct BootSample {
    /// From the process's start until the API answers.
    pub(super) api_ms: Option<f64>,
    /// How long the `InstanceStart` request took.
    pub(super) start_call_ms: Option<f64>,
    /// From the process's start until the guest's milestone, with the API calls in between.
    pub(super) spawn_to_milestone_ms: Option<f64>,
    /// From sending `InstanceStart` until the guest's milestone.
    pub(super) start_to_milestone_ms: Option<f64>,
    /// Resident memory of the monitor at that moment, without guest memory.
    pub(super) resident_kib: Option<f64>,
}

/// The step of the guest's boot that ends the measurement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Milestone {
    /// Its first instruction, which writes to the boot timer.
    FirstInstruction,
    /// Its first process, which prints [`INIT`] on the serial console.
    Init,
}

/// Starts the monitor and the guest, waits for the milestone, measures, and ends the monitor.
pub(super) fn boot_once(monitor: &Monitor, guest: &Guest, milestone: Milestone) -> Result<BootSample> {
    match monitor.kind {
        MonitorKind::Vesta | MonitorKind::Firecracker => boot_with_api(&monitor.path, guest, milestone),
        MonitorKind::Qemu => boot_with_qemu(&monitor.path, guest, milestone),
    }
    .with_context(|| monitor.name.clone())
}

fn boot_with_api(program: &Path, guest: &Guest, milestone: Milestone) -> Result<BootSample> {
    let vmm = VmmBuilder::new(program)?.quiet().with_api().arg("--boot-timer").spawn()?;
    let mut api = vmm.client();
    api.wait_ready(TIMEOUT)?;
    let answered = Instant::now();
    guest.put(&mut api)?;
    let asked = Instant::now();
    api.put("/actions", &json!({"action_type": "InstanceStart"}))?.ok()?;
    let started = Instant::now();
    let text = match milestone {
        Milestone::FirstInstruction => BOOT_TIMER,
        Milestone::Init => INIT,
    };
    let line = vmm.wait_for_line(text, TIMEOUT)?;
    Ok(BootSample {
        api_ms: Some(ms(answered - vmm.started())),
        start_call_ms: Some(ms(started - asked)),
        spawn_to_milestone_ms: Some(ms(line.at - vmm.started())),
        // Another thread reads the line, perhaps before this one has read the response.
        start_to_milestone_ms: Some(ms(line.at.saturating_duration_since(asked))),
        resident_kib: Some(resident_kib(&vmm, guest)?),
    })
}

fn boot_with_qemu(program: &Path, guest: &Guest, milestone: Milestone) -> Result<BootSample> {
    if milestone != Milestone::Init {
        bail!("QEMU has no boot timer");
    }
    let vmm = qemu::microvm(VmmBuilder::new(program)?.quiet(), guest).spawn()?;
    let line = vmm.wait_for_line(INIT, TIMEOUT)?;
    Ok(BootSample {
        spawn_to_milestone_ms: Some(ms(line.at - vmm.started())),
        resident_kib: Some(resident_kib(&vmm, guest)?),
        ..BootSample::default()
    })
}

fn ms(time: Duration) -> f64 {
    time.as_secs_f64() * 1e3
}

/// Resident memory of the process, without mappings as large as guest memory or larger.
fn resident_kib(vmm: &Vmm, guest: &Guest) -> Result<f64> {
    let smaps =
        std::fs::read_to_string(format!("/proc/{}/smaps", vmm.pid())).context("the monitor's mappings")?;
    let guest_kib = u64::from(guest.mem_mib) * 1024;
    let resident = resident_beside(&smaps, guest_kib).context("no mapping is as large as guest memory")?;
    Ok(f64::from(u32::try_from(resident).context("the monitor's resident memory")?))
}

/// The sum of `Rss` over all mappings smaller than `guest_kib`. `None` where no mapping is larger.
fn resident_beside(smaps: &str, guest_kib: u64) -> Option<u64> {
    let mut sum = 0;
    let mut size = 0;
    let mut guest_is_there = false;
    for line in smaps.lines() {
        let mut words = line.split_whitespace();
        let (Some(key), Some(Ok(value))) = (words.next(), words.next().map(str::parse::<u64>)) else {
            continue;
        };
        match key {
            "Size:" => size = value,
            "Rss:" if size >= guest_kib => guest_is_there = true,
            "Rss:" => sum += value,
            _ => {}
        }
    }
    guest_is_there.then_some(sum)
}

#[cfg(test)]
mod tests {
    use super::*;

    const SMAPS: &str = "\
00400000-00600000 r-xp 00000000 fe:00 1 /usr/bin/vesta-vmm
Size:               2048 kB
KernelPageSize:        4 kB
Rss:                 900 kB
Pss:                 900 kB
7f0000000000-7f0008000000 rw-p 00000000 00:00 0
Size:             131072 kB
Rss:               40960 kB
7ffd00000000-7ffd00021000 rw-p 00000000 00:00 0 [stack]
Size:                132 kB
Rss:                  16 kB
";

    #[test]
    fn guest_memory_is_left_out() {
        assert_eq!(resident_beside(SMAPS, 131_072), Some(916));
    }

    #[test]
    fn no_mapping_of_guest_size_gives_no_number() {
        assert_eq!(resident_beside(SMAPS, 262_144), None);
    }
}
