//! Crashes of the host at any moment, with the loss of any part of what was not synced.
//!
//! After a failed sync, the host may also lose any part of what was not synced before it, at any
//! time, whatever later syncs return, and also if only the monitor is killed.

use std::sync::{Arc, Mutex};

use proptest::prelude::*;

use super::crash::as_if_host_crashed;
use super::recorder::{FileOp, OpLog, RecordingEngine};
use super::rig::*;
use sync::locked;

const SECTORS: u64 = 300;

#[derive(Debug, Clone)]
enum Step {
    Write {
        sector: u64,
        count: u64,
    },
    Zero {
        sector: u64,
        count: u64,
    },
    Flush,
    /// The next sync fails.
    FailSync,
    /// Carries out some of what was started.
    Some(u8),
}

fn step() -> impl Strategy<Value = Step> {
    let range = || (0..SECTORS - 20, 1..20u64);
    prop_oneof![
        5 => range().prop_map(|(sector, count)| Step::Write { sector, count }),
        1 => range().prop_map(|(sector, count)| Step::Zero { sector, count }),
        2 => Just(Step::Flush),
        1 => Just(Step::FailSync),
        3 => (0..6u8).prop_map(Step::Some),
    ]
}

/// What a sector may have after a crash: its content at the last completed flush, or anything
/// written since.
struct Model {
    /// By sector: the bytes that filled it, from its content at the last flush on.
    may_hold: Vec<Vec<u8>>,
    /// By flush in flight: the length of each list when it was started.
    flushes: Vec<(Token, Vec<usize>)>,
    /// Writes in flight: the first sector, the number of sectors, and the byte.
    writes: Vec<(Token, u64, u64, u8)>,
}

impl Model {
    /// Takes completions; `failed` is whether a sync has failed.
    fn take(&mut self, rig: &mut Rig, failed: bool) {
        while let Some((token, result)) = rig.queue.pop_completion() {
            assert!(result.is_ok() || failed, "{result:?}");
            self.writes.retain(|write| write.0 != token);
            if failed && let Some(at) = self.flushes.iter().position(|flush| flush.0 == token) {
                assert_eq!(result, Err(Errno::IO), "a flush succeeded after a failed sync");
                self.flushes.swap_remove(at);
            }
            if let Some(at) = self.flushes.iter().position(|flush| flush.0 == token) {
                let (_, lens) = self.flushes.swap_remove(at);
                for (index, len) in lens.into_iter().enumerate() {
                    // All contents before the last one that was complete when the flush began are
                    // gone.
                    self.may_hold[index].drain(..len - 1);
                    for (_, others) in &mut self.flushes {
                        others[index] -= (len - 1).min(others[index] - 1);
                    }
                }
            }
        }
    }

    fn is_busy(&self, sector: u64, count: u64) -> bool {
        self.writes.iter().any(|&(_, from, len, _)| sector < from + len && from < sector + count)
    }
}

fn run(steps: &[Step], lost: &[bool], crash_at: usize, only_killed: bool) {
    let dir = tempfile::tempdir_in("/dev/shm").unwrap();
    let base = dir.path().join("base");
    // Bytes of the base are below 128, written bytes are above.
    let fill: Vec<u8> = (0..SECTORS).flat_map(|sector| [(sector % 100) as u8 + 1; 512]).collect();
    std::fs::write(&base, fill).unwrap();
    let top = dir.path().join("top");
    let options = overlaid(&base, top.clone(), vec![], IoEngine::Sync);

    let mut rig = Rig::open(&options);
    let before = std::fs::read(&top).unwrap();
    let log = Arc::new(Mutex::new(Vec::new()));
    let has_failed = |log: &OpLog| locked(log).iter().any(|op| matches!(op, FileOp::FailedSync));
    let recorder = RecordingEngine::new(rig.disk.files(), Arc::clone(&log));
    let syncs = Arc::clone(&recorder.syncs);
    rig.queue = rig.disk.queue_with(Box::new(recorder));
    let may_hold = (0..SECTORS).map(|sector| vec![(sector % 100) as u8 + 1]).collect();
    let mut model = Model { may_hold, flushes: vec![], writes: vec![] };

    let mut value = 0u8;
    'steps: for step in steps {
        let mut kicks = 0;
        match *step {
            Step::Write { sector, count } | Step::Zero { sector, count } => {
                if model.is_busy(sector, count) || rig.next_addr > 8 << 20 {
                    continue;
                }
                let token;
                let new = if matches!(step, Step::Zero { .. }) {
                    let request = Request::WriteZeroes { len: count * SECTOR, unmap: true };
                    token = rig.start(sector * SECTOR, request);
                    0
                } else {
                    value = value % 120 + 1;
                    token = rig.start_write(
                        sector * SECTOR,
                        &vec![value + 128; (count * SECTOR) as usize],
                        u64::MAX,
                    );
                    value + 128
                };
                model.writes.push((token, sector, count, new));
                for sector in sector..sector + count {
                    model.may_hold[sector as usize].push(new);
                }
            }
            Step::Flush => {
                let token = rig.start(0, Request::Flush);
                // A flush covers what was complete when it began.
                let lens = (0..SECTORS).map(|sector| {
                    let list = &model.may_hold[sector as usize];
                    list.len() - usize::from(model.is_busy(sector, 1))
                });
                let lens = lens.collect();
                model.flushes.push((token, lens));
            }
            Step::FailSync => *locked(&syncs.error) = Some(Errno::IO),
            Step::Some(count) => kicks = count,
        }
        for _ in 0..kicks {
            rig.queue.submit_and_reap();
            model.take(&mut rig, has_failed(&log));
            if locked(&log).len() >= crash_at {
                break 'steps;
            }
        }
    }

    if only_killed {
        // A moment when nothing is in flight.
        rig.queue.drain();
        model.take(&mut rig, has_failed(&log));
    }

    // The host crashes. What was synced is there, and any part of the rest. After a kill everything
    // is there but what a failed sync has lost.
    let mut file = before;
    let log = locked(&log).clone();
    let last_sync =
        |log: &[FileOp]| log.iter().rposition(|op| matches!(op, FileOp::Sync)).map_or(0, |at| at + 1);
    let failed = log.iter().position(|op| matches!(op, FileOp::FailedSync));
    let doubtful = failed.map_or(0..0, |failed| last_sync(&log[..failed])..failed);
    let kept = if only_killed { log.len() } else { last_sync(&log) };
    let mut lost = lost.iter().cycle();
    for (index, op) in log.iter().enumerate() {
        let is_safe = index < kept && !doubtful.contains(&index);
        if let FileOp::Write { offset, bytes } = op
            && (is_safe || !lost.next().unwrap())
        {
            file[*offset as usize..*offset as usize + bytes.len()].copy_from_slice(bytes);
        }
    }
    let found = dir.path().join("found");
    std::fs::write(&found, &file).unwrap();
    if !only_killed {
        as_if_host_crashed(&found);
    }
    let mut after = Rig::open(&overlaid(&base, found, vec![], IoEngine::Sync));
    let bytes = after.read(0, SECTORS * SECTOR).unwrap();
    for (sector, bytes) in bytes.chunks(512).enumerate() {
        assert!(bytes.iter().all(|&byte| byte == bytes[0]));
        let may_hold = &model.may_hold[sector];
        assert!(may_hold.contains(&bytes[0]), "sector {sector} holds {}, none of {may_hold:?}", bytes[0]);
    }
    // What is in flight ends before its memory is freed.
    rig.queue.drain();
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 600, ..ProptestConfig::default() })]

    #[test]
    fn overlay_keeps_flushed_writes_after_a_host_crash(
        steps in prop::collection::vec(step(), 1..60),
        lost in prop::collection::vec(any::<bool>(), 1..50),
        crash_at in 1..400usize,
        only_killed: bool,
    ) {
        run(&steps, &lost, crash_at, only_killed);
    }
}
