//! The page server `page-server` (`tests/src/bin`) as a process.

use std::io::{BufRead, BufReader, Write};
use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::process::{Pid, PidfdFlags, Signal, kill_process, pidfd_open, pidfd_send_signal};

use crate::process::die_with_parent;

/// A page server that is killed with this value.
#[derive(Debug)]
pub struct PageServer {
    process: Child,
    socket: PathBuf,
    output: BufReader<ChildStdout>,
    /// The process that serves, if it is another one.
    serving: Option<OwnedFd>,
}

impl PageServer {
    /// Starts `program` with the memory file `image` and a socket beside it. `faults` is the number
    /// of page faults that it serves, `all`, `none` or `except:OFFSET`.
    pub fn start(program: &str, image: &Path, faults: &str) -> Result<PageServer> {
        PageServer::spawn(program, image, &[faults])
    }

    /// The same with a process that listens and another one that serves.
    pub fn start_forked(program: &str, image: &Path, faults: &str) -> Result<PageServer> {
        PageServer::spawn(program, image, &[faults, "forked"])
    }

    fn spawn(program: &str, image: &Path, how: &[&str]) -> Result<PageServer> {
        let socket = image.with_extension(format!("pages-{}.sock", how.join("-")));
        let mut command = Command::new(program);
        command.arg(&socket).arg(image).args(how).stdin(Stdio::piped()).stdout(Stdio::piped());
        let mut process = die_with_parent(&mut command).spawn().context("cannot run the page server")?;
        let output = BufReader::new(process.stdout.take().context("it is a pipe")?);
        let mut server = PageServer { process, socket, output, serving: None };
        server.wait_for("LISTENING")?;
        if how.contains(&"forked") {
            let pid = Pid::from_raw(server.next_line()?.parse()?).context("the id of a process")?;
            server.serving = Some(pidfd_open(pid, PidfdFlags::empty())?);
        }
        Ok(server)
    }

    /// Waits for its next line, which must be `line`.
    pub fn wait_for(&mut self, line: &str) -> Result<()> {
        let printed = self.next_line()?;
        ensure!(printed == line, "{printed}");
        Ok(())
    }

    /// Waits for its next line.
    fn next_line(&mut self) -> Result<String> {
        let mut printed = String::new();
        self.output.read_line(&mut printed)?;
        Ok(printed.trim().to_owned())
    }

    /// Ends the process that listened. The one that serves continues.
    pub fn end_listener(&mut self) -> Result<()> {
        self.process.stdin.take().context("it is ended once")?.write_all(b"x")?;
        ensure!(self.process.wait()?.success(), "the process that listened failed");
        Ok(())
    }

    /// Its socket.
    pub fn socket(&self) -> &Path {
        &self.socket
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.process), signal).context("cannot send the signal")
    }
}

impl Drop for PageServer {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
        if let Some(serving) = &self.serving {
            let _ = pidfd_send_signal(serving, Signal::KILL);
            let _ = poll(&mut [PollFd::new(serving, PollFlags::IN)], None);
        }
        let _ = std::fs::remove_file(&self.socket);
    }
}
