//! Entry point of the fuzz target: a hostile guest on the entropy device.

use crate::{Entropy, EntropyState};
use virtio::fuzz::{BASE, Input, MAX_ACTS, NO_LIMIT, SIZE, common_act, limits, new_guest, still_whole};
use virtio::rate_limiter::RateLimiterUpdate;
use virtio::testing::{Guest, Kind, TestWorker};

/// A hostile guest on the entropy device. The first byte chooses the transport.
pub fn device(data: &[u8]) {
    let mut input = Input(data);
    let kind = if input.u8() & 1 == 0 { Kind::Mmio } else { Kind::Pci };
    let (device, mut control) = Entropy::new(limits(&mut input), 1);
    let mut guest = new_guest(kind, Box::new(device));
    let mut driver = Some(guest.start(BASE, SIZE, true));
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 16 {
            0 => guest.worker.advance(u64::from(input.u32())),
            1 => control.update(limits(&mut input), guest.worker.now()),
            2 => {
                let mut state = guest.save();
                let own: EntropyState = state.common().device.decode().expect("the state is this device's");
                let worker = TestWorker::new();
                let device;
                (device, control) = Entropy::restore(&own, worker.now());
                let mut copy = Guest::with(kind, Box::new(device), guest.ram.clone(), worker);
                copy.restore(&state).expect("a saved state can be restored");
                guest = copy;
            }
            act => common_act(act, &mut input, &mut guest, &mut driver),
        }
        guest.worker.run();
    }
    control.update(RateLimiterUpdate { bandwidth: Some(NO_LIMIT), ops: Some(NO_LIMIT) }, guest.worker.now());
    still_whole(&mut guest);
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio::fuzz::seeded;

    #[test]
    fn random_guests_do_not_break_the_entropy_device() {
        seeded(device, 1_000);
    }
}
