//! Threads of the monitor that break, as a bug would break them.
#![expect(unsafe_code, reason = "another process's registers are reached by ptrace only")]

use std::io;

use anyhow::{Context, Result, bail};

/// Where the stack pointer is then, and the next instruction beside it: nothing is mapped in the
/// lowest page.
const UNMAPPED: u64 = 0x100;

/// Lets a thread of a child of this process go on with its stack used up: it faults at once, and
/// has no stack to handle that on.
pub fn exhaust_stack(thread: i32) -> Result<()> {
    request(libc::PTRACE_SEIZE, thread, 0).context("cannot seize the thread")?;
    request(libc::PTRACE_INTERRUPT, thread, 0).context("cannot interrupt the thread")?;
    let mut status = 0;
    // SAFETY: the status outlives the call.
    if unsafe { libc::waitpid(thread, &raw mut status, libc::__WALL) } != thread || !libc::WIFSTOPPED(status)
    {
        bail!("the thread does not stop: {}, status {status}", io::Error::last_os_error());
    }
    // SAFETY: the registers are plain numbers, for which zero is a value.
    let mut registers: libc::user_regs_struct = unsafe { std::mem::zeroed() };
    request(libc::PTRACE_GETREGS, thread, (&raw mut registers).addr())
        .context("cannot read the registers")?;
    registers.rsp = UNMAPPED;
    registers.rip = UNMAPPED;
    // It does not start the system call again that it was in.
    registers.orig_rax = u64::MAX;
    request(libc::PTRACE_SETREGS, thread, (&raw mut registers).addr()).context("cannot set the registers")?;
    request(libc::PTRACE_DETACH, thread, 0).context("cannot let go of the thread")
}

fn request(request: libc::c_uint, thread: i32, data: usize) -> io::Result<()> {
    // SAFETY: of the requests above, those that read or write this process's memory are given
    // registers that outlive the call.
    let done = unsafe { libc::ptrace(request, thread, 0usize, data) };
    if done < 0 { Err(io::Error::last_os_error()) } else { Ok(()) }
}
