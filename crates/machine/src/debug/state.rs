//! What the machine's owner and the debugger's thread share.

use std::sync::{Arc, Mutex};

use sync::{EventFd, locked};

/// How the guest ended, for its debugger.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum DebugEnd {
    /// With the exit status of the monitor.
    Exited(u8),
    /// With the monitor, by this signal.
    Signalled(u8),
}

/// Shared state. Locked for moments only, and never by a vCPU.
#[derive(Debug)]
pub(super) struct SharedState {
    inner: Mutex<Inner>,
    /// Readable once the guest has ended.
    wake: Arc<EventFd>,
}

#[derive(Debug, Default)]
struct Inner {
    attached: bool,
    /// How many hold a [`KeptOut`].
    keeping_out: usize,
    end: Option<DebugEnd>,
}

/// While it exists, no debugger attaches.
#[derive(Debug)]
pub struct KeptOut(Arc<SharedState>);

impl Drop for KeptOut {
    fn drop(&mut self) {
        locked(&self.0.inner).keeping_out -= 1;
    }
}

impl SharedState {
    /// No debugger is attached.
    pub(super) fn new() -> std::io::Result<Self> {
        Ok(SharedState { inner: Mutex::default(), wake: Arc::new(EventFd::new()?) })
    }

    /// Notes that a debugger attaches. False while debuggers are kept out.
    pub(super) fn attach(&self) -> bool {
        let mut inner = locked(&self.inner);
        inner.attached = inner.keeping_out == 0;
        inner.attached
    }

    /// Notes that the debugger has left no trace in the guest.
    pub(super) fn detach(&self) {
        locked(&self.inner).attached = false;
    }

    /// Keeps debuggers out. `None` if one is attached.
    pub(super) fn keep_out(self: &Arc<Self>) -> Option<KeptOut> {
        let mut inner = locked(&self.inner);
        if inner.attached {
            return None;
        }
        inner.keeping_out += 1;
        Some(KeptOut(Arc::clone(self)))
    }

    /// Notes that the guest has ended, and wakes the debugger's thread. The first end counts.
    pub(super) fn set_end(&self, end: DebugEnd) {
        locked(&self.inner).end.get_or_insert(end);
        self.wake.signal();
    }

    /// Whether the guest has ended.
    pub(super) fn has_ended(&self) -> bool {
        locked(&self.inner).end.is_some()
    }

    /// How the guest ended.
    pub(super) fn end(&self) -> DebugEnd {
        locked(&self.inner).end.unwrap_or(DebugEnd::Exited(0))
    }

    /// Readable once the guest has ended.
    pub(super) fn wake(&self) -> &EventFd {
        &self.wake
    }

    /// [`Self::wake`], to be kept.
    pub(super) fn shared_wake(&self) -> Arc<EventFd> {
        Arc::clone(&self.wake)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn attached_debugger_and_snapshot_exclude_each_other() {
        let state = Arc::new(SharedState::new().unwrap());
        assert!(state.attach() && state.keep_out().is_none());
        state.detach();
        let (first, second) = (state.keep_out().unwrap(), state.keep_out().unwrap());
        drop(first);
        assert!(!state.attach());
        drop(second);
        assert!(state.attach());
    }

    #[test]
    fn first_end_counts() {
        let state = SharedState::new().unwrap();
        assert!(!state.has_ended());
        state.set_end(DebugEnd::Signalled(15));
        state.set_end(DebugEnd::Exited(0));
        assert!(state.has_ended() && state.wake().take() > 0);
        assert_eq!(state.end(), DebugEnd::Signalled(15));
    }
}
