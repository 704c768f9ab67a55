//! Whether a file is open, or mapped, anywhere else on this host.
//!
//! The kernel grants a write lease (`F_SETLEASE`, fcntl(2)) only while the file has no other open
//! file description, and a mapping keeps the one that it was made with. So a lease that is granted
//! says that no clone, page server, copy or loop device has the file. The lease is
//! given back at once, so that a later open does not wait for it.
//!
//! Where the kernel grants none (another user's file, a network file system), the
//! answer is no.

use std::fs::File;
use std::os::fd::AsRawFd;

/// `F_SETSIG` of linux/fcntl.h.
const F_SETSIG: libc::c_int = 10;

/// Whether `file` is the only open file description of its file on this host.
pub(crate) fn is_alone(file: &File) -> bool {
    let fd = file.as_raw_fd();
    // An open in this moment breaks the lease by a signal. SIGIO would end the process; SIGURG is
    // ignored by default.
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_that_is_open_twice_is_not_alone() {
        let file = tempfile::NamedTempFile::new().unwrap();
        assert!(is_alone(file.as_file()));
        let other = File::open(file.path()).unwrap();
        assert!(!is_alone(file.as_file()) && !is_alone(&other));
        drop(other);
        assert!(is_alone(file.as_file()));
    }
}
