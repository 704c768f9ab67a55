//! The alternate signal stack of a thread, on which the handlers of [`crate::fatal`] run: also when
//! the thread's own stack is used up.
//!
//! The standard library gives its threads such a stack only if its own start-up code ran. This
//! process starts without it ([`crate::main`]): it reads `/proc/self/maps` and makes a dozen more
//! system calls, which took a fifth of the time to the API.

use std::cell::RefCell;
use std::ffi::c_void;
use std::io;
use std::ptr;

use rustix::mm::{MapFlags, MprotectFlags, ProtFlags, mmap_anonymous, mprotect, munmap};

/// Bytes below the stack that fault.
const GUARD: usize = 4096;
/// Bytes of the stack. The kernel's frame takes up to 3.5 KiB of it with AVX-512.
const SIZE: usize = 16 << 10;

thread_local! {
    static OWN: RefCell<Option<AltStack>> = const { RefCell::new(None) };
}

/// A mapped stack that is this thread's alternate one until it is dropped.
struct AltStack(*mut c_void);

/// Gives the calling thread an alternate stack until the thread ends. Without memory for one it has
/// none: an overflow of its stack then ends the process without a message.
pub(crate) fn install() {
    match AltStack::new() {
        Ok(stack) => OWN.set(Some(stack)),
        Err(error) => log::warn!("a thread has no alternate signal stack: {error}"),
    }
}

impl AltStack {
    fn new() -> io::Result<Self> {
        let prot = ProtFlags::READ | ProtFlags::WRITE;
        // SAFETY: a new mapping at an address of the kernel's choice.
        let base = unsafe { mmap_anonymous(ptr::null_mut(), GUARD + SIZE, prot, MapFlags::PRIVATE) }?;
        let stack = AltStack(base);
        // SAFETY: it is the beginning of the mapping above, which is not used yet.
        unsafe { mprotect(base, GUARD, MprotectFlags::empty()) }?;
        let alternate = libc::stack_t { ss_sp: base.wrapping_byte_add(GUARD), ss_flags: 0, ss_size: SIZE };
        // SAFETY: the stack stays mapped until `drop`, which takes it from the thread first.
        if unsafe { libc::sigaltstack(&raw const alternate, ptr::null_mut()) } < 0 {
            return Err(io::Error::last_os_error());
        }
        Ok(stack)
    }
}

impl Drop for AltStack {
    fn drop(&mut self) {
        let none = libc::stack_t { ss_sp: ptr::null_mut(), ss_flags: libc::SS_DISABLE, ss_size: 0 };
        // SAFETY: disabling the alternate stack has no precondition. This runs at the end of the
        // thread, not in a handler on that stack.
        unsafe { libc::sigaltstack(&raw const none, ptr::null_mut()) };
        // SAFETY: the mapping is this value's, and the kernel uses it no longer.
        if let Err(error) = unsafe { munmap(self.0, GUARD + SIZE) } {
            log::warn!("cannot unmap an alternate signal stack: {error}");
        }
    }
}
