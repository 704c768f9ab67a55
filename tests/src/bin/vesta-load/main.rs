//! `vesta-load`: puts load on a disk, and reports its speed.
//!
//! ```text
//! vesta-load [--direct] [--seconds S] [--region BYTES] LABEL=FILE... WORKLOAD...
//! ```
//!
//! Runs each workload on each file, one after the other; [`vesta_tests::load`] describes workloads
//! and reports. Files are overwritten. The program is small and static, so that it fits into a
//! guest's initramfs; it also runs on the host. One transfer at a time is a plain system call,
//! several go through `io_uring`.

#![deny(unsafe_code)]

mod blocks;
mod ring;

use std::fs::File;
use std::os::unix::fs::OpenOptionsExt;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::fs::{OFlags, SeekFrom};
use vesta_tests::load::{Direction, PAUSE, Report, Workload, begin_line, end_line};

use blocks::{Block, Places};

/// What the command line asks for.
struct Job {
    direct: bool,
    time: Duration,
    region: Option<u64>,
    files: Vec<(String, PathBuf)>,
    workloads: Vec<Workload>,
}

fn main() -> Result<()> {
    let job = parse(std::env::args().skip(1))?;
    for (label, path) in &job.files {
        for &workload in &job.workloads {
            println!("{}", begin_line(label, workload));
            std::thread::sleep(PAUSE);
            let report =
                run(&job, path, workload).with_context(|| format!("{workload} on {}", path.display()))?;
            println!("{} {}", end_line(label, workload), serde_json::to_string(&report)?);
            std::thread::sleep(PAUSE);
        }
    }
    Ok(())
}

fn parse(mut args: impl Iterator<Item = String>) -> Result<Job> {
    let mut job = Job {
        direct: false,
        time: Duration::from_secs(1),
        region: None,
        files: Vec::new(),
        workloads: Vec::new(),
    };
    while let Some(arg) = args.next() {
        let mut value = || args.next().with_context(|| format!("{arg} needs a value"));
        match arg.as_str() {
            "--direct" => job.direct = true,
            "--seconds" => job.time = Duration::try_from_secs_f64(value()?.parse()?)?,
            "--region" => job.region = Some(value()?.parse()?),
            _ => match arg.split_once('=') {
                Some((label, path)) => job.files.push((label.to_owned(), path.into())),
                None => job.workloads.push(arg.parse()?),
            },
        }
    }
    if job.files.is_empty() || job.workloads.is_empty() {
        bail!("vesta-load [--direct] [--seconds S] [--region BYTES] LABEL=FILE... WORKLOAD...");
    }
    Ok(job)
}

fn run(job: &Job, path: &std::path::Path, workload: Workload) -> Result<Report> {
    let write = workload.direction == Direction::Write;
    let flags = if job.direct { OFlags::DIRECT } else { OFlags::empty() };
    let file = File::options()
        .read(!write)
        .write(write)
        .custom_flags(flags.bits().cast_signed())
        .open(path)
        .context("cannot open")?;
    let size = rustix::fs::seek(&file, SeekFrom::End(0))?;
    let places = Places::new(size.min(job.region.unwrap_or(u64::MAX)), workload)?;
    if workload.depth == 1 {
        one_at_a_time(&file, workload, places, job.time)
    } else {
        ring::several_at_a_time(&file, workload, places, job.time)
    }
}

fn one_at_a_time(file: &File, workload: Workload, mut places: Places, time: Duration) -> Result<Report> {
    let mut block = Block::new(workload.block);
    let mut took = Vec::with_capacity(1 << 16);
    let begun = Instant::now();
    let mut before = begun;
    loop {
        let offset = places.next();
        let moved = match workload.direction {
            Direction::Read => rustix::io::pread(file, block.bytes_mut(), offset)?,
            Direction::Write => rustix::io::pwrite(file, block.bytes(), offset)?,
        };
        if moved != workload.block as usize {
            bail!("transfer at {offset}: {moved} bytes of {}", workload.block);
        }
        let done = took.len() as u64 + 1;
        if workload.flush.is_some_and(|writes| done.is_multiple_of(writes.into())) {
            rustix::fs::fdatasync(file)?;
        }
        let now = Instant::now();
        took.push(u64::try_from((now - before).as_nanos())?);
        before = now;
        if now - begun >= time {
            break;
        }
    }
    let (ops, nanos) = (took.len() as u64, u64::try_from(begun.elapsed().as_nanos())?);
    took.sort_unstable();
    let at = |percent: usize| took.get(took.len() * percent / 100).copied();
    Ok(Report { ops, nanos, median_ns: at(50), p99_ns: at(99) })
}
