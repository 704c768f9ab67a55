//! Guests whose memory comes from a page server, also from one that fails.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{
    WALL_CLOCK, is_consecutive, sweeping, unconfigured, wait_for_bytes, with_clocks,
};
use vesta_tests::guest::TIMEOUT;
use vesta_tests::page_server::PageServer;
use vesta_tests::vmm::Vmm;

const SERVER: &str = env!("CARGO_BIN_EXE_page-server");

fn start(dir: &Path, faults: &str) -> Result<PageServer> {
    PageServer::start(SERVER, &dir.join("memory"), faults)
}

/// Saves a guest that checks 1024 of its pages again and again to `dir`.
fn save(dir: &Path) -> Result<()> {
    save_guest(sweeping(&json!({}))?, dir)
}

fn save_guest((_vmm, mut api, _serial): (Vmm, ApiClient, PathBuf), dir: &Path) -> Result<()> {
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    let body = json!({"snapshot_path": dir.join("state"), "mem_file_path": dir.join("memory")});
    api.put("/snapshot/create", &body)?.ok().map(drop)
}

fn load(dir: &Path, kind: &str, path: &Path) -> Value {
    json!({
        "snapshot_path": dir.join("state"),
        "mem_backend": {"backend_type": kind, "backend_path": path},
        "resume_vm": true,
    })
}

#[test]
fn a_guest_resumes_with_pages_of_its_page_server() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let server = start(home.path(), "all")?;
    let (_vmm, mut api, serial) = unconfigured()?;
    api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?.ok()?;
    // The guest counts only if all its pages are right.
    ensure!(is_consecutive(&wait_for_bytes(&serial, 5)?));
    let refused = api.put("/fork", &json!({"children": [{"id": "a"}]}))?;
    ensure!(refused.status == 400 && refused.fault().contains("page server"), "{refused:?}");
    Ok(())
}

#[test]
fn a_guest_ends_with_its_page_server_and_never_sees_zeros() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    // The server ends while the guest checks its pages, some of which it has already seen.
    let mut ends = Vec::new();
    for faults in ["200", "500", "900"] {
        let server = start(home.path(), faults)?;
        let (vmm, mut api, serial) = unconfigured()?;
        api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?.ok()?;
        ends.push((faults, server, vmm, serial));
    }
    for (faults, _server, vmm, serial) in &mut ends {
        let (code, output) = vmm.finish(TIMEOUT)?;
        ensure!(code == 1 && output.contains("the page server has ended"), "{code} {output}");
        // At a page of zeros the guest would have printed an error.
        let numbers = fs::read(&*serial)?;
        ensure!(numbers.len() <= 1, "{faults}: it ran on without its pages: {:?}", &numbers[..4]);
    }
    Ok(())
}

#[test]
fn a_forked_page_server_outlives_its_listening_process() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let mut server = PageServer::start_forked(SERVER, &home.path().join("memory"), "all")?;
    let (mut vmm, mut api, serial) = unconfigured()?;
    let mut body = load(home.path(), "Uffd", server.socket());
    body["resume_vm"] = json!(false);
    api.put("/snapshot/load", &body)?.ok()?;
    server.end_listener()?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 5)?));
    ensure!(vmm.is_running()?, "{}", vmm.stdout.text());
    Ok(())
}

#[test]
fn the_old_snapshot_survives_a_page_server_that_ends() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let files = || [home.path().join("state"), home.path().join("memory")].map(fs::read);
    let [state, memory] = files();
    let (state, memory) = (state?, memory?);
    let server = start(home.path(), "300")?;
    let (mut vmm, mut api, _serial) = unconfigured()?;
    let mut body = load(home.path(), "Uffd", server.socket());
    body["resume_vm"] = json!(false);
    api.put("/snapshot/load", &body)?.ok()?;
    let body =
        json!({"snapshot_path": home.path().join("state"), "mem_file_path": home.path().join("memory")});
    let refused = api.put("/snapshot/create", &body)?;
    ensure!(refused.status == 400 && refused.fault().contains("pages-300.sock"), "{refused:?}");
    let (code, output) = vmm.finish(TIMEOUT)?;
    ensure!(code == 1 && output.contains("the page server has ended"), "{code} {output}");
    let [now_state, now_memory] = files();
    ensure!(now_state? == state && now_memory? == memory, "the snapshot is another one");
    Ok(())
}

#[test]
fn the_api_answers_while_the_page_server_stalls() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let server = start(home.path(), "all")?;
    let (vmm, mut api, serial) = unconfigured()?;
    let mut body = load(home.path(), "Uffd", server.socket());
    body["resume_vm"] = json!(false);
    api.put("/snapshot/load", &body)?.ok()?;
    server.signal(Signal::STOP)?;
    // The vCPU soon accesses a missing page, and the pause waits for the vCPU.
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    let paused = api.patch("/vm", &json!({"state": "Paused"}))?;
    ensure!(paused.status == 204 || paused.fault().contains("did not pause in time"), "{paused:?}");
    let state = api.get("/")?.json()?["state"].clone();
    ensure!(state == json!(if paused.status == 204 { "Paused" } else { "Running" }), "{state}");
    let create = json!({"snapshot_path": home.path().join("s"), "mem_file_path": home.path().join("m")});
    if paused.status == 204 {
        let refused = api.put("/snapshot/create", &create)?;
        ensure!(refused.status == 400 && refused.fault().contains("did not answer"), "{refused:?}");
        ensure!(!home.path().join("s").exists() && !home.path().join("m").exists());
    }
    server.signal(Signal::CONT)?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 3)?));
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    api.put("/snapshot/create", &create)?.ok()?;
    drop(vmm);
    Ok(())
}

#[test]
fn an_unreachable_page_server_is_refused_and_a_retry_works() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let (_vmm, mut api, serial) = unconfigured()?;
    let refused = api.put("/snapshot/load", &load(home.path(), "Uffd", Path::new("/nowhere/pages.sock")))?;
    ensure!(refused.status == 400 && refused.fault().contains("/nowhere/pages.sock"), "{refused:?}");
    let server = start(home.path(), "none")?;
    let refused = api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?;
    ensure!(refused.status == 400 && refused.fault().contains("pages-none.sock"), "{refused:?}");
    api.put("/snapshot/load", &load(home.path(), "File", &home.path().join("memory")))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 5)?));
    Ok(())
}

#[test]
fn a_load_fails_without_the_page_of_a_vcpus_clock() -> Result<()> {
    let home = tempfile::tempdir()?;
    save_guest(with_clocks()?, home.path())?;
    let mut server = start(home.path(), &format!("except:{WALL_CLOCK}"))?;
    let (_vmm, mut api, serial) = unconfigured()?;
    let refused = api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?;
    server.wait_for("WITHHELD")?;
    ensure!(refused.status == 400 && refused.fault().contains("did not answer a page fault"), "{refused:?}");
    ensure!(api.get("/")?.json()?["state"] == json!("Not started"));
    // The failed load leaves nothing that disturbs another one.
    api.put("/snapshot/load", &load(home.path(), "File", &home.path().join("memory")))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 5)?));
    Ok(())
}

#[test]
fn a_load_whose_page_server_ends_under_a_vcpu_fails() -> Result<()> {
    let home = tempfile::tempdir()?;
    save_guest(with_clocks()?, home.path())?;
    let mut server = start(home.path(), &format!("except:{WALL_CLOCK}"))?;
    let (vmm, mut api, serial) = unconfigured()?;
    let body = load(home.path(), "Uffd", server.socket());
    let mut other = vmm.client();
    let loading = std::thread::spawn(move || other.put("/snapshot/load", &body));
    server.wait_for("WITHHELD")?;
    drop(server);
    let refused = loading.join().expect("it does not panic")?;
    ensure!(refused.status == 400 && refused.fault().contains("is gone"), "{refused:?}");
    api.put("/snapshot/load", &load(home.path(), "File", &home.path().join("memory")))?.ok()?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 5)?));
    Ok(())
}

#[test]
fn sigterm_ends_a_load_whose_page_server_stalls() -> Result<()> {
    let home = tempfile::tempdir()?;
    save_guest(with_clocks()?, home.path())?;
    let mut server = start(home.path(), &format!("except:{WALL_CLOCK}"))?;
    let (mut vmm, mut api, _serial) = unconfigured()?;
    let body = load(home.path(), "Uffd", server.socket());
    let loading = std::thread::spawn(move || api.put("/snapshot/load", &body));
    server.wait_for("WITHHELD")?;
    vmm.signal(Signal::TERM)?;
    let refused = loading.join().expect("it does not panic")?;
    ensure!(refused.status == 400 && refused.fault().contains("was cancelled"), "{refused:?}");
    ensure!(vmm.exit_status(TIMEOUT)?.signal() == Some(Signal::TERM.as_raw()));
    Ok(())
}
