//! The boot timer: a guest writes a magic byte to say "I am here", and the log says how long that took.

use rustix::time::{ClockId, clock_gettime};

use crate::bus::BusDevice;
use crate::layout::BOOT_TIMER_MAGIC;

/// When the monitor started, in microseconds of the monotonic clock and of CPU time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartTimes {
    /// Monotonic clock.
    pub wall_us: u64,
    /// CPU time of this process, to be left out of the count; with what a parent spent taken off, it can be negative.
    pub cpu_us: i64,
}

impl StartTimes {
    /// Now.
    pub fn now() -> Self {
        StartTimes {
            wall_us: clock_us(ClockId::Monotonic),
            cpu_us: clock_us(ClockId::ProcessCPUTime).cast_signed(),
        }
    }
}

fn clock_us(clock: ClockId) -> u64 {
    let time = clock_gettime(clock);
    time.tv_sec.unsigned_abs() * 1_000_000 + time.tv_nsec.unsigned_abs() / 1000
}

/// One register of one byte.
#[derive(Debug)]
pub(crate) struct BootTimer {
    start: StartTimes,
}

impl BootTimer {
    pub(crate) fn new(start: StartTimes) -> Self {
        BootTimer { start }
    }
}

impl BusDevice for BootTimer {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if offset != 0 || data != [BOOT_TIMER_MAGIC] {
            return;
        }
        let now = StartTimes::now();
        let wall = now.wall_us.saturating_sub(self.start.wall_us);
        let cpu = (now.cpu_us - self.start.cpu_us).max(0);
        // Tools look for this line.
        log::info!(
            "Guest-boot-time = {wall:>6} us {} ms, {cpu:>6} CPU us {} CPU ms",
            wall / 1000,
            cpu / 1000
        );
    }
}
