//! The signal that makes a vCPU thread leave `KVM_RUN`.
//!
//! A signal alone may come too early: just before the thread enters the guest, where it would then
//! stay. So the handler, which runs on the vCPU's own thread, sets `immediate_exit` in the
//! `kvm_run` mapping that the thread shares with KVM. The next `KVM_RUN` then completes a pending
//! port or MMIO access and returns at once.
//!
//! The thread makes its vCPU [`ThreadVcpu`] before its first `KVM_RUN`. Unsafe code is here because
//! the signal handler reaches the mapping through a raw pointer.

#![expect(unsafe_code, reason = "a signal handler writes to the mapping that a vCPU shares with KVM")]

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
    /// `immediate_exit` of the vCPU that this thread runs; null if it runs none.
    static IMMEDIATE_EXIT: Cell<*mut u8> = const { Cell::new(null_mut()) };
}

/// The signal: the first of the real-time signals.
fn signal_number() -> libc::c_int {
    SIGRTMIN()
}

extern "C" fn on_signal(_: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    if let Some(flag) = NonNull::new(IMMEDIATE_EXIT.get()) {
        // SAFETY: the pointer is into the mapping of the `ThreadVcpu` of this thread. `ThreadVcpu`
        // clears it before its mapping is unmapped.
        unsafe { flag.as_ptr().write_volatile(1) };
    }
}

/// Installs the handler. Only the first call in a process has an effect.
pub(crate) fn install_handler() -> Result<(), vmm_sys_util::errno::Error> {
    static INSTALL: Once = Once::new();
    let mut result = Ok(());
    INSTALL.call_once(|| result = register_signal_handler(signal_number(), on_signal));
    result
}

/// A vCPU that the signal reaches while this thread owns it. It cannot be sent to another thread.
pub(crate) struct ThreadVcpu {
    fd: VcpuFd,
    not_send: PhantomData<*const ()>,
}

impl ThreadVcpu {
    /// Makes this thread the one that runs the vCPU, whose `kvm_run` mapping has `run_size` bytes.
    /// A thread runs at most one vCPU.
    pub(crate) fn new(mut fd: VcpuFd, run_size: usize) -> Self {
        debug_assert!(IMMEDIATE_EXIT.get().is_null());
        let run = fd.get_kvm_run();
        IMMEDIATE_EXIT.set(&raw mut run.immediate_exit);
        // A fork of this process must not inherit the mapping: it would keep this guest alive in
        // the kernel after its own process has ended. SAFETY: the range is the mapping of `fd`,
        // whose size the kernel reported. The advice does not change the memory of this process.
        let kept = unsafe { rustix::mm::madvise((&raw mut *run).cast(), run_size, Advice::LinuxDontFork) };
        debug_assert!(kept.is_ok(), "a mapping takes the advice: {kept:?}");
        ThreadVcpu { fd, not_send: PhantomData }
    }

    /// The suberror of the `KVM_EXIT_INTERNAL_ERROR` that `KVM_RUN` just returned with.
    pub(crate) fn internal_suberror(&mut self) -> u32 {
        let exit = self.fd.get_kvm_run().__bindgen_anon_1;
        // SAFETY: every member of the union is plain numbers, so any bytes are valid for this one.
        unsafe { exit.internal.suberror }
    }
}

impl Drop for ThreadVcpu {
    fn drop(&mut self) {
        // Before `fd` is dropped, which unmaps `kvm_run`.
        IMMEDIATE_EXIT.set(null_mut());
    }
}

impl Deref for ThreadVcpu {
    type Target = VcpuFd;

    fn deref(&self) -> &VcpuFd {
        &self.fd
    }
}

impl DerefMut for ThreadVcpu {
    fn deref_mut(&mut self) -> &mut VcpuFd {
        &mut self.fd
    }
}

/// Makes the vCPU that `thread` runs leave `KVM_RUN`.
pub(crate) fn send<T>(thread: &JoinHandle<T>) {
    let killed = thread.kill(signal_number());
    debug_assert!(killed.is_ok(), "a thread that has not been joined can be sent a signal: {killed:?}");
}
