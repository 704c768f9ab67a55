//! Signals: those that ask this process to end, and those that say it is broken.
//!
//! SIGTERM, SIGINT and SIGQUIT end it as they would end any program, but in order: the guest's output is carried out, its overlays closed, the
//! socket removed, the terminal restored, and then the signal takes its default course, so that a parent sees it. SIGHUP does the same
//! with an exit code of its own. The fatal ones end it at once with theirs.

use std::io::Read;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};
use rustix::fs::{Mode, OFlags};
use vmm_sys_util::signal::register_signal_handler;

use crate::exit::ExitCode;
use crate::terminal;

/// Those that ask.
const ASKING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];

/// Those that say something is broken, with the code to exit with.
const FATAL: [(libc::c_int, ExitCode); 6] = [
    (libc::SIGSYS, ExitCode::BadSyscall),
    (libc::SIGBUS, ExitCode::BusError),
    (libc::SIGSEGV, ExitCode::SegmentationFault),
    (libc::SIGXFSZ, ExitCode::FileSize),
    (libc::SIGXCPU, ExitCode::CpuTime),
    (libc::SIGILL, ExitCode::IllegalInstruction),
];

/// The first asking signal that came; 0 for none.
static ASKED: AtomicI32 = AtomicI32::new(0);
/// Written to when one came.
static WAKE: OnceLock<OwnedFd> = OnceLock::new();

/// Becomes readable when a signal asked this process to end.
#[derive(Debug)]
pub(crate) struct Signals(BorrowedFd<'static>);

impl Signals {
    /// Which signal came, if one did.
    pub(crate) fn asked(&self) -> Option<i32> {
        // First what wakes, so that what is taken here is seen below: a handler notes its signal before it wakes.
        let _ = rustix::io::read(self.0, &mut [0; 8]);
        Some(ASKED.load(Ordering::Acquire)).filter(|signal| *signal != 0)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0
    }
}

/// Reads a text file or FIFO, such as the shell's `<(...)`, unless a signal asks this process to
/// end: then the error is `Interrupted`.
pub(crate) fn read_to_string(path: &Path, signals: &Signals) -> std::io::Result<String> {
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::NOCTTY | OFlags::CLOEXEC;
    let mut file = std::fs::File::from(rustix::fs::open(path, flags, Mode::empty())?);
    let mut bytes = Vec::new();
    loop {
        // A read of a FIFO that has no writer yet returns its end. poll waits for a writer.
        let mut fds = [PollFd::new(&file, PollFlags::IN), PollFd::new(signals, PollFlags::IN)];
        match poll(&mut fds, None) {
            Err(rustix::io::Errno::INTR) => continue,
            ready => ready?,
        };
        if !fds[1].revents().is_empty() {
            return Err(std::io::ErrorKind::Interrupted.into());
        }
        match file.read_to_end(&mut bytes) {
            Ok(_) => break,
            // There is more to come. What was read is in `bytes`.
            Err(e) if e.kind() == std::io::ErrorKind::WouldBlock => {}
            Err(e) => return Err(e),
        }
    }
    String::from_utf8(bytes).map_err(|e| std::io::Error::new(std::io::ErrorKind::InvalidData, e))
}

/// Installs all handlers. Called once.
pub(crate) fn install() -> std::io::Result<Signals> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let wake = WAKE.get_or_init(|| fd);
    for signal in ASKING {
        register_signal_handler(signal, on_asking)?;
    }
    for (signal, _) in FATAL {
        register_signal_handler(signal, on_fatal)?;
    }
    Ok(Signals(wake.as_fd()))
}

/// Signals that ask wait, for this thread and forks that it makes, as long as this lives. So none that is meant for a fork comes while the
/// fork would still tell its parent of it: it waits for [`renew`] or [`take_their_course`].
pub(crate) fn hold() -> Held {
    Held(mask(libc::SIG_BLOCK))
}

/// Lets signals come again, as they did before, when it is dropped. In a fork it is not dropped.
#[derive(Debug)]
pub(crate) struct Held(libc::sigset_t);

impl Drop for Held {
    fn drop(&mut self) {
        // SAFETY: the set is one that the kernel filled in; the old one is not asked for.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// Blocks the asking signals or lets them through (`how`); what was blocked before.
fn mask(how: libc::c_int) -> libc::sigset_t {
    // SAFETY: a `sigset_t` is plain numbers, for which zero is a value; the calls below fill both in.
    let (mut asking, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: `asking` is ours alone.
    unsafe { libc::sigemptyset(&raw mut asking) };
    for signal in ASKING {
        // SAFETY: as above, and the signal is one there is.
        unsafe { libc::sigaddset(&raw mut asking, signal) };
    }
    // SAFETY: both sets outlive the call, which can only fail for a wrong `how`.
    unsafe { libc::pthread_sigmask(how, &raw const asking, &raw mut before) };
    before
}

/// In a fork: signals are this process's own from here on, those too that came since it was made. The handlers are there already.
pub(crate) fn renew() -> std::io::Result<Signals> {
    ASKED.store(0, Ordering::Release);
    let Some(wake) = WAKE.get() else { return install() };
    // In place of the parent's, under the same number: a handler may come at any time.
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    // SAFETY: `wake` stays an open descriptor of the same owner, which never closes it; only what it refers to changes.
    let replaced = unsafe { libc::dup3(fd.as_raw_fd(), wake.as_raw_fd(), libc::O_CLOEXEC) };
    if replaced < 0 {
        return Err(std::io::Error::last_os_error());
    }
    mask(libc::SIG_UNBLOCK);
    Ok(Signals(wake.as_fd()))
}

/// From now on signals that ask this process to end, end it.
pub(crate) fn take_their_course() {
    for signal in ASKING {
        // SAFETY: restoring the default action of a valid signal has no precondition.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
    mask(libc::SIG_UNBLOCK);
}

/// The descriptor that the handlers write to.
pub(crate) fn descriptor() -> Option<BorrowedFd<'static>> {
    WAKE.get().map(AsFd::as_fd)
}

extern "C" fn on_asking(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    let _ = ASKED.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Relaxed);
    if let Some(wake) = WAKE.get() {
        let _ = rustix::io::write(wake, &1u64.to_ne_bytes());
    }
}

extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    terminal::restore();
    let code = FATAL.iter().find(|(fatal, _)| *fatal == signal).map_or(ExitCode::Generic, |(_, code)| *code);
    // Only what a signal handler may do: no allocation, no lock, one write.
    let mut text = Line::default();
    text.push(b"Error: this monitor is ended by signal ");
    text.push_number(signal.unsigned_abs());
    if signal == libc::SIGSYS {
        text.push(b", after the forbidden system call ");
        text.push_number(syscall_number(info));
    }
    text.push(b": exit_code=");
    text.push_number((code as i32).unsigned_abs());
    text.push(b"\n");
    let _ = rustix::io::write(rustix::stdio::stderr(), text.as_bytes());
    exit_now(code);
}

/// Ends the process by `signal`, as a parent would see any program ended by it; SIGHUP has an exit code instead.
pub(crate) fn end_by(signal: i32) -> ExitCode {
    if signal != libc::SIGHUP {
        terminal::restore();
        log::info!("ended by signal {signal}");
        raise_default(signal);
    }
    ExitCode::HangUp
}

/// A short text without allocation.
struct Line {
    bytes: [u8; 128],
    len: usize,
}

impl Default for Line {
    fn default() -> Self {
        Line { bytes: [0; 128], len: 0 }
    }
}

impl Line {
    fn push(&mut self, text: &[u8]) {
        let room = &mut self.bytes[self.len..];
        let len = text.len().min(room.len());
        room[..len].copy_from_slice(&text[..len]);
        self.len += len;
    }

    fn push_number(&mut self, mut number: u32) {
        let mut digits = [0; 10];
        let mut at = digits.len();
        loop {
            at -= 1;
            digits[at] = b'0' + (number % 10) as u8;
            number /= 10;
            if number == 0 {
                break;
            }
        }
        self.push(&digits[at..]);
    }

    fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }
}

/// The system call that SIGSYS is about.
fn syscall_number(info: *mut libc::siginfo_t) -> u32 {
    if info.is_null() {
        return 0;
    }
    // SAFETY: the kernel passes a whole `siginfo_t`, which for SIGSYS begins like this, to a handler with SA_SIGINFO.
    unsafe { (*info.cast::<SigsysInfo>()).syscall }
}

/// The beginning of `siginfo_t` for SIGSYS.
#[repr(C)]
struct SigsysInfo {
    signal: i32,
    errno: i32,
    code: i32,
    call_addr: *const libc::c_void,
    syscall: u32,
}

/// Ends the process without running anything else.
fn exit_now(code: ExitCode) -> ! {
    // SAFETY: `_exit` has no precondition, and may be called from a signal handler.
    unsafe { libc::_exit(code as i32) }
}

/// Lets `signal` take its default course.
fn raise_default(signal: i32) {
    // SAFETY: restoring the default action of a valid signal has no precondition.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // SAFETY: nor has raising it.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_holds_numbers_and_is_cut_at_its_end() {
        let mut line = Line::default();
        line.push(b"n=");
        line.push_number(0);
        line.push(b",");
        line.push_number(u32::MAX);
        assert_eq!(line.as_bytes(), b"n=0,4294967295");
        line.push(&[b'x'; 200]);
        assert_eq!(line.as_bytes().len(), 128);
    }
}
