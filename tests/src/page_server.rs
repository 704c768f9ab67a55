//! The page server of `page-server` (`tests/src/bin`), as a process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::process::die_with_parent;

/// A page server that is killed with this value.
#[derive(Debug)]
pub struct PageServer {
    process: Child,
    socket: PathBuf,
    output: BufReader<ChildStdout>,
}

impl PageServer {
    /// Starts `program` with the memory file `image`, at a socket beside that. It answers `faults`
    /// faults: a number, `all`, `none`, or `except:OFFSET`.
    pub fn start(program: &str, image: &Path, faults: &str) -> Result<PageServer> {
        let socket = image.with_extension(format!("pages-{faults}.sock"));
        let mut command = Command::new(program);
        command.arg(&socket).arg(image).arg(faults).stdout(Stdio::piped());
        let mut process = die_with_parent(&mut command).spawn().context("cannot run the page server")?;
        let output = BufReader::new(process.stdout.take().context("it is a pipe")?);
        let mut server = PageServer { process, socket, output };
        server.wait_for("LISTENING")?;
        Ok(server)
    }

    /// Waits until it says `line`, the next that it says.
    pub fn wait_for(&mut self, line: &str) -> Result<()> {
        let mut said = String::new();
        self.output.read_line(&mut said)?;
        ensure!(said.trim() == line, "{said}");
        Ok(())
    }

    /// Where it listens.
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
        // It may have ended by itself.
        let _ = self.process.kill();
        let _ = self.process.wait();
        let _ = std::fs::remove_file(&self.socket);
    }
}
