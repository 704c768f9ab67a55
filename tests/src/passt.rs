//! `passt`: a network for guests whose monitor has no privileges.

use std::path::Path;
use std::process::Child;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::guest::TIMEOUT;
use crate::unprivileged;

/// The interval of polling whether it listens.
const LOOK_EVERY: Duration = Duration::from_millis(20);

/// A running `passt` without privileges. It ends with this value.
#[derive(Debug)]
pub struct Passt(Child);

impl Passt {
    /// Starts one that listens at `socket`, in a directory that [belongs](unprivileged::give) to
    /// its user. `more` are further arguments.
    pub fn start(socket: &Path, more: &[&str]) -> Result<Passt> {
        let mut command = unprivileged::command("passt");
        command.arg("--foreground").arg("--socket").arg(socket).args(more);
        let passt = Passt(command.spawn().context("cannot run passt")?);
        let begun = Instant::now();
        while !listens(socket)? {
            ensure!(begun.elapsed() < TIMEOUT, "passt does not listen");
            std::thread::sleep(LOOK_EVERY);
        }
        Ok(passt)
    }

    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.0.id()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.0), signal).context("cannot send passt the signal")
    }
}

impl Drop for Passt {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Whether a process listens at `socket`. A test connection would not do: passt accepts one at a
/// time and queues no other.
fn listens(socket: &Path) -> Result<bool> {
    let sockets =
        std::fs::read_to_string("/proc/thread-self/net/unix").context("the list of Unix sockets")?;
    let socket = socket.to_str().context("a path that is UTF-8")?;
    // Flags are the fourth field; this flag marks listening sockets.
    Ok(sockets
        .lines()
        .any(|line| line.ends_with(socket) && line.split_whitespace().nth(3) == Some("00010000")))
}
