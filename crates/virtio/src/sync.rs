//! Locks.

use std::sync::{Mutex, MutexGuard, PoisonError};

/// Locks `mutex`. A thread that died holding it left the data as it was: every critical section here leaves it whole at each step.
pub(crate) fn locked<T: ?Sized>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}
