//! The page server of `page-server` (`tests/src/bin`), as a process.

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::process::die_with_parent;

/// A page server that is killed with this value.
#[derive(Debug)]
pub struct PageServer {
    process: Child,
    socket: PathBuf,
}

impl PageServer {
    /// Starts `program` with the memory file `image`, at a socket beside that. It answers `faults` faults: a number, `all` or `none`.
    pub fn start(program: &str, image: &Path, faults: &str) -> Result<PageServer> {
        let socket = image.with_extension(format!("pages-{faults}.sock"));
        let mut command = Command::new(program);
        command.arg(&socket).arg(image).arg(faults).stdout(Stdio::piped());
        let process = die_with_parent(&mut command).spawn().context("cannot run the page server")?;
        let mut server = PageServer { process, socket };
        let mut line = String::new();
        BufReader::new(server.process.stdout.take().context("it is a pipe")?).read_line(&mut line)?;
        ensure!(line.trim() == "LISTENING", "{line}");
        Ok(server)
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
