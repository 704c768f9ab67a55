//! A reset that takes its time: the device's tasks drain and come back from their workers.
//!
//! Who waits for it does so without the transport's lock, so that other vCPUs reach the registers meanwhile. However many wait, and
//! however often the driver asks again: all have the one deadline that began with the reset.

use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use super::RESET_TIMEOUT;
use crate::worker::{Removal, Removed, TaskHandle};
use sync::locked;

/// A reset that is under way. Clones are the same.
#[derive(Clone)]
pub struct Resetting(Arc<Drain>);

struct Drain {
    begun: Instant,
    /// The tasks that are not back. Locked by whoever waits for them.
    removals: Mutex<Vec<Removal>>,
}

impl Resetting {
    /// Takes the tasks back from their workers.
    pub(super) fn begin(tasks: impl Iterator<Item = TaskHandle>) -> Self {
        let removals = Mutex::new(tasks.map(TaskHandle::remove).collect());
        Resetting(Arc::new(Drain { begun: Instant::now(), removals }))
    }

    /// Waits until nothing is in flight any more, until [`RESET_TIMEOUT`] after the reset began at most. The next access to the
    /// transport then finds the device reset.
    pub fn wait(&self) {
        self.wait_until(self.until(RESET_TIMEOUT));
    }

    /// When the reset is older than `patience`.
    pub(super) fn until(&self, patience: Duration) -> Instant {
        self.0.begun + patience
    }

    /// Waits until nothing is in flight any more, until `deadline` at most. Says whether that is so.
    pub(super) fn wait_until(&self, deadline: Instant) -> bool {
        let left = || deadline.saturating_duration_since(Instant::now());
        take_back(&mut locked(&self.0.removals), left)
    }

    /// Whether nothing is in flight any more (and nobody is about to find that out).
    pub(super) fn is_done(&self) -> bool {
        let no_time = || Duration::ZERO;
        match self.0.removals.try_lock() {
            Ok(mut removals) => take_back(&mut removals, no_time),
            Err(TryLockError::Poisoned(poisoned)) => take_back(&mut poisoned.into_inner(), no_time),
            Err(TryLockError::WouldBlock) => false,
        }
    }
}

/// Takes what has come back, and waits as long as there is time `left`. True if all is back.
fn take_back(removals: &mut Vec<Removal>, left: impl Fn() -> Duration) -> bool {
    while let Some(removal) = removals.last() {
        let left = left();
        match if left.is_zero() { removal.poll() } else { removal.wait(left) } {
            Removed::Task(task) => task.detach(),
            Removed::Ended => {}
            Removed::NotYet => return false,
        }
        removals.pop();
    }
    true
}
