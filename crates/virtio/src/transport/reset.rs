//! A reset in progress: the device's tasks drain and come back from their workers.
//!
//! vCPUs wait for it without the transport's lock, so that others reach the registers meanwhile.
//! All have the same deadline, however many wait and however often the driver writes the status.

use std::sync::{Arc, Mutex, TryLockError};
use std::time::{Duration, Instant};

use super::RESET_TIMEOUT;
use crate::worker::{Removal, Removed, TaskHandle};
use sync::locked;

/// A reset in progress. Clones share it.
#[derive(Clone)]
pub struct Resetting(Arc<Drain>);

struct Drain {
    begun: Instant,
    /// The tasks that are not back yet. A thread that waits for them holds the lock.
    removals: Mutex<Vec<Removal>>,
}

impl Resetting {
    /// Removes the tasks from their workers.
    pub(super) fn begin(tasks: impl Iterator<Item = TaskHandle>) -> Self {
        let removals = Mutex::new(tasks.map(TaskHandle::remove).collect());
        Resetting(Arc::new(Drain { begun: Instant::now(), removals }))
    }

    /// Waits until nothing is in flight, at most until [`RESET_TIMEOUT`] after the reset began. The
    /// next access to the transport completes the reset.
    pub fn wait(&self) {
        self.wait_until(self.until(RESET_TIMEOUT));
    }

    /// The time at which the reset is `timeout` old.
    pub(super) fn until(&self, timeout: Duration) -> Instant {
        self.0.begun + timeout
    }

    /// Waits until nothing is in flight, at most until `deadline`. Returns whether nothing is.
    pub(super) fn wait_until(&self, deadline: Instant) -> bool {
        let left = || deadline.saturating_duration_since(Instant::now());
        take_back(&mut locked(&self.0.removals), left)
    }

    /// Whether nothing is in flight. False also while another thread waits for it.
    pub(super) fn is_done(&self) -> bool {
        let no_time = || Duration::ZERO;
        match self.0.removals.try_lock() {
            Ok(mut removals) => take_back(&mut removals, no_time),
            Err(TryLockError::Poisoned(poisoned)) => take_back(&mut poisoned.into_inner(), no_time),
            Err(TryLockError::WouldBlock) => false,
        }
    }
}

/// Detaches the tasks that are back, and waits for the others as long as there is time `left`.
/// Returns whether all are back.
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
