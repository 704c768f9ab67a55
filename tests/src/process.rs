//! Processes that do not outlive who started them, or nobody waits for.

use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};

/// Makes the command's process end when the thread that starts it does, however that ends.
///
/// The kernel counts the thread, not the process: start from one that lives as long as the child is to.
#[expect(unsafe_code, reason = "what happens between fork and exec can be said in no other way")]
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure runs in the child after `fork`, where only async-signal-safe calls are allowed. It makes
    // one system call (`prctl`), allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        })
    }
}

/// Processes that nobody waits for, such as the children of a fork. They are killed when this value is dropped.
#[derive(Debug)]
pub struct Orphans(Vec<OwnedFd>);

impl Orphans {
    /// The processes with these ids, as far as they are still there.
    pub fn of(pids: &[u64]) -> Orphans {
        let open =
            |pid: &u64| pidfd_open(Pid::from_raw(i32::try_from(*pid).ok()?)?, PidfdFlags::empty()).ok();
        Orphans(pids.iter().filter_map(open).collect())
    }

    /// How many of them still run.
    pub fn running(&self) -> Result<usize> {
        let mut running = 0;
        for pidfd in &self.0 {
            let now = Timespec { tv_sec: 0, tv_nsec: 0 };
            if poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&now))? == 0 {
                running += 1;
            }
        }
        Ok(running)
    }

    /// Kills them, and waits until they are gone.
    pub fn kill(mut self, patience: Duration) -> Result<()> {
        for pidfd in std::mem::take(&mut self.0) {
            kill(&pidfd);
            let limit = Timespec::try_from(patience).context("the time limit")?;
            if poll(&mut [PollFd::new(&pidfd, PollFlags::IN)], Some(&limit))? == 0 {
                bail!("a killed process is still there");
            }
        }
        Ok(())
    }
}

impl Drop for Orphans {
    fn drop(&mut self) {
        self.0.iter().for_each(kill);
    }
}

fn kill(pidfd: &OwnedFd) {
    // It may have ended by itself.
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
}
