//! An engine that tells what it did to the last of its files, in order.

use std::collections::VecDeque;
use std::fs::File;
use std::ops::Range;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};

use rustix::io::Errno;

use crate::block::direct::carry_out;
use crate::block::engine::{Done, Op, Transfer};
use crate::block::tests::SECTOR;
use crate::sync::locked;

/// Something that was done to a file.
#[derive(Debug, Clone)]
pub(in crate::block) enum Deed {
    /// These bytes stand at this offset now.
    Write { offset: u64, bytes: Vec<u8> },
    /// All that was done before is durable now.
    Sync,
    /// What was done since the last sync may be lost at any time, whatever later syncs say.
    FailedSync,
}

/// Where the last of the files cannot be written.
pub(in crate::block) type Broken = Arc<Mutex<Range<u64>>>;

/// Whether the next sync of the last of the files fails.
pub(in crate::block) type FailsSync = Arc<AtomicBool>;

/// What was done, in order.
pub(in crate::block) type Deeds = Arc<Mutex<Vec<Deed>>>;

/// Carries transfers out one after the other, the latest first: nobody may rely on their order.
#[derive(Debug)]
pub(in crate::block) struct Recorder<T> {
    files: Vec<Arc<File>>,
    deeds: Deeds,
    pub(super) broken: Broken,
    pub(super) fails_sync: FailsSync,
    noted: VecDeque<Transfer<T>>,
    done: Vec<Done<T>>,
}

impl<T> Recorder<T> {
    pub(super) fn new(files: Vec<Arc<File>>, deeds: Deeds) -> Self {
        let broken = Broken::default();
        let fails_sync = FailsSync::default();
        Recorder { files, deeds, broken, fails_sync, noted: VecDeque::new(), done: Vec::new() }
    }

    pub(in crate::block) fn push(&mut self, transfer: Transfer<T>) {
        self.noted.push_back(transfer);
    }

    /// Carries out one of those that were noted.
    pub(in crate::block) fn submit(&mut self) {
        let Some(mut transfer) = self.noted.pop_back() else { return };
        let (op, offset, len) = (transfer.op(), transfer.offset(), transfer.left());
        let top = usize::from(transfer.file()) == self.files.len() - 1;
        let fails = top && op == Op::Write && locked(&self.broken).contains(&offset);
        let result = if fails {
            Err(Errno::NOSPC)
        } else if top && op == Op::Sync && self.fails_sync.swap(false, Ordering::Relaxed) {
            locked(&self.deeds).push(Deed::FailedSync);
            Err(Errno::IO)
        } else {
            carry_out(&mut transfer, &self.files)
        };
        if top && result.is_ok() {
            match op {
                Op::Read => {}
                Op::Write | Op::PunchHole | Op::ZeroRange => {
                    let mut bytes = vec![0; len as usize];
                    self.files[self.files.len() - 1].read_exact_at(&mut bytes, offset).unwrap();
                    // One sector each: that is what a disk writes whole.
                    for (index, bytes) in bytes.chunks(SECTOR as usize).enumerate() {
                        let (offset, bytes) = (offset + index as u64 * SECTOR, bytes.to_vec());
                        locked(&self.deeds).push(Deed::Write { offset, bytes });
                    }
                }
                Op::Sync => locked(&self.deeds).push(Deed::Sync),
            }
        }
        self.done.push(transfer.finish(result));
    }

    pub(in crate::block) fn reap(&mut self, done: &mut Vec<Done<T>>) {
        done.append(&mut self.done);
    }

    pub(in crate::block) fn in_flight(&self) -> usize {
        self.noted.len() + self.done.len()
    }
}
