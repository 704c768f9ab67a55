//! Breaking a thread of the monitor, as a bug would.
#![expect(unsafe_code, reason = "only ptrace changes another process's registers")]

use std::io;

use anyhow::{Context, Result, bail};

/// The stack and instruction pointers of a broken thread. The lowest page is never mapped.
const UNMAPPED: u64 = 0x100;

/// Makes a thread of a child process continue with an exhausted stack: it faults at once, and has
/// no stack to handle the fault on.
pub fn exhaust_stack(thread: i32) -> Result<()> {
    request(libc::PTRACE_SEIZE, thread, 0).context("cannot seize the thread")?;
    request(libc::PTRACE_INTERRUPT, thread, 0).context("cannot interrupt the thread")?;
    let mut status = 0;
    // SAFETY: the status outlives the call.
    if unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) } != thread || !libc::WIFSTOPPED(status)
    {
        bail!("thread {thread} does not stop: {}, status {status}", io::Error::last_os_error());
    }
    // SAFETY: the registers are plain numbers, for which zero is a valid value.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, thread, (&raw mut registers).addr())
        .context("cannot read the registers")?;
    registers.rsp = UNMAPPED;
    registers.rip = UNMAPPED;
    // The kernel does not restart the interrupted system call.
    registers.orig_rax = u64::MAX;
    request(libc::PTRACE_SETREGS, thread, (&raw mut registers).addr()).context("cannot set the registers")?;
    request(libc::PTRACE_DETACH, thread, 0).context("cannot detach from the thread")
}

fn request(request: libc::c_uint, thread: i32, data: usize) -> io::Result<()> {
    // SAFETY: of the requests above, those that read or write this process's memory are given
    // registers that outlive the call.
    let done = unsafe { libc::ptrace(request, thread, 0usize, data) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
