//! Metrics: lines in a file or FIFO, and Prometheus text.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail, ensure};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use rustix::process::Signal;
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{counting_in, unconfigured, wait_for_bytes};
use vesta_tests::disks::{disk, drive};
use vesta_tests::elf::{Elf, reset_guest, serial_guest, unemulatable_guest};
use vesta_tests::guest::{Guest, TIMEOUT, Transport, start, vmm_path, vmm_with_api};
use vesta_tests::minimal_driver;
use vesta_tests::process::Orphans;
use vesta_tests::snapshots::{Files, pause, save_live};
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// Firecracker's names, one a line.
const NAMES: &str = include_str!("../data/firecracker-metrics.txt");

/// The lines of a file of metrics, each checked to be what clients read: groups of unsigned
/// numbers, of which some are in one more object.
fn lines(path: &Path) -> Result<Vec<Value>> {
    let text = fs::read_to_string(path).with_context(|| path.display().to_string())?;
    ensure!(text.is_empty() || text.ends_with('\n'), "the last line is not whole");
    text.lines().map(checked).collect()
}

fn checked(line: &str) -> Result<Value> {
    let line: Value = serde_json::from_str(line).with_context(|| line.to_owned())?;
    for (key, value) in line.as_object().context("a line is an object")? {
        match key.as_str() {
            "utc_timestamp_ms" => ensure!(value.is_u64()),
            "id" => ensure!(value.is_string()),
            "properties" => {
                ensure!(value.as_object().is_some_and(|texts| texts.values().all(Value::is_string)));
            }
            _ => ensure!(numbers(value).is_some(), "{key}: {value}"),
        }
    }
    Ok(line)
}

/// The numbers in a group by name, with those of objects in it; `None` if there is anything else.
fn numbers(group: &Value) -> Option<BTreeMap<String, u64>> {
    let mut all = BTreeMap::new();
    for (name, value) in group.as_object()? {
        match value.as_object() {
            Some(parts) => {
                for (part, value) in parts {
                    all.insert(format!("{name}.{part}"), value.as_u64()?);
                }
            }
            None => _ = all.insert(name.clone(), value.as_u64()?),
        }
    }
    Some(all)
}

/// A counter in a line.
fn number(line: &Value, group: &str, field: &str) -> Result<u64> {
    line[group][field].as_u64().with_context(|| format!("{group}.{field} in {line}"))
}

/// The sum of a counter over lines.
fn total(lines: &[Value], group: &str, field: &str) -> Result<u64> {
    lines.iter().map(|line| number(line, group, field)).sum()
}

fn flush(api: &mut ApiClient) -> Result<()> {
    api.put("/actions", &json!({"action_type": "FlushMetrics"}))?.ok().map(drop)
}

/// The value of a sample of Prometheus text.
fn sample<'a>(text: &'a str, name: &str) -> Result<&'a str> {
    let value = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    value.with_context(|| format!("{name} in {text}"))
}

/// A guest that reads its drive `d` again and again, and sends a byte after each read.
fn reading_guest(
    builder: VmmBuilder,
    transport: Transport,
    prepare: impl FnOnce(&mut ApiClient) -> Result<()>,
) -> Result<(Vmm, ApiClient, PathBuf)> {
    let builder = transport.args().iter().fold(builder, VmmBuilder::arg);
    let vmm = builder.with_api().spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    prepare(&mut api)?;
    let (image, serial) = (vmm.dir().join("kernel"), vmm.dir().join("serial"));
    fs::write(&image, minimal_driver::reader(transport).bytes())?;
    Guest::bare(&image).mem_mib(16).put(&mut api)?;
    api.put("/drives/d", &drive("d", &disk(vmm.dir(), "disk", 1)?))?.ok()?;
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    start(&mut api)?;
    wait_for_bytes(&serial, 20)?;
    Ok((vmm, api, serial))
}

#[test]
fn lines_have_firecrackers_names_in_its_order() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let path = builder.dir().join("metrics");
    let builder = builder.arg("--metrics-path").arg(&path);
    let (_vmm, _api, _serial) = reading_guest(builder, Transport::Mmio, |_| Ok(()))?;
    let lines = lines(&path)?;
    ensure!(lines.len() == 1, "one line when the guest starts: {lines:?}");
    let line = &lines[0];
    let mut expected: BTreeSet<String> =
        NAMES.lines().filter(|name| !name.starts_with('#')).map(str::to_owned).collect();
    let of_drive: Vec<_> = expected.iter().filter_map(|name| name.strip_prefix("block.")).collect();
    let of_drive: Vec<_> = of_drive.into_iter().map(|field| format!("block_d.{field}")).collect();
    expected.extend(of_drive);
    let mut names = BTreeSet::new();
    for (group, value) in line.as_object().context("an object")? {
        if group != "utc_timestamp_ms" {
            names
                .extend(numbers(value).context("numbers")?.into_keys().map(|name| format!("{group}.{name}")));
        }
    }
    let missing: Vec<_> = expected.difference(&names).collect();
    let unknown: Vec<_> = names.difference(&expected).collect();
    ensure!(missing.is_empty() && unknown.is_empty(), "missing: {missing:?}; unknown: {unknown:?}");
    // In the text, because a parsed object has no order.
    let text = fs::read_to_string(&path)?;
    let mut order: Vec<_> = NAMES.lines().filter_map(|name| Some(name.split_once('.')?.0)).collect();
    order.retain(|group| !group.starts_with('#'));
    order.dedup();
    let places = order.iter().map(|group| text.find(&format!("\"{group}\":{{")).context(*group));
    let places = places.collect::<Result<Vec<_>>>()?;
    ensure!(places.is_sorted(), "{text}");
    Ok(())
}

#[test]
fn counters_are_those_of_what_happened() -> Result<()> {
    for transport in [Transport::Mmio, Transport::Pci] {
        let builder = VmmBuilder::new(&vmm_path())?;
        let path = builder.dir().join("metrics");
        let (_vmm, mut api, serial) = reading_guest(builder, transport, |api| {
            let config = json!({"metrics_path": path, "emit_id": true, "properties": {"zone": "a"}});
            api.put("/metrics", &config)?.ok()?;
            ensure!(api.put("/drives/x", &json!({"drive_id": "x"}))?.status == 400);
            ensure!(api.put("/logger", &json!({"level": "loud"}))?.status == 400);
            api.get("/version")?.ok()?;
            api.get("/machine-config")?.ok().map(drop)
        })?;
        flush(&mut api)?;
        wait_for_bytes(&serial, 20)?;
        pause(&mut api)?;
        flush(&mut api)?;
        let lines = lines(&path)?;
        ensure!(lines.len() == 3, "at the start and twice on request");
        for (field, count) in [
            ("drive_count", 2),
            ("drive_fails", 1),
            ("logger_count", 1),
            ("logger_fails", 1),
            ("metrics_count", 1),
            ("metrics_fails", 0),
            ("machine_cfg_count", 1),
            ("boot_source_count", 1),
            ("serial_count", 1),
            ("actions_count", 3),
            ("actions_fails", 0),
        ] {
            ensure!(total(&lines, "put_api_requests", field)? == count, "{field}: {lines:?}");
        }
        ensure!(number(&lines[0], "get_api_requests", "vmm_version_count")? == 1);
        ensure!(number(&lines[0], "get_api_requests", "machine_cfg_count")? == 1);
        ensure!(number(&lines[0], "api_server", "process_startup_time_us")? > 0);
        for line in &lines {
            ensure!(
                (&line["id"], &line["properties"]) == (&json!("anonymous-instance"), &json!({"zone":"a"}))
            );
        }

        // Paused, and all that it wrote is in the file.
        let written = fs::metadata(&serial)?.len();
        let sum = |group, field| total(&lines, group, field);
        let reads = sum("block_d", "read_count")?;
        ensure!(sum("uart", "write_count")? == written);
        ensure!(reads == written || reads == written + 1, "{reads} reads, {written} bytes");
        ensure!(sum("block_d", "read_bytes")? == reads * 512);
        ensure!(sum("block", "read_count")? == reads && sum("block_d", "write_count")? == 0);
        ensure!(sum("block_d", "queue_event_count")? >= reads.min(20));
        ensure!(sum("block_d", "execute_fails")? + sum("block_d", "event_fails")? == 0);
        ensure!(sum("vcpu", "exit_io_out")? >= written);
        match transport {
            Transport::Mmio => ensure!(sum("vcpu", "exit_mmio_write")? > 10),
            Transport::Pci => ensure!(sum("vcpu", "exit_io_out")? > 2 * written),
        }
        let last = lines.last().context("a line")?;
        let micros =
            |line: &Value, part: &str| line["block_d"]["read_agg"][part].as_u64().unwrap_or_default();
        ensure!(micros(last, "max_us") >= micros(last, "min_us"));
        let sum_us = lines.iter().map(|line| micros(line, "sum_us")).sum::<u64>();
        ensure!(sum_us >= micros(last, "max_us") && micros(last, "max_us") > 0);
        ensure!(last["block"]["read_agg"]["sum_us"] == last["block_d"]["read_agg"]["sum_us"]);
        ensure!(number(last, "latencies_us", "pause_vm")? >= number(last, "latencies_us", "vmm_pause_vm")?);
        ensure!(number(last, "latencies_us", "vmm_pause_vm")? > 0);

        let response = api.get("/metrics")?.ok()?;
        ensure!(response.header("content-type") == Some("text/plain; version=0.0.4"));
        let text = response.body;
        ensure!(sample(&text, "vesta_block_read_total{drive=\"d\"}")? == reads.to_string());
        ensure!(sample(&text, "vesta_block_read_bytes_total{drive=\"d\"}")? == (reads * 512).to_string());
        ensure!(sample(&text, "vesta_uart_write_total")? == written.to_string());
        ensure!(sample(&text, "vesta_put_api_requests_drive_fails_total")? == "1");
        ensure!(text.contains("vesta_info{id=\"anonymous-instance\",state=\"Paused\",version="), "{text}");
    }
    Ok(())
}

#[test]
fn output_is_set_once_before_the_start() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let (first, second) = (builder.dir().join("first"), builder.dir().join("second"));
    let vmm = builder.with_api().arg("--metrics-path").arg(&first).spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    ensure!(api.get("/vm/config")?.json()?["metrics"] == json!({"metrics_path": first}));
    for body in [json!({"metrics_path": second}), json!({"metrics_path": first})] {
        let refused = api.put("/metrics", &body)?;
        ensure!(refused.status == 400 && refused.fault().contains("it can be set once"), "{refused:?}");
    }
    ensure!(api.put("/actions", &json!({"action_type": "FlushMetrics"}))?.status == 400, "not started");

    let (_vmm, mut api, _serial) = counting_in(VmmBuilder::new(&vmm_path())?)?;
    ensure!(api.get("/vm/config")?.json()?["metrics"].is_null());
    let refused = api.put("/metrics", &json!({"metrics_path": second}))?;
    ensure!(
        refused.status == 400
            && refused.fault().contains("not supported after starting the microVM: PUT /metrics")
    );
    ensure!(!second.exists());
    // Without an output there is nothing to flush, and Prometheus text all the same.
    flush(&mut api)?;
    ensure!(sample(&api.get("/metrics")?.ok()?.body, "vesta_put_api_requests_metrics_fails_total")? == "1");
    Ok(())
}

#[test]
fn invalid_output_is_refused() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    for (body, named) in [
        (json!({}), "metrics_path"),
        (json!({"metrics_path": ""}), "metrics_path is empty"),
        (json!({"metrics_path": "m", "emit": true}), "`emit`"),
        (json!({"metrics_path": "m", "properties": {"a": 1}}), "string"),
        (json!({"metrics_path": vmm.dir().join("missing/m")}), "missing/m: No such file"),
        (json!({"metrics_path": vmm.dir()}), "Is a directory"),
    ] {
        let refused = api.put("/metrics", &body)?;
        ensure!(refused.status == 400 && refused.fault().contains(named), "{body}: {refused:?}");
    }
    // A failed attempt is no first one.
    api.put("/metrics", &json!({"metrics_path": vmm.dir().join("m")}))?.ok()?;
    let builder = VmmBuilder::new(&vmm_path())?.arg("--metrics-path").arg("/nowhere/m").with_api();
    let (code, printed) = builder.quiet().spawn()?.finish(TIMEOUT)?;
    ensure!(code == 1 && printed.contains("/nowhere/m: No such file"), "{code}: {printed}");
    Ok(())
}

/// A monitor that starts this guest from a configuration file with metrics.
fn from_file(elf: &Elf, output: impl FnOnce(&Path) -> Result<PathBuf>) -> Result<(Vmm, PathBuf)> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let kernel = builder.dir().join("kernel");
    fs::write(&kernel, elf.bytes())?;
    let path = output(builder.dir())?;
    let mut config = Guest::bare(&kernel).mem_mib(16).config();
    config["metrics"] = json!({"metrics_path": path});
    Ok((builder.with_config(&config)?.spawn()?, path))
}

#[test]
fn last_line_comes_at_every_orderly_end() -> Result<()> {
    let file = |dir: &Path| Ok(dir.join("metrics"));
    let (mut vmm, path) = from_file(&serial_guest(b"hello"), file)?;
    ensure!(vmm.exit_code(TIMEOUT)? == 0);
    let printed = lines(&path)?;
    ensure!(printed.len() == 2, "at the start and at the end: {printed:?}");
    ensure!(total(&printed, "uart", "write_count")? == 5);
    ensure!(number(&printed[1], "i8042", "reset_count")? == 1);
    ensure!(total(&printed, "vcpu", "exit_io_out")? == 6, "{printed:?}");

    for (signal, sighup) in [(Signal::TERM, 0), (Signal::HUP, 1)] {
        let builder = VmmBuilder::new(&vmm_path())?;
        let path = builder.dir().join("metrics");
        let (mut vmm, _api, _) = counting_in(builder.arg("--metrics-path").arg(&path))?;
        vmm.signal(signal)?;
        vmm.exit_status(TIMEOUT)?;
        let printed = lines(&path)?;
        ensure!(printed.len() == 2, "{printed:?}");
        ensure!(number(&printed[1], "signals", "sighup")? == sighup, "{printed:?}");
        ensure!(number(&printed[1], "uart", "write_count")? >= 10);
    }

    // A guest that cannot be started.
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let path = builder.dir().join("metrics");
    let mut config = Guest::bare(&builder.dir().join("missing")).config();
    config["metrics"] = json!({"metrics_path": path});
    let mut vmm = builder.with_config(&config)?.quiet().spawn()?;
    let code = vmm.exit_code(TIMEOUT)?;
    ensure!(code != 0 && lines(&path)?.len() == 1);
    Ok(())
}

#[test]
fn fatal_signal_has_a_line_of_its_own() -> Result<()> {
    for (signal, field) in [(Signal::BUS, "sigbus"), (Signal::SEGV, "sigsegv"), (Signal::ILL, "sigill")] {
        let builder = VmmBuilder::new(&vmm_path())?;
        let path = builder.dir().join("metrics");
        let (mut vmm, _api, _) = counting_in(builder.arg("--metrics-path").arg(&path).quiet())?;
        vmm.signal(signal)?;
        vmm.exit_status(TIMEOUT)?;
        let printed = lines(&path)?;
        ensure!(printed.len() == 2, "{printed:?}");
        let last = &printed[1];
        ensure!(number(last, "signals", field)? == 1 && number(last, "vmm", "panic_count")? == 0);
        ensure!(number(last, "seccomp", "num_faults")? == 0);
    }
    Ok(())
}

/// A FIFO at the path `metrics` in `dir`.
fn fifo(dir: &Path) -> Result<PathBuf> {
    let path = dir.join("metrics");
    mkfifoat(CWD, &path, Mode::RUSR | Mode::WUSR)?;
    Ok(path)
}

#[test]
fn fifo_without_a_reader_delays_nothing_and_lines_stay_whole() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let path = fifo(builder.dir())?;
    let (_vmm, mut api, serial) = counting_in(builder.arg("--metrics-path").arg(&path))?;
    let mut lost = 0;
    for _ in 0..20 {
        let response = api.put("/actions", &json!({"action_type": "FlushMetrics"}))?;
        if response.status == 400 {
            ensure!(response.fault().contains("is not being read"), "{response:?}");
            lost += 1;
        }
    }
    ensure!(lost > 5, "the FIFO holds only a few lines, and {lost} were lost");
    wait_for_bytes(&serial, 10)?;
    // Now somebody reads. Every line that arrives is whole, and the lost ones are counted.
    let fd = rustix::fs::open(&path, OFlags::RDONLY | OFlags::NONBLOCK, Mode::empty())?;
    let (mut reader, mut text) = (fs::File::from(fd), String::new());
    let deadline = Instant::now() + TIMEOUT;
    let counted = loop {
        flush(&mut api).ok();
        let mut bytes = [0; 16 << 10];
        match reader.read(&mut bytes) {
            Ok(count) => text.push_str(str::from_utf8(&bytes[..count])?),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(error) => return Err(error.into()),
        }
        let whole = text.rfind('\n').map_or("", |end| &text[..end]);
        let lines = whole.lines().map(checked).collect::<Result<Vec<_>>>()?;
        let counted = total(&lines, "logger", "missed_metrics_count")?;
        if counted >= lost {
            break counted;
        }
        if Instant::now() > deadline {
            bail!("{counted} of {lost} lost lines are counted: {text}");
        }
    };
    ensure!(counted >= lost);
    Ok(())
}

#[test]
fn full_disk_loses_lines_and_harms_nothing() -> Result<()> {
    let (mut vmm, mut api) = vmm_with_api(&["--metrics-path", "/dev/full"])?;
    let (image, serial) = (vmm.dir().join("kernel"), vmm.dir().join("serial"));
    fs::write(&image, vesta_tests::counting::kernel().bytes())?;
    Guest::bare(&image).mem_mib(16).put(&mut api)?;
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    start(&mut api)?;
    let refused = api.put("/actions", &json!({"action_type": "FlushMetrics"}))?;
    ensure!(refused.fault().contains("not written to /dev/full: No space left"), "{refused:?}");
    wait_for_bytes(&serial, 10)?;
    let text = api.get("/metrics")?.ok()?.body;
    ensure!(sample(&text, "vesta_logger_missed_metrics_total")? == "2", "at the start and on request");
    ensure!(sample(&text, "vesta_logger_metrics_fails_total")? == "2");
    vmm.signal(Signal::TERM)?;
    vmm.exit_status(TIMEOUT)?;
    ensure!(vmm.stdout.text().contains("metrics: the line was not written to /dev/full"));
    Ok(())
}

#[test]
fn child_of_a_fork_counts_from_zero_into_its_own_file() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let path = builder.dir().join("metrics");
    let (vmm, mut api, serial) = counting_in(builder.arg("--metrics-path").arg(&path))?;
    wait_for_bytes(&serial, 1000)?;
    let (socket, own) = (vmm.dir().join("child.sock"), vmm.dir().join("child.metrics"));
    let child = json!({
        "id": "child",
        "api_socket": socket,
        "metrics": {"metrics_path": own, "emit_id": true},
        "serial": {"serial_out_path": vmm.dir().join("child.serial")},
    });
    let silent = json!({"id": "silent"});
    let reply = api.put("/fork", &json!({"children": [child, silent]}))?.ok()?.json()?;
    let orphans = Orphans::of_fork(&reply)?;
    let mut of_child = ApiClient::new(&socket);
    flush(&mut of_child)?;
    let first = &lines(&own)?[0];
    ensure!(first["id"] == "child" && number(first, "uart", "write_count")? < 1000, "{first}");
    ensure!(number(first, "put_api_requests", "boot_source_count")? == 0);
    let config = of_child.get("/vm/config")?.json()?;
    ensure!(config["metrics"]["metrics_path"] == json!(own), "{config}");
    orphans.signal(Signal::TERM)?;
    orphans.wait(TIMEOUT)?;
    let of_child = lines(&own)?;
    ensure!(of_child.len() == 3, "at the start, on request and at the end");
    ensure!(of_child.iter().all(|line| line["id"] == "child"));
    // Nothing of the children is in the parent's file.
    flush(&mut api)?;
    ensure!(lines(&path)?.len() == 2);
    let text = api.get("/metrics")?.ok()?.body;
    ensure!(sample(&text, "vesta_fork_total")? == "1");
    ensure!(sample(&text, "vesta_fork_children_started_total")? == "2");
    ensure!(sample(&text, "vesta_fork_pause_duration_max_seconds")?.parse::<f64>()? > 0.0);
    Ok(())
}

#[test]
fn no_snapshot_has_the_output_and_a_load_keeps_it() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let saved = builder.dir().join("saved.metrics");
    let (vmm, mut api, _serial) = counting_in(builder.arg("--metrics-path").arg(&saved))?;
    let files = Files::new(vmm.dir(), "saved");
    save_live(&mut api, &files.create("Full"))?;
    ensure!(sample(&api.get("/metrics")?.ok()?.body, "vesta_live_snapshot_total")? == "1");
    drop(api);
    let before = fs::read(&saved)?;

    let (_restored, mut api, serial) = unconfigured()?;
    let path = vmm.dir().join("restored.metrics");
    api.put("/metrics", &json!({"metrics_path": path}))?.ok()?;
    api.put("/snapshot/load", &files.load())?.ok()?;
    wait_for_bytes(&serial, 10)?;
    ensure!(api.get("/vm/config")?.json()?["metrics"]["metrics_path"] == json!(path));
    flush(&mut api)?;
    let printed = lines(&path)?;
    ensure!(printed.len() == 2 && total(&printed, "uart", "write_count")? >= 10);
    ensure!(number(&printed[1], "latencies_us", "load_snapshot")? > 0);

    let (_plain, mut api, _serial) = unconfigured()?;
    api.put("/snapshot/load", &files.load())?.ok()?;
    ensure!(api.get("/vm/config")?.json()?["metrics"].is_null());
    ensure!(fs::read(&saved)? == before, "only the saved microVM writes to its file");
    Ok(())
}

#[test]
fn guest_that_ends_at_once_loses_no_count() -> Result<()> {
    let (mut vmm, path) = from_file(&reset_guest(), |dir| Ok(dir.join("metrics")))?;
    ensure!(vmm.exit_code(TIMEOUT)? == 0);
    let printed = lines(&path)?;
    ensure!(total(&printed, "i8042", "reset_count")? == 1 && total(&printed, "i8042", "write_count")? == 1);
    ensure!(total(&printed, "vcpu", "failures")? == 0);

    let (mut vmm, path) = from_file(&unemulatable_guest().0, |dir| Ok(dir.join("metrics")))?;
    ensure!(vmm.exit_code(TIMEOUT)? == 1);
    ensure!(total(&lines(&path)?, "vcpu", "failures")? == 1, "KVM cannot run that guest");
    Ok(())
}
