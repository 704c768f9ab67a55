//! Tests of the device through a driver, on both transports.

use vm_memory::{Bytes, GuestAddress};

use crate::{Entropy, EntropyControl, EntropyState, MAX_REQUEST};
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::testing::{DriverQueue, Guest, Kind, RUNNING};
use virtio::transport::Status;
use virtio::worker::Nanos;

const DATA: u64 = 0x10_0000;
const MS: Nanos = 1_000_000;

fn guest(kind: Kind, limits: RateLimiterConfig) -> (Guest, DriverQueue, EntropyControl) {
    let (device, control) = Entropy::new(limits, 1);
    let mut guest = Guest::new(kind, Box::new(device));
    let driver = guest.start(0x1000, 256, true);
    (guest, driver, control)
}

fn request(guest: &mut Guest, driver: &mut DriverQueue, buffers: &[(u64, u32)]) {
    driver.add(&[], buffers).unwrap();
    if driver.publish() {
        guest.kick(0);
    }
}

fn bandwidth(size: u64, refill_time_ms: u64) -> RateLimiterConfig {
    let bucket = BucketConfig { size, refill_time_ms, one_time_burst: 0 };
    RateLimiterConfig { bandwidth: Some(bucket), ops: None }
}

#[test]
fn buffers_get_random_bytes_and_nothing_else_is_written() {
    for kind in [Kind::Mmio, Kind::Pci] {
        let (mut guest, mut driver, _) = guest(kind, RateLimiterConfig::default());
        request(&mut guest, &mut driver, &[(DATA, 64), (DATA + 0x1000, 5000)]);
        assert_eq!(driver.take_used().unwrap().written, 5064);
        let mut bytes = vec![0; 0x1000 + 5008];
        guest.ram.memory().read_slice(&mut bytes, GuestAddress(DATA)).unwrap();
        let (first, gap) = bytes[..0x1000].split_at(64);
        let (second, after) = bytes[0x1000..].split_at(5000);
        assert!(gap.iter().chain(after).all(|&byte| byte == 0));
        // 5000 random bytes lack one of the 256 values with a probability of about 1e-6, and this
        // test allows five missing values.
        let distinct = second.iter().collect::<std::collections::BTreeSet<_>>().len();
        assert!(distinct > 250 && first.iter().any(|byte| *byte != first[0]));
        request(&mut guest, &mut driver, &[(DATA + 0x4000, 64)]);
        let mut again = [0; 64];
        guest.ram.memory().read_slice(&mut again, GuestAddress(DATA + 0x4000)).unwrap();
        assert_ne!(first, again);
    }
}

#[test]
fn request_gets_at_most_64_kib_and_an_empty_one_nothing() {
    let (mut guest, mut driver, _) = guest(Kind::Mmio, RateLimiterConfig::default());
    request(&mut guest, &mut driver, &[(DATA, 40 << 10), (DATA, 40 << 10)]);
    assert_eq!(driver.take_used().unwrap().written, MAX_REQUEST);
    driver.add(&[(DATA, 16)], &[]).unwrap();
    request(&mut guest, &mut driver, &[(DATA, 0)]);
    assert_eq!(driver.take_used().unwrap().written, 0);
    assert_eq!(driver.take_used().unwrap().written, 0);
    assert_eq!(guest.status(), RUNNING);
}

#[test]
fn many_large_requests_are_all_served() {
    let (mut guest, mut driver, _) = guest(Kind::Pci, RateLimiterConfig::default());
    for _ in 0..256 {
        driver.add(&[], &[(DATA, MAX_REQUEST)]).unwrap();
    }
    assert!(driver.publish());
    guest.kick(0);
    assert_eq!(std::iter::from_fn(|| driver.take_used()).count(), 256);
}

#[test]
fn rate_limiter_delays_requests_until_its_timer() {
    let (mut guest, mut driver, control) = guest(Kind::Mmio, bandwidth(1000, 100));
    assert_eq!(guest.worker.next_timer(), None);
    for _ in 0..3 {
        driver.add(&[], &[(DATA, 1000)]).unwrap();
    }
    driver.publish();
    guest.kick(0);
    assert!(driver.take_used().is_some());
    assert!(driver.take_used().is_none());
    assert_eq!(guest.worker.next_timer(), Some(guest.worker.now() + 100 * MS));
    guest.worker.advance(99 * MS);
    assert!(driver.take_used().is_none());
    guest.worker.advance(MS);
    assert!(driver.take_used().is_some() && driver.take_used().is_none());
    guest.worker.advance(100 * MS);
    assert!(driver.take_used().is_some());
    assert_eq!(guest.worker.next_timer(), None, "no request is delayed");
    let stats = control.stats();
    assert_eq!((stats.entropy_event_count.get(), stats.entropy_bytes.get()), (3, 3000));
    assert_eq!(stats.entropy_rate_limiter_throttled.get(), 2);
    assert_eq!(stats.rate_limiter_event_count.get(), 2);
}

#[test]
fn new_limits_apply_at_once_to_delayed_requests() {
    let (mut guest, mut driver, control) = guest(Kind::Mmio, bandwidth(10, 1_000_000));
    assert_eq!(control.limits(), bandwidth(10, 1_000_000));
    for _ in 0..2 {
        request(&mut guest, &mut driver, &[(DATA, 10)]);
    }
    assert!(driver.take_used().is_some() && driver.take_used().is_none());
    control.update(bandwidth(0, 0), guest.worker.now());
    guest.worker.run();
    assert!(driver.take_used().is_some());
}

#[test]
fn reset_drops_a_delayed_request_and_keeps_the_limits() {
    let (mut guest, mut driver, control) = guest(Kind::Pci, bandwidth(10, 1_000));
    for _ in 0..2 {
        request(&mut guest, &mut driver, &[(DATA, 10)]);
    }
    guest.reset();
    assert_eq!(guest.worker.next_timer(), None);
    let mut driver = guest.start(0x1000, 256, true);
    request(&mut guest, &mut driver, &[(DATA, 10)]);
    assert!(driver.take_used().is_none(), "the bucket is still empty");
    assert_eq!(control.limits(), bandwidth(10, 1_000));
    guest.worker.advance(1_000 * MS);
    assert!(driver.take_used().is_some());
}

#[test]
fn restored_device_delays_by_the_remaining_time() {
    let (mut guest, mut driver, _) = guest(Kind::Mmio, bandwidth(10, 1_000));
    for _ in 0..2 {
        request(&mut guest, &mut driver, &[(DATA, 10)]);
    }
    driver.take_used().unwrap();
    guest.worker.advance(400 * MS);
    let mut state = guest.save();
    let own: EntropyState = state.common().device.decode().expect("the state is this device's");
    assert_eq!(own.limiter.bandwidth.unwrap().tokens, 4);
    let worker = virtio::testing::TestWorker::new();
    let (device, _) = Entropy::restore(&own, worker.now());
    let mut copy = Guest::with(Kind::Mmio, Box::new(device), guest.ram.clone(), worker);
    copy.restore(&state).unwrap();
    assert!(driver.take_used().is_none());
    copy.worker.advance(599 * MS);
    assert!(driver.take_used().is_none());
    copy.worker.advance(MS);
    assert!(driver.take_used().is_some());
}

#[test]
fn broken_queue_sets_device_needs_reset() {
    let (mut guest, driver, control) = guest(Kind::Mmio, RateLimiterConfig::default());
    driver.set_descriptor(0, u64::MAX - 5, 10, 2, 0);
    driver.set_avail_entry(0, 0);
    driver.set_avail_idx(1);
    guest.kick(0);
    assert_eq!(guest.status(), RUNNING | Status::DEVICE_NEEDS_RESET);
    guest.kick(0);
    assert_eq!(guest.broken_count(), 1);
    let stats = control.stats();
    assert_eq!((stats.entropy_event_fails.get(), stats.host_rng_fails.get()), (1, 0));
}
