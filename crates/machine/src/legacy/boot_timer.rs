//! The boot timer: a guest writes a magic byte to say "I am here", and the log says how long that took.
//!
//! A guest may have several such places, but not fill the log: after [`MOST_LINES`] nothing more is said.

use std::sync::atomic::{AtomicU32, Ordering};

use rustix::time::{ClockId, clock_gettime};

use crate::bus::BusDevice;
use crate::layout::BOOT_TIMER_MAGIC;

/// The most lines that one guest gets.
const MOST_LINES: u32 = 64;

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
    /// How many lines are left.
    left: AtomicU32,
}

impl BootTimer {
    pub(crate) fn new(start: StartTimes) -> Self {
        BootTimer { start, left: AtomicU32::new(MOST_LINES) }
    }

    /// What a write of `data` at `offset` says.
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
    fn the_magic_byte_gives_a_line_and_a_guest_that_goes_on_writing_it_no_more() {
        let timer = BootTimer::new(StartTimes::now());
        for (offset, data) in [(0, &[0][..]), (1, &[BOOT_TIMER_MAGIC]), (0, &[BOOT_TIMER_MAGIC, 0]), (0, &[])]
        {
            assert_eq!(timer.line(offset, data), None);
        }
        let lines: Vec<_> = (0..1000).filter_map(|_| timer.line(0, &[BOOT_TIMER_MAGIC])).collect();
        assert_eq!(lines.len(), MOST_LINES as usize);
        assert!(lines[0].starts_with("Guest-boot-time = "), "{}", lines[0]);
    }
}
