//! Several transfers at a time, through `io_uring`.
//!
//! # Unsafe code
//!
//! A submission carries the address of a block, which is not moved or freed before the ring.
#![expect(unsafe_code, reason = "a submission carries the address of a block")]

use std::fs::File;
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use io_uring::{IoUring, opcode, types::Fd};
use vesta_tests::load::{Direction, Report, Workload};

use crate::blocks::{Block, Places};

/// Keeps `workload.depth` transfers in flight for `time`, then waits for the last of them.
pub(crate) fn several_at_a_time(
    file: &File,
    workload: Workload,
    mut places: Places,
    time: Duration,
) -> Result<Report> {
    let depth = workload.depth;
    // Before the ring, so that it is dropped after it.
    let mut blocks: Vec<Block> = (0..depth).map(|_| Block::new(workload.block)).collect();
    let mut ring = IoUring::new(depth).context("cannot make an io_uring")?;
    let mut free: Vec<u32> = (0..depth).collect();
    let (mut ops, mut in_flight) = (0, 0);
    let begun = Instant::now();
    let mut over = false;
    loop {
        while !over && let Some(slot) = free.pop() {
            let block = blocks.get_mut(slot as usize).context("there is a block for each")?.bytes_mut();
            let (fd, offset) = (Fd(file.as_raw_fd()), places.next());
            let entry = match workload.direction {
                Direction::Read => {
                    opcode::Read::new(fd, block.as_mut_ptr(), workload.block).offset(offset).build()
                }
                Direction::Write => {
                    opcode::Write::new(fd, block.as_ptr(), workload.block).offset(offset).build()
                }
            };
            // SAFETY: the block is on the heap and is freed after the ring. Its bytes are not
            // accessed, and it is reused only after its transfer. The loop, and with it the ring,
            // ends when nothing is in flight, or the process exits.
            unsafe { ring.submission().push(&entry.user_data(slot.into())) }?;
            in_flight += 1;
        }
        if in_flight == 0 {
            break;
        }
        ring.submit_and_wait(1).context("cannot wait for transfers")?;
        for completion in ring.completion() {
            let result = completion.result();
            if result < 0 || result.cast_unsigned() != workload.block {
                // The kernel may still write to blocks, so nothing is freed.
                eprintln!("vesta-load: transfer of {} bytes: result {result}", workload.block);
                std::process::exit(1);
            }
            free.push(completion.user_data() as u32);
            ops += 1;
            in_flight -= 1;
        }
        over = begun.elapsed() >= time;
    }
    if ops == 0 {
        bail!("no transfer completed");
    }
    Ok(Report { ops, nanos: u64::try_from(begun.elapsed().as_nanos())?, median_ns: None, p99_ns: None })
}
