//! Memory that `O_DIRECT` takes, and where in a file to put it.

use anyhow::{Result, bail};
use vesta_tests::load::Workload;

/// What `O_DIRECT` asks of any disk's memory is met by a page.
const ALIGNMENT: usize = 4096;

/// One transfer's memory; it begins at a page.
pub(crate) struct Block {
    memory: Vec<u8>,
    from: usize,
    len: usize,
}

impl Block {
    pub(crate) fn new(len: u32) -> Block {
        let len = len as usize;
        // Not zeros: a host may know how to store those without writing anything.
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
    /// Places in the first `size` bytes.
    pub(crate) fn new(size: u64, workload: Workload) -> Result<Places> {
        let block = u64::from(workload.block);
        let count = size / block;
        if count == 0 {
            bail!("it has {size} bytes, less than one transfer of {block}");
        }
        Ok(Places { count, block, random: workload.random, next: 0x2545_f491_4f6c_dd1d })
    }

    pub(crate) fn next(&mut self) -> u64 {
        if self.random {
            // xorshift: as good as it needs to be, and no system call.
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
