//! Guests whose memory comes from a page server, also from one that fails.

use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{counts, sweeping, wait_for};
use vesta_tests::guest::{SOON, vmm_path};
use vesta_tests::page_server::PageServer;
use vesta_tests::vmm::{Vmm, VmmBuilder};

const SERVER: &str = env!("CARGO_BIN_EXE_page-server");

fn start(dir: &Path, faults: &str) -> Result<PageServer> {
    PageServer::start(SERVER, &dir.join("memory"), faults)
}

/// A snapshot of a guest that looks at 1024 of its pages again and again, in `dir`.
fn save(dir: &Path) -> Result<()> {
    let (_vmm, mut api, _serial) = sweeping(&json!({}))?;
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
fn a_page_server_that_ends_ends_the_guest_and_the_log_says_so() -> Result<()> {
    let home = tempfile::tempdir()?;
    save(home.path())?;
    let server = start(home.path(), "200")?;
    let (mut vmm, mut api, _serial) = empty()?;
    api.put("/snapshot/load", &load(home.path(), "Uffd", server.socket()))?.ok()?;
    let (code, said) = vmm.finish(SOON)?;
    ensure!(code == 1 && said.contains("the page server has ended"), "{code} {said}");
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
