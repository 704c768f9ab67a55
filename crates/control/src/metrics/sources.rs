//! [`Sources`]: handles to the counters of all parts of a microVM, and the [`Report`] of them.
//!
//! Each part owns its counters. Reading them takes no lock, so that a report can be made on any
//! thread, also while the machine is being paused on another one.

use std::sync::Arc;

use machine::MachineStats;
use machine::stats::VcpuStats;
use sync::LatencyTotals;

use super::device_groups;
use super::operations::{self, Durations, OperationStats};
use super::process::ProcessCounts;
use super::report::{Group, Report, Value};
use super::requests::ApiStats;
use crate::http::Method;

/// The time that the process took to start, in microseconds, until its API was served.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct StartupTimes {
    /// Of the monotonic clock.
    pub wall_us: u64,
    /// Of its CPU time, and of its parent's before it.
    pub cpu_us: u64,
}

/// Handles to the counters of a microVM.
#[derive(Debug)]
pub(crate) struct Sources {
    pub(super) api: Option<Arc<ApiStats>>,
    pub(super) operations: Arc<OperationStats>,
    pub(super) process: fn() -> ProcessCounts,
    /// `None` before the guest starts.
    pub(super) machine: Option<MachineStats>,
    pub(super) startup: StartupTimes,
}

/// What happened to lines of metrics.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct LineCounts {
    /// Lines that were lost.
    pub(crate) missed: u64,
    /// Those of them for which the kernel refused the write.
    pub(crate) failed: u64,
}

impl Sources {
    /// The report that a line is made from, in the order of its groups.
    pub(crate) fn report(&self, lines: LineCounts) -> Report {
        let none = ApiStats::default();
        let api = self.api.as_deref().unwrap_or(&none);
        let process = (self.process)();
        let machine = self.machine.as_ref();
        let devices = machine.map(|machine| &machine.devices);
        let mut groups = vec![
            Group::new(
                "api_server",
                vec![
                    ("process_startup_time_us", Value::Micros(self.startup.wall_us)),
                    ("process_startup_time_cpu_us", Value::Micros(self.startup.cpu_us)),
                ],
            ),
            device_groups::balloon(),
        ];
        groups.extend(device_groups::block(devices.map_or(&[], |devices| &devices.drives)));
        groups.push(Group::counts("deprecated_api", &[("deprecated_http_api_calls", api.deprecated.get())]));
        groups.push(api.group("get_api_requests", Method::Get));
        groups.push(device_groups::i8042(machine.map(|machine| &*machine.keyboard)));
        groups.push(device_groups::uart(machine.map(|machine| &*machine.serial)));
        groups.push(operations::latencies(self.client_durations(&none), &self.operations.durations));
        groups.push(Group::counts(
            "logger",
            &[
                ("missed_metrics_count", lines.missed),
                ("metrics_fails", lines.failed),
                ("missed_log_count", process.missed_log_lines),
                ("rate_limited_log_count", process.suppressed_log_lines),
            ],
        ));
        let metadata = devices.and_then(|devices| devices.metadata.as_deref());
        groups.push(device_groups::mmds(metadata.map(mmds::Service::stats)));
        groups.extend(device_groups::net(devices.map_or(&[], |devices| &devices.networks)));
        groups.push(api.group("patch_api_requests", Method::Patch));
        groups.push(api.group("put_api_requests", Method::Put));
        let [seccomp, vmm, signals] = process.groups();
        groups.push(seccomp);
        groups.push(vcpu(machine.map_or(&[], |machine| &machine.vcpus)));
        groups.push(vmm);
        groups.push(signals);
        groups.push(device_groups::vsock(devices.and_then(|devices| devices.vsock.as_ref())));
        groups.push(device_groups::entropy(devices.and_then(|devices| devices.entropy.as_ref())));
        groups.push(device_groups::pmem());
        groups.push(device_groups::interrupts(devices));
        groups.push(device_groups::memory_hotplug());
        Report { groups }
    }

    /// The groups that a line does not have.
    pub(crate) fn own_groups(&self) -> Vec<Group> {
        let mut groups = Vec::from(self.operations.own_groups());
        if let Some(machine) = &self.machine {
            groups.extend(device_groups::own(&machine.devices));
        }
        groups
    }

    fn client_durations<'a>(&'a self, none: &'a ApiStats) -> &'a Durations {
        &self.api.as_deref().unwrap_or(none).durations
    }
}

/// The group `vcpu`: the sums over all vCPUs, and the extremes of all.
fn vcpu(vcpus: &[Arc<VcpuStats>]) -> Group {
    let count = |of: fn(&VcpuStats) -> u64| Value::Count(vcpus.iter().map(|vcpu| of(vcpu)).sum());
    let latency = |of: fn(&VcpuStats) -> LatencyTotals| {
        // A vCPU without such an exit has no extremes.
        let totals = vcpus.iter().map(|vcpu| of(vcpu)).filter(|totals| totals.max_ns > 0);
        Value::Latency(totals.reduce(merge).unwrap_or_default())
    };
    Group::new(
        "vcpu",
        vec![
            ("exit_io_in", count(|vcpu| vcpu.io_in.count.get())),
            ("exit_io_out", count(|vcpu| vcpu.io_out.count.get())),
            ("exit_mmio_read", count(|vcpu| vcpu.mmio_read.count.get())),
            ("exit_mmio_write", count(|vcpu| vcpu.mmio_write.count.get())),
            ("failures", count(|vcpu| vcpu.failures.get())),
            ("kvmclock_ctrl_fails", count(|vcpu| vcpu.kvmclock_ctrl_fails.get())),
            ("exit_io_in_agg", latency(|vcpu| vcpu.io_in.latency.get())),
            ("exit_io_out_agg", latency(|vcpu| vcpu.io_out.latency.get())),
            ("exit_mmio_read_agg", latency(|vcpu| vcpu.mmio_read.latency.get())),
            ("exit_mmio_write_agg", latency(|vcpu| vcpu.mmio_write.latency.get())),
        ],
    )
}

fn merge(a: LatencyTotals, b: LatencyTotals) -> LatencyTotals {
    LatencyTotals {
        min_ns: a.min_ns.min(b.min_ns),
        max_ns: a.max_ns.max(b.max_ns),
        sum_ns: a.sum_ns.saturating_add(b.sum_ns),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vcpus_without_exits_do_not_count_as_the_fastest() {
        let vcpus: Vec<Arc<VcpuStats>> = (0..3).map(|_| Arc::default()).collect();
        vcpus[0].io_in.latency.record(300);
        vcpus[2].io_in.latency.record(100);
        vcpus[2].io_in.count.add(1);
        let group = vcpu(&vcpus);
        let expected = LatencyTotals { min_ns: 100, max_ns: 300, sum_ns: 400 };
        assert_eq!(group.fields[6], ("exit_io_in_agg", Value::Latency(expected)));
        assert_eq!(group.fields[0].1, Value::Count(1));
    }
}
