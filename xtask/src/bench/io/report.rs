//! The tables of `bench io`.

use std::collections::BTreeMap;
use std::fmt::Write as _;

use vesta_tests::load::{Direction, Workload};

use super::super::table::{Row, markdown, median};
use super::contestant::{Contestant, QEMU};
use super::disks::Disk;
use super::sample::{Sample, Samples};

/// All measurements.
pub(super) struct Results {
    contestants: Vec<Contestant>,
    /// For each contestant, by disk and workload: one sample for each round.
    samples: Vec<BTreeMap<(String, String), Vec<Sample>>>,
}

/// The figure of a sample that a table shows.
type Figure = fn(Workload, &Sample) -> Option<f64>;

impl Results {
    pub(super) fn new(contestants: Vec<Contestant>) -> Results {
        let samples = contestants.iter().map(|_| BTreeMap::new()).collect();
        Results { contestants, samples }
    }

    pub(super) fn contestant(&self, index: usize) -> Option<&Contestant> {
        self.contestants.get(index)
    }

    pub(super) fn add(&mut self, contestant: usize, samples: Samples) {
        for (disk, workload, sample) in samples {
            self.samples[contestant].entry((disk, workload.to_string())).or_default().push(sample);
        }
    }

    pub(super) fn exclude(&mut self, contestant: usize) {
        self.contestants.remove(contestant);
        self.samples.remove(contestant);
    }

    pub(super) fn tables(&self, disks: &[Disk], workloads: &[Workload]) -> String {
        let mut text = String::new();
        // Infallible: it writes to a String.
        for disk in disks {
            let _ = writeln!(text, "### On {}\n", disk.what);
            text += &self.table(disk, workloads, title, speed);
            let _ = writeln!(text, "\nHost CPU for each transfer, without the vCPU, us:\n");
            text += &self
                .table(disk, workloads, short_title, |_, sample| Some(micros_each(sample, sample.other_ns)));
            let _ = writeln!(text, "\nHost CPU for each transfer, with the vCPU and its guest, us:\n");
            let all =
                |_: Workload, sample: &Sample| Some(micros_each(sample, sample.other_ns + sample.vcpu_ns));
            text += &self.table(disk, workloads, short_title, all);
            for (what, figure) in KVM_FIGURES {
                let _ = writeln!(text, "\n{what} for each transfer:\n");
                text += &self.table(disk, workloads, short_title, figure);
            }
            text += &self.ratios(disk, workloads);
            text.push('\n');
        }
        text
    }

    fn table(
        &self,
        disk: &Disk,
        workloads: &[Workload],
        title: fn(Workload) -> String,
        figure: Figure,
    ) -> String {
        let rows: Vec<Row> = self
            .contestants
            .iter()
            .zip(&self.samples)
            .map(|(contestant, samples)| Row {
                name: contestant.name.clone(),
                samples: workloads.iter().map(|&workload| series(samples, disk, workload, figure)).collect(),
            })
            .filter(|row: &Row| row.samples.iter().any(|samples| !samples.is_empty()))
            .collect();
        let titles: Vec<String> = workloads.iter().map(|&workload| title(workload)).collect();
        let titles: Vec<&str> = titles.iter().map(String::as_str).collect();
        markdown(&titles, &rows)
    }

    /// Speed and cost relative to QEMU: medians of the ratios within each round.
    fn ratios(&self, disk: &Disk, workloads: &[Workload]) -> String {
        let Some(qemu) = self.contestants.iter().position(|contestant| contestant.name == QEMU) else {
            return String::new();
        };
        let mut text = format!(
            "\nRelative to {QEMU}, within each round: speed / host CPU without the vCPU:\n\n\
             | | {} |\n|---|{}\n",
            workloads.iter().map(|&workload| short_title(workload)).collect::<Vec<_>>().join(" | "),
            "---:|".repeat(workloads.len())
        );
        for (contestant, samples) in self.contestants.iter().zip(&self.samples) {
            let cells: Vec<String> = workloads
                .iter()
                .map(|&workload| {
                    let ratio = |figure: Figure| {
                        let (ours, theirs) = (
                            series(samples, disk, workload, figure),
                            series(&self.samples[qemu], disk, workload, figure),
                        );
                        let ratios: Vec<f64> =
                            ours.iter().zip(&theirs).map(|(ours, theirs)| ours / theirs).collect();
                        median(&ratios).map_or_else(|| "-".to_owned(), |ratio| format!("{ratio:.2}"))
                    };
                    let rate: Figure = |_, sample| Some(per_second(sample));
                    let cost: Figure = |_, sample| Some(micros_each(sample, sample.other_ns));
                    format!("{} / {}", ratio(rate), ratio(cost))
                })
                .collect();
            let _ = writeln!(text, "| {} | {} |", contestant.name, cells.join(" | "));
        }
        text
    }
}

/// Figures from KVM's counters, where the host shows them.
const KVM_FIGURES: [(&str, Figure); 2] = [
    ("Exits from the guest", |_, sample| Some(float(sample.kvm?.exits) / float(sample.report.ops))),
    ("Interrupts to the guest", |_, sample| Some(float(sample.kvm?.interrupts) / float(sample.report.ops))),
];

fn series(
    samples: &BTreeMap<(String, String), Vec<Sample>>,
    disk: &Disk,
    workload: Workload,
    figure: Figure,
) -> Vec<f64> {
    let of_workload = samples.get(&(disk.label.clone(), workload.to_string()));
    of_workload.into_iter().flatten().filter_map(|sample| figure(workload, sample)).collect()
}

/// The speed in the workload's unit: latency for a depth of one without flushes, else transfers per
/// second, or MiB per second for large blocks.
fn speed(workload: Workload, sample: &Sample) -> Option<f64> {
    if workload.depth == 1 && workload.flush.is_none() {
        return sample.report.median_ns.map(|nanos| float(nanos) / 1e3);
    }
    let large = workload.block >= LARGE;
    Some(per_second(sample) * if large { f64::from(workload.block) / f64::from(1 << 20) } else { 1.0 })
}

/// Workloads with blocks of this size or more are measured in MiB per second.
const LARGE: u32 = 64 << 10;

fn title(workload: Workload) -> String {
    let unit = match workload {
        Workload { depth: 1, flush: None, .. } => "us",
        Workload { block: LARGE.., .. } => "MiB/s",
        _ => "IOPS",
    };
    format!("{}, {unit}", short_title(workload))
}

fn short_title(workload: Workload) -> String {
    let direction = match workload.direction {
        Direction::Read => "read",
        Direction::Write => "write",
    };
    let flush = workload.flush.map_or_else(String::new, |writes| format!(", flush after {writes}"));
    format!("{} KiB {direction}, QD{}{flush}", workload.block / 1024, workload.depth)
}

fn per_second(sample: &Sample) -> f64 {
    float(sample.report.ops) * 1e9 / float(sample.report.nanos)
}

fn micros_each(sample: &Sample, nanos: u64) -> f64 {
    float(nanos) / 1e3 / float(sample.report.ops)
}

#[expect(clippy::cast_precision_loss, reason = "it is printed with few digits")]
fn float(count: u64) -> f64 {
    count as f64
}

#[cfg(test)]
mod tests {
    use vesta_tests::load::Report;

    use super::*;

    #[test]
    fn each_workload_has_its_own_unit() {
        let report = Report { ops: 2000, nanos: 500_000_000, median_ns: Some(7500), p99_ns: None };
        let sample = Sample { report, vcpu_ns: 0, other_ns: 3_000_000, kvm: None };
        for (workload, unit, value) in [
            ("randread:4096:1", "us", 7.5),
            ("randwrite:4096:32", "IOPS", 4000.0),
            ("randwrite:4096:1:64", "IOPS", 4000.0),
            ("read:131072:4", "MiB/s", 500.0),
        ] {
            let workload: Workload = workload.parse().unwrap();
            assert!(title(workload).ends_with(unit), "{}", title(workload));
            let error = speed(workload, &sample).unwrap() - value;
            assert!(error.abs() < 1e-9, "{workload}: {error}");
        }
        assert!((micros_each(&sample, sample.other_ns) - 1.5).abs() < 1e-9);
    }
}
