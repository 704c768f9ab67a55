//! What runs in a guest to watch its clocks: a thread that moves from one vCPU to the next and
//! reads them on each.
//!
//! It says `WRONG CLOCK ...` if `CLOCK_MONOTONIC` or the time stamp counter is ever below what it
//! was on the vCPU before, or if the kernel gives up its clock source, and `HOPPED N` after every N
//! rounds over all vCPUs. It never ends.
//!
//! Where the host's own counter is not stable (an emulated host), KVM moves a vCPU's counter each
//! time that the vCPU comes to another processor. If the counters disagree in the first rounds,
//! they are not watched afterwards: `COUNTERS UNSTABLE`.

use std::fs;
use std::io::{Result, Write};

use rustix::thread::{CpuSet, sched_setaffinity};
use rustix::time::{ClockId, clock_gettime};

/// Looks at both clocks on one vCPU before the next.
const LOOKS: u32 = 8;
/// Rounds between two lines.
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
                    say(&format!("WRONG CLOCK_MONOTONIC {time} after {last_time} on vCPU {vcpu}"));
                }
                if stable && counter < last_counter && round <= ROUNDS {
                    stable = false;
                    say("COUNTERS UNSTABLE");
                } else if stable && counter < last_counter {
                    say(&format!("WRONG CLOCK rdtsc {counter} after {last_counter} on vCPU {vcpu}"));
                }
                (last_time, last_counter) = (time, counter);
            }
        }
        if round.is_multiple_of(ROUNDS) {
            let now = clock_source()?;
            if now != source {
                say(&format!("WRONG CLOCK source {now} after {source}"));
            }
            say(&format!("HOPPED {round}"));
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
    // SAFETY: each x86_64 processor has the instruction, and it accesses no memory.
    unsafe { std::arch::x86_64::_mm_lfence() };
    // SAFETY: as above.
    unsafe { std::arch::x86_64::_rdtsc() }
}

fn clock_source() -> Result<String> {
    let name = fs::read_to_string("/sys/devices/system/clocksource/clocksource0/current_clocksource")?;
    Ok(name.trim().to_owned())
}

/// Says one line, in one write, so that the lines of several processes do not mix.
fn say(line: &str) {
    let _ = std::io::stdout().write_all(format!("{line}\n").as_bytes());
}
