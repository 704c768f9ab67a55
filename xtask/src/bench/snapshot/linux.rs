//! Linux guests: time until a program in the guest answers its first request.
//!
//! The request is one byte through vsock, which the guest's program sends back. A boot, restores in
//! a new process and a child of a fork are measured beside each other.

use std::fs;
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::process::Orphans;
use vesta_tests::vmm::{Vmm, VmmBuilder};
use vesta_tests::vsock::{port, try_connect_within};

use super::common::{FEWEST_RUNS, RunSpec, TIMEOUT, all_at_once, ms, pause, private_kib};
use crate::bench::monitor::Monitor;
use crate::bench::peers::{lacking, not_measured};
use crate::bench::rounds::{Entry, interleaved};
use crate::bench::serving_guest::{SERVING, ServingGuest};
use crate::process::say;

/// Longest wait for an answer in the first attempt. It doubles after each attempt without an
/// answer.
const FIRST_ATTEMPT: Duration = Duration::from_millis(500);
/// The guest's vsock socket, relative to the directory of each monitor, so clones need no override.
const SOCKET: &str = "v.sock";
/// The same for a child of a fork.
const CHILD_SOCKET: &str = "child.sock";
/// How many clones are started at once.
const CLONES: [usize; 2] = [10, 50];

/// How a guest is started.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum StartMethod {
    Boot,
    Load,
    /// The pages that the first restore used are read ahead of the guest.
    Prefetch,
    /// `--restore`, without an API call.
    Flag,
    Fork,
}

impl StartMethod {
    /// All methods; the first two are in every monitor.
    const ALL: [StartMethod; 5] =
        [StartMethod::Boot, StartMethod::Load, StartMethod::Prefetch, StartMethod::Flag, StartMethod::Fork];
    const OF_PEERS: [StartMethod; 2] = [StartMethod::Boot, StartMethod::Load];

    fn name(self) -> &'static str {
        match self {
            StartMethod::Boot => "boot",
            StartMethod::Load => "PUT /snapshot/load",
            StartMethod::Prefetch => "PUT /snapshot/load, prefetch",
            StartMethod::Flag => "--restore",
            StartMethod::Fork => "child of PUT /fork",
        }
    }
}

/// The figures of one guest that has answered.
#[derive(Debug, Default)]
struct Sample {
    /// From the process's start; `None` for a fork.
    spawn_ms: Option<f64>,
    /// From the request that starts the guest; `None` where there is none.
    call_ms: Option<f64>,
    own_kib: f64,
}

/// A monitor under test, with a snapshot of its own making and a guest that is forked.
struct Contestant<'a> {
    monitor: &'a Monitor,
    guest: &'a ServingGuest,
    state: PathBuf,
    memory: PathBuf,
    /// It is paused except while it is forked.
    parent: Vmm,
}

impl<'a> Contestant<'a> {
    fn prepare(monitor: &'a Monitor, guest: &'a ServingGuest, dir: &Path) -> Result<Contestant<'a>> {
        let (parent, mut api, _) = boot(monitor, guest)?;
        let path = |part: &str| dir.join(format!("linux-{}.{part}", monitor.name));
        let (state, memory) = (path("state"), path("memory"));
        pause(&mut api)?;
        api.put("/snapshot/create", &json!({"snapshot_path": state, "mem_file_path": memory}))?.ok()?;
        Ok(Contestant { monitor, guest, state, memory, parent })
    }

    fn load_body(&self, method: StartMethod) -> Value {
        let mut body = json!({
            "snapshot_path": self.state,
            "mem_backend": {"backend_type": "File", "backend_path": self.memory},
            "resume_vm": true,
        });
        if method == StartMethod::Prefetch {
            body["prefetch"] = json!(true);
        }
        body
    }

    fn load(&self, vmm: &Vmm, method: StartMethod) -> Result<Instant> {
        let mut api = vmm.ready_client(TIMEOUT)?;
        let asked = Instant::now();
        api.put("/snapshot/load", &self.load_body(method))?.ok()?;
        Ok(asked)
    }

    /// Restores once with prefetching, which records the pages that the guest uses.
    fn record(&self) -> Result<()> {
        let vmm = VmmBuilder::new(&self.monitor.path)?.quiet().with_api().spawn()?;
        self.load(&vmm, StartMethod::Prefetch)?;
        wait_for_answer(&vmm.dir().join(SOCKET))?;
        let mut written = self.memory.clone().into_os_string();
        written.push(".working-set");
        let deadline = Instant::now() + TIMEOUT;
        while !Path::new(&written).exists() {
            if Instant::now() > deadline {
                bail!("no working set is recorded in {}", Path::new(&written).display());
            }
            std::thread::sleep(Duration::from_millis(1));
        }
        Ok(())
    }

    fn sample(&self, method: StartMethod) -> Result<Sample> {
        match method {
            StartMethod::Boot => {
                let (vmm, _, asked) = boot(self.monitor, self.guest)?;
                measure_answer(&vmm, Some(asked))
            }
            StartMethod::Load | StartMethod::Prefetch => {
                let vmm = VmmBuilder::new(&self.monitor.path)?.quiet().with_api().spawn()?;
                let asked = self.load(&vmm, method)?;
                measure_answer(&vmm, Some(asked))
            }
            StartMethod::Flag => {
                let vmm = VmmBuilder::new(&self.monitor.path)?.quiet().with_api();
                let vmm = vmm.arg("--restore").arg(&self.state).arg("--memory").arg(&self.memory).spawn()?;
                measure_answer(&vmm, None)
            }
            StartMethod::Fork => self.fork(),
        }
    }

    fn fork(&self) -> Result<Sample> {
        let mut api = self.parent.ready_client(TIMEOUT)?;
        api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
        let socket = self.parent.dir().join(CHILD_SOCKET);
        let body = json!({"children": [{"id": "child", "vsock_override": {"uds_path": socket}}]});
        let asked = Instant::now();
        let reply = api.put("/fork", &body)?.ok()?.json()?;
        let orphan = Orphans::of_fork(&reply)?;
        wait_for_answer(&socket)?;
        let call_ms = Some(ms(asked.elapsed()));
        let pid = reply["children"][0]["pid"].as_u64().context("a pid")?;
        let own_kib = private_kib(pid)?;
        pause(&mut api)?;
        orphan.kill(TIMEOUT)?;
        // A killed monitor leaves its socket behind.
        fs::remove_file(&socket)?;
        Ok(Sample { spawn_ms: None, call_ms, own_kib })
    }

    fn clean_up(&self) {
        let mut working_set = self.memory.clone().into_os_string();
        working_set.push(".working-set");
        for path in [&self.state, &self.memory, Path::new(&working_set)] {
            // Not all of them exist.
            let _ = fs::remove_file(path);
        }
    }
}

/// Boots a guest that serves. Returns also the time at which it was started.
fn boot(monitor: &Monitor, guest: &ServingGuest) -> Result<(Vmm, ApiClient, Instant)> {
    let vmm = VmmBuilder::new(&monitor.path)?.quiet().with_api().spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    guest.guest().put(&mut api)?;
    api.put("/vsock", &json!({"guest_cid": 3, "uds_path": SOCKET}))?.ok()?;
    let asked = Instant::now();
    api.put("/actions", &json!({"action_type": "InstanceStart"}))?.ok()?;
    vmm.wait_for_output(SERVING, TIMEOUT)?;
    Ok((vmm, api, asked))
}

fn measure_answer(vmm: &Vmm, asked: Option<Instant>) -> Result<Sample> {
    wait_for_answer(&vmm.dir().join(SOCKET))?;
    Ok(Sample {
        spawn_ms: Some(ms(vmm.started().elapsed())),
        call_ms: asked.map(|asked| ms(asked.elapsed())),
        own_kib: private_kib(vmm.pid().into())?,
    })
}

/// Sends one byte and receives it again, as soon as the guest's program answers.
///
/// Until then there may be no socket, no listener, or a connection that ends or gets no answer: a
/// restored guest resets its connections, also those made before it has handled the reset event.
fn wait_for_answer(socket: &Path) -> Result<()> {
    let deadline = Instant::now() + TIMEOUT;
    let mut limit = FIRST_ATTEMPT;
    while let Err(error) = echo(socket, limit) {
        if Instant::now() > deadline {
            return Err(error).with_context(|| socket.display().to_string());
        }
        if error.downcast_ref::<io::Error>().is_some_and(|error| error.kind() == io::ErrorKind::WouldBlock) {
            limit *= 2;
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn echo(socket: &Path, limit: Duration) -> Result<()> {
    let mut stream =
        try_connect_within(socket, port::ECHO, limit)?.context("the guest refuses the connection")?;
    let mut byte = [7];
    stream.write_all(&byte)?;
    Ok(stream.read_exact(&mut byte)?)
}

/// Prints the tables.
pub(super) fn tables(spec: &RunSpec, guest: &ServingGuest) -> Result<()> {
    let (mut contestants, mut left_out) = (Vec::new(), String::new());
    for monitor in &spec.monitors {
        match Contestant::prepare(monitor, guest, &spec.dir) {
            Ok(contestant) => contestants.push(contestant),
            Err(error) if monitor.peer => {
                say!("{} is not measured: {error:#}", monitor.name);
                left_out += &not_measured(&monitor.name, &format!("{error:#}"));
            }
            Err(error) => return Err(error).with_context(|| monitor.name.clone()),
        }
    }
    let measured = first_answers(spec, &contestants).and_then(|()| clones(&contestants));
    contestants.iter().for_each(Contestant::clean_up);
    print!("{left_out}");
    measured
}

fn first_answers(spec: &RunSpec, contestants: &[Contestant<'_>]) -> Result<()> {
    let mut entries = Vec::new();
    for contestant in contestants {
        let Monitor { name, peer, .. } = contestant.monitor;
        let is_vesta = contestant.monitor.is_vesta();
        if is_vesta {
            contestant.record().with_context(|| name.clone())?;
        }
        let methods: &[StartMethod] = if is_vesta { &StartMethod::ALL } else { &StartMethod::OF_PEERS };
        entries.extend(methods.iter().map(|method| Entry {
            name: format!("{name}: {}", method.name()),
            may_fail: *peer,
            contestant: (contestant, *method),
        }));
    }
    let measured = interleaved(entries, spec.runs, true, |(contestant, method)| {
        let sample = contestant.sample(*method)?;
        let list = |value: Option<f64>| value.into_iter().collect();
        Ok(vec![list(sample.spawn_ms), list(sample.call_ms), vec![sample.own_kib]])
    })?;
    println!("## The first request that the guest answers\n");
    let columns =
        ["spawn to answer, ms", "call (InstanceStart, load, fork) to answer, ms", "own memory then, KiB"];
    let lacking = lacking(&spec.monitors, "--restore, prefetch and forks");
    println!("{}{lacking}", measured.markdown(&columns));
    Ok(())
}

fn clones(contestants: &[Contestant<'_>]) -> Result<()> {
    for count in CLONES {
        let entries = contestants.iter().map(|contestant| Entry {
            name: contestant.monitor.name.clone(),
            may_fail: contestant.monitor.peer,
            contestant,
        });
        let measured = interleaved(entries.collect(), FEWEST_RUNS, false, |contestant| {
            let began = Instant::now();
            let clones = all_at_once(&contestant.monitor.path, count, |clone| {
                contestant.load(clone, StartMethod::Load)?;
                wait_for_answer(&clone.dir().join(SOCKET))
            })?;
            let took = ms(began.elapsed());
            let own = clones.iter().map(|clone| private_kib(clone.pid().into()));
            Ok(vec![vec![took], own.collect::<Result<_>>()?])
        })?;
        println!("## Clones: {count} at once\n");
        println!("{}", measured.markdown(&["until all have answered, ms", "own memory of each, KiB"]));
    }
    Ok(())
}
