//! Rate limits of disks, measured from within a guest.
//!
//! Requests are counted in a window of ten seconds that begins when full buckets and bursts are
//! used up. A limiter must keep its rate within 1% by the host's clock: the guest prints a line
//! after request `n`, whose time of arrival is when that request had completed.
//!
//! A stall of the host (an emulated or busy one) makes a rate seem lower, or higher if a window
//! begins with the stall. So [`Stalls`] measures them and widens the bounds, and up to [`WINDOWS`]
//! windows are tried. On a quiet host the bounds stay as they are.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use serde_json::{Value, json};
use vesta_tests::disks::{DiskGuest, MIB, disk, drive, with};
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT};
use vesta_tests::on_each_transport;
use vesta_tests::stalls::Stalls;
use vesta_tests::vmm::Vmm;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

/// The largest number of windows.
const WINDOWS: u32 = 3;

/// A line of `disk-tool rate`: so many requests had completed at that time of the host and of the
/// guest.
#[derive(Debug, Clone, Copy)]
struct Mark {
    at: Instant,
    guest_ns: u64,
    requests: u64,
}

/// All its lines about one disk.
fn marks(vmm: &Vmm, dev: &str) -> Result<Vec<Mark>> {
    let head = format!("RATE {dev} ");
    let lines = vmm.stdout.lines();
    let ours = lines.iter().filter_map(|line| Some((line.at, line.text.split_once(&head)?.1)));
    ours.map(|(at, numbers)| {
        let (requests, guest_ns) = numbers.split_once(' ').context("the line has two numbers")?;
        Ok(Mark { at, guest_ns: guest_ns.parse()?, requests: requests.parse()? })
    })
    .collect()
}

/// Its first line about the disk with so many requests or more, at that time of the host or later.
fn wait_for(vmm: &Vmm, dev: &str, requests: u64, from: Instant) -> Result<Mark> {
    let deadline = Instant::now() + BOOT_TIMEOUT;
    loop {
        let len = vmm.stdout.len();
        let mark = marks(vmm, dev)?.into_iter().find(|mark| mark.requests >= requests && mark.at >= from);
        if let Some(mark) = mark {
            return Ok(mark);
        }
        ensure!(
            Instant::now() < deadline,
            "{dev} does not get to {requests} requests:\n{}",
            vmm.stdout.text()
        );
        vmm.stdout.wait_for_more_than(len, BOOT_TIMEOUT)?;
    }
}

/// Measures one disk in the window from `from` on. Returns a description, and whether the rate is
/// `right` requests per second.
fn look(
    vmm: &Vmm,
    stalls: &Stalls,
    dev: &str,
    right: f64,
    (from, window): (Instant, Duration),
    percent: f64,
) -> Result<(String, bool)> {
    let first = wait_for(vmm, dev, 0, from)?;
    let last = wait_for(vmm, dev, 0, first.at + window)?;
    let requests = f64::from(u32::try_from(last.requests - first.requests)?);
    let took = (last.at - first.at).as_secs_f64();
    let guest = Duration::from_nanos(last.guest_ns - first.guest_ns).as_secs_f64();
    // And what delayed the first line.
    let before = first.at.checked_sub(Duration::from_millis(200)).unwrap_or(first.at);
    let stalled = stalls.between(before, last.at).as_secs_f64();
    let off = |seconds: f64| 100.0 * (requests / seconds / right - 1.0);
    let seen = format!(
        "{dev}: {:.2} requests per second ({:+.2}%), by the guest's clock {:.2} ({:+.2}%), should be {right}; the host was stalled for {stalled:.2} of {took:.2} s",
        requests / took,
        off(took),
        requests / guest,
        off(guest)
    );
    eprintln!("{seen}");
    let kept = off(took + stalled) <= percent && off((took - stalled).max(0.001)) >= -percent;
    Ok((seen, kept))
}

/// Checks the rates of several disks, within so many percent, from `from` on.
fn check(
    vmm: &Vmm,
    stalls: &Stalls,
    from: Instant,
    window: Duration,
    percent: f64,
    disks: &[(&str, f64)],
) -> Result<()> {
    let mut wrong = Vec::new();
    for number in 0..WINDOWS {
        wrong.clear();
        for &(dev, right) in disks {
            let (seen, kept) = look(vmm, stalls, dev, right, (from + window * number, window), percent)?;
            if !kept {
                wrong.push(seen);
            }
        }
        if wrong.is_empty() {
            return Ok(());
        }
    }
    bail!("not kept in any of {WINDOWS} windows; in the last: {wrong:#?}");
}

fn bucket(size: u64, refill_time: u64) -> Value {
    json!({"size": size, "refill_time": refill_time})
}

on_each_transport! {
    /// Six disks that share a vCPU and an I/O worker. The rates are low enough for an emulated
    /// host.
    fn limits_hold_within_one_percent_and_change_at_once(transport) {
        const KIB: u64 = 1024;
        let burst = with(bucket(64 * KIB, 1000), &json!({"one_time_burst": 4 * MIB}));
        let disks = [
            // Bytes per second, few and many.
            ("vda", "4096", json!({"bandwidth": bucket(16 * KIB, 250)})),
            ("vdb", "524288", json!({"bandwidth": bucket(MIB, 100)})),
            // Requests per second.
            ("vdc", "512", json!({"ops": bucket(1, 100)})),
            ("vdd", "512", json!({"ops": bucket(10, 200)})),
            ("vde", "65536", json!({"bandwidth": burst})),
            // One in an hour.
            ("vdf", "512", json!({"ops": bucket(1, 3_600_000)})),
        ];
        let mut guest = DiskGuest::new(transport)?.tool(TOOL);
        let mut script = String::new();
        for (dev, size, limits) in &disks {
            let path = disk(guest.dir(), dev, 8)?;
            guest = guest.drive(with(drive(dev, &path), &json!({"rate_limiter": limits})));
            // Reads and writes share a limit.
            let what = if *dev == "vda" { "write" } else { "read" };
            script = format!("{script}disk-tool rate {dev} {what} {size} &\n");
        }
        let stalls = Stalls::watch();
        let vmm = guest.run(&(script + "wait"))?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        // The burst and the bucket pass at once: 4 MiB and 64 KiB. The next request waits for a
        // second, like all after it.
        let waited = wait_for(&vmm, "vde", 66, vmm.started())?;
        let seconds = Duration::from_nanos(waited.guest_ns).as_secs_f64();
        eprintln!("vde: request 66 was over after {seconds:.2} s");
        ensure!((0.9..10.0).contains(&seconds), "the burst took {seconds} s");
        let right = [("vda", 16.0), ("vdb", 20.0), ("vdc", 10.0), ("vdd", 50.0), ("vde", 1.0)];
        check(&vmm, &stalls, waited.at, Duration::from_secs(10), 1.0, &right)?;
        ensure!(marks(&vmm, "vdf")?.is_empty(), "a request passed that was to wait for an hour");

        let mut patch = |dev: &str, limits: Value| {
            api.patch(&format!("/drives/{dev}"), &json!({"drive_id": dev, "rate_limiter": limits}))?.ok().map(drop)
        };
        patch("vda", json!({"bandwidth": bucket(8 * KIB, 50)}))?;
        patch("vdb", json!({"bandwidth": bucket(256 * KIB, 100), "ops": bucket(10, 100)}))?;
        patch("vdc", json!({"ops": bucket(3, 100)}))?;
        patch("vdd", json!({"bandwidth": bucket(0, 0), "ops": bucket(2, 100)}))?;
        let changed = Instant::now();
        // A full or indebted bucket soon has no effect after the change. The window is short, so
        // the bound is wider.
        let right = [("vda", 40.0), ("vdb", 5.0), ("vdc", 30.0), ("vdd", 20.0)];
        check(&vmm, &stalls, changed + Duration::from_millis(500), Duration::from_secs(4), 2.5, &right)?;

        // Removing a limit releases its waiting requests at once.
        let removed = Instant::now();
        patch("vdf", json!({"ops": bucket(0, 0)}))?;
        let first = wait_for(&vmm, "vdf", 2, removed)?;
        eprintln!("vdf: the first line came {:?} after its limit went", first.at - removed);
        ensure!(first.at - removed < Duration::from_secs(2), "it took {:?}", first.at - removed);
        Ok(())
    }
}
