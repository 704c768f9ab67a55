//! Forks of guests of a few instructions.

use std::fs;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{counting, counts, wait_for};
use vesta_tests::guest::{SOON, vmm_path};
use vesta_tests::process::Orphans;
use vesta_tests::vmm::VmmBuilder;

fn child(dir: &Path, id: &str) -> Value {
    json!({
        "id": id,
        "api_socket": dir.join(format!("{id}.sock")),
        "serial": {"serial_out_path": dir.join(format!("{id}.serial"))},
    })
}

fn fork(api: &mut ApiClient, children: &[Value]) -> Result<Value> {
    api.put("/fork", &json!({"children": children}))?.ok()?.json()
}

fn client(dir: &Path, id: &str) -> ApiClient {
    ApiClient::new(&dir.join(format!("{id}.sock")))
}

#[test]
fn children_and_parent_go_on_independently_from_the_same_moment() -> Result<()> {
    let (vmm, mut api, serial) = counting(&json!({}))?;
    // The children outlive their parent, and its directory.
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let reply = fork(&mut api, &[child(dir, "a"), child(dir, "b")])?;
    let orphans = Orphans::of_fork(&reply)?;
    let parent = wait_for(&serial, 10)?;
    assert!(counts(&parent) && parent[0] == 0);
    let mut firsts = Vec::new();
    for id in ["a", "b"] {
        let said = wait_for(&dir.join(format!("{id}.serial")), 10)?;
        assert!(counts(&said), "{id}");
        firsts.push(said[0]);
        assert_eq!(client(dir, id).get("/")?.json()?["id"], json!(id));
    }
    assert_eq!(firsts[0], firsts[1], "both begin at the same moment");
    // Killing one leaves the others.
    Orphans::of(&[reply["children"][0]["pid"].as_u64().context("a pid")?]).kill(SOON)?;
    wait_for(&dir.join("b.serial"), 10)?;
    wait_for(&serial, 10)?;
    drop(vmm);
    // Nor do children end with their parent.
    assert_eq!(client(dir, "b").get("/")?.json()?["state"], json!("Running"));
    orphans.kill(SOON)
}

#[test]
fn a_fork_of_a_fork_works_and_a_paused_one_stays_paused() -> Result<()> {
    let (_vmm, mut api, _serial) = counting(&json!({}))?;
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let mut orphans = Vec::new();
    for id in ["one", "two", "three"] {
        let reply = fork(&mut api, &[child(dir, id)])?;
        orphans.push(Orphans::of_fork(&reply)?);
        api = client(dir, id);
        let said = wait_for(&dir.join(format!("{id}.serial")), 300)?;
        assert!(counts(&said), "{id}");
    }
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    let mut still = child(dir, "still");
    still["resume"] = json!(false);
    let reply = fork(&mut api, &[still])?;
    orphans.push(Orphans::of_fork(&reply)?);
    let mut still = client(dir, "still");
    assert_eq!(api.get("/")?.json()?["state"], json!("Paused"));
    assert_eq!(still.get("/")?.json()?["state"], json!("Paused"));
    assert_eq!(fs::metadata(dir.join("still.serial"))?.len(), 0);
    still.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    assert!(counts(&wait_for(&dir.join("still.serial"), 10)?));
    orphans.into_iter().try_for_each(|orphan| orphan.kill(SOON))
}

#[test]
fn fifty_children_of_one_call_all_begin() -> Result<()> {
    let (_vmm, mut api, serial) = counting(&json!({}))?;
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let children: Vec<_> = (0..50).map(|n| child(dir, &format!("c{n}"))).collect();
    let reply = fork(&mut api, &children)?;
    let orphans = Orphans::of_fork(&reply)?;
    for n in 0..50 {
        assert!(counts(&wait_for(&dir.join(format!("c{n}.serial")), 1)?), "c{n}");
    }
    wait_for(&serial, 10)?;
    assert_eq!(orphans.running()?, 50);
    orphans.kill(SOON)
}

#[test]
fn what_cannot_be_forked_is_refused_by_name_and_the_guest_goes_on() -> Result<()> {
    let (vmm, mut api, serial) = counting(&json!({}))?;
    let taken = vmm.dir().join("api.sock");
    for (body, named) in [
        (json!({"children": []}), "0 entries"),
        (json!({"children": [{"id": "a"}, {"id": "a"}]}), "id a is given twice"),
        (json!({"children": [{"id": "a", "api_socket": taken}]}), "in use"),
        (json!({"children": [{"id": "a", "api_socket": "/nowhere/a.sock"}]}), "/nowhere/a.sock"),
        (json!({"children": [{"id": "a", "drives": [{"drive_id": "d", "overlay": "/o"}]}]}), "no drive d"),
        (
            json!({"children": [{"id": "a", "cgroup": "/nowhere"}]}),
            "child a: cannot move to the cgroup /nowhere",
        ),
        (json!({"children": [{"id": "a", "serial": {"serial_out_path": "/nowhere/s"}}]}), "/nowhere/s"),
        (
            json!({"children": [{"id": "a", "logger": {"log_path": "/nowhere/l"}}]}),
            "child a: cannot open the log",
        ),
    ] {
        let refused = api.put("/fork", &body)?;
        assert_eq!(refused.status, 400, "{refused:?}");
        assert!(refused.fault().contains(named), "{named}: {refused:?}");
        assert!(counts(&wait_for(&serial, 10)?));
    }
    let mut before = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let refused = before.ready_client(SOON)?.put("/fork", &json!({"children": [{"id": "a"}]}))?;
    assert_eq!(refused.status, 400);
    assert!(refused.fault().contains("needs a started microVM"), "{refused:?}");
    assert!(before.is_running()?);
    Ok(())
}
