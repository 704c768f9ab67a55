//! `GET /events` and `--events-fd`, with guests of a few instructions.

use std::fs::File;
use std::io::{PipeReader, PipeWriter, Read, pipe};
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{self, counting, wait_for_bytes};
use vesta_tests::elf::{Elf, null_guest, port_guest, reset_guest, triple_fault_guest, unemulatable_guest};
use vesta_tests::events::{Event, EventStream};
use vesta_tests::guest::{Guest, TIMEOUT, start, vmm_path, vmm_with_api};
use vesta_tests::page_server::PageServer;
use vesta_tests::process::Orphans;
use vesta_tests::snapshots::{Files, pause, resume, save_live};
use vesta_tests::vmm::{Vmm, VmmBuilder};
use vesta_tests::{minimal_driver, on_each_transport};

/// ACPI's sleep control register, and the value that powers off.
const POWER_OFF: (u16, u8) = (0x600, 0x34);
/// The port of the pvpanic device.
const PVPANIC: u16 = 0x505;

/// A monitor whose guest is ready to start, and its events.
fn watched(elf: &Elf, args: &[&str]) -> Result<(Vmm, ApiClient, EventStream)> {
    let (vmm, mut api) = vmm_with_api(args)?;
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, elf.bytes())?;
    Guest::bare(&kernel).put(&mut api)?;
    let events = EventStream::open(&api)?;
    Ok((vmm, api, events))
}

/// Starts this guest, which ends by itself. Returns its events after `started`, and the exit
/// status.
fn events_of(elf: &Elf) -> Result<(Vec<Event>, i32)> {
    let (mut vmm, mut api, mut events) = watched(elf, &[])?;
    start(&mut api)?;
    let started = events.expect("started")?;
    ensure!(started["by"] == "boot" && started["state"] == "Running", "{started}");
    Ok((events.rest()?, vmm.exit_code(TIMEOUT)?))
}

fn names(events: &[Event]) -> Vec<&str> {
    events.iter().map(|event| event.name.as_str()).collect()
}

fn child(dir: &Path, id: &str) -> Value {
    json!({"id": id, "api_socket": dir.join(id), "resume": false})
}

/// A snapshot of a paused guest; the files are in `dir`.
fn saved(dir: &Path) -> Result<Files> {
    let (_vmm, mut api, _serial) = counting(&json!({}))?;
    let files = Files::new(dir, "s");
    pause(&mut api)?;
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    Ok(files)
}

#[test]
fn every_change_of_a_microvm_is_an_event_in_order() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let (mut vmm, mut api, _serial) = counting(&json!({}))?;
    let (mut events, others) = (EventStream::open(&api)?, EventStream::open(&api)?);
    ensure!(events.expect("started")?["id"] == "parent");
    pause(&mut api)?;
    pause(&mut api)?;
    let files = Files::new(dir, "s");
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    // A refused snapshot has not begun.
    let nowhere = Files::new(Path::new("/nowhere"), "s");
    ensure!(api.put("/snapshot/create", &nowhere.create("Full"))?.status == 400);
    resume(&mut api)?;
    resume(&mut api)?;
    for name in ["paused", "snapshot", "snapshot", "resumed"] {
        let data = events.expect(name)?;
        ensure!(name != "snapshot" || data["snapshot_path"] == json!(files.state), "{data}");
    }
    let live = Files::new(dir, "live");
    save_live(&mut api, &live.create("Full"))?;
    let mut states = Vec::new();
    while states.last() != Some(&json!("Done")) {
        let data = events.expect("snapshot")?;
        ensure!(data["mem_file_path"] == json!(live.memory) && data["bytes_done"].is_u64(), "{data}");
        states.push(data["state"].clone());
    }
    ensure!(states[..states.len() - 1].iter().all(|state| state == "Running"), "{states:?}");
    ensure!((2..=10).contains(&states.len()), "{states:?}");

    let reply = api.put("/fork", &json!({"children": [child(dir, "a")]}))?.ok()?.json()?;
    let _orphans = Orphans::of_fork(&reply)?;
    let forked = events.expect("forked")?;
    ensure!(forked["children"] == reply["children"] && forked["started"] == 1, "{forked}");
    vmm.signal(Signal::TERM)?;
    let exit = events.expect("exit")?;
    ensure!((&exit["reason"], &exit["signal"], &exit["code"]) == (&json!("signal"), &json!(15), &json!(143)));
    ensure!(events.next_event()?.is_none());
    vmm.exit_status(TIMEOUT)?;
    // The other reader has all of it too, though it reads only now.
    let others = others.rest()?;
    ensure!(names(&others).first() == Some(&"started") && names(&others).last() == Some(&"exit"));
    ensure!(names(&others).iter().filter(|name| **name != "snapshot").count() == 5, "{others:?}");

    // The child has events of its own.
    let mut childs = ApiClient::new(&dir.join("a"));
    let mut events = EventStream::open(&childs)?;
    let started = events.expect("started")?;
    ensure!(
        (&started["by"], &started["state"], &started["id"])
            == (&json!("fork"), &json!("Paused"), &json!("a"))
    );
    resume(&mut childs)?;
    events.expect("resumed").map(drop)
}

#[test]
fn restored_guest_is_started_and_then_resumed() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = saved(home.path())?;
    let (_vmm, mut api, _serial) = counting::unconfigured()?;
    let mut events = EventStream::open(&api)?;
    let mut load = files.load();
    load["resume_vm"] = json!(false);
    api.put("/snapshot/load", &load)?.ok()?;
    let started = events.expect("started")?;
    ensure!((&started["by"], &started["state"]) == (&json!("restore"), &json!("Paused")), "{started}");
    ensure!(started["snapshot_path"] == json!(files.state));
    resume(&mut api)?;
    let resumed = events.next_event()?.context("an event")?;
    ensure!(resumed.name == "resumed");
    // A client that comes back gets what it missed.
    drop(events);
    pause(&mut api)?;
    EventStream::open_after(&api, &resumed.id)?.expect("paused").map(drop)
}

#[test]
fn end_of_a_guest_is_an_event_and_then_the_exit() -> Result<()> {
    for (elf, expected, reason, code) in [
        (port_guest(&[POWER_OFF]), vec!["poweroff", "exit"], "poweroff", 0),
        (reset_guest(), vec!["reset", "exit"], "reset", 0),
        (triple_fault_guest().0, vec!["reset", "exit"], "triple_fault", 0),
        (unemulatable_guest().0, vec!["exit"], "fault", 1),
    ] {
        let (events, status) = events_of(&elf)?;
        ensure!(names(&events) == expected && status == code, "{events:?}, {status}");
        let exit = &events[events.len() - 1].data;
        ensure!(exit["reason"] == reason && exit["code"] == code, "{exit}");
        ensure!(exit["error"].is_string() == (reason == "fault"), "{exit}");
    }
    Ok(())
}

#[test]
fn guest_panic_is_an_event_and_does_not_end_the_guest() -> Result<()> {
    for (value, crash_kernel) in [(1, false), (2, true)] {
        let (events, status) = events_of(&port_guest(&[(PVPANIC, value)]))?;
        ensure!(names(&events) == ["guest_panic", "reset", "exit"] && status == 0, "{events:?}");
        let panic = &events[0].data;
        ensure!(panic["crash_kernel"] == crash_kernel && panic["times"] == 1, "{panic}");
    }
    Ok(())
}

#[test]
fn panics_in_a_loop_displace_no_other_event() -> Result<()> {
    let (events, _) = events_of(&port_guest(&vec![(PVPANIC, 1); 1000]))?;
    let times: Vec<_> = events.iter().filter_map(|event| event.data["times"].as_u64()).collect();
    ensure!(times == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512], "{events:?}");
    ensure!(names(&events)[10..] == ["reset", "exit"], "{events:?}");
    Ok(())
}

on_each_transport! {
    fn device_with_a_broken_queue_is_an_event(transport) {
        let elf = minimal_driver::breaking_kernel(transport);
        let (vmm, mut api, mut events) = watched(&elf, transport.args())?;
        api.put("/entropy", &json!({}))?.ok()?;
        start(&mut api)?;
        events.expect("started")?;
        let broken = events.expect("device_error")?;
        ensure!(broken["device"] == "entropy" && broken["needs_reset"] == true, "{broken}");
        ensure!(broken["error"].as_str().is_some_and(|error| error.contains("queue")), "{broken}");
        ensure!(api.get("/")?.json()?["state"] == "Running");
        drop(vmm);
        Ok(())
    }
}

#[test]
fn start_that_fails_is_an_exit_with_its_error() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = saved(home.path())?;
    // A page server that sends nothing keeps the start waiting until the client is there.
    let mut server = PageServer::start(env!("CARGO_BIN_EXE_page-server"), &files.memory, "none")?;
    let builder = VmmBuilder::new(&vmm_path())?.with_api().arg("--restore").arg(&files.state);
    let mut vmm = builder.arg("--page-server").arg(server.socket()).spawn()?;
    server.wait_for("STALLED")?;
    let events = EventStream::open(&vmm.client())?;
    drop(server);
    let events = events.rest()?;
    ensure!(names(&events) == ["exit"], "{events:?}");
    let exit = &events[0].data;
    ensure!(exit["reason"] == "error" && exit["code"] == vmm.exit_code(TIMEOUT)?, "{exit}");
    ensure!(exit["error"].as_str().is_some_and(|error| error.contains("page server")), "{exit}");
    Ok(())
}

/// A monitor with `--events-fd`, and the other end of the pipe.
fn with_events_fd(builder: VmmBuilder) -> Result<(VmmBuilder, PipeReader)> {
    let (reader, writer) = pipe()?;
    Ok((given(builder, writer)?, reader))
}

fn given(mut builder: VmmBuilder, fd: impl Into<OwnedFd>) -> Result<VmmBuilder> {
    let number = builder.inherit(fd.into())?;
    Ok(builder.arg("--events-fd").arg(number.to_string()))
}

fn byte(reader: &mut PipeReader) -> Result<u8> {
    let mut byte = [0];
    reader.read_exact(&mut byte).context("the descriptor was closed")?;
    Ok(byte[0])
}

fn rest(mut reader: impl Read) -> Result<String> {
    let mut rest = String::new();
    reader.read_to_string(&mut rest)?;
    Ok(rest)
}

fn kernel_in(builder: &VmmBuilder) -> Result<PathBuf> {
    let kernel = builder.dir().join("kernel");
    std::fs::write(&kernel, null_guest().bytes())?;
    Ok(kernel)
}

#[test]
fn events_fd_tells_when_the_api_answers_and_the_guest_runs() -> Result<()> {
    let (builder, mut reader) = with_events_fd(VmmBuilder::new(&vmm_path())?.with_api())?;
    let kernel = kernel_in(&builder)?;
    let vmm = builder.spawn()?;
    ensure!(byte(&mut reader)? == b'A');
    // At the first attempt.
    let mut api = vmm.client();
    api.get("/")?.ok()?;
    Guest::bare(&kernel).put(&mut api)?;
    start(&mut api)?;
    ensure!(byte(&mut reader)? == b'R');
    // It is closed, while the monitor runs.
    ensure!(rest(reader)?.is_empty());
    pause(&mut api)?;
    resume(&mut api)
}

#[test]
fn events_fd_works_with_a_config_file_with_and_without_an_api() -> Result<()> {
    for (api, expected) in [(true, "AR"), (false, "R")] {
        let builder = VmmBuilder::new(&vmm_path())?;
        let builder = if api { builder.with_api() } else { builder.arg("--no-api") };
        let (builder, reader) = with_events_fd(builder)?;
        let kernel = kernel_in(&builder)?;
        let _vmm = builder.with_config(&Guest::bare(&kernel).config())?.spawn()?;
        ensure!(rest(reader)? == expected);
    }
    Ok(())
}

#[test]
fn events_fd_tells_when_a_restored_guest_first_runs() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = saved(home.path())?;
    let serial = home.path().join("serial");
    let restore = |builder: VmmBuilder| {
        let builder = builder.arg("--restore").arg(&files.state).arg("--memory").arg(&files.memory);
        builder.arg("--serial").arg(&serial)
    };
    let (builder, reader) = with_events_fd(VmmBuilder::new(&vmm_path())?.arg("--no-api"))?;
    let vmm = restore(builder).spawn()?;
    ensure!(rest(reader)? == "R");
    wait_for_bytes(&serial, 10)?;
    drop(vmm);

    let (builder, mut reader) = with_events_fd(VmmBuilder::new(&vmm_path())?.with_api())?;
    let mut vmm = restore(builder).arg("--paused").spawn()?;
    ensure!(byte(&mut reader)? == b'A');
    let mut api = vmm.client();
    // A child does not hold the descriptor.
    let reply = api.put("/fork", &json!({"children": [child(home.path(), "a")]}))?.ok()?.json()?;
    let orphans = Orphans::of_fork(&reply)?;
    resume(&mut ApiClient::new(&home.path().join("a")))?;
    vmm.signal(Signal::KILL)?;
    vmm.exit_status(TIMEOUT)?;
    ensure!(rest(reader)?.is_empty(), "a guest of this monitor has not run");
    ensure!(orphans.running()? == 1);
    orphans.kill(TIMEOUT)
}

#[test]
fn events_fd_may_be_a_file_or_socket_and_its_reader_may_go() -> Result<()> {
    let home = tempfile::tempdir()?;
    let path = home.path().join("events");
    let run = |fd: OwnedFd| -> Result<Vmm> {
        let builder = given(VmmBuilder::new(&vmm_path())?.with_api().arg("--boot-timer"), fd)?;
        let kernel = kernel_in(&builder)?;
        let vmm = builder.with_config(&Guest::bare(&kernel).config())?.spawn()?;
        vmm.wait_for_output("Guest-boot-time =", TIMEOUT)?;
        vmm.ready_client(TIMEOUT)?;
        Ok(vmm)
    };
    let vmm = run(File::create(&path)?.into())?;
    ensure!(std::fs::read_to_string(&path)? == "AR");
    drop(vmm);
    let (reader, writer) = UnixStream::pair()?;
    let _vmm = run(writer.into())?;
    ensure!(rest(reader)? == "AR");
    let (reader, writer) = pipe()?;
    drop::<PipeReader>(reader);
    run(PipeWriter::into(writer)).map(drop)
}

#[test]
fn events_fd_must_be_open_for_writing() -> Result<()> {
    let (read_only, _writer) = pipe()?;
    let closed = VmmBuilder::new(&vmm_path())?.arg("--events-fd").arg("57");
    let standard = VmmBuilder::new(&vmm_path())?.arg("--events-fd").arg("1");
    let read_only = given(VmmBuilder::new(&vmm_path())?, read_only)?;
    for (builder, why) in [
        (closed, "cannot use it: Bad file descriptor"),
        (standard, "with number 3 or more"),
        (read_only, "it is open only for reading"),
    ] {
        let socket = builder.dir().join("api.sock");
        let (code, output) = builder.with_api().spawn()?.finish(TIMEOUT)?;
        ensure!(code == 153 && output.contains("--events-fd is") && output.contains(why), "{code}: {output}");
        ensure!(!socket.exists());
    }
    Ok(())
}
