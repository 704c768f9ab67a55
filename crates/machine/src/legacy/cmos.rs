//! A CMOS clock (MC146818) on ports 0x70 and 0x71. It shows the host's time in UTC; a guest cannot
//! set it.
//!
//! Guests other than Linux read the date from it, and some wait at boot until it says that no
//! update is in progress. There are no alarms, no interrupts and no CMOS memory: every other
//! register reads 0 and ignores writes. The ACPI tables say that there is no CMOS clock, so that
//! Linux uses the paravirtual clock.
//!
//! # One instant for a whole date
//!
//! A guest reads a date register by register once status A says that no update is in progress. All
//! date registers show one instant. It is taken when the guest reads status A, reads a register for
//! the second time, or reads one a second or more after the last instant.
//!
//! # State
//!
//! The index register. The time is the host's, also in a restored guest.

use std::sync::Mutex;
use std::time::{Duration, SystemTime, UNIX_EPOCH};

use serde::{Deserialize, Serialize};
use sync::locked;

use crate::bus::BusDevice;

/// The index port, as offset from port 0x70. It is write-only: reads return all ones.
const INDEX: u64 = 0;
/// The data port, as offset from port 0x70.
const DATA: u64 = 1;

/// Bit 7 of the index port masks NMIs and is not part of the index.
const INDEX_MASK: u8 = 0x7f;

/// The registers that do not read as 0.
mod register {
    pub(super) const SECONDS: u8 = 0x00;
    pub(super) const MINUTES: u8 = 0x02;
    pub(super) const HOURS: u8 = 0x04;
    pub(super) const WEEKDAY: u8 = 0x06;
    pub(super) const DAY: u8 = 0x07;
    pub(super) const MONTH: u8 = 0x08;
    pub(super) const YEAR: u8 = 0x09;
    pub(super) const STATUS_A: u8 = 0x0a;
    pub(super) const STATUS_B: u8 = 0x0b;
    pub(super) const STATUS_D: u8 = 0x0d;
    pub(super) const CENTURY: u8 = 0x32;
}

/// The time base of 32768 Hz and the rate of 1024 Hz that firmware sets; no update in progress.
const STATUS_A: u8 = 0x26;
/// 24 hours, BCD; no interrupt enabled.
const STATUS_B: u8 = 0x02;
/// Valid RAM and time: the battery is charged.
const STATUS_D: u8 = 0x80;

/// How long the date registers show one instant.
const INSTANT_LIMIT: Duration = Duration::from_secs(1);

const SECONDS_PER_DAY: u64 = 24 * 60 * 60;

/// The CMOS clock.
#[derive(Debug, Default)]
pub(crate) struct Cmos(Mutex<Registers>);

/// What the clock saves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CmosState {
    /// The selected register.
    index: u8,
}

#[derive(Debug, Default)]
struct Registers {
    index: u8,
    shown: Option<ShownInstant>,
}

/// The instant that date registers show.
#[derive(Debug, Clone, Copy)]
struct ShownInstant {
    at: SystemTime,
    /// The date registers that were read at this instant, one bit each.
    read: u64,
}

impl Cmos {
    /// A clock with saved registers.
    pub(crate) fn restore(state: CmosState) -> Self {
        let registers = Registers { index: state.index & INDEX_MASK, shown: None };
        Cmos(Mutex::new(registers))
    }

    /// The clock's state.
    pub(crate) fn save(&self) -> CmosState {
        CmosState { index: locked(&self.0).index }
    }
}

impl BusDevice for Cmos {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = locked(&self.0);
        // A port has one byte: a string instruction is several accesses to the same port.
        for byte in data {
            *byte = if offset == DATA { registers.read(SystemTime::now()) } else { 0xff };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        // Of a wider write the first byte is for this port, and the next one for the other.
        if let (INDEX, Some(index)) = (offset, data.first()) {
            locked(&self.0).index = index & INDEX_MASK;
        }
    }
}

impl Registers {
    /// The selected register at the time `now`.
    fn read(&mut self, now: SystemTime) -> u8 {
        match self.index {
            register::STATUS_A => {
                self.shown = Some(ShownInstant { at: now, read: 0 });
                STATUS_A
            }
            register::STATUS_B => STATUS_B,
            register::STATUS_D => STATUS_D,
            index => date_register(index, UNIX_EPOCH).map_or(0, |_| self.read_date(index, now)),
        }
    }

    fn read_date(&mut self, index: u8, now: SystemTime) -> u8 {
        let bit = 1 << index;
        let valid = |shown: &ShownInstant| {
            shown.read & bit == 0 && now.duration_since(shown.at).is_ok_and(|age| age < INSTANT_LIMIT)
        };
        let mut shown = self.shown.filter(valid).unwrap_or(ShownInstant { at: now, read: 0 });
        shown.read |= bit;
        self.shown = Some(shown);
        date_register(index, shown.at).unwrap_or(0)
    }
}

/// What the date register `index` shows at `time`; `None` if it is none.
fn date_register(index: u8, time: SystemTime) -> Option<u8> {
    let seconds = time.duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let days = seconds / SECONDS_PER_DAY;
    let value = match index {
        register::SECONDS => seconds % 60,
        register::MINUTES => seconds / 60 % 60,
        register::HOURS => seconds / 3600 % 24,
        // 1 is Sunday, and the epoch was a Thursday.
        register::WEEKDAY => (days + 4) % 7 + 1,
        register::DAY => date(days).2,
        register::MONTH => date(days).1,
        register::YEAR => date(days).0 % 100,
        register::CENTURY => date(days).0 / 100 % 100,
        _ => return None,
    };
    Some((value / 10 << 4 | value % 10) as u8)
}

/// Year, month and day in the Gregorian calendar, `days` after 1 January 1970.
fn date(days: u64) -> (u64, u64, u64) {
    const DAYS_IN_400_YEARS: u64 = 146_097;
    let (mut year, mut day) = (1970 + days / DAYS_IN_400_YEARS * 400, days % DAYS_IN_400_YEARS);
    let is_leap =
        |year: u64| year.is_multiple_of(4) && (!year.is_multiple_of(100) || year.is_multiple_of(400));
    while day >= 365 + u64::from(is_leap(year)) {
        day -= 365 + u64::from(is_leap(year));
        year += 1;
    }
    let february = 28 + u64::from(is_leap(year));
    let mut month = 1;
    for length in [31, february, 31, 30, 31, 30, 31, 31, 30, 31, 30, 31] {
        if day < length {
            break;
        }
        day -= length;
        month += 1;
    }
    (year, month, day + 1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn at(seconds: u64) -> SystemTime {
        UNIX_EPOCH + Duration::from_secs(seconds)
    }

    fn read_at(registers: &mut Registers, index: u8, now: SystemTime) -> u8 {
        registers.index = index;
        registers.read(now)
    }

    /// Century, year, month, day, weekday, hours, minutes, seconds.
    fn whole(seconds: u64) -> [u8; 8] {
        [0x32, 9, 8, 7, 6, 4, 2, 0].map(|index| date_register(index, at(seconds)).unwrap())
    }

    #[test]
    fn time_is_utc_in_bcd_and_24_hours() {
        assert_eq!(whole(0), [0x19, 0x70, 1, 1, 5, 0, 0, 0]);
        assert_eq!(whole(951_868_799), [0x20, 0x00, 0x02, 0x29, 3, 0x23, 0x59, 0x59]);
        assert_eq!(whole(951_868_800), [0x20, 0x00, 0x03, 0x01, 4, 0, 0, 0]);
        assert_eq!(whole(1_795_871_692), [0x20, 0x26, 0x11, 0x28, 7, 0x13, 0x14, 0x52]);
        assert_eq!(whole(4_107_542_400), [0x21, 0x00, 0x03, 0x01, 2, 0, 0, 0], "2100 has no 29 February");
        assert_eq!(date_register(0, UNIX_EPOCH - Duration::from_secs(5)), Some(0), "a host before 1970");
    }

    #[test]
    fn no_update_is_ever_in_progress_and_unknown_registers_are_0() {
        let cmos = Cmos::default();
        for index in 0..=0xff {
            cmos.write(INDEX, &[index]);
            let mut value = [0xee; 2];
            cmos.read(DATA, &mut value);
            match index & 0x7f {
                0x0a => assert_eq!(value, [0x26; 2]),
                0x0b => assert_eq!(value, [0x02; 2]),
                0x0d => assert_eq!(value, [0x80; 2]),
                0 | 2 | 4 | 6..=9 | 0x32 => {}
                _ => assert_eq!(value, [0; 2], "{index:#x}"),
            }
        }
    }

    #[test]
    fn writes_change_nothing_but_the_index() {
        let cmos = Cmos::default();
        cmos.write(INDEX, &[0x8b]);
        cmos.write(DATA, &[0x06]);
        let mut value = [0];
        cmos.read(DATA, &mut value);
        assert_eq!(value, [STATUS_B]);
        cmos.read(INDEX, &mut value);
        assert_eq!(value, [0xff]);
        cmos.write(INDEX, &[]);
        assert_eq!(cmos.save(), CmosState { index: 0x0b });
        assert_eq!(Cmos::restore(cmos.save()).save(), cmos.save());
    }

    #[test]
    fn date_is_of_the_instant_at_which_status_a_was_read() {
        let midnight = 1_798_761_600; // 1 January 2027
        let mut registers = Registers::default();
        read_at(&mut registers, register::STATUS_A, at(midnight) - Duration::from_nanos(1));
        let date = [0, 2, 4, 7, 8, 9].map(|index| read_at(&mut registers, index, at(midnight)));
        assert_eq!(date, [0x59, 0x59, 0x23, 0x31, 0x12, 0x26]);
        assert_eq!(read_at(&mut registers, 0, at(midnight)), 0, "read again");
        assert_eq!(read_at(&mut registers, 9, at(midnight)), 0x27, "of the same instant");
    }

    #[test]
    fn an_instant_is_shown_for_less_than_a_second() {
        let mut registers = Registers::default();
        read_at(&mut registers, register::STATUS_A, at(100));
        assert_eq!(read_at(&mut registers, 2, at(3600 + 120)), 2);
        read_at(&mut registers, register::STATUS_A, at(100));
        assert_eq!(read_at(&mut registers, 0, at(41)), 0x41, "the host's clock was set back");
    }

    proptest! {
        #[test]
        fn each_day_follows_the_one_before(days in 0u64..3_000_000) {
            let (before, after) = (date(days), date(days + 1));
            let next_day = (before.0, before.1, before.2 + 1);
            let next_month = (before.0, before.1 + 1, 1);
            let next_year = (before.0 + 1, 1, 1);
            prop_assert!(after == next_day || after == next_month && before.2 >= 28
                || after == next_year && (before.1, before.2) == (12, 31));
            prop_assert!((1..=12).contains(&after.1) && (1..=31).contains(&after.2));
        }
    }
}
