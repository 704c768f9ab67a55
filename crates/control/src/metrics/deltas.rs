//! [`Deltas`]: what a line has, from the totals of a [`Report`].
//!
//! # Invariant
//!
//! The counters of the lines that were written add up to the totals. So a line that is lost changes
//! nothing here: what it had is in the next line. Reading a report for another purpose changes
//! nothing either.

use std::collections::BTreeMap;

use sync::LatencyTotals;

use super::report::{Group, Of, Report, Value};

/// The totals in the last line that was written.
#[derive(Debug, Default)]
pub(crate) struct Deltas {
    /// By key of a group: one total for each field.
    written: BTreeMap<String, Vec<u64>>,
}

/// A group of a line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LineGroup {
    /// Its key in the line: the name, with the device's id if it is about one.
    pub(crate) key: String,
    pub(crate) fields: Vec<(&'static str, LineValue)>,
}

/// A value of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LineValue {
    Number(u64),
    Micros { min: u64, max: u64, sum: u64 },
}

impl Deltas {
    /// The groups of the next line. [`Self::commit`] follows if it is written.
    pub(crate) fn next(&self, report: &Report) -> Vec<LineGroup> {
        let mut groups: Vec<LineGroup> = Vec::with_capacity(report.groups.len());
        let mut of_kind = 0;
        for group in &report.groups {
            let key = key(group);
            let fields = match group.of {
                Of::AllDevices => {
                    let devices = &groups[groups.len() - of_kind..];
                    group
                        .fields
                        .iter()
                        .enumerate()
                        .map(|(at, field)| (field.0, sum(devices, at, field.1)))
                        .collect()
                }
                Of::Process | Of::Device { .. } => {
                    let before = self.written.get(&key);
                    group
                        .fields
                        .iter()
                        .enumerate()
                        .map(|(at, (name, value))| {
                            let before = before.and_then(|totals| totals.get(at)).copied().unwrap_or(0);
                            (*name, change(*value, before))
                        })
                        .collect()
                }
            };
            of_kind = if matches!(group.of, Of::Device { .. }) { of_kind + 1 } else { 0 };
            groups.push(LineGroup { key, fields });
        }
        groups
    }

    /// Notes that the line for this report was written.
    pub(crate) fn commit(&mut self, report: &Report) {
        let groups = report.groups.iter().filter(|group| group.of != Of::AllDevices);
        self.written = groups
            .map(|group| (key(group), group.fields.iter().map(|(_, value)| total(*value)).collect()))
            .collect();
    }
}

fn key(group: &Group) -> String {
    match &group.of {
        Of::Process | Of::AllDevices => group.name.to_owned(),
        Of::Device { id, .. } => format!("{}_{id}", group.name),
    }
}

/// The part of a value that only grows, in the unit of a line.
fn total(value: Value) -> u64 {
    match value {
        Value::Count(count) => count,
        Value::Latency(LatencyTotals { sum_ns, .. }) => sum_ns / 1000,
        Value::Store(_) | Value::Micros(_) => 0,
    }
}

fn change(value: Value, before: u64) -> LineValue {
    // A device that was replaced counts from zero.
    let grown = |now: u64| now.checked_sub(before).unwrap_or(now);
    match value {
        Value::Count(now) => LineValue::Number(grown(now)),
        Value::Store(number) | Value::Micros(number) => LineValue::Number(number),
        Value::Latency(latency) => LineValue::Micros {
            min: latency.min_ns / 1000,
            max: latency.max_ns / 1000,
            sum: grown(total(value)),
        },
    }
}

/// The sum of field `at` of several devices. As in Firecracker, durations have no extremes.
fn sum(devices: &[LineGroup], at: usize, kind: Value) -> LineValue {
    let values = devices.iter().filter_map(|device| device.fields.get(at));
    let sum = values.fold(0_u64, |sum, (_, value)| match value {
        LineValue::Number(number) => sum.saturating_add(*number),
        LineValue::Micros { sum: micros, .. } => sum.saturating_add(*micros),
    });
    match kind {
        Value::Latency(_) => LineValue::Micros { min: 0, max: 0, sum },
        Value::Count(_) | Value::Store(_) | Value::Micros(_) => LineValue::Number(sum),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn device(id: &str, count: u64, sum_ns: u64) -> Group {
        let latency = LatencyTotals { min_ns: 2000, max_ns: 9000, sum_ns };
        Group {
            name: "block",
            of: Of::Device { label: "drive", id: id.into() },
            fields: vec![("read_count", Value::Count(count)), ("read_agg", Value::Latency(latency))],
        }
    }

    fn report(devices: Vec<Group>, stored: u64) -> Report {
        let fields =
            vec![("read_count", Value::Count(0)), ("read_agg", Value::Latency(LatencyTotals::default()))];
        let mut groups = devices;
        groups.push(Group { name: "block", of: Of::AllDevices, fields });
        groups.push(Group::new("vmm", vec![("panic_count", Value::Store(stored))]));
        Report { groups }
    }

    fn numbers(groups: &[LineGroup]) -> Vec<(String, Vec<LineValue>)> {
        let values = |group: &LineGroup| group.fields.iter().map(|(_, value)| *value).collect();
        groups.iter().map(|group| (group.key.clone(), values(group))).collect()
    }

    #[test]
    fn lost_line_is_in_the_next_one() {
        let mut deltas = Deltas::default();
        let first = report(vec![device("a", 5, 10_000)], 1);
        deltas.commit(&first);
        // This line is lost.
        deltas.next(&report(vec![device("a", 8, 20_000)], 1));
        let third = report(vec![device("a", 9, 30_999)], 1);
        let micros = |min, max, sum| LineValue::Micros { min, max, sum };
        assert_eq!(
            numbers(&deltas.next(&third)),
            [
                ("block_a".into(), vec![LineValue::Number(4), micros(2, 9, 20)]),
                ("block".into(), vec![LineValue::Number(4), micros(0, 0, 20)]),
                ("vmm".into(), vec![LineValue::Number(1)]),
            ]
        );
    }

    #[test]
    fn aggregate_is_the_sum_of_the_devices() {
        let deltas = Deltas::default();
        let groups = deltas.next(&report(vec![device("a", 1, 1500), device("b", 2, 1500)], 0));
        assert_eq!(groups[2].key, "block");
        assert_eq!(groups[2].fields[0].1, LineValue::Number(3));
        assert_eq!(groups[2].fields[1].1, LineValue::Micros { min: 0, max: 0, sum: 2 }, "of whole µs");
        let groups = deltas.next(&report(Vec::new(), 0));
        assert_eq!(groups[0].fields[0].1, LineValue::Number(0));
    }

    #[test]
    fn microseconds_of_lines_add_up_to_the_total() {
        let mut deltas = Deltas::default();
        let mut sum = 0;
        for ns in (0..10_000).step_by(700) {
            let report = report(vec![device("a", 0, ns)], 0);
            let LineValue::Micros { sum: micros, .. } = deltas.next(&report)[0].fields[1].1 else { panic!() };
            sum += micros;
            deltas.commit(&report);
        }
        assert_eq!(sum, 9);
    }

    #[test]
    fn replaced_device_counts_from_zero() {
        let mut deltas = Deltas::default();
        deltas.commit(&report(vec![device("a", 100, 0)], 0));
        let groups = deltas.next(&report(vec![device("a", 3, 0)], 0));
        assert_eq!(groups[0].fields[0].1, LineValue::Number(3));
    }
}
