//! What holds requests back: rate limits, and the bounds of what is in flight.

use super::guest::*;
use super::rig::*;
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};

const MS: u64 = 1_000_000;

#[test]
fn rate_limit_throttles_until_the_timer_expires() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let ops = BucketConfig { size: 2, refill_time_ms: 100, one_time_burst: 0 };
    let limits = RateLimiterConfig { bandwidth: None, ops: Some(ops) };
    let mut guest = Guest::with(&options, config(1, 1), limits, Blocking::Allowed, u64::MAX);
    assert_eq!(guest.worker.next_timer(), None);
    for sector in 0..5 {
        guest.submit(0, IN, sector, &[], 512);
    }
    guest.kick(0);
    guest.wait(0, 2);
    assert_eq!(guest.worker.next_timer(), Some(guest.worker.now() + 50 * MS));
    let stats = std::sync::Arc::clone(guest.control.stats());
    assert_eq!((stats.rate_limiter_throttled_events.get(), stats.remaining_reqs_count.get()), (1, 3));
    assert_eq!(stats.no_avail_buffer.get(), 0);
    guest.worker.advance(49 * MS);
    assert_eq!(guest.drivers[0].out(), 3);
    guest.worker.advance(MS);
    guest.wait(0, 1);
    // Without limits they complete at once, and the timer is cleared.
    let none = BucketConfig { size: 0, refill_time_ms: 0, one_time_burst: 0 };
    guest.control.update_limits(RateLimiterConfig { bandwidth: None, ops: Some(none) }, guest.worker.now());
    guest.wait(0, 2);
    assert_eq!(guest.worker.next_timer(), None);
    guest.kick_for_nothing(0);
    guest.worker.run();
    assert_eq!(stats.no_avail_buffer.get(), 1, "the queue is empty");
}

/// The limiter serves both queues, although each of them could use all of it.
#[test]
fn rate_limit_is_shared_by_full_queues() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let ops = BucketConfig { size: 10, refill_time_ms: 1000, one_time_burst: 0 };
    let limits = RateLimiterConfig { bandwidth: None, ops: Some(ops) };
    let mut guest = Guest::with(&options, config(2, 1), limits, Blocking::Allowed, u64::MAX);
    for queue in 0..2 {
        for _ in 0..20 {
            guest.submit(queue, IN, 0, &[], 512);
        }
        guest.kick(queue);
    }
    guest.worker.run();
    for _ in 0..10 {
        guest.worker.advance(100 * MS);
    }
    let completed = [0, 1].map(|queue: usize| guest.drivers[queue].used_idx());
    assert_eq!(completed, [10, 10]);
}

/// All requests in flight must complete before the guest is paused, so they are bounded.
#[test]
fn bytes_in_flight_are_bounded() {
    const BYTES: u32 = 8 << 20;
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Sync);
    std::fs::File::options().append(true).open(&options.path).unwrap().set_len(u64::from(BYTES)).unwrap();
    let mut guest = Guest::new(&options);
    // One buffer for all of them; a guest may read to one place twice.
    let (header, data, status) = (1 << 20, 2 << 20, (1 << 20) + 64);
    for _ in 0..20 {
        guest.drivers[0]
            .add(&[(header, 16)], &[(data, BYTES), (status, 1)])
            .expect("the queue has free descriptors");
    }
    guest.kick(0);
    let mut completed = 0;
    while completed < 20 {
        guest.worker.run();
        let (taken, used) = guest.positions[0].get();
        assert!(u32::from(taken - used) * BYTES <= 64 << 20, "{} at once", taken - used);
        completed += guest.wait(0, 1).len();
    }
}

#[test]
fn request_larger_than_the_in_flight_bound_fails() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    std::fs::File::options().append(true).open(&options.path).unwrap().set_len(1 << 30).unwrap();
    let mut guest = Guest::new(&options);
    let read = |guest: &mut Guest, bytes: u32| {
        let buffers: Vec<_> =
            (0..bytes / (8 << 20)).map(|_| (2 << 20, 8 << 20)).chain([(1 << 19, 1)]).collect();
        guest.drivers[0].add(&[(1 << 20, 16)], &buffers).expect("the queue has free descriptors");
        guest.kick(0);
        guest.wait(0, 1);
        guest.ram.memory().read_obj::<u8>(GuestAddress(1 << 19)).unwrap()
    };
    assert_eq!(read(&mut guest, 64 << 20), 0);
    assert_eq!(read(&mut guest, 72 << 20), 1);
    let sectors = (4 << 20) / 512;
    assert_eq!(guest.one(WRITE_ZEROES, 0, &ranges(&[(0, sectors, 0); 16]), 0).status, 0);
    assert_eq!(guest.one(WRITE_ZEROES, 0, &ranges(&[(0, sectors + 1, 0)]), 0).status, 1);
    assert_eq!(guest.one(DISCARD, 0, &ranges(&[(0, sectors + 1, 0)]), 0).status, 0);
}

#[test]
fn bandwidth_limit_counts_reads_writes_and_write_zeroes() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let bandwidth = BucketConfig { size: 4096, refill_time_ms: 1000, one_time_burst: 1024 };
    let limits = RateLimiterConfig { bandwidth: Some(bandwidth), ops: None };
    let mut guest = Guest::with(&options, config(1, 1), limits, Blocking::Allowed, u64::MAX);
    assert_eq!(guest.one(FLUSH, 0, &[], 0).status, 0);
    assert_eq!(guest.one(GET_ID, 0, &[], 512).status, 0);
    assert_eq!(guest.one(DISCARD, 0, &ranges(&[(0, 64, 0)]), 0).status, 0);
    assert_eq!(guest.write(0, &[1; 512]), 0);
    assert_eq!(guest.one(WRITE_ZEROES, 0, &ranges(&[(8, 1, 0)]), 0).status, 0);
    assert_eq!(guest.read(0, 8).0, 0);
    guest.submit(0, IN, 0, &[], 512);
    guest.kick(0);
    guest.worker.run();
    assert_eq!(guest.worker.next_timer(), Some(guest.worker.now() + 125 * MS));
}
