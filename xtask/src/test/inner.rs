//! The test runner on the host: each test in a process of its own, with a time limit.
//!
//! A test that leaves a process or a file behind fails. This process is the subreaper of all
//! processes that a test starts, so none escapes by leaving its process group.

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

/// How many bytes are kept of a test's output, from its end.
const OUTPUT_LIMIT: usize = 256 << 10;

/// `test-inner PLAN RECORDS`: runs the tests of the plan, and appends to the records.
pub(crate) fn main(parser: &mut lexopt::Parser) -> Result<ExitCode> {
    let (plan, records) = (PathBuf::from(parser.value()?), PathBuf::from(parser.value()?));
    let plan: Plan = serde_json::from_slice(&std::fs::read(&plan)?).context("the plan")?;
    let mut records = File::options().append(true).create(true).open(&records)?;
    // The value does not matter.
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

/// Prints how a test ended, and its output if it failed.
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
    // It holds the other end of the pipe.
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
        None => Verdict::Failed(format!("timed out after {} s", plan.limit.as_secs())),
        Some(status) if status.code() == Some(IGNORED_STATUS.into()) => {
            let reason = output.lines().rev().find_map(|line| line.split_once(IGNORED_MARK));
            Verdict::Ignored(reason.map_or("no reason given", |(_, reason)| reason).to_owned())
        }
        Some(status) if status.success() && !output.contains("1 passed") => {
            Verdict::Failed("the test binary did not run it".to_owned())
        }
        Some(status) if status.success() && !left.is_empty() => {
            Verdict::Failed(format!("passed, but left behind: {}", left.join(", ")))
        }
        Some(status) if status.success() => Verdict::Passed,
        Some(status) => Verdict::Failed(match status.signal() {
            Some(signal) => format!("killed by signal {signal}"),
            None => "see its output".to_owned(),
        }),
    };
    Ok((verdict, output))
}

/// Waits for a process to end; `None` if it has not ended within the limit.
fn wait(child: &mut Child, limit: Duration) -> Result<Option<std::process::ExitStatus>> {
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty())?;
    let limit = Timespec::try_from(limit).context("the time limit")?;
    if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))? == 0 {
        // The whole group is killed, so that nothing holds the pipe; the caller kills the rest.
        kill_process_group(Pid::from_child(child), Signal::KILL)?;
        child.wait()?;
        return Ok(None);
    }
    Ok(Some(child.wait()?))
}

/// Kills all descendants of this process, and returns their names.
fn kill_descendants() -> Result<Vec<String>> {
    let mut names = Vec::new();
    // The children of a killed process become children of this one, so this repeats.
    loop {
        let children = children()?;
        if children.is_empty() {
            return Ok(names);
        }
        for (pid, name) in children {
            names.push(name);
            // It may have ended.
            let _ = kill_process(pid, Signal::KILL);
            let _ = rustix::process::waitpid(Some(pid), WaitOptions::empty());
        }
    }
}

/// The children of this process, without zombies, which are reaped.
fn children() -> Result<Vec<(Pid, String)>> {
    let me = std::process::id();
    let mut children = Vec::new();
    for entry in std::fs::read_dir("/proc")?.flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| Pid::from_raw(name.parse().ok()?)) else {
            continue;
        };
        // It may have ended.
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

/// Reads to the end, and returns the last [`OUTPUT_LIMIT`] bytes.
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

/// How long the kernel may take to release devices after a test.
const CLEANUP_TIMEOUT: Duration = Duration::from_secs(2);

/// Devices, mounts and files on the machine, which a test could leave behind.
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
            // An unused loop device may remain.
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

    /// What exists beyond this state. The kernel releases some things late: it closes a disk some
    /// time after the process that used it in an `io_uring` has ended. So this polls until nothing
    /// is left or the time is over.
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
