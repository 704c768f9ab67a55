//! One measurement of one contestant: what its guest reports, and the host's counters meanwhile.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::Result;
use vesta_tests::load::{self, Report, Workload};

use super::super::cpu_time::{ThreadTime, thread_times};
use super::contestant::Contestant;
use super::setup::{Setup, TIMEOUT};

/// One workload on one disk.
#[derive(Debug, Clone, Copy)]
pub(super) struct Sample {
    pub(super) report: Report,
    /// Processor time of vCPU threads and of all other threads, in nanoseconds.
    pub(super) vcpu_ns: u64,
    pub(super) other_ns: u64,
    /// KVM's counters, where the host shows them.
    pub(super) kvm: Option<KvmCounts>,
}

/// KVM's counters of one guest.
#[derive(Debug, Clone, Copy)]
pub(super) struct KvmCounts {
    pub(super) exits: u64,
    pub(super) interrupts: u64,
    pub(super) halts: u64,
}

/// The samples of one contestant in one round, by disk and workload.
pub(super) type Samples = Vec<(String, Workload, Sample)>;

/// Runs all workloads on all disks of one contestant.
pub(super) fn measure(setup: &Setup<'_>, contestant: &Contestant) -> Result<Samples> {
    let vmm = contestant.start(setup)?;
    let mut samples = Vec::new();
    for disk in setup.disks.list().iter().filter(|disk| contestant.uses(disk)) {
        for &workload in setup.workloads {
            vmm.wait_for_line(&load::begin_line(&disk.label, workload), TIMEOUT)?;
            let before = Counters::read(vmm.pid())?;
            let line = vmm.wait_for_line(&load::end_line(&disk.label, workload), TIMEOUT + setup.time)?;
            let after = Counters::read(vmm.pid())?;
            samples.push((disk.label.clone(), workload, before.until(&after, load::report(&line.text)?)));
        }
    }
    Ok(samples)
}

/// What the host counts for a process.
struct Counters {
    threads: BTreeMap<String, ThreadTime>,
    kvm: Option<KvmCounts>,
}

impl Counters {
    fn read(pid: u32) -> Result<Counters> {
        Ok(Counters { threads: thread_times(pid)?, kvm: kvm_counts(pid) })
    }

    fn until(&self, after: &Counters, report: Report) -> Sample {
        let (mut vcpu_ns, mut other_ns) = (0, 0);
        for (id, thread) in &after.threads {
            let used = thread.nanos - self.threads.get(id).map_or(0, |before| before.nanos);
            *if thread.is_vcpu { &mut vcpu_ns } else { &mut other_ns } += used;
        }
        let kvm = self.kvm.zip(after.kvm).map(|(before, after)| KvmCounts {
            exits: after.exits - before.exits,
            interrupts: after.interrupts - before.interrupts,
            halts: after.halts - before.halts,
        });
        Sample { report, vcpu_ns, other_ns, kvm }
    }
}

/// Reads debugfs, which has a directory for each guest, named after the process and a descriptor.
fn kvm_counts(pid: u32) -> Option<KvmCounts> {
    let prefix = format!("{pid}-");
    let dir: PathBuf = std::fs::read_dir("/sys/kernel/debug/kvm")
        .ok()?
        .flatten()
        .find(|entry| entry.file_name().to_string_lossy().starts_with(&prefix))?
        .path();
    let count = |name: &str| std::fs::read_to_string(dir.join(name)).ok()?.trim().parse().ok();
    Some(KvmCounts {
        exits: count("exits")?,
        interrupts: count("irq_injections")?,
        halts: count("halt_exits")?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counters(threads: &[(&str, bool, u64)]) -> Counters {
        let threads = threads
            .iter()
            .map(|&(id, is_vcpu, nanos)| (id.to_owned(), ThreadTime { is_vcpu, nanos }))
            .collect();
        Counters { threads, kvm: None }
    }

    #[test]
    fn processor_time_is_split_by_vcpu_and_other_threads() {
        let before = counters(&[("1", false, 100), ("2", true, 1000), ("3", false, 70)]);
        let after = counters(&[("1", false, 130), ("2", true, 1500), ("4", false, 7)]);
        let report = Report { ops: 1, nanos: 1, median_ns: None, p99_ns: None };
        let sample = before.until(&after, report);
        assert_eq!((sample.vcpu_ns, sample.other_ns), (500, 37));
    }
}
