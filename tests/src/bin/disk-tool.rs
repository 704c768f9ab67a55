//! `disk-tool`: writes to a guest's disks and checks them, as a part of the disk tests.
//!
//! | command | does | prints |
//! |---|---|---|
//! | `run DEV SEED WRITERS WRITES` | runs several [`Stream`]s at once, which write, read back and flush | `FLUSHED DEV STREAM N`: the first N writes of the stream are flushed; `VERIFIED DEV`; `FAILED DEV STREAM N ERROR`: write, read or flush number N failed; `WRONG DEV ...` |
//! | `until FILE DEV SEED WRITERS` | the same, until FILE exists in the guest | the same |
//! | `check DEV SEED WRITERS N...` | checks the disk after the first N writes of each stream | `CHECKED DEV`, `WRONG DEV ...` |
//! | `rate DEV read\|write BYTES` | makes requests of that size one after the other, without end | `RATE DEV REQUESTS NANOSECONDS` about five times a second: the number of requests so far, and the time |
//! | `zero DEV OFFSET LENGTH keep\|free` | zeroes a range of bytes and keeps or frees its space | `ZEROED DEV`, `FAILED DEV ...` |
//!
//! All I/O bypasses the guest's page cache.

use std::fs::File;
use std::io::{Read, Result, Seek, SeekFrom, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use rustix::fs::{FallocateFlags, OFlags, fallocate, fdatasync};
use vesta_tests::line::print_line;
use vesta_tests::pattern::{Content, MOST_SECTORS, SECTOR, Stream, mix};

/// The number of writes between two flushes of a stream.
const FLUSH_EVERY: u64 = 32;
/// The number of writes between two reads.
const READ_EVERY: u64 = 3;

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let good = match args[..] {
        ["run", dev, seed, writers, writes] => {
            let writes = number(writes);
            run(dev, number(seed), number(writers), &|n| n == writes)
        }
        ["until", file, dev, seed, writers] => {
            run(dev, number(seed), number(writers), &|_| Path::new(file).exists())
        }
        ["check", dev, seed, writers, ref counts @ ..] if counts.len() as u64 == number(writers) => {
            check(dev, number(seed), number(writers), &counts.iter().map(|n| number(n)).collect::<Vec<_>>())
        }
        ["rate", dev, what, bytes] => rate(dev, what == "write", number(bytes)),
        ["zero", dev, offset, length, how] => zero(dev, number(offset), number(length), how == "free"),
        _ => {
            eprintln!("disk-tool: what is {args:?}?");
            false
        }
    };
    if good { ExitCode::SUCCESS } else { ExitCode::FAILURE }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|error| panic!("{text:?} is no number: {error}"))
}

/// Opens a disk. Returns also the number of its sectors.
fn open(dev: &str, write: bool) -> Result<(File, u64)> {
    let path = format!("/dev/{dev}");
    let flags = OFlags::DIRECT.bits().cast_signed();
    let mut file = File::options().read(true).write(write).custom_flags(flags).open(path)?;
    let size = file.seek(SeekFrom::End(0))?;
    Ok((file, size / SECTOR as u64))
}

/// A buffer for `O_DIRECT`.
struct Buffer(Vec<u8>);

impl Buffer {
    const ALIGN: usize = 4096;

    fn new(len: usize) -> Buffer {
        Buffer(vec![0; len + Self::ALIGN])
    }

    fn get(&mut self, len: usize) -> &mut [u8] {
        let start = self.0.as_ptr().align_offset(Self::ALIGN);
        &mut self.0[start..start + len]
    }
}

/// Runs the writers. Each calls `enough` before each write, and ends when it returns `true`.
fn run(dev: &str, seed: u64, writers: u64, enough: &(dyn Fn(u64) -> bool + Sync)) -> bool {
    let (file, sectors) = match open(dev, true) {
        Ok(opened) => opened,
        Err(error) => {
            print_line(&format!("FAILED {dev} - 0 open: {error}"));
            return false;
        }
    };
    let streams = Stream::all(seed, sectors, writers);
    let good = std::thread::scope(|scope| {
        let file = &file;
        let run = |(index, stream)| scope.spawn(move || write_stream(dev, file, index, stream, enough));
        let threads: Vec<_> = streams.iter().enumerate().map(run).collect();
        threads.into_iter().all(|thread| thread.join().unwrap_or(false))
    });
    if good {
        print_line(&format!("VERIFIED {dev}"));
    }
    good
}

fn write_stream(
    dev: &str,
    file: &File,
    index: usize,
    stream: &Stream,
    enough: &(dyn Fn(u64) -> bool + Sync),
) -> bool {
    let mut buffer = Buffer::new(MOST_SECTORS as usize * SECTOR);
    let mut held = stream.after(0);
    let mut writes = 0;
    while !enough(writes) {
        let n = writes;
        writes += 1;
        let sectors = stream.write(n);
        let bytes = buffer.get((sectors.end - sectors.start) as usize * SECTOR);
        stream.fill(sectors.clone(), n, bytes);
        let failed = |what: &str, error: std::io::Error| {
            print_line(&format!("FAILED {dev} {index} {n} {what}: {error}"));
            false
        };
        if let Err(error) = file.write_all_at(bytes, sectors.start * SECTOR as u64) {
            return failed("write", error);
        }
        stream.note(n, &mut held);
        if n % READ_EVERY == READ_EVERY - 1 {
            // The sectors of an earlier or later write of this stream.
            let sectors = stream.write(mix(n) % (2 * n));
            let bytes = buffer.get((sectors.end - sectors.start) as usize * SECTOR);
            if let Err(error) = file.read_exact_at(bytes, sectors.start * SECTOR as u64) {
                return failed("read", error);
            }
            for (sector, bytes) in sectors.zip(bytes.chunks_exact(SECTOR)) {
                let right = held[(sector - stream.sectors().start) as usize];
                if !is_right(dev, stream.read(sector, bytes), sector, right) {
                    return false;
                }
            }
        }
        if n % FLUSH_EVERY == FLUSH_EVERY - 1 {
            if let Err(error) = fdatasync(file) {
                return failed("flush", error.into());
            }
            print_line(&format!("FLUSHED {dev} {index} {}", n + 1));
        }
    }
    // All sectors once more. Only this stream writes to them, so their exact content is known.
    let mut wrong = false;
    let checked = stream.check(writes, |sector, bytes| {
        let direct = buffer.get(bytes.len());
        file.read_exact_at(direct, sector * SECTOR as u64)?;
        for (sector, bytes) in (sector..).zip(direct.chunks_exact(SECTOR)) {
            let right = held[(sector - stream.sectors().start) as usize];
            wrong |= !is_right(dev, stream.read(sector, bytes), sector, right);
        }
        bytes.copy_from_slice(direct);
        Ok(())
    });
    if let Err(error) = &checked {
        print_line(&format!("WRONG {dev} {error}"));
    }
    checked.is_ok() && !wrong
}

fn is_right(dev: &str, found: std::result::Result<Content, String>, sector: u64, right: Content) -> bool {
    match found {
        Ok(found) if found == right => return true,
        Ok(found) => print_line(&format!("WRONG {dev} sector {sector} holds {found:?}, not {right:?}")),
        Err(error) => print_line(&format!("WRONG {dev} {error}")),
    }
    false
}

fn check(dev: &str, seed: u64, writers: u64, counts: &[u64]) -> bool {
    let all = || -> std::result::Result<(), String> {
        let (file, sectors) = open(dev, false).map_err(|error| error.to_string())?;
        let mut buffer = Buffer::new(MOST_SECTORS as usize * SECTOR);
        for (stream, &count) in Stream::all(seed, sectors, writers).iter().zip(counts) {
            stream.check(count, |sector, bytes| {
                let direct = buffer.get(bytes.len());
                file.read_exact_at(direct, sector * SECTOR as u64)?;
                bytes.copy_from_slice(direct);
                Ok(())
            })?;
        }
        Ok(())
    };
    match all() {
        Ok(()) => print_line(&format!("CHECKED {dev}")),
        Err(error) => {
            print_line(&format!("WRONG {dev} {error}"));
            return false;
        }
    }
    true
}

fn rate(dev: &str, write: bool, size: u64) -> bool {
    let requests = || -> Result<()> {
        let (mut file, sectors) = open(dev, write)?;
        let per_pass = sectors * SECTOR as u64 / size;
        let mut buffer = Buffer::new(size as usize);
        let (begun, mut reported, mut count) = (Instant::now(), Duration::ZERO, 0_u64);
        loop {
            if count.is_multiple_of(per_pass) {
                file.seek(SeekFrom::Start(0))?;
            }
            let bytes = buffer.get(size as usize);
            if write {
                file.write_all(bytes)?;
            } else {
                file.read_exact(bytes)?;
            }
            count += 1;
            let now = begun.elapsed();
            if now > reported + Duration::from_millis(200) {
                reported = now;
                print_line(&format!("RATE {dev} {count} {}", now.as_nanos()));
            }
        }
    };
    if let Err(error) = requests() {
        print_line(&format!("FAILED {dev} {error}"));
    }
    false
}

fn zero(dev: &str, offset: u64, length: u64, free: bool) -> bool {
    let how = if free {
        FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE
    } else {
        FallocateFlags::ZERO_RANGE | FallocateFlags::KEEP_SIZE
    };
    let zeroed = open(dev, true).and_then(|(file, _)| Ok(fallocate(&file, how, offset, length)?));
    match &zeroed {
        Ok(()) => print_line(&format!("ZEROED {dev}")),
        Err(error) => print_line(&format!("FAILED {dev} {error}")),
    }
    zeroed.is_ok()
}
