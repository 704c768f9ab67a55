//! The ACPI sleep control, sleep status and reset registers, at ports.

use sync::Counter;

use crate::bus::BusDevice;
use crate::events::{EventSink, MachineEvent};
use crate::layout::{ACPI_RESET, ACPI_RESET_VALUE, ACPI_SLEEP_CONTROL, ACPI_SLEEP_TYPE_S5};

/// `SLP_EN` of the sleep control register (ACPI 6.5, 4.8.3.7).
const SLEEP_ENABLE: u8 = 1 << 5;
const SLEEP_TYPE_SHIFT: u8 = 2;
const SLEEP_TYPE_MASK: u8 = 0b111;

/// Offsets from the sleep control register, which comes first.
const CONTROL: u64 = 0;
const RESET: u64 = (ACPI_RESET - ACPI_SLEEP_CONTROL) as u64;

/// The three registers.
#[derive(Debug)]
pub(crate) struct Power {
    events: EventSink,
    /// How often the guest asked for a sleep type that does not exist.
    refused: Counter,
}

impl Power {
    pub(crate) fn new(events: EventSink) -> Self {
        Power { events, refused: Counter::default() }
    }

    /// Counts a request for an unsupported sleep type. Returns a line for the log, ever more
    /// rarely: a guest may ask in a loop.
    fn refuse(&self, kind: u8) -> Option<String> {
        let times = self.refused.rarely()?;
        Some(format!("the guest asked for sleep type {kind}, which is not supported ({times} times)"))
    }
}

impl BusDevice for Power {
    /// All registers read 0. In the status register that means: no wake-up.
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(0);
    }

    fn write(&self, offset: u64, data: &[u8]) {
        match (offset, data) {
            (CONTROL, [value]) if value & SLEEP_ENABLE != 0 => {
                let kind = value >> SLEEP_TYPE_SHIFT & SLEEP_TYPE_MASK;
                if kind == ACPI_SLEEP_TYPE_S5 {
                    self.events.post(MachineEvent::PowerOff);
                } else if let Some(line) = self.refuse(kind) {
                    log::warn!("{line}");
                }
            }
            (RESET, [ACPI_RESET_VALUE]) => self.events.post(MachineEvent::Reset),
            _ => {}
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::event_channel;

    fn written(offset: u64, value: u8) -> Option<MachineEvent> {
        let (sink, source) = event_channel().unwrap();
        Power::new(sink).write(offset, &[value]);
        source.take()
    }

    #[test]
    fn soft_off_powers_off() {
        assert_eq!(written(CONTROL, ACPI_SLEEP_TYPE_S5 << 2 | SLEEP_ENABLE), Some(MachineEvent::PowerOff));
        assert_eq!(written(CONTROL, ACPI_SLEEP_TYPE_S5 << 2), None, "not enabled");
        assert_eq!(written(CONTROL, 3 << 2 | SLEEP_ENABLE), None, "another type");
    }

    #[test]
    fn unsupported_sleep_types_are_logged_ever_more_rarely() {
        let power = Power::new(event_channel().unwrap().0);
        assert_eq!((0..100_000).filter_map(|_| power.refuse(3)).count(), 17);
    }

    #[test]
    fn reset_register_resets() {
        assert_eq!(written(RESET, ACPI_RESET_VALUE), Some(MachineEvent::Reset));
        assert_eq!(written(RESET, 0), None);
    }
}
