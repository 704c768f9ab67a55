//! The totals of a [`Report`] as Prometheus text (exposition format 0.0.4).
//!
//! # Names
//!
//! `vesta_GROUP_FIELD`, from the names in a line: counters end with `_total` (in the place of
//! `_count`), durations are in seconds. Devices are told apart by a label. There is no sum over
//! devices: Prometheus adds up.

use std::collections::BTreeSet;
use std::fmt::Write;

use super::report::{Group, Of, Report, Value};

/// The media type of the text.
pub(crate) const CONTENT_TYPE: &str = "text/plain; version=0.0.4";

/// The text of these groups, with `info` as labels of `vesta_info`.
pub(crate) fn render(info: &[(&str, &str)], reports: &[&Report]) -> String {
    let mut text = String::from(
        "# HELP vesta_info The microVM's id and the monitor's version.\n# TYPE vesta_info gauge\nvesta_info",
    );
    put_labels(&mut text, info);
    text.push_str(" 1\n");
    let groups: Vec<_> =
        reports.iter().flat_map(|report| &report.groups).filter(|group| group.of != Of::AllDevices).collect();
    let mut done = BTreeSet::new();
    for group in &groups {
        for (field, value) in &group.fields {
            if done.insert((group.name, *field)) {
                put_family(&mut text, &groups, group.name, field, *value);
            }
        }
    }
    text
}

/// A series of samples: the end of its name, its type, and how its value is written.
type Series = (&'static str, &'static str, fn(Value) -> String);

const COUNT: &[Series] = &[("_total", "counter", number)];
const STORE: &[Series] = &[("", "gauge", number)];
const MICROS: &[Series] = &[("_seconds", "gauge", seconds_of_micros)];
const LATENCY: &[Series] = &[
    ("_seconds_total", "counter", |value| seconds(totals(value).sum_ns)),
    ("_min_seconds", "gauge", |value| seconds(totals(value).min_ns)),
    ("_max_seconds", "gauge", |value| seconds(totals(value).max_ns)),
];

/// The samples of one field, of all devices: a family has to be in one place.
fn put_family(text: &mut String, groups: &[&Group], group: &str, field: &str, kind: Value) {
    let series = match kind {
        Value::Count(_) => COUNT,
        Value::Store(_) => STORE,
        Value::Micros(_) => MICROS,
        Value::Latency(_) => LATENCY,
    };
    for (end, kind, show) in series {
        let name = metric_name(group, field, end);
        // Writing to a string does not fail.
        let _ = writeln!(text, "# HELP {name} The counter {group}.{field}.\n# TYPE {name} {kind}");
        for of in groups.iter().filter(|other| other.name == group) {
            let Some((_, value)) = of.fields.iter().find(|other| other.0 == field) else { continue };
            text.push_str(&name);
            if let Of::Device { label, id } = &of.of {
                put_labels(text, &[(label, id)]);
            }
            let _ = writeln!(text, " {}", show(*value));
        }
    }
}

fn metric_name(group: &str, field: &str, end: &str) -> String {
    let group = group.strip_suffix("_us").unwrap_or(group);
    let stem = ["_count", "_us", "_agg"].iter().find_map(|unit| field.strip_suffix(unit)).unwrap_or(field);
    let stem = if field == "count" { "" } else { stem };
    let join = if stem.is_empty() { "" } else { "_" };
    let duration = if field.ends_with("_agg") { "_duration" } else { "" };
    format!("vesta_{group}{join}{stem}{duration}{end}")
}

fn put_labels(text: &mut String, labels: &[(&str, &str)]) {
    text.push('{');
    for (at, (name, value)) in labels.iter().enumerate() {
        if at > 0 {
            text.push(',');
        }
        text.push_str(name);
        text.push_str("=\"");
        for character in value.chars() {
            match character {
                '\\' => text.push_str("\\\\"),
                '"' => text.push_str("\\\""),
                '\n' => text.push_str("\\n"),
                other => text.push(other),
            }
        }
        text.push('"');
    }
    text.push('}');
}

fn number(value: Value) -> String {
    match value {
        Value::Count(number) | Value::Store(number) | Value::Micros(number) => number.to_string(),
        Value::Latency(totals) => totals.sum_ns.to_string(),
    }
}

fn seconds_of_micros(value: Value) -> String {
    match value {
        Value::Micros(micros) => seconds(micros.saturating_mul(1000)),
        other => number(other),
    }
}

fn totals(value: Value) -> sync::LatencyTotals {
    if let Value::Latency(totals) = value { totals } else { sync::LatencyTotals::default() }
}

fn seconds(ns: u64) -> String {
    format!("{}.{:09}", ns / 1_000_000_000, ns % 1_000_000_000)
}

#[cfg(test)]
mod tests {
    use sync::LatencyTotals;

    use super::*;

    fn device(id: &str, bytes: u64) -> Group {
        Group {
            name: "block",
            of: Of::Device { label: "drive", id: id.into() },
            fields: vec![("read_bytes", Value::Count(bytes)), ("read_count", Value::Count(1))],
        }
    }

    #[test]
    fn families_are_whole_and_have_type_and_help() {
        let latency = LatencyTotals { min_ns: 5, max_ns: 1_500_000_000, sum_ns: 2_000_000_001 };
        let report = Report {
            groups: vec![
                device("a", 3),
                device("b", 4),
                Group { of: Of::AllDevices, ..device("", 7) },
                Group::new("latencies_us", vec![("pause_vm", Value::Micros(1500))]),
                Group::new("vcpu", vec![("exit_io_in_agg", Value::Latency(latency))]),
                Group::new("vmm", vec![("panic_count", Value::Store(0))]),
            ],
        };
        let own = Report { groups: vec![Group::counts("fork", &[("count", 2), ("fails", 0)])] };
        let text = render(&[("id", "vm-1"), ("version", "0.1")], &[&report, &own]);
        let expected = "\
# HELP vesta_info The microVM's id and the monitor's version.
# TYPE vesta_info gauge
vesta_info{id=\"vm-1\",version=\"0.1\"} 1
# HELP vesta_block_read_bytes_total The counter block.read_bytes.
# TYPE vesta_block_read_bytes_total counter
vesta_block_read_bytes_total{drive=\"a\"} 3
vesta_block_read_bytes_total{drive=\"b\"} 4
# HELP vesta_block_read_total The counter block.read_count.
# TYPE vesta_block_read_total counter
vesta_block_read_total{drive=\"a\"} 1
vesta_block_read_total{drive=\"b\"} 1
# HELP vesta_latencies_pause_vm_seconds The counter latencies_us.pause_vm.
# TYPE vesta_latencies_pause_vm_seconds gauge
vesta_latencies_pause_vm_seconds 0.001500000
# HELP vesta_vcpu_exit_io_in_duration_seconds_total The counter vcpu.exit_io_in_agg.
# TYPE vesta_vcpu_exit_io_in_duration_seconds_total counter
vesta_vcpu_exit_io_in_duration_seconds_total 2.000000001
# HELP vesta_vcpu_exit_io_in_duration_min_seconds The counter vcpu.exit_io_in_agg.
# TYPE vesta_vcpu_exit_io_in_duration_min_seconds gauge
vesta_vcpu_exit_io_in_duration_min_seconds 0.000000005
# HELP vesta_vcpu_exit_io_in_duration_max_seconds The counter vcpu.exit_io_in_agg.
# TYPE vesta_vcpu_exit_io_in_duration_max_seconds gauge
vesta_vcpu_exit_io_in_duration_max_seconds 1.500000000
# HELP vesta_vmm_panic The counter vmm.panic_count.
# TYPE vesta_vmm_panic gauge
vesta_vmm_panic 0
# HELP vesta_fork_total The counter fork.count.
# TYPE vesta_fork_total counter
vesta_fork_total 2
# HELP vesta_fork_fails_total The counter fork.fails.
# TYPE vesta_fork_fails_total counter
vesta_fork_fails_total 0
";
        assert_eq!(text, expected);
    }

    #[test]
    fn labels_are_escaped() {
        let text = render(&[("id", "a\"b\\c\nd")], &[]);
        assert!(text.ends_with("vesta_info{id=\"a\\\"b\\\\c\\nd\"} 1\n"), "{text}");
    }
}
