//! Signals that ask this process to end: SIGTERM, SIGINT, SIGQUIT and SIGHUP.
//!
//! Before [`install`] there is nothing to clean up, and they end the process at once. From then on
//! they end it in order: the guest's output is carried out, its overlays are closed, the socket is
//! removed, the terminal is restored. Then the signal takes its default action, so that a parent
//! sees which signal it was. SIGHUP has an exit code instead.
//!
//! The kernel does not apply default actions to process 1 of a PID namespace. There the process
//! exits with 128 plus the signal's number, which is what a shell reports of a process that a
//! signal ended: see [`end_init_at_once`] and [`end_by`].
//!
//! Signals that say this process is broken are in [`crate::fatal`].

use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::sync::OnceLock;
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::event::{EventfdFlags, eventfd};

use crate::exit::ExitCode;
use crate::terminal;

/// Those that ask.
const ASKING: [libc::c_int; 4] = [libc::SIGTERM, libc::SIGINT, libc::SIGQUIT, libc::SIGHUP];

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

/// A signal handler, as `SA_SIGINFO` calls it.
pub(crate) type Handler = extern "C" fn(libc::c_int, *mut libc::siginfo_t, *mut libc::c_void);

/// Installs a handler, which runs on the thread's alternate stack and is not interrupted by other
/// signals.
///
/// The standard library gives each of its threads an alternate stack, which no other code replaces.
pub(crate) fn handle(signal: libc::c_int, handler: Handler) -> std::io::Result<()> {
    // SAFETY: a `sigaction` is plain numbers and an optional function, for which zero is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler as *const () as usize;
    action.sa_flags = libc::SA_SIGINFO | libc::SA_ONSTACK;
    // SAFETY: the set is ours alone.
    unsafe { libc::sigfillset(&raw mut action.sa_mask) };
    // SAFETY: the action outlives the call. The handlers of this crate make system calls and use
    // atomics, and nothing else.
    if unsafe { libc::sigaction(signal, &raw const action, std::ptr::null_mut()) } < 0 {
        return Err(std::io::Error::last_os_error());
    }
    Ok(())
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
        ASKING.into_iter().for_each(take_default_action);
    }
}

/// Installs the handlers, so that the signals end the process in order. Called once.
pub(crate) fn install() -> std::io::Result<Signals> {
    let fd = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
    let wake = WAKE.get_or_init(|| fd);
    for signal in ASKING {
        handle(signal, on_asking)?;
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
    ASKING.into_iter().for_each(take_default_action);
    mask(libc::SIG_UNBLOCK);
}

/// Restores the default action of `signal`, which is to end the process. Process 1 of a PID
/// namespace gets a handler that does.
fn take_default_action(signal: libc::c_int) {
    if is_init() && handle(signal, on_asking_at_once).is_ok() {
        return;
    }
    // SAFETY: restoring the default action of a valid signal has no precondition.
    unsafe { libc::signal(signal, libc::SIG_DFL) };
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

extern "C" fn on_asking_at_once(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    exit_now(ExitCode::of_asking(signal))
}

/// Ends the process by `signal`, so that a parent sees which signal ended it. Returns the code to
/// exit with where that is not possible: for SIGHUP, which has one, and in process 1 of a PID
/// namespace.
pub(crate) fn end_by(signal: i32) -> ExitCode {
    if signal != libc::SIGHUP {
        terminal::restore();
        log::info!("ended by signal {signal}");
        if !is_init() {
            raise_default(signal);
        }
    }
    ExitCode::of_asking(signal)
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
    // SAFETY: nor has raising it.
    unsafe { libc::raise(signal) };
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subprocess;

    /// A live snapshot's writer: signals that came while it was forked wait until it takes their
    /// default action.
    #[test]
    fn asking_signals_end_a_writer_that_is_init_of_a_namespace() {
        if subprocess::is_one() {
            assert!(is_init());
            install().unwrap();
            let held = hold();
            // SAFETY: raising a signal has no precondition.
            unsafe { libc::raise(libc::SIGTERM) };
            take_their_course();
            drop(held);
            return;
        }
        let ended = subprocess::again_as_init(
            "signals::tests::asking_signals_end_a_writer_that_is_init_of_a_namespace",
        );
        assert_eq!(ended.status.code(), Some(128 + libc::SIGTERM), "{ended:?}");
    }

    #[test]
    fn asking_signals_end_init_before_anything_is_set_up() {
        if subprocess::is_one() {
            end_init_at_once();
            // SAFETY: raising a signal has no precondition.
            unsafe { libc::raise(libc::SIGINT) };
            return;
        }
        let ended =
            subprocess::again_as_init("signals::tests::asking_signals_end_init_before_anything_is_set_up");
        assert_eq!(ended.status.code(), Some(128 + libc::SIGINT), "{ended:?}");
    }
}
