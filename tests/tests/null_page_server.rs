//! Guests whose memory comes from a page server, also from one that fails.

use std::fs;
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use rustix::process::Signal;
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{WALL_CLOCK, counts, sweeping, wait_for, with_clocks};
use vesta_tests::guest::{SOON, vmm_path};
use vesta_tests::page_server::PageServer;
use vesta_tests::vmm::{Vmm, VmmBuilder};

const SERVER: &str = env!("CARGO_BIN_EXE_page-server");

fn start(dir: &Path, faults: &str) -> Result<PageServer> {
    PageServer::start(SERVER, &dir.join("memory"), faults)
}

/// A snapshot of a guest that looks at 1024 of its pages again and again, in `dir`.
fn save(dir: &Path) -> Result<()> {
    save_guest(sweeping(&json!({}))?, dir)
}

fn save_guest((_vmm, mut api, _serial): (Vmm, ApiClient, PathBuf), dir: &Path) -> Result<()> {
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    let body = json!({"snapshot_path": dir.join("state"), "mem_file_path": dir.join("memory")});
    api.put("/snapshot/create", &body)?.ok().map(drop)
}

fn empty() -> Result<(Vmm, ApiClient, PathBuf)> {
    let vmm = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let mut api = vmm.ready_client(SOON)?;
    let serial = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    Ok((vmm, api, serial))
}

fn load(dir: &Path, kind: &str, path: &Path) -> Value {
    json!({
        "snapshot_path": dir.join("state"),
        "mem_backend": {"backend_type": kind, "backend_path": path},
        "resume_vm": true,
    })
}

#[test]
fn a_guest_goes_on_with_what_its_page_server_sends() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let server = start(home.path(), "all")?;
    let (_vmm, mut api, serial) = empty()?;
    api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?.ok()?;
    // It says a number only if all its pages are right.
    ensure!(counts(&wait_for(&serial, 5)?));
    let refused = api.put("/fork", &json!({"children": [{"id": "a"}]}))?;
    ensure!(refused.status == 400 && refused.fault().contains("page server"), "{refused:?}");
    Ok(())
}

#[test]
fn a_page_server_that_ends_ends_the_guest_which_never_sees_zeros_and_the_log_says_so() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    // It ends while the guest looks at its pages, of which it has seen some as they should be.
    let mut ends = Vec::new();
    for faults in ["200", "500", "900"] {
        let server = start(home.path(), faults)?;
        let (vmm, mut api, serial) = empty()?;
        api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?.ok()?;
        ends.push((faults, server, vmm, serial));
    }
    for (faults, _server, vmm, serial) in &mut ends {
        let (code, said) = vmm.finish(SOON)?;
        ensure!(code == 1 && said.contains("the page server has ended"), "{code} {said}");
        // At a page of zeros it would have said that it is wrong, aloud.
        let numbers = fs::read(&*serial)?;
        ensure!(numbers.len() <= 1, "{faults}: it went on without its pages: {:?}", &numbers[..4]);
    }
    Ok(())
}

#[test]
fn guest_of_a_forked_page_server_outlives_the_process_that_listened() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let mut server = PageServer::start_forked(SERVER, &home.path().join("memory"), "all")?;
    let (mut vmm, mut api, serial) = empty()?;
    let mut body = load(home.path(), "Uffd", server.socket());
    body["resume_vm"] = json!(false);
    api.put("/snapshot/load", &body)?.ok()?;
    server.end_listener()?;
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    ensure!(counts(&wait_for(&serial, 5)?));
    ensure!(vmm.is_running()?, "{}", vmm.stdout.text());
    Ok(())
}

#[test]
fn a_page_server_that_ends_while_its_guest_is_saved_leaves_the_old_snapshot() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let files = || [home.path().join("state"), home.path().join("memory")].map(fs::read);
    let [state, memory] = files();
    let (state, memory) = (state?, memory?);
    let server = start(home.path(), "300")?;
    let (mut vmm, mut api, _serial) = empty()?;
    let mut body = load(home.path(), "Uffd", server.socket());
    body["resume_vm"] = json!(false);
    api.put("/snapshot/load", &body)?.ok()?;
    let body =
        json!({"snapshot_path": home.path().join("state"), "mem_file_path": home.path().join("memory")});
    let refused = api.put("/snapshot/create", &body)?;
    ensure!(refused.status == 400 && refused.fault().contains("pages-300.sock"), "{refused:?}");
    let (code, said) = vmm.finish(SOON)?;
    ensure!(code == 1 && said.contains("the page server has ended"), "{code} {said}");
    let [now_state, now_memory] = files();
    ensure!(now_state? == state && now_memory? == memory, "the snapshot is another one");
    Ok(())
}

#[test]
fn a_page_server_that_stalls_leaves_the_monitor_answering_and_the_guest_can_be_saved_later() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let server = start(home.path(), "all")?;
    let (vmm, mut api, serial) = empty()?;
    let mut body = load(home.path(), "Uffd", server.socket());
    body["resume_vm"] = json!(false);
    api.put("/snapshot/load", &body)?.ok()?;
    server.signal(Signal::STOP)?;
    // The vCPU comes to a page that is missing at once, and the pause to a vCPU that waits.
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
    ensure!(counts(&wait_for(&serial, 3)?));
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    api.put("/snapshot/create", &create)?.ok()?;
    drop(vmm);
    Ok(())
}

#[test]
fn a_page_server_that_is_not_there_or_never_answers_is_refused_and_another_load_works() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let (_vmm, mut api, serial) = empty()?;
    let refused = api.put("/snapshot/load", &load(home.path(), "Uffd", Path::new("/nowhere/pages.sock")))?;
    ensure!(refused.status == 400 && refused.fault().contains("/nowhere/pages.sock"), "{refused:?}");
    let server = start(home.path(), "none")?;
    let refused = api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?;
    ensure!(refused.status == 400 && refused.fault().contains("pages-none.sock"), "{refused:?}");
    api.put("/snapshot/load", &load(home.path(), "File", &home.path().join("memory")))?.ok()?;
    ensure!(counts(&wait_for(&serial, 5)?));
    Ok(())
}

#[test]
fn a_load_fails_if_the_page_of_a_vcpus_clock_never_comes() -> Result<()> {
    let home = tempfile::tempdir()?;
    save_guest(with_clocks()?, home.path())?;
    let mut server = start(home.path(), &format!("except:{WALL_CLOCK}"))?;
    let (_vmm, mut api, serial) = empty()?;
    let refused = api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?;
    server.wait_for("WITHHELD")?;
    ensure!(refused.status == 400 && refused.fault().contains("did not answer a page fault"), "{refused:?}");
    ensure!(api.get("/")?.json()?["state"] == json!("Not started"));
    // Nothing is left of it that another load would come across.
    api.put("/snapshot/load", &load(home.path(), "File", &home.path().join("memory")))?.ok()?;
    ensure!(counts(&wait_for(&serial, 5)?));
    Ok(())
}

#[test]
fn a_load_whose_page_server_ends_under_a_vcpu_fails() -> Result<()> {
    let home = tempfile::tempdir()?;
    save_guest(with_clocks()?, home.path())?;
    let mut server = start(home.path(), &format!("except:{WALL_CLOCK}"))?;
    let (vmm, mut api, serial) = empty()?;
    let body = load(home.path(), "Uffd", server.socket());
    let mut other = vmm.client();
    let loading = std::thread::spawn(move || other.put("/snapshot/load", &body));
    server.wait_for("WITHHELD")?;
    drop(server);
    let refused = loading.join().expect("it does not panic")?;
    ensure!(refused.status == 400 && refused.fault().contains("is gone"), "{refused:?}");
    api.put("/snapshot/load", &load(home.path(), "File", &home.path().join("memory")))?.ok()?;
    ensure!(counts(&wait_for(&serial, 5)?));
    Ok(())
}

#[test]
fn sigterm_ends_a_load_whose_page_server_stalls() -> Result<()> {
    let home = tempfile::tempdir()?;
    save_guest(with_clocks()?, home.path())?;
    let mut server = start(home.path(), &format!("except:{WALL_CLOCK}"))?;
    let (mut vmm, mut api, _serial) = empty()?;
    let body = load(home.path(), "Uffd", server.socket());
    let loading = std::thread::spawn(move || api.put("/snapshot/load", &body));
    server.wait_for("WITHHELD")?;
    vmm.signal(Signal::TERM)?;
    let refused = loading.join().expect("it does not panic")?;
    ensure!(refused.status == 400 && refused.fault().contains("was cancelled"), "{refused:?}");
    ensure!(vmm.exit_status(SOON)?.signal() == Some(Signal::TERM.as_raw()));
    Ok(())
}
