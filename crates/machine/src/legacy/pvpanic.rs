//! The pvpanic device (QEMU's `docs/specs/pvpanic`, the ISA one): a guest's kernel that panics says
//! so before it halts, reboots or hands over to a crash kernel.
//!
//! A guest finds it in the DSDT (`QEMU0001`); Linux has the driver `pvpanic-mmio`, which serves
//! ports too. It has no state: a guest that was saved on a machine without it finds nothing at its
//! port but this device.

use sync::Counter;

use crate::bus::BusDevice;
use crate::events::{Notice, NoticeSink};

/// The guest's kernel panicked.
const PANICKED: u8 = 1 << 0;
/// The guest's kernel panicked, and its crash kernel takes over.
const CRASH_LOADED: u8 = 1 << 1;
/// The bits that a guest may write, which it reads first.
const SUPPORTED: u8 = PANICKED | CRASH_LOADED;

/// The device: one register of one byte.
#[derive(Debug)]
pub(crate) struct PvPanic {
    notices: NoticeSink,
    panics: Counter,
}

impl PvPanic {
    pub(crate) fn new(notices: NoticeSink) -> Self {
        PvPanic { notices, panics: Counter::default() }
    }

    fn report(&self, crash_kernel: bool) {
        // A guest may write in a loop, and must not fill the log or the queue of notices.
        let Some(times) = self.panics.rarely() else { return };
        let next = if crash_kernel { "; its crash kernel takes over" } else { "" };
        log::warn!("the guest's kernel panicked (time {times}){next}");
        self.notices.post(Notice::GuestPanic { crash_kernel, times });
    }
}

impl BusDevice for PvPanic {
    fn read(&self, _offset: u64, data: &mut [u8]) {
        data.fill(SUPPORTED);
    }

    fn write(&self, _offset: u64, data: &[u8]) {
        for value in data {
            if value & SUPPORTED != 0 {
                self.report(value & CRASH_LOADED != 0);
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::event_channel;

    #[test]
    fn each_supported_bit_reports_a_panic() {
        for (value, expected) in [
            (PANICKED, Some(false)),
            (CRASH_LOADED, Some(true)),
            (SUPPORTED, Some(true)),
            (0, None),
            (4, None),
        ] {
            let (sink, source) = event_channel().unwrap();
            PvPanic::new(sink.notices()).write(0, &[value]);
            let notice = expected.map(|crash_kernel| Notice::GuestPanic { crash_kernel, times: 1 });
            assert_eq!(source.take_notices().list, Vec::from_iter(notice), "{value}");
        }
    }

    #[test]
    fn reads_return_the_supported_bits() {
        let device = PvPanic::new(event_channel().unwrap().0.notices());
        let mut byte = [0];
        device.read(0, &mut byte);
        assert_eq!(byte, [3]);
    }

    #[test]
    fn panics_in_a_loop_are_reported_ever_more_rarely() {
        let (sink, source) = event_channel().unwrap();
        let device = PvPanic::new(sink.notices());
        (0..1000).for_each(|_| device.write(0, &[PANICKED; 100]));
        let times: Vec<_> = source.take_notices().list.into_iter().collect();
        assert_eq!(times.len(), 17);
        assert_eq!(times[16], Notice::GuestPanic { crash_kernel: false, times: 1 << 16 });
    }
}
