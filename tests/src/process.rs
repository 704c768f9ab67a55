//! Child processes that end with their parent, and orphans.

use std::os::fd::OwnedFd;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, Signal, pidfd_open, pidfd_send_signal};
use serde_json::Value;

/// Has the command's process killed when the thread that starts it ends for any reason.
///
/// The kernel watches the thread, not the process: start it from a thread that lives long enough.
#[expect(unsafe_code, reason = "pre_exec runs code between fork and exec")]
pub fn die_with_parent(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;
    // SAFETY: the closure runs in the child after `fork`, where only async-signal-safe calls are
    // allowed. It makes one system call (`prctl`), allocates nothing and takes no lock.
    unsafe {
        command.pre_exec(|| {
            rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))?;
            Ok(())
        })
    }
}

/// Hides `io_uring` from the command's process and its children, by a system call filter.
#[expect(unsafe_code, reason = "pre_exec runs code between fork and exec")]
pub fn without_io_uring(command: &mut Command) -> &mut Command {
    use std::os::unix::process::CommandExt;
    let step = |code: u32, jf: u8, k: u32| libc::sock_filter { code: code as u16, jt: 0, jf, k };
    let setup = u32::try_from(libc::SYS_io_uring_setup).expect("numbers of system calls are small");
    let program = [
        // The number of the system call is the first field of `struct seccomp_data`.
        step(libc::BPF_LD | libc::BPF_W | libc::BPF_ABS, 0, 0),
        step(libc::BPF_JMP | libc::BPF_JEQ | libc::BPF_K, 1, setup),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ERRNO | libc::ENOSYS.cast_unsigned()),
        step(libc::BPF_RET | libc::BPF_K, 0, libc::SECCOMP_RET_ALLOW),
    ];
    let set_filter = move || {
        rustix::thread::set_no_new_privs(true)?;
        let filter = libc::sock_fprog { len: program.len() as u16, filter: program.as_ptr().cast_mut() };
        // SAFETY: the kernel copies the filter, which outlives the call, and keeps no pointer to
        // it.
        let set =
            unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const filter) };
        if set == 0 { Ok(()) } else { Err(std::io::Error::last_os_error()) }
    };
    // SAFETY: the closure runs in the child after `fork`, where only async-signal-safe calls are
    // allowed. It makes two system calls (`prctl`, `seccomp`), allocates nothing and takes no lock.
    unsafe { command.pre_exec(set_filter) }
}

/// Processes without a waiting parent, such as the children of a fork. They are killed when this
/// value is dropped.
#[derive(Debug)]
pub struct Orphans(Vec<OwnedFd>);

impl Orphans {
    /// The processes with these ids that still exist.
    pub fn of(pids: &[u64]) -> Orphans {
        let open =
            |pid: &u64| pidfd_open(Pid::from_raw(i32::try_from(*pid).ok()?)?, PidfdFlags::empty()).ok();
        Orphans(pids.iter().filter_map(open).collect())
    }

    /// The children in the response to `PUT /fork`, all of which must have started.
    pub fn of_fork(reply: &Value) -> Result<Orphans> {
        let children = reply["children"].as_array().context("children")?;
        let pids: Vec<_> = children.iter().filter_map(|child| child["pid"].as_u64()).collect();
        ensure!(pids.len() == children.len(), "not all children started: {reply}");
        Ok(Orphans::of(&pids))
    }

    /// Sends them a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        self.0.iter().try_for_each(|pidfd| Ok(pidfd_send_signal(pidfd, signal)?))
    }

    /// How many of them are still running.
    pub fn running(&self) -> Result<usize> {
        let mut running = 0;
        for pidfd in &self.0 {
            running += usize::from(!has_ended(pidfd, Duration::ZERO)?);
        }
        Ok(running)
    }

    /// Waits until all of them have ended.
    pub fn wait(mut self, timeout: Duration) -> Result<()> {
        for (at, pidfd) in self.0.iter().enumerate() {
            if !has_ended(pidfd, timeout)? {
                bail!("process {at} of {} is still running", self.0.len());
            }
        }
        self.0.clear();
        Ok(())
    }

    /// Kills them, and waits until they are gone.
    pub fn kill(mut self, timeout: Duration) -> Result<()> {
        for pidfd in std::mem::take(&mut self.0) {
            kill(&pidfd);
            if !has_ended(&pidfd, timeout)? {
                bail!("a killed process still exists");
            }
        }
        Ok(())
    }
}

impl Drop for Orphans {
    /// Waits after killing them: a process takes a while to die.
    fn drop(&mut self) {
        self.0.iter().for_each(kill);
        for pidfd in &self.0 {
            // The test runner reports one that does not die.
            let _ = has_ended(pidfd, DYING);
        }
    }
}

/// The children of a process, oldest first.
pub fn children(pid: u32) -> Result<Vec<u64>> {
    let path = format!("/proc/{pid}/task/{pid}/children");
    let children = std::fs::read_to_string(&path).with_context(|| path.clone())?;
    children.split_whitespace().map(|pid| pid.parse().with_context(|| path.clone())).collect()
}

/// How long a killed process may take to end.
const DYING: Duration = Duration::from_secs(20);

fn has_ended(pidfd: &OwnedFd, timeout: Duration) -> Result<bool> {
    let limit = Timespec::try_from(timeout).context("the time limit")?;
    Ok(poll(&mut [PollFd::new(pidfd, PollFlags::IN)], Some(&limit))? > 0)
}

fn kill(pidfd: &OwnedFd) {
    // It may have ended.
    let _ = pidfd_send_signal(pidfd, Signal::KILL);
}

#[cfg(test)]
mod tests {
    use std::os::unix::process::CommandExt;
    use std::path::Path;
    use std::process::Stdio;

    use super::*;

    /// A process whose parent has ended.
    fn orphan(script: &str) -> u64 {
        let mut shell = Command::new("/bin/sh");
        shell.arg("-c").arg(format!("{{ {script}; }} >/dev/null & echo $!")).process_group(0);
        let output = shell.stderr(Stdio::null()).output().unwrap();
        String::from_utf8(output.stdout).unwrap().trim().parse().unwrap()
    }

    /// Whether it exists and is not a zombie.
    fn lives(pid: u64) -> bool {
        let stat = std::fs::read_to_string(Path::new("/proc").join(pid.to_string()).join("stat"));
        stat.is_ok_and(|stat| !stat.contains(") Z "))
    }

    #[test]
    fn dropping_orphans_waits_for_their_end() {
        let pid = orphan("exec sleep 1000");
        assert!(lives(pid));
        drop(Orphans::of(&[pid]));
        assert!(!lives(pid));
    }

    #[test]
    fn waiting_for_running_orphans_times_out() {
        let pid = orphan("true");
        Orphans::of(&[pid]).wait(DYING).unwrap();
        let pid = orphan("exec sleep 1000");
        assert!(Orphans::of(&[pid]).wait(Duration::from_millis(1)).is_err());
        assert!(!lives(pid));
    }
}
