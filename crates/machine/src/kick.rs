//! Making a vCPU thread leave `KVM_RUN`.
//!
//! A signal alone can come too early: just before the thread enters the guest, where it would then stay. So the handler, which
//! runs on the vCPU's own thread, sets `immediate_exit` in the page that the thread shares with KVM, and the next `KVM_RUN`
//! returns at once, after it has finished a port or memory access that was under way.
//!
//! The thread makes its vCPU [`Kickable`] before its first `KVM_RUN`. Unsafe code is here because the signal handler reaches
//! the page through a raw pointer.

use std::cell::Cell;
use std::marker::PhantomData;
use std::ops::{Deref, DerefMut};
use std::ptr::{NonNull, null_mut};
use std::sync::Once;
use std::thread::JoinHandle;

use kvm_ioctls::VcpuFd;
use rustix::mm::Advice;
use vmm_sys_util::signal::{Killable, SIGRTMIN, register_signal_handler};

thread_local! {
    /// `immediate_exit` of the vCPU that this thread runs.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// The signal that kicks: the first of the real-time ones.
fn signal() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn on_kick(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(flag) = NonNull::new(IMMEDIATE_EXIT.get()) {
        // SAFETY: the pointer is to the page of the `Kickable` that this thread has; it is cleared before the page goes.
        unsafe { flag.as_ptr().write_volatile(1) };
    }
}

/// Installs the handler, once for the process.
pub(crate) fn install_handler() -> Result<(), vmm_sys_util::errno::Error> {
    static INSTALL: Once = Once::new();
    let mut result = Ok(());
    INSTALL.call_once(|| result = register_signal_handler(signal(), on_kick));
    result
}

/// A vCPU that kicks reach while this thread has it. It cannot be sent to another thread.
pub(crate) struct Kickable {
    fd: VcpuFd,
    not_send: PhantomData<*const ()>,
}

impl Kickable {
    /// Makes this thread the one that runs the vCPU, whose shared pages are `run_size` bytes. A thread runs one at a time.
    pub(crate) fn new(mut fd: VcpuFd, run_size: usize) -> Self {
        debug_assert!(IMMEDIATE_EXIT.get().is_null());
        let run = fd.get_kvm_run();
        IMMEDIATE_EXIT.set(&raw mut run.immediate_exit);
        // A fork of this process must not have these pages: they would keep this guest alive in the kernel after its own
        // process has gone.
        // SAFETY: the mapping is that of `fd` and has the size that the kernel gave; the advice changes nothing here.
        let kept = unsafe { rustix::mm::madvise((&raw mut *run).cast(), run_size, Advice::LinuxDontFork) };
        debug_assert!(kept.is_ok(), "a mapping takes the advice: {kept:?}");
        Kickable { fd, not_send: PhantomData }
    }

    /// The suberror of the `KVM_EXIT_INTERNAL_ERROR` that `KVM_RUN` just returned with.
    pub(crate) fn internal_suberror(&mut self) -> u32 {
        let exit = self.fd.get_kvm_run().__bindgen_anon_1;
        // SAFETY: every member of the union is plain numbers, so any bytes are valid for this one.
        unsafe { exit.internal.suberror }
    }
}

impl Drop for Kickable {
    fn drop(&mut self) {
        // Before the descriptor, and with it the page, goes.
        IMMEDIATE_EXIT.set(null_mut());
    }
}

impl Deref for Kickable {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl DerefMut for Kickable {
    fn deref_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }
}

/// Makes the vCPU that `thread` runs leave `KVM_RUN`.
pub(crate) fn kick<T>(thread: &JoinHandle<T>) {
    let killed = thread.kill(signal());
    debug_assert!(killed.is_ok(), "a thread that has not been joined can be sent a signal: {killed:?}");
}
