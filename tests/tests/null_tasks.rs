//! Long commands: the API responds meanwhile, and a client or the end of the process can cancel
//! them.

use std::fs;
use std::io::Write as _;
use std::os::unix::net::UnixStream;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Instant;

use anyhow::{Result, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::Signal;
use serde_json::{Value, json};
use vesta_tests::api::{ApiClient, Response, read_response};
use vesta_tests::counting::{is_consecutive, sweeping, wait_for_bytes};
use vesta_tests::elf::null_guest;
use vesta_tests::guest::{Guest, TIMEOUT, Transport, vmm_path};
use vesta_tests::host_devices::SmallFs;
use vesta_tests::page_server::PageServer;
use vesta_tests::snapshots::{Files, pause, unconfigured};
use vesta_tests::vmm::{Vmm, VmmBuilder};

const SERVER: &str = env!("CARGO_BIN_EXE_page-server");

/// Saves a guest that checks 1024 of its pages again and again.
fn save(dir: &Path) -> Result<Files> {
    let files = Files::new(dir, "a");
    let (_vmm, mut api, _serial) = sweeping(&json!({}))?;
    pause(&mut api)?;
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    Ok(files)
}

fn load_from(files: &Files, server: &PageServer) -> Value {
    json!({
        "snapshot_path": files.state,
        "mem_backend": {"backend_type": "Uffd", "backend_path": server.socket()},
    })
}

/// Waits until the monitor waits for its page server.
fn wait_until_it_fetches(vmm: &Vmm) -> Result<()> {
    wait_for_thread(vmm, "page_fetch")
}

fn wait_for_thread(vmm: &Vmm, name: &str) -> Result<()> {
    let begun = Instant::now();
    while !vmm.threads()?.iter().any(|thread| thread.name == name) {
        ensure!(begun.elapsed() < TIMEOUT, "it has no thread {name}");
        std::thread::yield_now();
    }
    Ok(())
}

fn is_readable(connection: &UnixStream) -> Result<bool> {
    let now = Timespec { tv_sec: 0, tv_nsec: 0 };
    Ok(poll(&mut [PollFd::new(connection, PollFlags::IN)], Some(&now))? > 0)
}

fn ensure_cancelled(answer: &Response) -> Result<()> {
    ensure!(answer.status == 400 && answer.fault().contains("cancelled"), "{answer:?}");
    Ok(())
}

#[test]
fn a_waiting_load_can_be_observed_and_cancelled() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = save(home.path())?;
    let server = PageServer::start(SERVER, &files.memory, "none")?;
    let (vmm, mut api) = unconfigured(Transport::Mmio)?;
    let serial = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    let mut load = api.begin_put("/snapshot/load", &load_from(&files, &server))?;
    wait_until_it_fetches(&vmm)?;
    ensure!(api.get("/")?.json()?["state"] == "Not started");
    ensure!(api.get("/metrics")?.ok()?.body.contains("state=\"Not started\""));
    let job = api.get("/snapshot/job")?.json()?;
    ensure!(job["state"] == "Running" && job["snapshot_path"] == json!(files.state), "{job}");
    api.delete("/snapshot/job")?.ok()?;
    ensure_cancelled(&read_response(&mut load)?)?;
    // It accepts another load.
    api.put("/snapshot/load", &files.load())?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 3)?));
    Ok(())
}

#[test]
fn sigterm_ends_a_load_that_waits_for_its_page_server() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = save(home.path())?;
    let server = PageServer::start(SERVER, &files.memory, "none")?;
    let (mut vmm, api) = unconfigured(Transport::Mmio)?;
    let mut load = api.begin_put("/snapshot/load", &load_from(&files, &server))?;
    wait_until_it_fetches(&vmm)?;
    vmm.signal(Signal::TERM)?;
    // After 10 s without a response of the page server it would fail by itself.
    ensure_cancelled(&read_response(&mut load)?)?;
    ensure!(vmm.exit_status(TIMEOUT)?.signal() == Some(Signal::TERM.as_raw()));
    Ok(())
}

#[test]
fn sigterm_ends_a_restore_from_the_command_line() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = save(home.path())?;
    let server = PageServer::start(SERVER, &files.memory, "none")?;
    let builder = VmmBuilder::new(&vmm_path())?.with_api().arg("--restore").arg(&files.state);
    let mut vmm = builder.arg("--page-server").arg(server.socket()).spawn()?;
    wait_until_it_fetches(&vmm)?;
    ensure!(vmm.ready_client(TIMEOUT)?.get("/")?.json()?["state"] == "Not started");
    vmm.signal(Signal::TERM)?;
    ensure!(vmm.exit_status(TIMEOUT)?.signal() == Some(Signal::TERM.as_raw()));
    ensure!(!vmm.stderr.text().contains("did not answer"), "{}", vmm.stderr.text());
    ensure!(!vmm.dir().join("api.sock").exists());
    Ok(())
}

/// A paused guest whose page server is stopped, so that a snapshot of it waits.
fn stalled(files: &Files) -> Result<(PageServer, Vmm, ApiClient)> {
    let server = PageServer::start(SERVER, &files.memory, "all")?;
    let (vmm, mut api) = unconfigured(Transport::Mmio)?;
    let serial = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    api.put("/snapshot/load", &load_from(files, &server))?.ok()?;
    server.signal(Signal::STOP)?;
    Ok((server, vmm, api))
}

#[test]
fn a_waiting_create_can_be_observed_and_cancelled() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = save(home.path())?;
    let (server, vmm, mut api) = stalled(&files)?;
    let out = tempfile::tempdir()?;
    let new = Files::new(out.path(), "b");
    let mut create = api.begin_put("/snapshot/create", &new.create("Full"))?;
    wait_until_it_fetches(&vmm)?;
    ensure!(api.get("/")?.json()?["state"] == "Paused");
    ensure!(api.get("/metrics")?.ok()?.body.contains("vesta_uart_write_total "));
    let job = api.get("/snapshot/job")?.json()?;
    ensure!(job["state"] == "Running" && job["mem_file_path"] == json!(new.memory), "{job}");
    api.delete("/snapshot/job")?.ok()?;
    ensure_cancelled(&read_response(&mut create)?)?;
    ensure!(fs::read_dir(out.path())?.next().is_none(), "a file was left behind");
    // The guest is unchanged and can be saved.
    server.signal(Signal::CONT)?;
    api.put("/snapshot/create", &new.create("Full"))?.ok()?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&vmm.dir().join("serial"), 3)?));
    Ok(())
}

#[test]
fn sigterm_ends_a_waiting_create_and_leaves_no_file() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = save(home.path())?;
    let (_server, mut vmm, api) = stalled(&files)?;
    let out = tempfile::tempdir()?;
    let mut create = api.begin_put("/snapshot/create", &Files::new(out.path(), "b").create("Full"))?;
    wait_until_it_fetches(&vmm)?;
    vmm.signal(Signal::TERM)?;
    ensure_cancelled(&read_response(&mut create)?)?;
    ensure!(vmm.exit_status(TIMEOUT)?.signal() == Some(Signal::TERM.as_raw()));
    ensure!(fs::read_dir(out.path())?.next().is_none(), "a file was left behind");
    Ok(())
}

#[test]
fn neither_file_nor_block_device_is_refused_at_once() -> Result<()> {
    let (vmm, mut api) = unconfigured(Transport::Mmio)?;
    let dir = vmm.dir().to_owned();
    let fifo = dir.join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600))?;
    let kernel = dir.join("kernel");
    fs::write(&kernel, null_guest().bytes())?;
    let socket = dir.join("api.sock");
    for path in [&fifo, &dir, &"/dev/zero".into(), &socket] {
        let drive = |path: &Path| json!({"drive_id": "d", "path_on_host": path, "is_root_device": false});
        let overlaid = json!({"drive_id": "d", "path_on_host": kernel, "is_root_device": false,
            "overlay": {"path": dir.join("top"), "layers": [path]}});
        let load = |state: &Path| Files { state: state.to_owned(), memory: kernel.clone() }.load();
        let requests = [
            ("/boot-source", json!({"kernel_image_path": path})),
            ("/boot-source", json!({"kernel_image_path": kernel, "initrd_path": path})),
            ("/drives/d", drive(path)),
            ("/drives/d", overlaid),
            ("/snapshot/load", load(path)),
        ];
        for (at, body) in requests {
            let refused = api.put(at, &body)?;
            let named = refused.fault().contains(path.to_str().unwrap_or_default());
            ensure!(refused.status == 400 && named, "{at} {body}: {refused:?}");
        }
    }
    let refused = api.put("/boot-source", &json!({"kernel_image_path": fifo}))?;
    ensure!(refused.fault().contains("it is a FIFO; it must be a file or a block device"), "{refused:?}");
    ensure!(!dir.join("top").exists());
    Ok(())
}

#[test]
fn snapshot_targets_are_checked_before_memory_is_written() -> Result<()> {
    let home = tempfile::tempdir()?;
    let (_vmm, mut api, serial) = sweeping(&json!({}))?;
    wait_for_bytes(&serial, 2)?;
    // Memory does not fit, which is detected when it is written.
    let small = SmallFs::new(1 << 20)?;
    let memory = small.path().join("memory");
    let link = home.path().join("link");
    std::os::unix::fs::symlink("nowhere", &link)?;
    let bad = [home.path().join("no/state"), home.path().to_owned(), link, memory.clone()];
    for live in [false, true] {
        if !live {
            pause(&mut api)?;
        }
        for state in &bad {
            let body = json!({"snapshot_path": state, "mem_file_path": memory, "live": live});
            let refused = api.put("/snapshot/create", &body)?;
            let named = refused.fault().contains(state.to_str().unwrap_or_default());
            ensure!(refused.status == 400 && named && !refused.fault().contains("space"), "{refused:?}");
            ensure!(fs::read_dir(small.path())?.next().is_none(), "a file was left behind");
        }
        api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    }
    Ok(())
}

#[test]
fn a_snapshot_never_replaces_a_file_of_a_drive() -> Result<()> {
    let home = tempfile::tempdir()?;
    let disk = home.path().join("disk");
    fs::write(&disk, [7; 4096])?;
    let drive = json!({"drive_id": "data", "path_on_host": disk, "is_root_device": false});
    let (_vmm, mut api, _serial) = vesta_tests::counting::counting_with(&[drive])?;
    pause(&mut api)?;
    let other = home.path().join("other");
    for (state, memory, live) in [(&disk, &other, false), (&other, &disk, false), (&other, &disk, true)] {
        let body = json!({"snapshot_path": state, "mem_file_path": memory, "live": live});
        let refused = api.put("/snapshot/create", &body)?;
        ensure!(refused.status == 400 && refused.fault().contains("drive data"), "{refused:?}");
        ensure!(fs::read(&disk)? == [7; 4096] && !other.exists());
    }
    Ok(())
}

#[test]
fn the_api_answers_while_a_pause_waits_for_a_page() -> Result<()> {
    let home = tempfile::tempdir()?;
    let files = save(home.path())?;
    let (server, vmm, mut api) = stalled(&files)?;
    let body = json!({"state": "Paused"}).to_string();
    // The vCPU soon accesses a missing page, and then a pause waits for the vCPU.
    let begun = Instant::now();
    let mut pausing = loop {
        api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
        let mut pausing = api.connect()?;
        write!(pausing, "PATCH /vm HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
        while !vmm.threads()?.iter().any(|thread| thread.name == "task") && !is_readable(&pausing)? {
            ensure!(begun.elapsed() < TIMEOUT, "it has no thread task");
        }
        if !is_readable(&pausing)? {
            break pausing;
        }
        read_response(&mut pausing)?.ok()?;
    };
    // It may have been paused at this moment.
    let state = api.get("/")?.json()?["state"].clone();
    ensure!(state == "Running" || is_readable(&pausing)?, "{state}");
    server.signal(Signal::CONT)?;
    let answer = read_response(&mut pausing)?;
    ensure!(answer.status == 204 || answer.fault().contains("did not pause in time"), "{answer:?}");
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&vmm.dir().join("serial"), 3)?));
    Ok(())
}

#[test]
fn a_configuration_file_can_be_a_fifo() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api").arg("--boot-timer");
    let (fifo, kernel) = (builder.dir().join("config"), builder.dir().join("kernel"));
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600))?;
    fs::write(&kernel, null_guest().bytes())?;
    let vmm = builder.arg("--config-file").arg(&fifo).spawn()?;
    // Longer than a FIFO's buffer, so that it arrives in pieces.
    let config = Guest::bare(&kernel).config().to_string() + &" ".repeat(200_000);
    fs::write(&fifo, config)?;
    vmm.wait_for_output("Guest-boot-time =", TIMEOUT)?;
    Ok(())
}
