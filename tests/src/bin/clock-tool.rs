//! `clock-tool`: watches a guest's clocks with a thread that reads them on one vCPU after the
//! other.
//!
//! It prints `WRONG CLOCK ...` if `CLOCK_MONOTONIC` or the time stamp counter is lower than it was
//! on the vCPU before, or if the kernel changes its clock source, and `HOPPED N` after every N
//! rounds over all vCPUs. It never ends.
//!
//! If the host's own counter is not stable (an emulated host), KVM adjusts a vCPU's counter each
//! time that the vCPU moves to another processor. If the counters disagree in the first rounds, it
//! prints `COUNTERS UNSTABLE` and does not watch them.

use std::fs;
use std::io::Result;

use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};
use vesta_tests::line::print_line;

/// How often both clocks are read on one vCPU before the next.
const LOOKS: u32 = 8;
/// The number of rounds between two lines.
const ROUNDS: u64 = 8;

fn main() -> Result<()> {
    let vcpus = std::thread::available_parallelism()?.get();
    let source = clock_source()?;
    let (mut last_time, mut last_counter) = (0, 0);
    let mut stable = true;
    for round in 1u64.. {
        for vcpu in 0..vcpus {
            let mut only = CpuSet::new();
            only.set(vcpu);
            sched_setaffinity(None, &only)?;
            for _ in 0..LOOKS {
                let (time, counter) = (monotonic(), counter());
                if time < last_time {
                    print_line(&format!("WRONG CLOCK_MONOTONIC {time} after {last_time} on vCPU {vcpu}"));
                }
                if stable && counter < last_counter && round <= ROUNDS {
                    stable = false;
                    print_line("COUNTERS UNSTABLE");
                } else if stable && counter < last_counter {
                    print_line(&format!("WRONG CLOCK rdtsc {counter} after {last_counter} on vCPU {vcpu}"));
                }
                (last_time, last_counter) = (time, counter);
            }
        }
        if round.is_multiple_of(ROUNDS) {
            let now = clock_source()?;
            if now != source {
                print_line(&format!("WRONG CLOCK source {now} after {source}"));
            }
            print_line(&format!("HOPPED {round}"));
        }
    }
    Ok(())
}

fn monotonic() -> i128 {
    let time = clock_gettime(ClockId::Monotonic);
    i128::from(time.tv_sec) * 1_000_000_000 + i128::from(time.tv_nsec)
}

/// The time stamp counter, read after everything before it.
#[expect(unsafe_code, reason = "instructions that have no safe form")]
fn counter() -> u64 {
    // SAFETY: every x86_64 processor has the instruction, and it accesses no memory.
    unsafe { std::arch::x86_64::_mm_lfence() };
    // SAFETY: as above.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn clock_source() -> Result<String> {
    let name = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    Ok(name.trim().to_owned())
}
