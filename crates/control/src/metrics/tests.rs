//! Tests of the recorder: which lines are written when, and what they have.

use std::collections::BTreeMap;
use std::path::Path;
use std::sync::atomic::Ordering;

use serde_json::Value as Json;

use super::*;

fn config(path: &Path) -> config::Metrics {
    config::Metrics { metrics_path: path.into(), ..config::Metrics::default() }
}

fn lines(path: &Path) -> Vec<Json> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

#[test]
fn prometheus_reads_totals_and_leaves_lines_alone() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let metrics = Metrics::new();
    let api = Arc::<ApiStats>::default();
    metrics.set_api(Some(Arc::clone(&api)));
    metrics.configure(&config(&path), "vm").unwrap();
    api.deprecated.add(3);
    metrics.flush().unwrap();
    api.deprecated.add(2);
    let total = "vesta_deprecated_api_deprecated_http_api_calls_total 5\n";
    for _ in 0..2 {
        assert!(metrics.prometheus(&[], Vec::new()).contains(total));
    }
    metrics.flush().unwrap();
    let counted: Vec<_> =
        lines(&path).iter().map(|line| line["deprecated_api"]["deprecated_http_api_calls"].clone()).collect();
    assert_eq!(counted, [3, 2]);
}

#[test]
fn lost_lines_are_counted_and_their_counters_come_later() {
    let metrics = Metrics::new();
    let api = Arc::<ApiStats>::default();
    metrics.set_api(Some(Arc::clone(&api)));
    metrics.configure(&config(Path::new("/dev/full")), "vm").unwrap();
    for _ in 0..3 {
        let error = metrics.flush().unwrap_err().to_string();
        assert!(error.contains("not written to /dev/full: No space left"), "{error}");
    }
    // The disk has space again.
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let output = Output::open(&path).unwrap();
    metrics.lock().writer.as_mut().unwrap().sink = Sink::new(output);
    api.deprecated.add(1);
    metrics.flush().unwrap();
    let line = &lines(&path)[0];
    assert_eq!(line["logger"]["missed_metrics_count"], 3);
    assert_eq!(line["logger"]["metrics_fails"], 3);
    assert_eq!(line["deprecated_api"]["deprecated_http_api_calls"], 1);
}

#[test]
fn output_is_set_once_and_a_failed_attempt_can_be_repeated() {
    let dir = tempfile::tempdir().unwrap();
    let metrics = Metrics::new();
    assert_eq!(metrics.config(), None);
    let error = metrics.configure(&config(&dir.path().join("missing/m")), "vm").unwrap_err().to_string();
    assert!(error.contains("missing/m: No such file"), "{error}");
    let first = config(&dir.path().join("m"));
    metrics.configure(&first, "vm").unwrap();
    let error = metrics.configure(&config(&dir.path().join("n")), "vm").unwrap_err().to_string();
    assert!(error.contains("it can be set once"), "{error}");
    assert_eq!(metrics.config(), Some(first));
    assert!(!dir.path().join("n").exists());
}

#[test]
fn nothing_is_due_before_the_guest_starts() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let metrics = Metrics::new();
    assert_eq!(metrics.tick(), None);
    metrics.configure(&config(&path), "vm").unwrap();
    assert_eq!(metrics.tick(), None);
    assert!(lines(&path).is_empty());
    // As when the guest starts.
    metrics.lock().write_and_schedule();
    assert!(metrics.tick().is_some_and(|wait| wait > Duration::from_secs(50) && wait <= INTERVAL));
    assert_eq!(lines(&path).len(), 1);
    metrics.lock().writer.as_mut().unwrap().due = Some(Instant::now());
    assert!(metrics.tick().is_some_and(|wait| wait > Duration::from_secs(50)));
    assert_eq!(lines(&path).len(), 2);
}

#[test]
fn every_line_has_the_id_and_properties_asked_for() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let properties: BTreeMap<_, _> = [("zone".to_owned(), "a \"b\"".to_owned())].into();
    let wanted = config::Metrics { emit_id: true, properties, ..config(&path) };
    let metrics = Metrics::new();
    let mut last = metrics.configure(&wanted, "vm-1").unwrap();
    metrics.flush().unwrap();
    last.write_short(b"17", b"\"vmm\":{\"panic_count\":1}");
    let lines = lines(&path);
    for line in &lines {
        assert_eq!((&line["id"], &line["properties"]["zone"]), (&"vm-1".into(), &"a \"b\"".into()));
    }
    assert_eq!((&lines[1]["utc_timestamp_ms"], &lines[1]["vmm"]["panic_count"]), (&17.into(), &1.into()));
}

#[test]
fn last_line_is_whole_after_a_line_in_part() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let metrics = Metrics::new();
    let mut last = metrics.configure(&config(&path), "vm").unwrap();
    std::fs::write(&path, "{\"utc_timestamp").unwrap();
    last.mid_line.store(true, Ordering::Release);
    last.write_short(b"1", b"\"vmm\":{}");
    let text = std::fs::read_to_string(&path).unwrap();
    assert_eq!(text, "{\"utc_timestamp\n{\"utc_timestamp_ms\":1,\"vmm\":{}}\n");
    last.write_short(b"1", &[b'x'; 1000]);
    assert_eq!(std::fs::read_to_string(&path).unwrap(), text, "a longer line is lost");
}

#[test]
fn last_line_does_not_wait_for_a_thread_that_writes() {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("m");
    let metrics = Metrics::new();
    let last = metrics.configure(&config(&path), "vm").unwrap();
    let held = metrics.lock();
    assert!(!last.write());
    drop(held);
    assert!(last.write());
    assert_eq!(lines(&path).len(), 1);
}
