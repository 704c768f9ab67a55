//! The monitor's log: which lines it has, and what it does when its destination takes no more.

use std::fs::{File, OpenOptions};
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, Mode, OFlags, mkfifoat};
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::counting::counting;
use vesta_tests::elf::{Elf, null_guest, reset_guest, timer_flood_guest};
use vesta_tests::guest::{Guest, TIMEOUT, start, vmm_path};
use vesta_tests::snapshots::{Files, pause, resume, unconfigured};
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// A monitor whose log is the file `log` in its directory.
fn logging(more: &[&str]) -> Result<(Vmm, ApiClient)> {
    let builder = VmmBuilder::new(&vmm_path())?.with_api().arg("--log-path");
    let log = builder.dir().join("log");
    let vmm = more.iter().fold(builder.arg(log), VmmBuilder::arg).spawn()?;
    let api = vmm.ready_client(TIMEOUT)?;
    Ok((vmm, api))
}

fn log_of(vmm: &Vmm) -> Result<String> {
    Ok(std::fs::read_to_string(vmm.dir().join("log"))?)
}

/// The output of a monitor with this kernel, which ends by itself.
fn run(kernel: &Elf, args: &[&str]) -> Result<String> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let image = builder.dir().join("kernel");
    std::fs::write(&image, kernel.bytes())?;
    let builder = builder.with_config(&Guest::bare(&image).config())?;
    let (code, output) = args.iter().fold(builder, VmmBuilder::arg).spawn()?.finish(TIMEOUT)?;
    ensure!(code == 0, "{code} {output}");
    Ok(output)
}

#[test]
fn each_request_and_its_status_are_logged() -> Result<()> {
    let (vmm, mut api) = logging(&["--level", "Debug", "--show-level"])?;
    api.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 64}))?.ok()?;
    ensure!(api.put("/machine-config", &json!({"vcpu_count": 0, "mem_size_mib": 64}))?.status == 400);
    ensure!(api.get("/nowhere")?.status == 400);
    ensure!(api.put("/actions", &json!({"action_type": "Reset"}))?.status == 400);
    api.put("/mmds", &json!({"token": "secret-of-the-guest"}))?.ok()?;
    api.patch("/mmds", &json!({"token": "secret-of-the-guest too"}))?.ok()?;
    let too_long = json!({"kernel_image_path": "k", "boot_args": "x".repeat(10_000)});
    ensure!(api.put("/boot-source", &too_long)?.status == 400);
    let answer = api.send_raw(b"no HTTP\r\n\r\n")?;
    ensure!(answer.status == 400, "{answer:?}");
    let log = log_of(&vmm)?;
    for line in [
        r#":fc_api:INFO] The API server received a Put request on "/machine-config" with body "{\"mem_size_mib\":64,\"vcpu_count\":1}"."#,
        ":fc_api:INFO] The request was executed successfully. Status code: 204 No Content.",
        ":fc_api:INFO] The request was executed successfully. Status code: 200 OK.",
        ":fc_api:ERROR] Received Error. Status code: 400 Bad Request. Message: vcpu_count is 0",
        r#":fc_api:INFO] The API server received a Get request on "/nowhere"."#,
        r#":fc_api:INFO] The API server received a Put request on "/mmds"."#,
        r#":fc_api:INFO] The API server received a Patch request on "/mmds"."#,
        "bytes more.",
        ":fc_api:DEBUG] Total previous API call duration: ",
    ] {
        ensure!(log.contains(line), "no {line:?} in:\n{log}");
    }
    ensure!(!log.contains("secret-of-the-guest"), "{log}");
    ensure!(log.lines().all(|line| line.len() < 4096), "{log}");
    let (received, answered) = ("received a ", "Status code: ");
    // One more answer than requests: to the bytes that are none.
    ensure!(log.matches(received).count() + 1 == log.matches(answered).count(), "{log}");
    Ok(())
}

#[test]
fn durations_of_actions_are_logged_once_they_succeed() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = Files::new(home.path(), "a");
    let (vmm, mut api, _serial) = counting(&json!({"track_dirty_pages": true}))?;
    pause(&mut api)?;
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    api.put("/snapshot/create", &Files::new(home.path(), "b").create("Diff"))?.ok()?;
    resume(&mut api)?;
    for action in ["pause vm", "create full snapshot", "create diff snapshot", "resume vm"] {
        vmm.wait_for_output(&format!(":main] '{action}' VMM action took "), TIMEOUT)?;
        vmm.wait_for_output(&format!(":fc_api] '{action}' API request took "), TIMEOUT)?;
    }
    let (other, mut api) = unconfigured(vesta_tests::guest::Transport::Mmio)?;
    ensure!(api.put("/snapshot/load", &Files::new(home.path(), "none").load())?.status == 400);
    api.put("/snapshot/load", &files.load())?.ok()?;
    other.wait_for_output("'load snapshot' API request took ", TIMEOUT)?;
    let lines = other.stdout.text();
    ensure!(lines.matches("'load snapshot' VMM action took ").count() == 1, "{lines}");
    Ok(())
}

#[test]
fn a_request_and_its_answer_surround_a_change_of_the_log() -> Result<()> {
    let (vmm, mut api) = logging(&[])?;
    let other = vmm.dir().join("other");
    api.put("/logger", &json!({"log_path": other, "level": "Error"}))?.ok()?;
    api.get("/")?.ok()?;
    ensure!(log_of(&vmm)?.ends_with("\\\"}\".\n"), "its last line is the request: {}", log_of(&vmm)?);
    ensure!(std::fs::read_to_string(other)?.is_empty(), "the level is Error");
    Ok(())
}

#[test]
fn the_first_line_is_logged_once_and_filtered_as_others() -> Result<()> {
    let count = |output: &str| output.matches("Running vesta-vmm v").count();
    ensure!(count(&run(&reset_guest(), &[])?) == 1);
    for args in [["--level", "Error"], ["--module", "x"], ["--level", "off"]] {
        let output = run(&reset_guest(), &args)?;
        ensure!(output.is_empty(), "{args:?}: {output}");
    }
    let (vmm, _api) = logging(&[])?;
    ensure!(count(&log_of(&vmm)?) == 1 && count(&vmm.stdout.text()) == 0, "{}", log_of(&vmm)?);
    Ok(())
}

#[test]
fn a_guest_that_causes_lines_is_limited() -> Result<()> {
    let output = run(&timer_flood_guest(50), &["--boot-timer"])?;
    let written = output.matches("] Guest-boot-time = ").count();
    // More than 10 only if the host stopped the guest for 5 s in between.
    ensure!((10..50).contains(&written), "{output}");
    ensure!(output.contains("] more lines like the last one from this place are suppressed\n"), "{output}");
    let counts = output.lines().filter_map(|line| {
        let (before, _) = line.split_once(" lines from crates/machine/src/legacy/boot_timer.rs:")?;
        before.rsplit_once("] ")?.1.parse::<usize>().ok()
    });
    ensure!(written + counts.sum::<usize>() == 50, "{output}");
    Ok(())
}

/// Reads what the FIFO has now.
fn drain(fifo: &mut File) -> Result<String> {
    let mut text = Vec::new();
    let mut part = vec![0; 1 << 20];
    loop {
        match fifo.read(&mut part) {
            Ok(0) => break,
            Ok(len) => text.extend_from_slice(&part[..len]),
            Err(error) if error.kind() == std::io::ErrorKind::WouldBlock => break,
            Err(error) => return Err(error.into()),
        }
    }
    Ok(String::from_utf8(text)?)
}

fn reader_of(fifo: &Path) -> Result<File> {
    use std::os::unix::fs::OpenOptionsExt;
    let flags = OFlags::NONBLOCK.bits().cast_signed();
    OpenOptions::new().read(true).custom_flags(flags).open(fifo).context("the reader of the FIFO")
}

#[test]
fn a_fifo_without_reader_loses_lines_and_stops_nothing() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.with_api().arg("--log-path");
    let fifo = builder.dir().join("fifo");
    mkfifoat(CWD, &fifo, Mode::RUSR | Mode::WUSR)?;
    let vmm = builder.arg(&fifo).spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let image = vmm.dir().join("kernel");
    std::fs::write(&image, null_guest().bytes())?;
    Guest::bare(&image).put(&mut api)?;
    // More than the FIFO's 64 KiB.
    for _ in 0..1000 {
        api.get("/")?.ok()?;
    }
    start(&mut api)?;
    ensure!(api.get("/")?.json()?["state"] == "Running");
    let mut reader = reader_of(&fifo)?;
    let text = drain(&mut reader)?;
    ensure!(text.ends_with('\n') && text.lines().all(|line| line.starts_with("20")), "a line is cut: {text}");
    api.get("/")?.ok()?;
    let text = drain(&mut reader)?;
    let first = text.lines().next().context("a line")?;
    ensure!(first.ends_with(" lines of the log were lost: their destination took no more"), "{text}");
    ensure!(text.lines().count() == 3, "{text}");
    Ok(())
}

#[test]
fn a_full_disk_loses_lines_and_stops_nothing() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.with_api().arg("--log-path").arg("/dev/full");
    let vmm = builder.spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let image = vmm.dir().join("kernel");
    std::fs::write(&image, null_guest().bytes())?;
    Guest::bare(&image).put(&mut api)?;
    let log = vmm.dir().join("log");
    api.put("/logger", &json!({"log_path": log}))?.ok()?;
    api.put("/logger", &json!({"log_path": "/dev/full"}))?.ok()?;
    start(&mut api)?;
    ensure!(api.get("/")?.json()?["state"] == "Running");
    let text = std::fs::read_to_string(log)?;
    let first = text.lines().next().context("a line")?;
    ensure!(first.ends_with(" lines of the log were lost: their destination took no more"), "{text}");
    Ok(())
}
