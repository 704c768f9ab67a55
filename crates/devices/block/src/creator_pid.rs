//! Which process made something that two processes must not take apart.
//!
//! A fork of the monitor has everything that it had: rings and files that are the parent's, and the memory of threads that do
//! not exist. What the child drops of these must stay as it is for the parent.

/// The process that made a thing.
#[derive(Debug, Clone, Copy)]
pub(crate) struct CreatorPid(u32);

impl CreatorPid {
    /// This process.
    pub(crate) fn current() -> Self {
        CreatorPid(std::process::id())
    }

    /// Whether this is still the process that made it, and no fork of it.
    pub(crate) fn is_current(self) -> bool {
        self.0 == std::process::id()
    }
}
