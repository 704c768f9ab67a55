//! Buffers for `O_DIRECT`, and the offsets of transfers.

use anyhow::{Result, bail};
use vesta_tests::load::Workload;

/// A page: enough for `O_DIRECT` on any disk.
const ALIGNMENT: usize = 4096;

/// The buffer of one transfer, aligned to a page.
pub(crate) struct Block {
    memory: Vec<u8>,
    from: usize,
    len: usize,
}

impl Block {
    pub(crate) fn new(len: u32) -> Block {
        let len = len as usize;
        // Not zeros, which a host may store without writing anything.
        let memory = vec![0x5a; len + ALIGNMENT];
        let from = memory.as_ptr().align_offset(ALIGNMENT);
        Block { memory, from, len }
    }

    pub(crate) fn bytes(&self) -> &[u8] {
        &self.memory[self.from..self.from + self.len]
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        &mut self.memory[self.from..self.from + self.len]
    }
}

/// The offsets of a workload, without end.
pub(crate) struct Places {
    count: u64,
    block: u64,
    random: bool,
    next: u64,
}

impl Places {
    /// Offsets in the first `size` bytes.
    pub(crate) fn new(size: u64, workload: Workload) -> Result<Places> {
        let block = u64::from(workload.block);
        let count = size / block;
        if count == 0 {
            bail!("disk has {size} bytes; at least one transfer of {block}");
        }
        Ok(Places { count, block, random: workload.random, next: 0x2545_f491_4f6c_dd1d })
    }

    pub(crate) fn next(&mut self) -> u64 {
        if self.random {
            // xorshift: random enough, and without a system call.
            self.next ^= self.next << 13;
            self.next ^= self.next >> 7;
            self.next ^= self.next << 17;
            (self.next >> 8) % self.count * self.block
        } else {
            self.next = (self.next + 1) % self.count;
            self.next * self.block
        }
    }
}
