//! The bounds of what a pause or a reset waits for, with slow disks and much data.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::guest::*;
use super::recorder::{Faults, OpLog, RecordingEngine};
use super::rig::*;
use crate::backend_slot::BackendHandle;
use crate::disk::DISCARD_PART;
use crate::disk::backlog::{Backlog, MIN_WINDOW};
use sync::locked;
use virtio::rate_limiter::RateLimiterConfig;

const MIB: u64 = 1 << 20;

/// A guest whose disk stalls and fails as the test wants.
struct Slow {
    guest: Guest,
    backlog: Arc<Backlog>,
    /// One for each I/O thread.
    syncs: Vec<Arc<Faults>>,
    writes: u64,
}

impl Slow {
    fn new(options: &DiskOptions, threads: u16) -> Slow {
        let limits = RateLimiterConfig::default();
        let guest = Guest::with(options, config(threads, threads), limits, Blocking::Never, u64::MAX);
        let disk = guest.control.disk();
        let backlog = Backlog::new(threads.into());
        let mut syncs = Vec::new();
        for (member, slot) in guest.control.slots.iter().enumerate() {
            let recorder = RecordingEngine::new(disk.files(), OpLog::default()).without_record();
            syncs.push(Arc::clone(&recorder.syncs));
            let queue = disk.queue_with(Box::new(recorder)).with_backlog(Arc::clone(&backlog), member);
            drop(slot.post(BackendHandle { queue, size: disk.size() }));
        }
        let mut slow = Slow { guest, backlog, syncs, writes: 0 };
        slow.guest.worker.run();
        slow
    }

    fn stall(&self, stalled: bool) {
        self.syncs.iter().for_each(|one| one.stalled.store(stalled, Ordering::Relaxed));
        // A real engine signals events.
        self.guest.control.slots.iter().for_each(|slot| slot.event.signal());
    }

    fn fail_next_sync(&self) {
        self.syncs.iter().for_each(|one| *locked(&one.error) = Some(Errno::IO));
    }

    /// Adds a write of 4 MiB to `queue`, each to another place. All of them write the same bytes.
    fn submit_write(&mut self, queue: usize) {
        let (header, data, status) = (MIB + self.writes * 128, 2 * MIB, MIB + self.writes * 128 + 64);
        let sector = self.writes * 4 * MIB / SECTOR;
        self.writes += 1;
        let out: Vec<u8> = [&OUT.to_le_bytes()[..], &[0; 4], &sector.to_le_bytes()].concat();
        self.guest.ram.memory().write_slice(&out, GuestAddress(header)).unwrap();
        let added = self.guest.drivers[queue].add(&[(header, 16), (data, 4 << 20)], &[(status, 1)]);
        added.expect("the queue has free descriptors");
    }

    fn kick(&mut self) {
        (0..self.guest.drivers.len()).for_each(|queue| self.guest.kick(queue));
        self.guest.worker.run();
    }
}

/// A disk of `bytes` bytes without data.
fn blank(dir: &Path, bytes: u64) -> DiskOptions {
    let path = dir.join("disk");
    std::fs::File::create(&path).unwrap().set_len(bytes).unwrap();
    raw(&path, IoEngine::Sync)
}

#[test]
fn dirty_bytes_of_all_threads_are_bounded_while_syncs_stall() {
    for threads in [1, 2] {
        let dir = tempfile::tempdir().unwrap();
        let mut slow = Slow::new(&blank(dir.path(), 256 * MIB), threads);
        slow.stall(true);
        for queue in 0..usize::from(threads) {
            (0..20).for_each(|_| slow.submit_write(queue));
        }
        slow.kick();
        let completed: u64 = slow.guest.drivers.iter().map(|driver| u64::from(driver.used_idx())).sum();
        assert_eq!(completed * 4 * MIB, MIN_WINDOW, "of {threads} threads");
        assert!(slow.backlog.total() <= MIN_WINDOW);
        // Everything completes once the disk works again.
        slow.stall(false);
        slow.kick();
        for queue in 0..usize::from(threads) {
            slow.guest.wait(queue, 20);
        }
        assert_eq!(slow.guest.one(FLUSH, 0, &[], 0).status, 0);
        assert_eq!(slow.backlog.total(), 0);
    }
}

#[test]
fn reads_and_flushes_pass_writes_that_wait_for_the_window() {
    let dir = tempfile::tempdir().unwrap();
    let mut slow = Slow::new(&blank(dir.path(), 256 * MIB), 2);
    slow.stall(true);
    (0..20).for_each(|_| slow.submit_write(0));
    slow.kick();
    let read = slow.guest.submit(1, IN, 0, &[], 4096);
    slow.kick();
    let used = slow.guest.wait(1, 1)[0];
    assert_eq!(slow.guest.response(&read, used).status, 0);
    let flush = slow.guest.submit(1, FLUSH, 0, &[], 0);
    slow.kick();
    assert!(slow.guest.drivers[1].take_used().is_none(), "it waits for the disk");
    slow.stall(false);
    slow.kick();
    let used = slow.guest.wait(1, 1)[0];
    assert_eq!(slow.guest.response(&flush, used).status, 0);
    slow.guest.wait(0, 20);
}

#[test]
fn error_of_an_early_sync_fails_the_next_flush() {
    let dir = tempfile::tempdir().unwrap();
    let mut slow = Slow::new(&blank(dir.path(), 256 * MIB), 1);
    slow.fail_next_sync();
    (0..9).for_each(|_| slow.submit_write(0));
    slow.kick();
    slow.guest.wait(0, 9);
    assert!(locked(&slow.syncs[0].error).is_none(), "no flush, but a sync");
    assert_eq!(slow.guest.one(FLUSH, 0, &[], 0).status, 1);
}

/// 16 GiB in one request: the parts that were not started are skipped.
#[test]
fn large_discard_is_cut_short_by_a_pause_or_reset() {
    for reset in [false, true] {
        for with_overlay in [false, true] {
            let dir = tempfile::tempdir().unwrap();
            let plain = blank(dir.path(), 4096 * MIB);
            let options = if with_overlay {
                overlaid(&plain.path, dir.path().join("top"), vec![], IoEngine::Sync)
            } else {
                plain
            };
            let mut slow = Slow::new(&options, 1);
            // The overlay's session has begun.
            assert_eq!(slow.guest.write(0, &[1; 512]), 0);
            slow.stall(true);
            let gib = (1 << 30) / 512;
            let list = ranges(&[(0, gib, 0), (u64::from(gib), gib, 0), (8, gib, 0)]);
            let submitted: Vec<_> = (0..8).map(|_| slow.guest.submit(0, DISCARD, 0, &list, 0)).collect();
            slow.kick();
            assert!(slow.backlog.total() <= MIN_WINDOW, "{} in flight", slow.backlog.total());
            if reset {
                let tasks = slow.guest.begin_reset();
                slow.guest.worker.run();
                slow.stall(false);
                slow.guest.end_reset(tasks);
            } else {
                let paused = slow.guest.worker.pause();
                slow.guest.worker.run();
                slow.stall(false);
                slow.guest.worker.run_until(|| paused.try_recv().is_ok());
                let used = slow.guest.drivers[0].take_used().expect("one has started");
                let submitted =
                    submitted.iter().find(|submitted| submitted.head == used.head).expect("one of them");
                assert_eq!(slow.guest.response(submitted, used).status, 0);
            }
            let holes = locked(&slow.syncs[0].holes);
            assert!(holes.iter().all(|&len| len <= DISCARD_PART), "{holes:?}");
            assert!((1..=MIN_WINDOW / DISCARD_PART).contains(&(holes.len() as u64)), "{} holes", holes.len());
        }
    }
}

/// A large discard without interruption covers all of its ranges.
#[test]
fn large_discard_covers_all_of_its_ranges() {
    for with_overlay in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (plain, mut content) = disk(dir.path(), 40_000, IoEngine::Async);
        let options = if with_overlay {
            overlaid(&plain.path, dir.path().join("top"), vec![], IoEngine::Async)
        } else {
            plain
        };
        let mut guest = Guest::new(&options);
        let cleared = [(1, 20_000), (20_003, 5), (21_000, 18_999)];
        assert_eq!(guest.one(DISCARD, 0, &ranges(&cleared.map(|(at, count)| (at, count, 0))), 0).status, 0);
        for (at, count) in cleared {
            content[at as usize * 512..(at as usize + count as usize) * 512].fill(0);
        }
        for sector in (0..40_000).step_by(2000) {
            let (status, data) = guest.read(sector, 2000);
            assert_eq!(status, 0);
            assert!(data == content[sector as usize * 512..(sector as usize + 2000) * 512], "at {sector}");
        }
    }
}

/// Without `fallocate`, zeros are written, and a discard does nothing and succeeds.
#[test]
fn zeroes_are_written_and_discards_ignored_without_fallocate() {
    for with_overlay in [false, true] {
        let dir = tempfile::tempdir().unwrap();
        let (plain, content) = disk(dir.path(), 40_000, IoEngine::Sync);
        let options = if with_overlay {
            overlaid(&plain.path, dir.path().join("top"), vec![], IoEngine::Sync)
        } else {
            plain
        };
        let mut slow = Slow::new(&options, 1);
        slow.syncs[0].no_ranges.store(true, Ordering::Relaxed);
        let guest = &mut slow.guest;
        for unmap in [0, 1] {
            // More than one part of each.
            let (zeroed, discarded) = (u64::from(unmap) * 9000, 18_001);
            assert_eq!(guest.one(WRITE_ZEROES, 0, &ranges(&[(zeroed, 8000, unmap)]), 0).status, 0);
            assert_eq!(guest.one(DISCARD, 0, &ranges(&[(discarded, 10_000, 0)]), 0).status, 0);
            for (sector, zero) in
                [(zeroed, true), (zeroed + 7999, true), (zeroed + 8000, false), (discarded, false)]
            {
                let at = sector as usize * 512;
                let expected = if zero { vec![0; 512] } else { content[at..at + 512].to_vec() };
                assert_eq!(guest.read(sector, 1), (0, expected), "sector {sector}, overlay {with_overlay}");
            }
        }
    }
}
