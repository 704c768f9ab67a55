//! The runner inside: each test in a process of its own, with a time limit, and nothing left of it afterwards.
//!
//! Processes that a test starts and loses come to this process (it is their subreaper), so that none escapes by
//! leaving its process group.

use std::collections::BTreeSet;
use std::fs::File;
use std::io::Read;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, WaitOptions, kill_process, kill_process_group, pidfd_open};
use vesta_tests::guest::{IGNORED_MARK, IGNORED_STATUS};
use vesta_tests::process::die_with_parent;

use super::record::{Plan, Record, Test, Verdict, append};
use crate::process::ScratchDir;

/// What is kept of a test's output: its end.
const OUTPUT_LIMIT: usize = 256 << 10;

/// `test-inner PLAN RECORDS`: runs the plan, and appends to the records.
pub(crate) fn main(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (plan, records) = (PathBuf::from(parser.value()?), PathBuf::from(parser.value()?));
    let plan: Plan = serde_json::from_slice(&std::fs::read(&plan)?).context("the plan")?;
    let mut records = File::options().append(true).create(true).open(&records)?;
    // The argument only has to be there.
    rustix::process::set_child_subreaper(Some(rustix::process::getpid()))?;
    for test in &plan.tests {
        append(&mut records, &Record::Started { title: test.title() })?;
        let started = Instant::now();
        let (verdict, output) = run(test, &plan)?;
        let took = started.elapsed();
        show(&test.title(), &verdict, took, &output);
        append(&mut records, &Record::Ended { title: test.title(), verdict, took, output })?;
    }
    Ok(ExitCode::SUCCESS)
}

/// Says how a test ended, and shows what it said where it failed.
pub(crate) fn show(title: &str, verdict: &Verdict, took: Duration, output: &str) {
    let took = took.as_secs_f64();
    match verdict {
        Verdict::Passed => println!("        PASS [{took:7.3}s] {title}"),
        Verdict::Ignored(reason) => println!("     IGNORED [{took:7.3}s] {title}: {reason}"),
        Verdict::Failed(reason) => {
            println!("        FAIL [{took:7.3}s] {title}: {reason}");
            println!("--- output of {title}\n{}\n--- end of {title}", output.trim_end());
        }
    }
}

fn run(test: &Test, plan: &Plan) -> Result<(Verdict, String)> {
    let scratch = ScratchDir::new()?;
    let before = HostState::read()?;
    let (reader, writer) = std::io::pipe()?;
    let mut command = Command::new(&test.binary);
    command
        .args(["--exact", &test.name, "--nocapture", "--test-threads=1"])
        .env("TMPDIR", scratch.path())
        .env("RUST_BACKTRACE", "0")
        .process_group(0)
        .stdin(Stdio::null())
        .stdout(writer.try_clone()?)
        .stderr(writer);
    let mut child = die_with_parent(&mut command)
        .spawn()
        .with_context(|| format!("cannot run {}", test.binary.display()))?;
    // It holds the pipe's other end.
    drop(command);
    let output = std::thread::spawn(move || read_end(reader));
    let ended = wait(&mut child, plan.limit)?;
    let mut left: Vec<String> =
        kill_descendants()?.into_iter().map(|name| format!("process {name}")).collect();
    let output = output.join().expect("it does not panic");
    left.extend(files_in(scratch.path())?.into_iter().map(|name| format!("file {name}")));
    if plan.machine_is_ours {
        left.extend(before.leftovers()?);
    }
    let verdict = match ended {
        None => Verdict::Failed(format!("it took longer than {} s", plan.limit.as_secs())),
        Some(status) if status.code() == Some(IGNORED_STATUS.into()) => {
            let reason = output.lines().rev().find_map(|line| line.split_once(IGNORED_MARK));
            Verdict::Ignored(reason.map_or("it did not say why", |(_, reason)| reason).to_owned())
        }
        Some(status) if status.success() && !output.contains("1 passed") => {
            Verdict::Failed("its binary did not run it".to_owned())
        }
        Some(status) if status.success() && !left.is_empty() => {
            Verdict::Failed(format!("it passed and left behind: {}", left.join(", ")))
        }
        Some(status) if status.success() => Verdict::Passed,
        Some(status) => Verdict::Failed(match status.signal() {
            Some(signal) => format!("signal {signal} ended it"),
            None => "see its output".to_owned(),
        }),
    };
    Ok((verdict, output))
}

/// Waits for a process's end; `None` where the time is over first.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<std::process::ExitStatus>> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).context("the time limit")?;
    if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))? == 0 {
        // The whole group goes, so that nothing holds the pipe; the caller counts what is left of it.
        kill_process_group(Pid::from_child(child), Signal::KILL)?;
        child.wait()?;
        return Ok(None);
    }
    Ok(Some(child.wait()?))
}

/// Ends all that descends from this process, and returns its names.
fn kill_descendants() -> Result<Vec<String>> {
    let mut names = Vec::new();
    // Ending a process hands its own children to this one: again until there are none.
    loop {
        let children = children()?;
        if children.is_empty() {
            return Ok(names);
        }
        for (pid, name) in children {
            names.push(name);
            // It may have ended by itself.
            let _ = kill_process(pid, Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

/// The processes whose parent is this one, those that have ended and were not waited for left out.
fn children() -> Result<Vec<(Pid, String)>> {
    let me = std::process::id();
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?)) else {
            continue;
        };
        // It may end while we look.
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let Some((before, after)) = stat.rsplit_once(')') else { continue };
        let name = before.split_once('(').map_or("", |(_, name)| name);
        let mut fields = after.split_whitespace();
        let (state, parent) = (fields.next(), fields.next());
        if parent != Some(me.to_string().as_str()) {
            continue;
        }
        if state == Some("Z") {
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::NOHANG);
        } else {
            children.push((pid, name.to_owned()));
        }
    }
    Ok(children)
}

/// Reads to the end, and keeps the last of it.
fn read_end(mut from: impl Read) -> String {
    let mut kept = Vec::new();
    let mut chunk = vec![0; 64 << 10];
    while let Ok(len @ 1..) = from.read(&mut chunk) {
        kept.extend_from_slice(&chunk[..len]);
        if kept.len() > 2 * OUTPUT_LIMIT {
            kept.drain(..kept.len() - OUTPUT_LIMIT);
        }
    }
    let start = kept.len().saturating_sub(OUTPUT_LIMIT);
    String::from_utf8_lossy(&kept[start..]).into_owned()
}

fn files_in(dir: &Path) -> Result<Vec<String>> {
    std::fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name().to_string_lossy().into_owned())).collect()
}

/// How long the kernel may take to take away what nobody has any more.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(2);

/// What a test could leave behind on the machine.
struct HostState(BTreeSet<String>);

impl HostState {
    fn read() -> Result<HostState> {
        let mut things = BTreeSet::new();
        for entry in std::fs::read_dir("/sys/class/net")? {
            things.insert(format!("network interface {}", entry?.file_name().to_string_lossy()));
        }
        for line in std::fs::read_to_string("/proc/self/mounts")?.lines() {
            things.insert(format!("mount on {}", line.split(' ').nth(1).unwrap_or_default()));
        }
        for entry in std::fs::read_dir("/sys/block")? {
            // A loop device stays when nothing is attached to it any more.
            let entry = entry?;
            let name = entry.file_name().to_string_lossy().into_owned();
            if name.starts_with("dm-") || entry.path().join("loop/backing_file").exists() {
                things.insert(format!("block device {name}"));
            }
        }
        for name in files_in(Path::new("/tmp"))?.into_iter().filter(|name| name.starts_with("vesta-")) {
            things.insert(format!("file /tmp/{name}"));
        }
        Ok(HostState(things))
    }

    /// What there is beyond this. The kernel takes some things away in its own time and tells nobody: it closes a disk some while after
    /// the process that had it in an `io_uring` has ended. So it is looked for until it is gone, or until the patience is.
    fn leftovers(&self) -> Result<Vec<String>> {
        let begun = Instant::now();
        loop {
            let left: Vec<String> = HostState::read()?.0.difference(&self.0).cloned().collect();
            if left.is_empty() || begun.elapsed() > CLEANUP_TIMEOUT {
                return Ok(left);
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }
}
