//! Forks of guests of a few instructions.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::fs::{CWD, Mode, mkfifoat};
use rustix::process::Signal;
use serde_json::{Value, json};
use tempfile::TempDir;
use vesta_tests::api::{ApiClient, Response};
use vesta_tests::counting::{counting, counting_with, is_consecutive, sweeping, wait_for_bytes};
use vesta_tests::disks::{disk, drive, with};
use vesta_tests::guest::{TIMEOUT, Transport, ignore, vmm_path};
use vesta_tests::process::{self, Orphans};
use vesta_tests::snapshots::{Files, pause, resume, unconfigured};
use vesta_tests::vmm::{Vmm, VmmBuilder};

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
fn children_and_parent_continue_from_the_same_state() -> Result<()> {
    let (vmm, mut api, serial) = counting(&json!({}))?;
    // The children outlive their parent and its directory.
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let reply = fork(&mut api, &[child(dir, "a"), child(dir, "b")])?;
    let orphans = Orphans::of_fork(&reply)?;
    let parent = wait_for_bytes(&serial, 10)?;
    assert!(is_consecutive(&parent) && parent[0] == 0);
    let mut firsts = Vec::new();
    for id in ["a", "b"] {
        let output = wait_for_bytes(&dir.join(format!("{id}.serial")), 10)?;
        assert!(is_consecutive(&output), "{id}");
        firsts.push(output[0]);
        assert_eq!(client(dir, id).get("/")?.json()?["id"], json!(id));
    }
    assert_eq!(firsts[0], firsts[1], "both begin at the same moment");
    // Killing one does not affect the others.
    Orphans::of(&[reply["children"][0]["pid"].as_u64().context("a pid")?]).kill(TIMEOUT)?;
    wait_for_bytes(&dir.join("b.serial"), 10)?;
    wait_for_bytes(&serial, 10)?;
    drop(vmm);
    // Children do not end with their parent.
    assert_eq!(client(dir, "b").get("/")?.json()?["state"], json!("Running"));
    orphans.kill(TIMEOUT)
}

#[test]
fn a_child_can_be_forked_and_a_paused_guest_stays_paused() -> Result<()> {
    let (_vmm, mut api, _serial) = counting(&json!({}))?;
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let mut orphans = Vec::new();
    for id in ["one", "two", "three"] {
        let reply = fork(&mut api, &[child(dir, id)])?;
        orphans.push(Orphans::of_fork(&reply)?);
        api = client(dir, id);
        let output = wait_for_bytes(&dir.join(format!("{id}.serial")), 300)?;
        assert!(is_consecutive(&output), "{id}");
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
    assert!(is_consecutive(&wait_for_bytes(&dir.join("still.serial"), 10)?));
    orphans.into_iter().try_for_each(|orphan| orphan.kill(TIMEOUT))
}

#[test]
fn one_call_starts_fifty_children() -> Result<()> {
    let (_vmm, mut api, serial) = counting(&json!({}))?;
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let children: Vec<_> = (0..50).map(|n| child(dir, &format!("c{n}"))).collect();
    let reply = fork(&mut api, &children)?;
    let orphans = Orphans::of_fork(&reply)?;
    for n in 0..50 {
        assert!(is_consecutive(&wait_for_bytes(&dir.join(format!("c{n}.serial")), 1)?), "c{n}");
    }
    wait_for_bytes(&serial, 10)?;
    assert_eq!(orphans.running()?, 50);
    orphans.kill(TIMEOUT)
}

#[test]
fn invalid_forks_are_refused_by_name_and_the_guest_continues() -> Result<()> {
    let (vmm, mut api, serial) = counting(&json!({}))?;
    let taken = vmm.dir().join("api.sock");
    for (body, named) in [
        (json!({"children": []}), "0 entries"),
        (json!({"children": [{"id": "a"}, {"id": "a"}]}), "id a is given twice"),
        (json!({"children": [{"id": "a"}, {"id": "parent"}]}), "child parent: this is the id of the microVM"),
        (json!({"children": [{"id": "a", "api_socket": taken}]}), "in use"),
        (json!({"children": [{"id": "a", "api_socket": "/nowhere/a.sock"}]}), "/nowhere/a.sock"),
        (
            json!({"children": [{"id": "a", "drives": [{"drive_id": "d", "overlay": "/o"}]}]}),
            "drive d: there is no such drive",
        ),
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
        assert!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    }
    let mut before = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let refused = before.ready_client(TIMEOUT)?.put("/fork", &json!({"children": [{"id": "a"}]}))?;
    assert_eq!(refused.status, 400);
    assert!(refused.fault().contains("not supported before starting the microVM"), "{refused:?}");
    assert!(before.is_running()?);
    Ok(())
}

#[test]
fn child_that_cannot_start_removes_its_api_socket() -> Result<()> {
    let (_vmm, mut api, _serial) = counting(&json!({}))?;
    let home = tempfile::tempdir()?;
    let mut child = child(home.path(), "a");
    child["cgroup"] = json!("/nowhere");
    let refused = api.put("/fork", &json!({"children": [child]}))?;
    ensure!(refused.status == 400, "{refused:?}");
    // The child ends after its report.
    let deadline = Instant::now() + TIMEOUT;
    while home.path().join("a.sock").exists() {
        ensure!(Instant::now() < deadline, "the socket is left behind");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

/// A child that does not start before the pipe which it uses as its cgroup's list is read.
struct Stuck {
    dir: TempDir,
}

impl Stuck {
    fn new() -> Result<Stuck> {
        let dir = tempfile::tempdir()?;
        mkfifoat(CWD, dir.path().join("cgroup.procs"), Mode::RWXU)?;
        Ok(Stuck { dir })
    }

    fn child(&self, id: &str) -> Value {
        let mut child = child(self.dir.path(), id);
        child["cgroup"] = json!(self.dir.path());
        child
    }

    /// Lets it start; returns its process id.
    fn let_go(&self) -> Result<u64> {
        Ok(fs::read_to_string(self.dir.path().join("cgroup.procs"))?.trim().parse()?)
    }
}

/// Sends a fork of these children, and waits until that many processes exist. The thread returns
/// the response.
fn begin_fork(vmm: &Vmm, children: Vec<Value>) -> Result<(JoinHandle<Result<Response>>, Orphans)> {
    let mut api = vmm.client();
    let count = children.len();
    let asking = std::thread::spawn(move || api.put("/fork", &json!({"children": children})));
    let deadline = Instant::now() + TIMEOUT;
    // Each child forks the next.
    let family = |pid: u32| -> Result<Vec<u64>> {
        let mut found = process::children(pid)?;
        while let Some(last) = found.last()
            && let Ok(next) = process::children(u32::try_from(*last)?)
            && !next.is_empty()
        {
            found.extend(next);
        }
        Ok(found)
    };
    loop {
        let found = family(vmm.pid())?;
        if found.len() == count {
            return Ok((asking, Orphans::of(&found)));
        }
        ensure!(Instant::now() < deadline, "there are {found:?}");
        std::thread::yield_now();
    }
}

fn answer(asking: JoinHandle<Result<Response>>) -> Result<Response> {
    asking.join().ok().context("the thread that asks")?
}

#[test]
fn a_child_that_dies_while_it_starts_delays_no_other() -> Result<()> {
    let (vmm, mut api, serial) = counting(&json!({}))?;
    let home = tempfile::tempdir()?;
    let stuck = Stuck::new()?;
    // The first child survives, and must not make its parent wait for the second.
    let begin = Instant::now();
    let (asking, orphans) = begin_fork(&vmm, vec![child(home.path(), "good"), stuck.child("bad")])?;
    client(home.path(), "good").wait_ready(TIMEOUT)?;
    let bad = process::children(vmm.pid())?;
    ensure!(bad.len() == 1, "{bad:?}: the second is the one that the parent makes");
    Orphans::of(&bad).kill(TIMEOUT)?;
    let reply = answer(asking)?.ok()?.json()?;
    ensure!(begin.elapsed() < TIMEOUT, "it took {:?}", begin.elapsed());
    ensure!(reply["children"][0]["pid"].is_u64(), "{reply}");
    ensure!(reply["children"][1]["error"].as_str().is_some_and(|error| error.contains("ended")), "{reply}");
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?) && api.get("/")?.status == 200);
    ensure!(is_consecutive(&wait_for_bytes(&home.path().join("good.serial"), 10)?));
    orphans.kill(TIMEOUT)
}

#[test]
fn a_signal_to_a_starting_child_does_not_reach_its_parent() -> Result<()> {
    let (mut vmm, mut api, serial) = counting(&json!({}))?;
    let stuck = Stuck::new()?;
    let (asking, orphans) = begin_fork(&vmm, vec![stuck.child("a")])?;
    orphans.signal(Signal::TERM)?;
    stuck.let_go()?;
    answer(asking)?;
    orphans.wait(TIMEOUT)?;
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?) && api.get("/")?.status == 200);
    ensure!(vmm.is_running()?);
    Ok(())
}

#[test]
fn a_parent_that_gets_sigterm_does_not_wait_for_children() -> Result<()> {
    let (mut vmm, _api, _serial) = counting(&json!({}))?;
    let stuck = Stuck::new()?;
    let (asking, orphans) = begin_fork(&vmm, vec![stuck.child("a")])?;
    vmm.signal(Signal::TERM)?;
    vmm.exit_status(TIMEOUT)?;
    // It may have responded or not.
    let _ = answer(asking);
    orphans.kill(TIMEOUT)
}

#[test]
fn children_have_their_own_session_and_no_inherited_streams() -> Result<()> {
    let (_vmm, mut api, _serial) = counting(&json!({}))?;
    let home = tempfile::tempdir()?;
    let [plain, mut logs] = ["plain", "logs"].map(|id| child(home.path(), id));
    logs["logger"] = json!({"log_path": home.path().join("log")});
    let reply = fork(&mut api, &[plain, logs])?;
    let orphans = Orphans::of_fork(&reply)?;
    for (at, null) in [&[0][..], &[0, 1, 2]].into_iter().enumerate() {
        let pid = reply["children"][at]["pid"].as_u64().context("a pid")?;
        let stat = fs::read_to_string(format!("/proc/{pid}/stat"))?;
        let fields: Vec<_> = stat.rsplit(") ").next().context("fields")?.split(' ').collect();
        // After the name: state, parent, process group, session.
        ensure!(fields[2..4].iter().all(|id| *id == pid.to_string()), "{stat}");
        for fd in null {
            let file = fs::read_link(format!("/proc/{pid}/fd/{fd}"))?;
            ensure!(file == Path::new("/dev/null"), "{at}: {fd} is {}", file.display());
        }
    }
    orphans.kill(TIMEOUT)
}

#[test]
fn a_child_moves_to_its_configured_cgroup() -> Result<()> {
    let mounts = fs::read_to_string("/proc/mounts")?;
    let root = mounts.lines().find_map(|line| {
        let mut words = line.split(' ').skip(1);
        let path = words.next()?;
        (words.next()? == "cgroup2").then(|| path.to_owned())
    });
    let Some(root) = root else { ignore("no cgroup v2 is mounted") };
    let group = Path::new(&root).join(format!("vesta-test-{}", std::process::id()));
    if let Err(error) = fs::create_dir(&group) {
        ignore(&format!("no cgroup can be made in {root}: {error}"));
    }
    let moved = || -> Result<()> {
        let (vmm, mut api, _serial) = counting(&json!({}))?;
        let home = tempfile::tempdir()?;
        let mut moves = child(home.path(), "moves");
        moves["cgroup"] = json!(group);
        let reply = fork(&mut api, &[moves, child(home.path(), "stays")])?;
        let orphans = Orphans::of_fork(&reply)?;
        let of = |pid: u64| -> Result<String> {
            let all = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
            Ok(all.lines().find_map(|line| line.strip_prefix("0::")).context("a cgroup v2")?.to_owned())
        };
        let pid = |at: usize| reply["children"][at]["pid"].as_u64().context("a pid");
        let name = group.file_name().context("a name")?.to_string_lossy().into_owned();
        ensure!(of(pid(0)?)?.ends_with(&name), "{}", of(pid(0)?)?);
        ensure!(of(pid(1)?)? == of(vmm.pid().into())?);
        orphans.kill(TIMEOUT)
    };
    let moved = moved();
    fs::remove_dir(&group)?;
    moved
}

/// The overlay of the first drive in `GET /vm/config`: its file and its layers.
fn overlay(api: &mut ApiClient, drive: usize) -> Result<(PathBuf, Vec<PathBuf>)> {
    let config = api.get("/vm/config")?.ok()?.json()?;
    let overlay = &config["drives"][drive]["overlay"];
    let path = |path: &Value| path.as_str().map(PathBuf::from);
    let layers = overlay["layers"].as_array().into_iter().flatten().filter_map(path).collect();
    Ok((path(&overlay["path"]).with_context(|| format!("an overlay in {config}"))?, layers))
}

#[test]
fn an_idle_guest_can_be_forked_any_number_of_times() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    let (_vmm, mut api, _serial) = counting_with(&[drive("d", &image)])?;
    // More often than an overlay can have layers.
    for round in 0..40 {
        let id = format!("c{round}");
        let reply = fork(&mut api, &[child(dir, &id)])?;
        let orphans = Orphans::of_fork(&reply)?;
        ensure!(overlay(&mut api, 0)? == (dir.join("disk.img.parent.1"), Vec::new()), "{round}");
        let childs = overlay(&mut client(dir, &id), 0)?;
        ensure!(childs == (dir.join(format!("disk.img.{id}.1")), Vec::new()), "{round}: {childs:?}");
        orphans.kill(TIMEOUT)?;
    }
    Ok(())
}

#[test]
fn writes_before_a_fork_are_a_layer_of_both_sides() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    fs::create_dir(dir.join("writes"))?;
    let top = dir.join("writes/top");
    let on_top = with(drive("d", &image), &json!({"overlay": {"path": top}}));
    drop(counting_with(std::slice::from_ref(&on_top))?);
    // As if the guest had written the first sectors: their bits in the first map.
    File::options().write(true).open(&top)?.write_all_at(&[0xff], 8192)?;
    // Two drives on one image have two overlays.
    let other = with(drive("e", &image), &json!({"overlay": {"path": dir.join("writes/other")}}));
    let (_vmm, mut api, _serial) = counting_with(&[on_top, other])?;
    let reply = fork(&mut api, &[child(dir, "a")])?;
    let orphans = Orphans::of_fork(&reply)?;
    // Beside the overlay, because the image's directory may be read-only.
    let name = |name: &str| dir.join("writes").join(name);
    let layers = vec![top];
    ensure!(overlay(&mut api, 0)? == (name("disk.img.parent.1"), layers.clone()));
    ensure!(overlay(&mut api, 1)? == (name("other"), Vec::new()));
    let mut child_api = client(dir, "a");
    ensure!(overlay(&mut child_api, 0)? == (name("disk.img.a.1"), layers.clone()));
    ensure!(overlay(&mut child_api, 1)? == (name("disk.img.a.2"), Vec::new()));
    // A child that has written nothing forks from the same layers.
    let grandchild = fork(&mut child_api, &[child(dir, "b")])?;
    let more = Orphans::of_fork(&grandchild)?;
    ensure!(overlay(&mut client(dir, "b"), 0)? == (name("disk.img.b.1"), layers));
    orphans.kill(TIMEOUT)?;
    more.kill(TIMEOUT)
}

/// A disk in `dir` with the overlay `top` on these layers.
fn with_layers(dir: &Path, top: &Path, layers: &[PathBuf]) -> Value {
    let disk = drive("d", &dir.join("disk.img"));
    with(disk, &json!({"overlay": {"path": top, "layers": layers}}))
}

/// Makes a disk and so many written layers on it. The next overlay on them is written too.
fn layered(dir: &Path, count: usize) -> Result<(Value, Vec<PathBuf>)> {
    disk(dir, "disk.img", 1)?;
    let mut layers = Vec::new();
    for number in 0..=count {
        let top = dir.join(format!("layer{number}"));
        drop(counting_with(&[with_layers(dir, &top, &layers)])?);
        // As if the guest had written other sectors in each layer.
        File::options().write(true).open(&top)?.write_all_at(&[0xff], 8192 + number as u64)?;
        layers.push(top);
    }
    let top = &layers[count];
    Ok((with_layers(dir, top, &layers[..count]), layers))
}

#[test]
fn many_layers_are_merged_in_the_background_for_later_forks() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let (drive, layers) = layered(dir, 16)?;
    let (mut vmm, mut api, serial) = counting_with(&[drive])?;
    let begun = Instant::now();
    let merged = [dir.join("disk.img.parent.2")];
    // Nothing waits for the merge. Children that end during it, or later, do not affect it.
    for round in 0.. {
        let id = format!("c{round}");
        let reply = fork(&mut api, &[child(dir, &id)])?;
        let orphans = Orphans::of_fork(&reply)?;
        let (_, childs) = overlay(&mut client(dir, &id), 0)?;
        orphans.signal(Signal::TERM)?;
        orphans.wait(TIMEOUT)?;
        // The parent, which has not written since, keeps its layers.
        ensure!(overlay(&mut api, 0)? == (dir.join("disk.img.parent.1"), layers.clone()));
        ensure!(merged[0].exists(), "{round}");
        if childs == merged {
            break;
        }
        ensure!(childs == layers && begun.elapsed() < TIMEOUT, "{round}: {childs:?}");
    }
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    // The merge is used: it outlives the monitor, and a guest on it finds correct data.
    vmm.signal(Signal::TERM)?;
    vmm.exit_status(TIMEOUT)?;
    counting_with(&[with_layers(dir, &dir.join("other"), &merged)])?;
    Ok(())
}

#[test]
fn a_fork_at_the_layer_limit_works_once_layers_are_merged() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let (drive, layers) = layered(dir, 32)?;
    let (_vmm, mut api, serial) = counting_with(&[drive])?;
    let begun = Instant::now();
    let body = json!({"children": [child(dir, "a")]});
    let mut refused = api.put("/fork", &body)?;
    ensure!(refused.status == 400 && refused.fault().contains("overlay.layers"), "{refused:?}");
    while refused.status == 400 && begun.elapsed() < TIMEOUT {
        refused = api.put("/fork", &body)?;
    }
    let orphans = Orphans::of_fork(&refused.ok()?.json()?)?;
    let merged = vec![dir.join("disk.img.parent.1"), layers[32].clone()];
    ensure!(overlay(&mut api, 0)? == (dir.join("disk.img.parent.2"), merged.clone()));
    ensure!(overlay(&mut client(dir, "a"), 0)? == (dir.join("disk.img.a.1"), merged));
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    orphans.kill(TIMEOUT)
}

#[test]
fn an_unused_merge_is_removed_when_the_monitor_ends() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let (drive, _) = layered(dir, 16)?;
    let (mut vmm, mut api, _serial) = counting_with(&[drive])?;
    let orphans = Orphans::of_fork(&fork(&mut api, &[child(dir, "a")])?)?;
    let merged = dir.join("disk.img.parent.2");
    ensure!(merged.exists());
    // Whether or not it is complete by now.
    vmm.signal(Signal::TERM)?;
    vmm.exit_status(TIMEOUT)?;
    ensure!(!merged.exists());
    orphans.kill(TIMEOUT)
}

#[test]
fn a_child_that_cannot_start_removes_only_its_own_overlay() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let image = disk(dir, "disk.img", 1)?;
    let (_vmm, mut api, serial) = counting_with(&[drive("d", &image)])?;
    let mut bad = child(dir, "bad");
    bad["serial"]["serial_out_path"] = json!("/nowhere/s");
    let reply = fork(&mut api, &[child(dir, "one"), bad, child(dir, "two")])?;
    let living: Vec<_> = (0..3).filter_map(|at| reply["children"][at]["pid"].as_u64()).collect();
    let orphans = Orphans::of(&living);
    ensure!(living.len() == 2, "{reply}");
    ensure!(reply["children"][1]["error"].to_string().contains("/nowhere/s"), "{reply}");
    for id in ["one", "two"] {
        ensure!(is_consecutive(&wait_for_bytes(&dir.join(format!("{id}.serial")), 10)?), "{id}");
        ensure!(dir.join(format!("disk.img.{id}.1")).exists(), "{id}");
    }
    ensure!(!dir.join("disk.img.bad.1").exists());
    ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
    orphans.kill(TIMEOUT)
}

#[test]
fn a_childs_diff_includes_its_parents_writes_before_the_fork() -> Result<()> {
    let home = tempfile::tempdir()?;
    let dir = home.path();
    let (_vmm, mut api, serial) = sweeping(&json!({"track_dirty_pages": true}))?;
    let files = Files::new(dir, "a");
    pause(&mut api)?;
    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
    resume(&mut api)?;
    wait_for_bytes(&serial, 2)?;
    let mut still = child(dir, "still");
    still["resume"] = json!(false);
    let reply = fork(&mut api, &[still])?;
    let orphans = Orphans::of_fork(&reply)?;
    client(dir, "still").put("/snapshot/create", &files.create("Diff"))?.ok()?;
    let (vmm, mut clone) = unconfigured(Transport::Mmio)?;
    let serial = vmm.dir().join("serial");
    clone.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    clone.put("/snapshot/load", &files.load())?.ok()?;
    // The guest prints nothing if a page of its memory is wrong.
    ensure!(is_consecutive(&wait_for_bytes(&serial, 3)?));
    orphans.kill(TIMEOUT)
}
