//! The device as its driver sees it.

use std::time::Duration;

use super::guest::*;
use super::rig::*;
use crate::{Block, BlockConfig, BlockError, BlockState};
use virtio::device::Device;
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::testing::{self, Kind, TestWorker};

fn capacity(block: &Block) -> u64 {
    let mut bytes = [0; 8];
    block.read_config(0, &mut bytes);
    u64::from_le_bytes(bytes)
}

#[test]
fn driver_reads_writes_and_gets_the_serial_number() {
    for engine in ENGINES {
        for blocking in [Blocking::Never, Blocking::Allowed] {
            let dir = tempfile::tempdir().unwrap();
            let (options, content) = disk(dir.path(), 64, engine);
            let mut guest =
                Guest::with(&options, config(1, 1), RateLimiterConfig::default(), blocking, u64::MAX);
            assert_eq!(capacity(&guest.block), 64);
            assert_eq!(guest.read(1, 3), (0, content[512..2048].to_vec()));
            assert_eq!(guest.write(2, &[9; 1024]), 0);
            assert_eq!(guest.read(2, 2), (0, vec![9; 1024]));
            assert_eq!(guest.one(FLUSH, 0, &[], 0).status, 0);
            let id = guest.one(GET_ID, 0, &[], 20);
            assert_eq!((id.status, &id.data[..]), (0, &b"disk_1\0\0\0\0\0\0\0\0\0\0\0\0\0\0"[..]));
            let stats = guest.control.stats();
            assert_eq!((stats.read_count.get(), stats.read_bytes.get()), (2, 5 * 512));
            assert_eq!((stats.write_count.get(), stats.write_bytes.get()), (1, 1024));
            assert_eq!(stats.flush_count.get(), 1);
            assert_eq!(guest.interrupt.take_queue(0), 5);
            drop(guest);
            assert_eq!(std::fs::read(&options.path).unwrap()[1024..2048], [9; 1024]);
        }
    }
}

#[test]
fn only_disk_reads_mark_the_pages_of_their_data_dirty() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (options, _) = disk(dir.path(), 64, engine);
        let mut guest = Guest::new(&options);
        // The second page of the data has neither the request's header nor its status.
        let page = (ARENA >> 12) + 1;
        for (kind, data, read_len) in [(IN, &[][..], 8192), (OUT, &[9; 8192], 0)] {
            let submitted = guest.submit(0, kind, 0, data, read_len);
            guest.ram.reset_monitor_dirty_pages();
            guest.kick(0);
            let used = guest.wait(0, 1)[0];
            assert_eq!(guest.response(&submitted, used).status, 0);
            guest.forget();
            let dirty = guest.ram.take_monitor_dirty_pages().unwrap();
            assert_eq!(dirty.runs(0).flatten().any(|dirty| dirty == page), kind == IN, "{engine:?}");
        }
    }
}

#[test]
fn reads_past_the_sector_size_return_zeros() {
    for kind in [Kind::Mmio, Kind::Pci] {
        let dir = tempfile::tempdir().unwrap();
        let (options, _) = disk(dir.path(), 64, IoEngine::Async);
        let disk = Disk::open(&options).unwrap();
        let (block, _) = Block::new(config(1, 1), disk, RateLimiterConfig::default(), vec![], 0).unwrap();
        let mut guest = testing::Guest::new(kind, Box::new(block));
        let read = |guest: &mut testing::Guest| {
            let mut sector_size = [0; 8];
            guest.read_config(20, &mut sector_size);
            u64::from_le_bytes(sector_size)
        };
        assert_eq!(read(&mut guest), 512, "Unikraft's driver");
        guest.negotiate_without(1 << 10);
        assert_eq!(read(&mut guest), 512, "one that does not accept the topology");
        guest.negotiate_without(0);
        assert_eq!(read(&mut guest), 512 | 0x0001_0003 << 32, "Linux learns of 4 KiB blocks");
        guest.negotiate_without(1 << 6 | 1 << 10);
        assert_eq!(read(&mut guest), 0);
    }
}

#[test]
fn offered_features_follow_from_the_drive() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let features = |options: &DiskOptions, queues| {
        let disk = Disk::open(options).unwrap();
        let limits = RateLimiterConfig::default();
        Block::new(config(queues, 1), disk, limits, vec![], 0).unwrap().0.features()
    };
    let bit = |features: u64, bit: u32| features >> bit & 1 == 1;
    let plain = features(&DiskOptions { cache_type: CacheType::Unsafe, ..options.clone() }, 1);
    assert!(!bit(plain, 5) && !bit(plain, 9) && !bit(plain, 12) && bit(plain, 13) && bit(plain, 14));
    let rich = features(&options, 4);
    assert!(bit(rich, 9) && bit(rich, 12));
    let read_only = features(&DiskOptions { read_only: true, ..options }, 1);
    assert!(bit(read_only, 5) && !bit(read_only, 13) && !bit(read_only, 14));
}

#[test]
fn malformed_requests_fail_and_change_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (options, content) = disk(dir.path(), 64, IoEngine::Async);
    let mut guest = Guest::new(&options);
    let (ok, ioerr, unsupp) = (0, 1, 2);
    // Past the end, in every way.
    for sector in [64, 63, u64::MAX, u64::MAX / 512, u64::MAX / 512 + 1] {
        assert_eq!(guest.read(sector, 2).0, ioerr, "sector {sector}");
        assert_eq!(guest.write(sector, &[1; 1024]), ioerr, "sector {sector}");
    }
    // Not whole sectors, or none.
    assert_eq!(guest.one(IN, 0, &[], 513).status, ioerr);
    assert_eq!(guest.one(IN, 0, &[], 0).status, ioerr);
    assert_eq!(guest.one(OUT, 0, &[1; 511], 0).status, ioerr);
    assert_eq!(guest.one(OUT, 0, &[], 0).status, ioerr);
    // Unknown types.
    for kind in [2, 3, 5, 6, 7, 9, 10, 12, 14, 16, u32::MAX] {
        assert_eq!(guest.one(kind, 0, &[], 512).status, unsupp, "type {kind}");
    }
    assert_eq!(guest.one(GET_ID, 0, &[], 19).status, ioerr);
    // Ranges.
    for kind in [DISCARD, WRITE_ZEROES] {
        let mut status = |payload: &[u8]| guest.one(kind, 0, payload, 0).status;
        assert_eq!(status(&[]), ioerr);
        assert_eq!(status(&[0; 15]), ioerr);
        assert_eq!(status(&ranges(&[(0, 1, 0); 17])), ioerr);
        assert_eq!(status(&ranges(&[(64, 1, 0)])), ioerr);
        assert_eq!(status(&ranges(&[(1, 64, 0)])), ioerr);
        assert_eq!(status(&ranges(&[(u64::MAX, u32::MAX, 0)])), ioerr);
        assert_eq!(status(&ranges(&[(0, (1 << 21) + 1, 0)])), ioerr);
        assert_eq!(status(&ranges(&[(0, 1, 2)])), unsupp);
        assert_eq!(status(&ranges(&[(0, 1, 0), (0, 1, 1 << 31)])), unsupp);
        assert_eq!(status(&ranges(&[(0, 0, 0)])), ok);
    }
    assert_eq!(guest.one(DISCARD, 0, &ranges(&[(0, 1, 1)]), 0).status, unsupp);
    assert_eq!(guest.read(0, 64), (ok, content));
    assert!(guest.control.stats().invalid_reqs_count.get() > 30);
    assert!(guest.interrupt.broken().is_empty());
}

#[test]
fn chain_without_a_status_byte_is_returned_unused() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let mut guest = Guest::new(&options);
    let head = guest.drivers[0].add(&[(1 << 20, 16)], &[]).unwrap();
    guest.kick(0);
    let used = guest.wait(0, 1)[0];
    assert_eq!((used.head, used.written), (head, 0));
    // The header is too short, but there is a status byte.
    guest.drivers[0].add(&[(1 << 20, 15)], &[(2 << 20, 1)]).unwrap();
    guest.kick(0);
    guest.wait(0, 1);
    assert_eq!(guest.read(0, 1).0, 0);
}

#[test]
fn request_with_too_many_buffers_fails() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let mut guest = Guest::new(&options);
    for (count, status) in [(256, 0), (257, 1)] {
        let header = (1 << 20, 16);
        guest.ram.memory().write_slice(&[0; 16], GuestAddress(header.0)).unwrap();
        let mut writable: Vec<_> = (0..count - 1).map(|index| ((2 << 20) + index * 8, 2)).collect();
        writable.push((3 << 20, 1024 - 2 * (count as u32 - 1)));
        writable.push((4 << 20, 1));
        guest.drivers[0].add_indirect(5 << 20, &[header], &writable).unwrap();
        guest.kick(0);
        guest.wait(0, 1);
        assert_eq!(guest.ram.memory().read_obj::<u8>(GuestAddress(4 << 20)).unwrap(), status);
    }
}

#[test]
fn read_only_disk_refuses_writes() {
    let dir = tempfile::tempdir().unwrap();
    let (options, content) = disk(dir.path(), 64, IoEngine::Async);
    let mut guest = Guest::new(&DiskOptions { read_only: true, ..options });
    assert_eq!(guest.write(0, &[1; 512]), 1);
    assert_eq!(guest.one(DISCARD, 0, &ranges(&[(0, 1, 0)]), 0).status, 1);
    assert_eq!(guest.one(WRITE_ZEROES, 0, &ranges(&[(0, 1, 0)]), 0).status, 1);
    assert_eq!(guest.one(FLUSH, 0, &[], 0).status, 0);
    assert_eq!(guest.read(0, 64), (0, content));
}

#[test]
fn one_request_zeroes_several_ranges() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (options, mut content) = disk(dir.path(), 64, engine);
        let mut guest = Guest::new(&options);
        assert_eq!(guest.one(WRITE_ZEROES, 0, &ranges(&[(1, 2, 0), (9, 1, 1), (63, 1, 0)]), 0).status, 0);
        assert_eq!(guest.one(DISCARD, 0, &ranges(&[(16, 8, 0), (32, 8, 0)]), 0).status, 0);
        for (sector, count) in [(1, 2), (9, 1), (63, 1), (16, 8), (32, 8)] {
            content[sector * 512..(sector + count) * 512].fill(0);
        }
        assert_eq!(guest.read(0, 64), (0, content));
        assert_eq!(guest.control.stats().discard_count.get(), 2);
    }
}

#[test]
fn driver_without_flush_gets_durable_writes() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (options, _) = disk(dir.path(), 64, engine);
        let without_flush = !(1 << 9);
        let limits = RateLimiterConfig::default();
        let mut guest = Guest::with(&options, config(1, 1), limits, Blocking::Never, without_flush);
        assert_eq!(guest.write(0, &[1; 512]), 0);
        let stats = guest.control.stats();
        assert_eq!((stats.write_count.get(), stats.flush_count.get()), (1, 0));
        assert_eq!(guest.read(0, 1), (0, vec![1; 512]));
    }
}

#[test]
fn failing_disk_returns_errors_and_serves_the_rest() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (options, content) = disk(dir.path(), 64, engine);
        let mut guest = Guest::new(&options);
        std::fs::File::options().write(true).open(&options.path).unwrap().set_len(512 * 10).unwrap();
        assert_eq!(guest.read(20, 1).0, 1);
        assert_eq!(guest.read(9, 2).0, 1);
        assert_eq!(guest.read(0, 10), (0, content[..5120].to_vec()));
        assert_eq!(guest.control.stats().execute_fails.get(), 2);
    }
}

#[test]
fn queues_are_dealt_to_one_task_per_io_thread() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (options, _) = disk(dir.path(), 4096, engine);
        let limits = RateLimiterConfig::default();
        let mut guest = Guest::with(&options, config(5, 2), limits, Blocking::Never, u64::MAX);
        for round in 0..4u8 {
            let mut submitted = Vec::new();
            for queue in 0..5 {
                for slot in 0..8u64 {
                    let sector = queue as u64 * 512 + slot * 8;
                    submitted.push(guest.submit(queue, OUT, sector, &[round + queue as u8 * 10; 4096], 0));
                }
                guest.kick(queue);
            }
            for queue in 0..5 {
                guest.wait(queue, 8);
                assert!(guest.interrupt.take_queue(queue as u16) > 0);
            }
            guest.forget();
        }
        for queue in 0..5u8 {
            assert_eq!(guest.read(u64::from(queue) * 512, 64), (0, vec![3 + queue * 10; 64 * 512]));
        }
    }
}

#[test]
fn pause_drains_requests_and_takes_no_new_ones() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (options, content) = disk(dir.path(), 4096, engine);
        let mut guest = Guest::new(&options);
        for slot in 0..16 {
            guest.submit(0, IN, slot * 8, &[], 4096);
        }
        guest.kick(0);
        let paused = guest.worker.pause();
        guest.worker.run_until(|| paused.try_recv().is_ok());
        let before = std::iter::from_fn(|| guest.drivers[0].take_used()).count();
        assert_eq!(guest.control.stats().read_count.get(), before as u64);
        let late = guest.submit(0, IN, 100, &[], 512);
        guest.kick(0);
        guest.worker.run();
        assert!(guest.drivers[0].take_used().is_none());
        guest.worker.resume();
        let rest = guest.wait(0, 17 - before);
        let used = rest.into_iter().find(|used| used.head == late.head).unwrap();
        assert_eq!(guest.response(&late, used).data, content[51200..51712]);
    }
}

#[test]
fn reset_during_io_drains_and_restarts_the_device() {
    for engine in ENGINES {
        for with_overlay in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let (plain, content) = disk(dir.path(), 4096, engine);
            let options = if with_overlay {
                overlaid(&plain.path, dir.path().join("top"), vec![], engine)
            } else {
                plain
            };
            let mut guest = Guest::new(&options);
            for round in 0..20u64 {
                for slot in 0..16 {
                    guest.submit(0, OUT, slot * 8, &[round as u8; 4096], 0);
                }
                guest.kick(0);
                let tasks = guest.begin_reset();
                guest.end_reset(tasks);
                // All requests that were taken have completed.
                let completed = u64::from(guest.drivers[0].used_idx());
                assert!(guest.control.stats().write_count.get() >= completed);
                guest.activate();
            }
            assert_eq!(guest.read(2048, 8), (0, content[2048 * 512..2056 * 512].to_vec()));
            let (status, data) = guest.read(0, 16 * 8);
            assert_eq!(status, 0);
            for sector in data.chunks(512) {
                assert!(sector.iter().all(|&byte| byte == sector[0]) || sector[1] != sector[0]);
            }
        }
    }
}

#[test]
fn driver_error_stops_the_device_until_it_is_reset() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (options, content) = disk(dir.path(), 64, engine);
        let mut guest = Guest::new(&options);
        for slot in 0..8 {
            guest.submit(0, IN, slot, &[], 512);
        }
        // A buffer outside guest memory, after good requests.
        guest.drivers[0].add(&[(1 << 20, 16)], &[(u64::MAX - 10, 512)]).unwrap();
        guest.kick(0);
        guest.worker.run();
        assert_eq!(guest.interrupt.broken().len(), 1);
        guest.submit(0, IN, 0, &[], 512);
        guest.kick(0);
        guest.worker.run();
        let tasks = guest.begin_reset();
        guest.end_reset(tasks);
        guest.activate();
        assert_eq!(guest.read(3, 1), (0, content[3 * 512..4 * 512].to_vec()));
        assert_eq!(guest.interrupt.broken().len(), 1);
    }
}

#[test]
fn disk_swap_takes_effect_at_once_and_frees_the_old_disk() {
    for engine in ENGINES {
        let dir = tempfile::tempdir().unwrap();
        let (options, _) = disk(dir.path(), 64, engine);
        let other = dir.path().join("other");
        std::fs::write(&other, pattern(0x11, 0, 128 * 512)).unwrap();
        let limits = RateLimiterConfig::default();
        let mut guest = Guest::with(&options, config(2, 2), limits, Blocking::Never, u64::MAX);
        let generation = guest.block.config_generation();
        for slot in 0..16 {
            guest.submit(0, OUT, slot, &[5; 512], 0);
            guest.submit(1, OUT, 16 + slot, &[6; 512], 0);
        }
        guest.kick(0);
        guest.kick(1);
        let new = Disk::open(&DiskOptions { path: other.clone(), ..options.clone() }).unwrap();
        let mut replaced = guest.control.replace(new).unwrap();
        assert_eq!(capacity(&guest.block), 128);
        assert_ne!(guest.block.config_generation(), generation);
        assert_eq!(guest.interrupt.configs(), 1);
        let submitted = guest.submit(0, IN, 127, &[], 512);
        guest.kick(0);
        guest.wait(1, 16);
        let used = guest.wait(0, 17);
        let used = used.into_iter().find(|used| used.head == submitted.head).unwrap();
        let response = guest.response(&submitted, used);
        assert_eq!((response.status, response.data), (0, pattern(0x11, 127 * 512, 512)));
        replaced.wait(Duration::ZERO).unwrap();
        // Each write is complete on one of the two disks.
        let (old, new) = (std::fs::read(&options.path).unwrap(), std::fs::read(&other).unwrap());
        for slot in 0..32 {
            let place = slot * 512..(slot + 1) * 512;
            let expected = if slot < 16 { [5; 512] } else { [6; 512] };
            assert!(old[place.clone()] == expected || new[place] == expected, "slot {slot}");
        }
    }
}

/// The engines may differ: `io_uring` can become unavailable after the guest has started.
#[test]
fn disk_swap_allows_any_engine_that_fits_the_worker() {
    for (from, blocking) in [
        (IoEngine::Async, Blocking::Never),
        (IoEngine::Async, Blocking::Allowed),
        (IoEngine::Sync, Blocking::Allowed),
    ] {
        for to in ENGINES {
            let dir = tempfile::tempdir().unwrap();
            let (options, content) = disk(dir.path(), 64, from);
            let limits = RateLimiterConfig::default();
            let mut guest = Guest::with(&options, config(1, 1), limits, blocking, u64::MAX);
            let other = dir.path().join("other");
            std::fs::write(&other, pattern(0x11, 0, 64 * 512)).unwrap();
            for slot in 0..16 {
                guest.submit(0, OUT, slot, &[5; 512], 0);
            }
            guest.kick(0);
            let new = Disk::open(&DiskOptions { path: other, engine: Some(to), ..options.clone() }).unwrap();
            let swapped = guest.control.replace(new);
            guest.wait(0, 16);
            let read = guest.read(32, 2);
            if blocking == Blocking::Never && to == IoEngine::Sync {
                // A blocking engine would block the devices that share the worker.
                let error = swapped.unwrap_err().to_string();
                assert!(error.starts_with("drive disk_1: io_engine Sync blocks"), "{error}");
                assert_eq!(read, (0, content[32 * 512..34 * 512].to_vec()));
                assert_eq!(guest.control.stats().update_count.get(), 0);
            } else {
                swapped.unwrap().wait(Duration::ZERO).unwrap();
                assert_eq!(read, (0, pattern(0x11, 32 * 512, 1024)), "{from:?} {blocking:?} to {to:?}");
            }
        }
    }
}

#[test]
fn disk_swap_works_while_inactive_or_paused() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let mut guest = Guest::new(&DiskOptions { cache_type: CacheType::Unsafe, ..options.clone() });
    let other = |name: &str, sectors: u64| {
        let path = dir.path().join(name);
        std::fs::write(&path, pattern(sectors as u8, 0, sectors * 512)).unwrap();
        Disk::open(&DiskOptions { path, cache_type: CacheType::Unsafe, ..options.clone() }).unwrap()
    };
    let tasks = guest.begin_reset();
    guest.end_reset(tasks);
    guest.control.replace(other("b", 10)).unwrap().wait(Duration::ZERO).unwrap();
    guest.activate();
    assert_eq!(guest.read(9, 1), (0, pattern(10, 9 * 512, 512)));
    assert_eq!(guest.read(10, 1).0, 1);

    let paused = guest.worker.pause();
    guest.worker.run_until(|| paused.try_recv().is_ok());
    // Twice: the first of them is never used.
    let mut first = guest.control.replace(other("c", 11)).unwrap();
    let mut second = guest.control.replace(other("d", 12)).unwrap();
    first.wait(Duration::ZERO).unwrap();
    guest.worker.resume();
    second.wait(Duration::ZERO).unwrap();
    assert_eq!(guest.read(11, 1), (0, pattern(12, 11 * 512, 512)));

    // A disk of size 0, as of a drive without a disk.
    let mut empty = guest.control.replace(other("e", 0)).unwrap();
    guest.worker.run();
    empty.wait(Duration::ZERO).unwrap();
    assert_eq!(capacity(&guest.block), 0);
    assert_eq!(guest.read(0, 1).0, 1);
    assert_eq!(guest.control.stats().update_count.get(), 4);
}

#[test]
fn disk_swap_refuses_a_disk_that_does_not_fit_the_driver() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let guest = Guest::new(&options);
    for other in [
        DiskOptions { read_only: true, ..options.clone() },
        DiskOptions { cache_type: CacheType::Unsafe, ..options.clone() },
    ] {
        let error = guest.control.replace(Disk::open(&other).unwrap()).unwrap_err();
        assert!(matches!(error, BlockError::Differs { .. }), "{error}");
    }
    let overlay =
        Disk::open(&overlaid(&options.path, dir.path().join("top"), vec![], IoEngine::Sync)).unwrap();
    let error = Block::new(config(2, 2), overlay, RateLimiterConfig::default(), vec![], 0).unwrap_err();
    assert!(matches!(error, BlockError::OverlayThreads { threads: 2, .. }), "{error}");
}

#[test]
fn restored_device_continues_where_it_was_saved() {
    let dir = tempfile::tempdir().unwrap();
    let (options, content) = disk(dir.path(), 64, IoEngine::Async);
    let ops = BucketConfig { size: 5, refill_time_ms: 1000, one_time_burst: 0 };
    let limits = RateLimiterConfig { bandwidth: None, ops: Some(ops) };
    let mut guest = Guest::with(&options, config(2, 1), limits, Blocking::Never, u64::MAX);
    assert_eq!(guest.read(0, 1).0, 0);
    assert_eq!(guest.read(0, 1).0, 0);
    let paused = guest.worker.pause();
    guest.worker.run_until(|| paused.try_recv().is_ok());
    let state: BlockState = guest.block.save().decode().expect("the state is this device's");
    let json = serde_json::to_string(&state).unwrap();
    let (features, generation) = (guest.block.features(), guest.block.config_generation());
    drop(guest);

    // On another host, with a disk that has grown.
    let state = serde_json::from_str(&json).unwrap();
    std::fs::File::options().append(true).open(&options.path).unwrap().set_len(100 * 512).unwrap();
    let worker = TestWorker::new();
    let (block, control) =
        Block::restore(&state, Disk::open(&options).unwrap(), vec![], worker.now()).unwrap();
    assert_eq!(block.features(), features);
    assert_ne!(block.config_generation(), generation);
    let mut guest = Guest::around(block, control, worker, u64::MAX);
    assert_eq!(guest.interrupt.configs(), 1, "the guest is notified of the new size");
    assert_eq!(guest.read(1, 2), (0, content[512..1536].to_vec()));
    assert_eq!(guest.read(99, 1), (0, vec![0; 512]));
    assert_eq!(guest.read(0, 1).0, 0);
    guest.submit(0, IN, 0, &[], 512);
    guest.kick(0);
    guest.worker.run();
    assert!(guest.worker.next_timer().is_some(), "the limiter remembers what was used up");

    let read_only = Disk::open(&DiskOptions { read_only: true, ..options }).unwrap();
    assert!(matches!(Block::restore(&state, read_only, vec![], 0), Err(BlockError::Differs { .. })));
}

#[test]
fn invalid_saved_state_is_refused() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let guest = Guest::new(&options);
    let good: BlockState = guest.block.save().decode().expect("the state is this device's");
    let with = |num_queues, io_threads, queue_size| BlockState {
        config: BlockConfig { num_queues, queue_size, io_threads, ..good.config.clone() },
        ..good.clone()
    };
    for state in [with(0, 0, 64), with(1, 0, 64), with(u16::MAX, u16::MAX, 64), with(1, 1, 1), with(1, 1, 65)]
    {
        let error = Block::restore(&state, Disk::open(&options).unwrap(), vec![], 0).unwrap_err();
        assert!(matches!(error, BlockError::State { .. }), "{error}");
        assert!(error.to_string().contains("disk_1"), "{error}");
    }
}

#[test]
fn config_space_can_be_read_at_any_offset_and_length() {
    let dir = tempfile::tempdir().unwrap();
    let (options, _) = disk(dir.path(), 64, IoEngine::Async);
    let guest = Guest::new(&options);
    let mut whole = [0xaa; 80];
    guest.block.read_config(0, &mut whole);
    assert_eq!(whole[60..], [0; 20]);
    for offset in 0..70 {
        for len in [1usize, 2, 4, 8] {
            let mut part = vec![0xaa; len];
            guest.block.read_config(offset as u64, &mut part);
            assert_eq!(part, whole[offset..offset + len]);
        }
    }
    let mut data = [0xaa; 8];
    guest.block.read_config(u64::MAX - 3, &mut data);
    assert_eq!(data, [0; 8]);
}
