//! The boot timer: a guest writes a magic byte, and the log says how long it took to get there.
//!
//! A guest may write several times, but not fill the log: after [`MAX_LINES`] lines no more are
//! written.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::time::{ClockId, clock_gettime};

use crate::bus::BusDevice;
use crate::layout::BOOT_TIMER_MAGIC;

/// The most log lines for one guest.
const MAX_LINES: u32 = 64;

/// When the monitor started, in microseconds of the monotonic clock and of CPU time.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct StartTimes {
    /// The monotonic clock.
    pub wall_us: u64,
    /// The CPU time that this process had used, which does not count. Less the time that a parent
    /// had used, which does, it can be negative.
    pub cpu_us: i64,
}

impl StartTimes {
    /// The times now.
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

/// The boot timer: one register of one byte.
#[derive(Debug)]
pub(crate) struct BootTimer {
    start: StartTimes,
    /// How many more lines may be written.
    left: AtomicU32,
}

impl BootTimer {
    pub(crate) fn new(start: StartTimes) -> Self {
        BootTimer { start, left: AtomicU32::new(MAX_LINES) }
    }

    /// The log line for a write of `data` at `offset`, if there is one.
    fn line(&self, offset: u64, data: &[u8]) -> Option<String> {
        if offset != 0 || data != [BOOT_TIMER_MAGIC] {
            return None;
        }
        let one_less = |left: u32| left.checked_sub(1);
        self.left.fetch_update(Ordering::Relaxed, Ordering::Relaxed, one_less).ok()?;
        let now = StartTimes::now();
        let wall = now.wall_us.saturating_sub(self.start.wall_us);
        let cpu = (now.cpu_us - self.start.cpu_us).max(0);
        // Tools look for this line.
        Some(format!(
            "Guest-boot-time = {wall:>6} us {} ms, {cpu:>6} CPU us {} CPU ms",
            wall / 1000,
            cpu / 1000
        ))
    }
}

impl BusDevice for BootTimer {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        if let Some(line) = self.line(offset, data) {
            log::info!("{line}");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn magic_byte_is_logged_a_bounded_number_of_times() {
        let timer = BootTimer::new(StartTimes::now());
        for (offset, data) in [(0, &[0][..]), (1, &[BOOT_TIMER_MAGIC]), (0, &[BOOT_TIMER_MAGIC, 0]), (0, &[])]
        {
            assert_eq!(timer.line(offset, data), None);
        }
        let lines: Vec<_> = (0..1000).filter_map(|_| timer.line(0, &[BOOT_TIMER_MAGIC])).collect();
        assert_eq!(lines.len(), MAX_LINES as usize);
        assert!(lines[0].starts_with("Guest-boot-time = "), "{}", lines[0]);
    }
}
