//! Runs a program one instruction at a time, and records which of its code runs.

#![expect(unsafe_code, reason = "ptrace")]

use std::collections::HashSet;
use std::io;
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, anyhow, bail};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Threads and forked children are traced too, and die with the tracer.
const OPTIONS: i32 = libc::PTRACE_O_TRACECLONE
    | libc::PTRACE_O_TRACEFORK
    | libc::PTRACE_O_TRACEVFORK
    | libc::PTRACE_O_EXITKILL;

/// The code of a program that has run.
#[derive(Debug)]
pub(super) struct Trace {
    program: PathBuf,
    seen: HashSet<u64>,
    addresses: Vec<u64>,
    steps: u64,
}

impl Trace {
    /// A trace of the position-independent program at this path, which has not run yet.
    pub(super) fn of(program: &Path) -> Result<Trace> {
        let program = program.canonicalize().with_context(|| program.display().to_string())?;
        Ok(Trace { program, seen: HashSet::new(), addresses: Vec::new(), steps: 0 })
    }

    /// The addresses in the program's file of the instructions that ran, each once, in the order in
    /// which they first ran.
    pub(super) fn addresses(&self) -> &[u64] {
        &self.addresses
    }

    /// How many instructions have run.
    pub(super) fn steps(&self) -> u64 {
        self.steps
    }

    /// Runs the program to its end. `arguments` completes its command; `drive` runs meanwhile, in
    /// another thread, and makes the program end. An error of either kills the program.
    pub(super) fn run(
        &mut self,
        arguments: impl FnOnce(&mut Command) -> Result<()>,
        drive: impl FnOnce(&OwnedFd) -> Result<()> + Send,
    ) -> Result<()> {
        let mut command = Command::new(&self.program);
        arguments(&mut command)?;
        // SAFETY: the closure runs in the child after `fork`, where only async-signal-safe calls
        // are allowed. It makes one system call, allocates nothing and takes no lock.
        unsafe { command.pre_exec(|| request(libc::PTRACE_TRACEME, 0, 0)) };
        let child = command.spawn().with_context(|| format!("cannot run {}", self.program.display()))?;
        let process = Pid::from_child(&child);
        let pidfd = pidfd_open(process, PidfdFlags::empty()).context("a pidfd")?;
        let kill = || {
            // It may have ended.
            let _ = pidfd_send_signal(&pidfd, Signal::KILL);
        };
        std::thread::scope(|scope| {
            let driver = scope.spawn(|| drive(&pidfd).inspect_err(|_| kill()));
            let traced = self.follow(process.as_raw_nonzero().get()).inspect_err(|_| kill());
            let driven = driver.join().map_err(|_| anyhow!("the thread that drives the program panicked"))?;
            traced.and(driven)
        })
    }

    /// Runs a new process, and all processes and threads that it starts, to their ends.
    fn follow(&mut self, process: i32) -> Result<()> {
        // The kernel stops a traced process when it has executed its program.
        match wait()? {
            Some((thread, status)) if thread == process && libc::WIFSTOPPED(status) => {}
            other => bail!("the program does not start: {other:?}"),
        }
        request(libc::PTRACE_SETOPTIONS, process, OPTIONS as usize).context("the options of ptrace")?;
        let code = mapping(process, &self.program)?;
        self.record(process, &code)?;
        step(process, 0)?;
        while let Some((thread, status)) = wait()? {
            if !libc::WIFSTOPPED(status) {
                continue;
            }
            let signal = match libc::WSTOPSIG(status) {
                libc::SIGTRAP if status >> 16 == 0 => {
                    self.record(thread, &code)?;
                    0
                }
                // A thread starts another one, or is new.
                libc::SIGTRAP | libc::SIGSTOP => 0,
                signal => signal,
            };
            step(thread, signal)?;
        }
        Ok(())
    }

    /// Records where a thread is, if that is in the program.
    fn record(&mut self, thread: i32, code: &Range<u64>) -> Result<()> {
        self.steps += 1;
        // SAFETY: the registers are plain numbers, for which zero is a valid value.
        let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
        unless_gone(request(libc::PTRACE_GETREGS, thread, (&raw mut registers).addr()))
            .context("cannot read the registers")?;
        if code.contains(&registers.rip) {
            let address = registers.rip - code.start;
            if self.seen.insert(address) {
                self.addresses.push(address);
            }
        }
        Ok(())
    }
}

/// Where a process has mapped a program's file.
fn mapping(process: i32, program: &Path) -> Result<Range<u64>> {
    let path = format!("/proc/{process}/maps");
    let maps = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    let name = program.to_str().context("the program's path is not UTF-8")?;
    let mut mapped: Option<Range<u64>> = None;
    for line in maps.lines().filter(|line| line.ends_with(name)) {
        let (range, _) = line.split_once(' ').with_context(|| line.to_owned())?;
        let (start, end) = range.split_once('-').with_context(|| line.to_owned())?;
        let (start, end) = (u64::from_str_radix(start, 16)?, u64::from_str_radix(end, 16)?);
        mapped = Some(mapped.map_or(start, |mapped| mapped.start)..end);
    }
    mapped.with_context(|| format!("{path} does not name {name}"))
}

/// Runs one instruction of a stopped thread, after it has received this signal (0: none).
fn step(thread: i32, signal: i32) -> Result<()> {
    let signal = usize::try_from(signal).context("a signal's number")?;
    unless_gone(request(libc::PTRACE_SINGLESTEP, thread, signal)).context("cannot run the thread")
}

/// Takes a thread that was killed while it was stopped for one that still runs: its end follows.
fn unless_gone(done: io::Result<()>) -> io::Result<()> {
    done.or_else(|error| if error.raw_os_error() == Some(libc::ESRCH) { Ok(()) } else { Err(error) })
}

/// Waits until a thread that this one traces stops or ends. Returns its id and status; `None` once
/// there is none.
fn wait() -> Result<Option<(i32, i32)>> {
    loop {
        let mut status = 0;
        // SAFETY: the status outlives the call.
        let thread = unsafe { libc::waitpid(-1, &raw mut status, libc::__WALL | libc::__WNOTHREAD) };
        if thread > 0 {
            return Ok(Some((thread, status)));
        }
        let error = io::Error::last_os_error();
        match error.raw_os_error() {
            Some(libc::ECHILD) => return Ok(None),
            Some(libc::EINTR) => {}
            _ => return Err(error).context("cannot wait for the program"),
        }
    }
}

fn request(request: libc::c_uint, thread: i32, data: usize) -> io::Result<()> {
    // SAFETY: of the requests above only PTRACE_GETREGS writes to this process's memory: to
    // registers that outlive the call.
    let done = unsafe { libc::ptrace(request, thread, 0usize, data) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}

#[cfg(test)]
mod tests {
    use std::process::Stdio;

    use super::*;

    #[test]
    fn a_trace_follows_children_to_their_ends() {
        let mut trace = Trace::of(Path::new("/bin/sh")).unwrap();
        let arguments = |command: &mut Command| {
            command.args(["-c", "(:); :"]).stdin(Stdio::null());
            Ok(())
        };
        trace.run(arguments, |_| Ok(())).unwrap();
        assert!(trace.addresses().len() > 1000);
        assert!(trace.steps() > trace.addresses().len() as u64);
    }

    #[test]
    fn an_error_of_the_driver_kills_the_program() {
        let mut trace = Trace::of(Path::new("/bin/sh")).unwrap();
        let arguments = |command: &mut Command| {
            command.args(["-c", "while :; do :; done"]).stdin(Stdio::null());
            Ok(())
        };
        let error = trace.run(arguments, |_| bail!("no")).unwrap_err();
        assert_eq!(error.to_string(), "no");
    }
}
