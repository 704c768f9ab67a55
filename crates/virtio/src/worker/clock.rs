//! The clock of a worker.

/// Nanoseconds of the monotonic clock.
pub type Nanos = u64;

/// The clock of a worker. Tasks share one reading per wake-up, and may read it again.
#[derive(Debug)]
pub(crate) struct Clock {
    source: fn() -> Nanos,
    now: Option<Nanos>,
    /// Whether it is the kernel's clock, which its timers follow.
    pub(super) ticks: bool,
}

impl Clock {
    /// The kernel's monotonic clock.
    pub(super) fn monotonic() -> Self {
        Clock { source: monotonic, now: None, ticks: true }
    }

    /// A clock that a test sets.
    #[cfg(any(test, feature = "testing"))]
    pub(crate) fn manual(source: fn() -> Nanos) -> Self {
        Clock { source, now: None, ticks: false }
    }

    /// The time of this wake-up.
    pub(super) fn now(&mut self) -> Nanos {
        *self.now.get_or_insert_with(self.source)
    }

    /// The time now.
    pub(super) fn read(&self) -> Nanos {
        (self.source)()
    }

    /// Begins a wake-up.
    pub(super) fn forget(&mut self) {
        self.now = None;
    }
}

/// Reads the kernel's monotonic clock.
pub fn monotonic() -> Nanos {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec.cast_unsigned() * 1_000_000_000 + now.tv_nsec.cast_unsigned()
}
