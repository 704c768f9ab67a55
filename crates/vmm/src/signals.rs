//! Signals that ask this process to end: SIGTERM, SIGINT, SIGQUIT and SIGHUP.
//!
//! Before [`install`] there is nothing to clean up, and they end the process at once. From then on
//! they end it in order: the guest's output is written, its overlays are closed, the sockets are
//! removed, the terminal is restored. Then the signal takes its default action, so that a parent
//! sees which signal it was. SIGHUP has an exit code instead.
//!
//! The kernel does not apply default actions to process 1 of a PID namespace. There the process
//! exits with 128 plus the signal's number, which is what a shell reports of a process that a
//! signal ended: see [`end_init_at_once`] and [`end_by`].
//!
//! Fatal signals are in [`crate::fatal`].

use std::os::fd::{AsFd, AsRawFd, BorrowedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use sync::EventFd;

use crate::exit::ExitCode;
use crate::personality::Personality;
use crate::{counts, logger, terminal};

/// The signals.
const END_SIGNALS: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];

/// The first of the signals that arrived; 0 for none.
static ARRIVED: AtomicI32 = AtomicI32::new(0);
/// Where it came from: its `si_code`.
static ORIGIN: AtomicI32 = AtomicI32::new(0);
/// Signalled when one arrived.
static WAKE: OnceLock<EventFd> = OnceLock::new();

/// Readable once a signal has asked this process to end.
#[derive(Debug)]
pub(crate) struct Signals(&'static EventFd);

impl Signals {
    /// The signal that arrived, if one did.
    pub(crate) fn arrived(&self) -> Option<i32> {
        // A handler stores its signal before it signals the eventfd, which therefore has nothing to
        // take as long as no signal is stored.
        let signal = ARRIVED.load(Ordering::Acquire);
        if signal == 0 {
            return None;
        }
        self.0.take();
        Some(signal)
    }
}

impl AsFd for Signals {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// A signal handler, as `SA_SIGINFO` calls it.
pub(crate) type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Installs a handler, which runs on the thread's alternate stack and is not interrupted by other
/// signals.
///
/// Each thread has an alternate stack ([`crate::alt_stack`]).
pub(crate) fn handle(signal: libc::c_int, handler: Handler) -> std::io::Result<()> {
    handle_with(signal, handler, 0)
}

/// As [`handle`], with more `flags`.
fn handle_with(signal: libc::c_int, handler: Handler, flags: libc::c_int) -> std::io::Result<()> {
    // SAFETY: a `sigaction` is plain numbers and an optional function, for which zero is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK | flags;
    // SAFETY: the set is a local variable that nothing else refers to.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    // SAFETY: the action outlives the call. The handlers of this crate make system calls and use
    // atomics, and nothing else.
    if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
}

/// Makes writes to a closed pipe or socket fail with `EPIPE` instead of ending the process. They
/// are counted, for metrics.
pub(crate) fn survive_sigpipe() {
    // A system call of another thread that it interrupts is restarted.
    if handle_with(libc::SIGPIPE, count_signal, libc::SA_RESTART).is_err() {
        // SAFETY: ignoring a signal has no precondition.
        unsafe { libc::signal(libc::SIGPIPE, libc::SIG_IGN) };
    }
}

extern "C" fn count_signal(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    counts::signal(signal);
}

/// Whether this is process 1 of its PID namespace, to which the kernel does not apply default
/// actions of signals.
pub(crate) fn is_init() -> bool {
    std::process::id() == 1
}

/// Makes the signals end the process at once if it is process 1 of its PID namespace. Others need
/// nothing for that.
pub(crate) fn end_init_at_once() {
    if is_init() {
        END_SIGNALS.into_iter().for_each(take_default_action);
    }
}

/// Installs the handlers, so that the signals end the process in order. Called once.
pub(crate) fn install() -> std::io::Result<Signals> {
    let event = EventFd::new()?;
    let wake = WAKE.get_or_init(|| event);
    for signal in END_SIGNALS {
        handle(signal, note_signal)?;
    }
    Ok(Signals(wake))
}

/// Blocks the signals for this thread, and for processes that it forks, as long as the returned
/// value lives.
///
/// A forked process shares the eventfd with its parent, and would report a signal there. So its
/// signals stay pending until [`renew`] or [`restore_default_actions`].
pub(crate) fn block() -> Blocked {
    Blocked(mask(libc::SIG_BLOCK))
}

/// Restores the signal mask when it is dropped. In a forked process it is never dropped.
#[derive(Debug)]
pub(crate) struct Blocked(libc::sigset_t);

impl Drop for Blocked {
    fn drop(&mut self) {
        // SAFETY: the kernel filled in the set. A null pointer for the old set is allowed.
        unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const self.0, std::ptr::null_mut()) };
    }
}

/// Blocks or unblocks the signals (`how`). Returns the mask from before.
fn mask(how: libc::c_int) -> libc::sigset_t {
    // SAFETY: a `sigset_t` is plain numbers, for which zero is a value; the calls below fill both
    // in.
    let (mut set, mut before): (libc::sigset_t, libc::sigset_t) = unsafe { std::mem::zeroed() };
    // SAFETY: `set` is a local variable that nothing else refers to.
    unsafe { libc::sigemptyset(&raw mut set) };
    for signal in END_SIGNALS {
        // SAFETY: as above, and the number is that of a signal.
        unsafe { libc::sigaddset(&raw mut set, signal) };
    }
    // SAFETY: both sets outlive the call, which can only fail for a wrong `how`.
    unsafe { libc::pthread_sigmask(how, &raw const set, &raw mut before) };
    before
}

/// For a forked process: handles its own signals from now on, also those that arrived since the
/// fork. The handlers are inherited.
pub(crate) fn renew() -> std::io::Result<Signals> {
    ARRIVED.store(0, Ordering::Release);
    let Some(wake) = WAKE.get() else { return install() };
    // In the place of the parent's, under the same number: a handler may run at any time.
    let event = EventFd::new()?;
    // SAFETY: `wake` stays an open descriptor of the same owner, which never closes it. Only the
    // file that it refers to changes.
    let replaced = unsafe { libc::dup3(event.as_raw_fd(), wake.as_raw_fd(), libc::O_CLOEXEC) };
    if replaced < 0 {
        return Err(std::io::Error::last_os_error());
    }
    mask(libc::SIG_UNBLOCK);
    Ok(Signals(wake))
}

/// For a forked process: the signals end it at once from now on.
pub(crate) fn restore_default_actions() {
    END_SIGNALS.into_iter().for_each(take_default_action);
    mask(libc::SIG_UNBLOCK);
}

/// Restores the default action of `signal`, which is to end the process. Process 1 of a PID
/// namespace gets a handler that does.
fn take_default_action(signal: libc::c_int) {
    if is_init() && handle(signal, exit_at_once).is_ok() {
        return;
    }
    // SAFETY: restoring the default action of a valid signal has no precondition.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
}

/// The eventfd that the handlers signal.
pub(crate) fn descriptor() -> Option<BorrowedFd<'static>> {
    WAKE.get().map(AsFd::as_fd)
}

extern "C" fn note_signal(signal: libc::c_int, info: *mut libc::siginfo_t, _: *mut libc::c_void) {
    counts::signal(signal);
    let is_first = ARRIVED.compare_exchange(0, signal, Ordering::AcqRel, Ordering::Relaxed).is_ok();
    if is_first && !info.is_null() {
        // SAFETY: with SA_SIGINFO the kernel passes a whole `siginfo_t`.
        ORIGIN.store(unsafe { (*info).si_code }, Ordering::Release);
    }
    if let Some(wake) = WAKE.get() {
        wake.signal();
    }
}

extern "C" fn exit_at_once(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    exit_now(ExitCode::of_signal(signal))
}

/// Ends the process by `signal`, so that a parent sees which signal ended it. Returns the exit code
/// where that is not possible: for SIGHUP, which has a code of its own, and in process 1 of a PID
/// namespace.
pub(crate) fn end_by(signal: i32) -> ExitCode {
    Personality::of_this_process().log_signal(signal, ORIGIN.load(Ordering::Acquire));
    if signal != libc::SIGHUP {
        terminal::restore();
        if !is_init() {
            logger::finish();
            raise_default(signal);
        }
    }
    ExitCode::of_signal(signal)
}

/// Ends the process without running anything else. A signal handler may call it.
pub(crate) fn exit_now(code: ExitCode) -> ! {
    // SAFETY: `_exit` has no precondition, and may be called from a signal handler.
    unsafe { libc::_exit(code as i32) }
}

/// Lets `signal` take its default action. Returns where the signal is blocked: then it does so
/// later.
pub(crate) fn raise_default(signal: i32) {
    // SAFETY: restoring the default action of a valid signal has no precondition.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
    // SAFETY: raising a valid signal has no precondition.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subprocess;

    /// As the writer of a live snapshot: signals that arrive while it is forked stay pending until
    /// their default action is restored.
    #[test]
    fn pending_signal_ends_a_writer_that_is_init() {
        if subprocess::is_one() {
            assert!(is_init());
            install().unwrap();
            let blocked = block();
            // SAFETY: raising a signal has no precondition.
            unsafe { libc::raise(libc::SIGTERM) };
            restore_default_actions();
            drop(blocked);
            return;
        }
        let ended = subprocess::again_as_init("signals::tests::pending_signal_ends_a_writer_that_is_init");
        assert_eq!(ended.status.code(), Some(128 + libc::SIGTERM), "{ended:?}");
    }

    #[test]
    fn write_to_a_closed_pipe_fails_and_is_counted() {
        if subprocess::is_one() {
            survive_sigpipe();
            let (reader, writer) = std::io::pipe().unwrap();
            drop(reader);
            let written = rustix::io::write(&writer, b"x");
            let ok = written == Err(rustix::io::Errno::PIPE) && counts::read().signals.sigpipe == 1;
            std::process::exit(if ok { 7 } else { 8 });
        }
        let ended = subprocess::again("signals::tests::write_to_a_closed_pipe_fails_and_is_counted");
        assert_eq!(ended.status.code(), Some(7), "{ended:?}");
    }

    #[test]
    fn signal_ends_init_before_handlers_are_installed() {
        if subprocess::is_one() {
            end_init_at_once();
            // SAFETY: raising a signal has no precondition.
            unsafe { libc::raise(libc::SIGINT) };
            return;
        }
        let ended =
            subprocess::again_as_init("signals::tests::signal_ends_init_before_handlers_are_installed");
        assert_eq!(ended.status.code(), Some(128 + libc::SIGINT), "{ended:?}");
    }
}
