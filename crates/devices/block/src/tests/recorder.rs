//! An engine that logs what it does to the last of its files, in order.

use std::collections::VecDeque;
use std::fmt;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::SECTOR;
use crate::engine::{Done, Engine, Op, Transfer, carry_out};
use sync::locked;

/// An operation on a file.
#[derive(Debug, Clone)]
pub(crate) enum FileOp {
    /// These bytes were written at this offset.
    Write { offset: u64, bytes: Vec<u8> },
    /// Everything before is durable.
    Sync,
    /// What was done since the last sync may be lost at any time, whatever later syncs return.
    FailedSync,
}

/// Offsets of the last file that cannot be written.
pub(crate) type BrokenRange = Arc<Mutex<Range<u64>>>;

/// Faults of the last file, and a log of its holes.
#[derive(Debug, Default)]
pub(crate) struct Faults {
    /// Syncs and discards do not complete.
    pub(crate) stalled: AtomicBool,
    /// The error of the next sync.
    pub(crate) error: Mutex<Option<Errno>>,
    /// The file system can neither punch holes nor zero ranges.
    pub(crate) no_ranges: AtomicBool,
    /// Lengths of the holes that were punched, in order.
    pub(crate) holes: Mutex<Vec<u64>>,
}

/// The operations, in order.
pub(crate) type OpLog = Arc<Mutex<Vec<FileOp>>>;

/// Carries out one transfer at a time, the latest first, since their order is undefined.
#[derive(Debug)]
pub(crate) struct RecordingEngine<T> {
    files: Vec<Arc<File>>,
    /// `None` if nothing is logged.
    log: Option<OpLog>,
    pub(crate) broken: BrokenRange,
    pub(crate) syncs: Arc<Faults>,
    queued: VecDeque<Transfer<T>>,
    done: Vec<Done<T>>,
}

impl<T> RecordingEngine<T> {
    pub(crate) fn new(files: Vec<Arc<File>>, log: OpLog) -> Self {
        let broken = BrokenRange::default();
        RecordingEngine {
            files,
            log: Some(log),
            broken,
            syncs: Arc::default(),
            queued: VecDeque::new(),
            done: Vec::new(),
        }
    }

    /// The same engine without a log.
    pub(crate) fn without_record(self) -> Self {
        RecordingEngine { log: None, ..self }
    }

    fn is_stalled(&self, transfer: &Transfer<T>) -> bool {
        matches!(transfer.op(), Op::Sync | Op::PunchHole) && self.syncs.stalled.load(Ordering::Relaxed)
    }
}

impl<T: fmt::Debug + Send> Engine<T> for RecordingEngine<T> {
    fn push(&mut self, transfer: Transfer<T>) {
        self.queued.push_back(transfer);
    }

    /// Carries out one of the queued transfers.
    fn submit(&mut self) {
        let Some(index) = self.queued.iter().rposition(|transfer| !self.is_stalled(transfer)) else { return };
        let Some(mut transfer) = self.queued.remove(index) else { return };
        let (op, offset, len) = (transfer.op(), transfer.offset(), transfer.remaining());
        let top = usize::from(transfer.file()) == self.files.len() - 1;
        let fails = top && op == Op::Write && locked(&self.broken).contains(&offset);
        let sync_error = if top && op == Op::Sync { locked(&self.syncs.error).take() } else { None };
        let is_range = matches!(op, Op::PunchHole | Op::ZeroRange);
        if op == Op::PunchHole {
            locked(&self.syncs.holes).push(len);
        }
        let result = match sync_error {
            Some(errno) => {
                if let Some(log) = &self.log {
                    locked(log).push(FileOp::FailedSync);
                }
                Err(errno)
            }
            None if fails => Err(Errno::NOSPC),
            None if is_range && self.syncs.no_ranges.load(Ordering::Relaxed) => Err(Errno::OPNOTSUPP),
            None => carry_out(&mut transfer, &self.files),
        };
        if top
            && result.is_ok()
            && let Some(log) = &self.log
        {
            match op {
                Op::Read | Op::WriteBack => {}
                Op::Write | Op::PunchHole | Op::ZeroRange => {
                    let mut bytes = vec![0; len as usize];
                    self.files[self.files.len() - 1].read_exact_at(&mut bytes, offset).unwrap();
                    // One sector each: a disk writes a sector atomically.
                    for (index, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
                        let (offset, bytes) = (offset + index as u64 * SECTOR, bytes.to_vec());
                        locked(log).push(FileOp::Write { offset, bytes });
                    }
                }
                Op::Sync => locked(log).push(FileOp::Sync),
            }
        }
        self.done.push(transfer.finish(result));
    }

    fn reap(&mut self, done: &mut Vec<Done<T>>) {
        done.append(&mut self.done);
    }

    /// Whether a transfer can be carried out or reaped.
    fn has_more(&self) -> bool {
        !self.done.is_empty() || self.queued.iter().any(|transfer| !self.is_stalled(transfer))
    }

    fn in_flight(&self) -> usize {
        self.queued.len() + self.done.len()
    }
}
