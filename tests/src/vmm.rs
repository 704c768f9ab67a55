//! The monitor under test as a process.

use std::ffi::{OsStr, OsString};
use std::io::Write;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open};
use serde_json::Value;
use tempfile::TempDir;

use crate::api::ApiClient;
use crate::process::{die_with_parent, without_io_uring};
use crate::transcript::{Line, Transcript};

/// A builder of monitors: arguments and a directory to run in.
#[derive(Debug)]
pub struct VmmBuilder {
    program: PathBuf,
    args: Vec<OsString>,
    dir: TempDir,
    inherited: Vec<OwnedFd>,
    name: Option<OsString>,
    show: bool,
    stdout_to_file: bool,
    io_uring: bool,
    input: Input,
}

/// The file in a monitor's directory for its standard output: see [`VmmBuilder::stdout_to_file`].
pub const STDOUT: &str = "stdout";

/// A monitor's standard input.
#[derive(Debug, Clone, Copy)]
enum Input {
    None,
    Pipe,
}

impl VmmBuilder {
    /// A monitor at this path, without arguments, in a new directory.
    pub fn new(program: &Path) -> Result<VmmBuilder> {
        let dir = tempfile::Builder::new()
            .prefix("vesta-test-")
            .tempdir()
            .context("a directory for the monitor")?;
        Ok(VmmBuilder {
            program: program.to_owned(),
            args: Vec::new(),
            dir,
            inherited: Vec::new(),
            name: None,
            show: true,
            stdout_to_file: false,
            io_uring: true,
            input: Input::None,
        })
    }

    /// The directory that it runs in, for files that its arguments name.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// Adds an argument.
    #[must_use]
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> VmmBuilder {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Serves the API at `api.sock` in its directory.
    #[must_use]
    pub fn with_api(self) -> VmmBuilder {
        let socket = self.dir.path().join("api.sock");
        self.arg("--api-sock").arg(socket)
    }

    /// Starts from a configuration file with this content.
    pub fn with_config(self, config: &Value) -> Result<VmmBuilder> {
        self.with_config_text(&config.to_string())
    }

    /// Starts from a configuration file with this text.
    pub fn with_config_text(self, text: &str) -> Result<VmmBuilder> {
        let file = self.dir.path().join("config.json");
        std::fs::write(&file, text).with_context(|| file.display().to_string())?;
        Ok(self.arg("--config-file").arg(file))
    }

    /// Runs it under another name (`argv[0]`).
    #[must_use]
    pub fn with_name(mut self, name: &str) -> VmmBuilder {
        self.name = Some(name.into());
        self
    }

    /// Lets it inherit this descriptor, which is closed here once it runs. Returns the number.
    pub fn inherit(&mut self, fd: OwnedFd) -> Result<RawFd> {
        rustix::io::fcntl_setfd(&fd, rustix::io::FdFlags::empty()).context("a descriptor to be inherited")?;
        let number = fd.as_raw_fd();
        self.inherited.push(fd);
        Ok(number)
    }

    /// Does not print its output on standard error.
    #[must_use]
    pub fn quiet(mut self) -> VmmBuilder {
        self.show = false;
        self
    }

    /// Sends its standard output to the file [`STDOUT`] in its directory, and its log to another
    /// file, so that the first has only the guest's output.
    pub fn stdout_to_file(mut self) -> Result<VmmBuilder> {
        let log = self.dir.path().join("log");
        // Some monitors do not create it.
        std::fs::write(&log, "").with_context(|| log.display().to_string())?;
        self.stdout_to_file = true;
        Ok(self.arg("--log-path").arg(log))
    }

    /// Runs it as on a kernel without `io_uring`.
    #[must_use]
    pub fn without_io_uring(mut self) -> VmmBuilder {
        self.io_uring = false;
        self
    }

    /// Lets the test write to the guest's serial port; see [`Vmm::type_in`].
    #[must_use]
    pub fn with_input(mut self) -> VmmBuilder {
        self.input = Input::Pipe;
        self
    }

    /// Starts it.
    pub fn spawn(self) -> Result<Vmm> {
        let mut command = Command::new(&self.program);
        if let Some(name) = &self.name {
            std::os::unix::process::CommandExt::arg0(&mut command, name);
        }
        command.args(&self.args).current_dir(self.dir.path());
        let input = match self.input {
            Input::None => Stdio::null(),
            Input::Pipe => Stdio::piped(),
        };
        command.stdin(input).stdout(Stdio::piped()).stderr(Stdio::piped());
        if self.stdout_to_file {
            let file = self.dir.path().join(STDOUT);
            command.stdout(std::fs::File::create(&file).with_context(|| file.display().to_string())?);
        }
        die_with_parent(&mut command);
        if !self.io_uring {
            without_io_uring(&mut command);
        }
        let started = Instant::now();
        let mut child = command.spawn().with_context(|| format!("cannot run {}", self.program.display()))?;
        let label = |label| self.show.then_some(label);
        let stdout = match child.stdout.take() {
            Some(pipe) => Transcript::of(pipe, label("stdout")),
            None => Transcript::of(std::io::empty(), None),
        };
        let stderr = Transcript::of(child.stderr.take().context("it is a pipe")?, label("stderr"));
        Ok(Vmm { child, started, stdout, stderr, dir: self.dir })
    }
}

/// A running monitor. It is killed, and its directory removed, when this value is dropped.
#[derive(Debug)]
pub struct Vmm {
    child: Child,
    started: Instant,
    /// Its standard output: the guest's serial console and, unless configured otherwise, its own
    /// log.
    pub stdout: Transcript,
    /// Its standard error.
    pub stderr: Transcript,
    dir: TempDir,
}

impl Vmm {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// When it was started.
    pub fn started(&self) -> Instant {
        self.started
    }

    /// The directory that it runs in.
    pub fn dir(&self) -> &Path {
        self.dir.path()
    }

    /// A new client of its API; see [`VmmBuilder::with_api`].
    pub fn client(&self) -> ApiClient {
        ApiClient::new(&self.dir.path().join("api.sock"))
    }

    /// A new client, once the API answers.
    pub fn ready_client(&self, timeout: Duration) -> Result<ApiClient> {
        let mut client = self.client();
        client.wait_ready(timeout)?;
        Ok(client)
    }

    /// Waits for a line of its standard output that contains `text`.
    pub fn wait_for_output(&self, text: &str, timeout: Duration) -> Result<String> {
        Ok(self.wait_for_line(text, timeout)?.text)
    }

    /// The same; returns also the line's time of arrival.
    pub fn wait_for_line(&self, text: &str, timeout: Duration) -> Result<Line> {
        self.stdout.wait_for(text, timeout).map_err(|error| self.with_errors(error))
    }

    fn with_errors(&self, error: anyhow::Error) -> anyhow::Error {
        let errors = self.stderr.text();
        if errors.is_empty() { error } else { error.context(format!("standard error:\n{errors}")) }
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        rustix::process::kill_process(Pid::from_child(&self.child), signal).context("cannot send the signal")
    }

    /// Whether it is still running.
    pub fn is_running(&mut self) -> Result<bool> {
        Ok(self.child.try_wait()?.is_none())
    }

    /// Waits for it to end.
    pub fn exit_status(&mut self, timeout: Duration) -> Result<ExitStatus> {
        let pidfd = pidfd_open(Pid::from_child(&self.child), PidfdFlags::empty());
        // If it was waited for already, its status is known.
        if let Ok(pidfd) = pidfd {
            let timeout = Timespec::try_from(timeout).context("the time limit")?;
            if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&timeout))? == 0 {
                bail!("still running; output:\n{}\n{}", self.stdout.text(), self.stderr.text());
            }
        }
        Ok(self.child.wait()?)
    }

    /// Waits for it to end. Returns its exit code, or an error if a signal killed it.
    pub fn exit_code(&mut self, timeout: Duration) -> Result<i32> {
        let status = self.exit_status(timeout)?;
        let signal = status.signal().unwrap_or_default();
        status.code().with_context(|| format!("killed by signal {signal}; output:\n{}", self.stderr.text()))
    }

    /// Waits for it to end. Returns its exit code and its output: standard output, then standard
    /// error.
    pub fn finish(&mut self, timeout: Duration) -> Result<(i32, String)> {
        let code = self.exit_code(timeout)?;
        let output = self.stdout.wait_for_end(timeout)?;
        let errors = self.stderr.wait_for_end(timeout)?;
        Ok((code, output + &errors))
    }

    /// The processor time of one of its threads, by name; `None` if there is no such thread.
    pub fn thread_time(&self, name: &str) -> Result<Option<Duration>> {
        Ok(self.threads()?.into_iter().find(|thread| thread.name == name).map(|thread| thread.time))
    }

    /// Writes to its standard input, which is the guest's serial port; see
    /// [`VmmBuilder::with_input`].
    pub fn type_in(&mut self, bytes: &[u8]) -> Result<()> {
        let input = self.child.stdin.as_mut().context("it was started without input")?;
        input.write_all(bytes).context("cannot write to its standard input")
    }

    /// Its threads.
    pub fn threads(&self) -> Result<Vec<Thread>> {
        let mut threads = Vec::new();
        for entry in std::fs::read_dir(format!("/proc/{}/task", self.pid()))? {
            let entry = entry?;
            // The thread may have ended.
            let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
            let mut thread = Thread::parse(&stat).with_context(|| format!("cannot read {stat:?}"))?;
            // In nanoseconds, if the kernel counts them.
            let precise = std::fs::read_to_string(entry.path().join("schedstat")).ok();
            let nanos = precise.and_then(|text| text.split_whitespace().next()?.parse().ok());
            thread.time = nanos.map_or(thread.time, |nanos| thread.time.max(Duration::from_nanos(nanos)));
            threads.push(thread);
        }
        Ok(threads)
    }
}

impl Drop for Vmm {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A thread, as `/proc` shows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Thread {
    /// Its thread id.
    pub id: u32,
    /// Its name.
    pub name: String,
    /// Its processor time; for a vCPU including the guest's. In steps of 10 ms if the kernel does
    /// not count nanoseconds.
    pub time: Duration,
}

impl Thread {
    /// Parses `/proc/PID/task/TID/stat`.
    fn parse(stat: &str) -> Option<Thread> {
        let (before, after) = stat.rsplit_once(')')?;
        let (id, name) = before.split_once('(')?;
        let mut fields = after.split_whitespace();
        // In proc(5) the name is field 2, utime field 14 and stime field 15.
        let user: u64 = fields.nth(11)?.parse().ok()?;
        let system: u64 = fields.next()?.parse().ok()?;
        let ticks_per_second = rustix::param::clock_ticks_per_second();
        let time = Duration::from_millis((user + system) * 1000 / ticks_per_second);
        Some(Thread { id: id.trim().parse().ok()?, name: name.to_owned(), time })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const LONG: Duration = Duration::from_secs(20);

    fn shell(script: &str) -> Vmm {
        VmmBuilder::new(Path::new("/bin/sh")).unwrap().quiet().arg("-c").arg(script).spawn().unwrap()
    }

    #[test]
    fn finish_returns_status_and_all_output() {
        let (code, printed) = shell("echo out; echo err >&2; exit 152").finish(LONG).unwrap();
        assert_eq!((code, printed.as_str()), (152, "out\nerr\n"));
    }

    #[test]
    fn death_by_a_signal_is_no_exit_code() {
        let error = shell("echo why >&2; kill -9 $$").exit_code(LONG).unwrap_err().to_string();
        assert!(error.starts_with("killed by signal 9"), "{error}");
    }

    #[test]
    fn a_process_that_does_not_end_is_an_error() {
        let mut vmm = shell("echo here; exec sleep 1000");
        vmm.wait_for_output("here", LONG).unwrap();
        let error = vmm.exit_status(Duration::from_millis(20)).unwrap_err().to_string();
        assert!(error.contains("still running") && error.contains("here"), "{error}");
    }

    #[test]
    fn dropping_removes_process_and_directory() {
        let vmm = shell("echo here; exec sleep 1000");
        vmm.wait_for_output("here", LONG).unwrap();
        let (pid, dir) = (vmm.pid(), vmm.dir().to_owned());
        drop(vmm);
        assert!(!Path::new(&format!("/proc/{pid}")).exists());
        assert!(!dir.exists());
    }

    #[test]
    fn a_thread_may_have_any_name() {
        let stat = "7 (fc_vcpu 0) (x)) R 1 2 3 4 5 6 7 8 9 10 150 50 0 0";
        let thread = Thread::parse(stat).unwrap();
        assert_eq!((thread.name.as_str(), thread.time), ("fc_vcpu 0) (x)", Duration::from_secs(2)));
    }
}
