//! Detects drops in a fork of the process.
//!
//! A fork of the monitor has copies of everything, but rings and open files are still the parent's,
//! and the parent's threads do not run in the child. A destructor that would change them must do so
//! only in the process that made them.

/// The process that made a value.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CreatorPid(u32);

impl CreatorPid {
    /// The current process.
    pub(crate) fn current() -> Self {
        CreatorPid(std::process::id())
    }

    /// Whether this is still the process that made the value, and no fork of it.
    pub(crate) fn is_current(self) -> bool {
        self.0 == std::process::id()
    }
}
