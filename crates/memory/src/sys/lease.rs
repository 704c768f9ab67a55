//! Checking that a file is not open or mapped elsewhere on this host.
//!
//! The kernel grants a write lease (`F_SETLEASE`, fcntl(2)) only while the file has no other open
//! file description, and a mapping holds the one that it was made with. So a granted lease shows
//! that no clone, page server, copy or loop device uses the file. The lease is released at once, so
//! that a later open does not wait for it.
//!
//! If the kernel grants no leases (another user's file, a network file system), the file counts as
//! used elsewhere.

use std::fs::File;
use std::os::fd::AsRawFd;

/// `F_SETSIG` of linux/fcntl.h.
const F_SETSIG: libc::c_int = 10;

/// Whether `file` is the only open file description of its file on this host.
pub(crate) fn is_sole_user(file: &File) -> bool {
    let fd = file.as_raw_fd();
    // Opening the file while the lease is held sends a signal. SIGIO would end the process; SIGURG
    // is ignored by default.
    // SAFETY: fcntl with a number; it touches no memory.
    if unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) } != 0 {
        return false;
    }
    // SAFETY: as above.
    let granted = unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) } == 0;
    if granted {
        // SAFETY: as above.
        unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_UNLCK) };
    }
    granted
}

/// A lease that a test holds until another open breaks it.
#[cfg(test)]
pub(crate) struct HeldLease(File);

#[cfg(test)]
impl HeldLease {
    /// Takes a write lease on the file at `path`. Its signal is sent to this thread, which blocks
    /// it.
    pub(crate) fn take(path: &std::path::Path) -> Self {
        let file = File::options().read(true).write(true).open(path).unwrap();
        let fd = file.as_raw_fd();
        let signals = Self::signals();
        // SAFETY: the set outlives the call, and the old one is not requested.
        let blocked =
            unsafe { libc::pthread_sigmask(libc::SIG_BLOCK, &raw const signals, std::ptr::null_mut()) };
        // SAFETY: fcntl with a number; it touches no memory.
        let chosen = unsafe { libc::fcntl(fd, F_SETSIG, libc::SIGURG) };
        // SAFETY: as above.
        let leased = unsafe { libc::fcntl(fd, libc::F_SETLEASE, libc::F_WRLCK) };
        // SAFETY: gettid has no preconditions.
        let thread = unsafe { libc::gettid() };
        // `struct f_owner_ex` of asm-generic/fcntl.h: F_OWNER_TID, and the thread's id.
        let owner = [0, thread];
        // SAFETY: the kernel reads the two integers, which outlive the call.
        let owned = unsafe { libc::fcntl(fd, F_SETOWN_EX, owner.as_ptr()) };
        assert_eq!([blocked, chosen, leased, owned], [0; 4], "{}", std::io::Error::last_os_error());
        HeldLease(file)
    }

    /// Waits for an open, which gets `EWOULDBLOCK` or waits, and releases the lease.
    pub(crate) fn release_to_opener(self) {
        let (signals, limit) = (Self::signals(), libc::timespec { tv_sec: 60, tv_nsec: 0 });
        // SAFETY: the set and the limit outlive the call, and no details are requested.
        let signal =
            unsafe { libc::sigtimedwait(&raw const signals, std::ptr::null_mut(), &raw const limit) };
        assert_eq!(signal, libc::SIGURG, "no open broke the lease");
        drop(self.0);
    }

    fn signals() -> libc::sigset_t {
        let mut signals = std::mem::MaybeUninit::uninit();
        // SAFETY: the set is written, which needs no earlier value.
        unsafe { libc::sigemptyset(signals.as_mut_ptr()) };
        // SAFETY: the set was initialised above.
        unsafe { libc::sigaddset(signals.as_mut_ptr(), libc::SIGURG) };
        // SAFETY: as above.
        unsafe { signals.assume_init() }
    }
}

/// `F_SETOWN_EX` of linux/fcntl.h.
#[cfg(test)]
const F_SETOWN_EX: libc::c_int = 15;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn file_open_twice_has_no_sole_user() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(is_sole_user(file.as_file()));
        let other = File::open(file.path()).unwrap();
        assert!(!is_sole_user(file.as_file()) && !is_sole_user(&other));
        drop(other);
        assert!(is_sole_user(file.as_file()));
    }
}
