//! Requests of the guest: parsing and checking (5.2.6).
//!
//! A request is a descriptor chain. Its readable bytes are a header of 16 bytes and the data to
//! write. Its writable bytes are the data to read and, last, one status byte. The driver may cut
//! these bytes into descriptors as it likes.
//!
//! # Error model
//!
//! A chain without a writable byte for the status cannot be answered: [`NoStatus`]. Every other
//! mistake of the driver is a [`Command::Fail`], which completes with a status and does not reach
//! the disk. A command that is not `Fail` lies within the disk, in whole sectors.

use memory::GuestRam;

use super::SECTOR;
use virtio::queue::{Buffers, Chain, GuestBuffer, QueueError};

/// Length of the header in bytes.
const HEADER_LEN: u32 = 16;
/// Length of the serial number in bytes (`VIRTIO_BLK_ID_BYTES`).
pub(crate) const SERIAL_LEN: u32 = 20;
/// Length in bytes of one range of a discard or write-zeroes.
const RANGE_LEN: u32 = 16;

/// Most ranges of one discard or write-zeroes.
pub(crate) const MAX_RANGES: u32 = 16;
/// Most sectors of one range of a discard: 1 GiB.
pub(crate) const MAX_DISCARD_SECTORS: u32 = 1 << 21;
/// Most sectors of one range of a write-zeroes: 4 MiB, so that all ranges together are at most
/// [`MAX_DATA`]. The zeros may have to be written.
pub(crate) const MAX_ZEROES_SECTORS: u32 = 1 << 13;
/// `size_max`: most bytes of one buffer. 254 such buffers (`seg_max`) are less than [`MAX_DATA`].
pub(crate) const MAX_BUFFER: u32 = 256 << 10;
/// Most bytes of one request's data. All requests in flight must complete before the guest is
/// paused, so none may take the disk long.
const MAX_DATA: u64 = 64 << 20;
/// Most buffers of one request's data.
pub(crate) const MAX_BUFFERS: usize = 256;

/// `VIRTIO_BLK_WRITE_ZEROES_FLAG_UNMAP`.
const UNMAP: u32 = 1;

/// Status of a completed request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub(crate) enum Status {
    /// `VIRTIO_BLK_S_OK`
    Ok = 0,
    /// `VIRTIO_BLK_S_IOERR`
    IoError = 1,
    /// `VIRTIO_BLK_S_UNSUPP`
    Unsupported = 2,
}

/// The chain has no byte for the status.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct NoStatus;

/// A range of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Range {
    /// In bytes, a multiple of 512.
    pub(crate) offset: u64,
    /// In bytes, a multiple of 512.
    pub(crate) len: u64,
    /// Whether the guest allows the space of the range to be given back.
    pub(crate) unmap: bool,
}

/// What a request asks for.
#[derive(Debug)]
pub(crate) enum Command<'a> {
    /// Read from `offset` into the buffers.
    Read { offset: u64, to: Buffers<'a> },
    /// Write the buffers from `offset` on.
    Write { offset: u64, from: Buffers<'a> },
    /// Make what was written durable.
    Flush,
    /// Return the serial number.
    GetId { to: Buffers<'a> },
    /// Discard the parsed ranges.
    Discard,
    /// Zero the parsed ranges.
    WriteZeroes,
    /// Complete with this status.
    Fail(Status),
}

/// A parsed request.
#[derive(Debug)]
pub(crate) struct Parsed<'a> {
    /// The operation, with its buffers.
    pub(crate) command: Command<'a>,
    /// The status byte.
    pub(crate) status: GuestBuffer,
    /// Device-writable bytes before the status byte.
    pub(crate) data_len: u32,
}

/// The `len` of the used element (2.7.8.2) of a request with `data_len` device-writable bytes
/// before the status byte, of which the device wrote the first `written`.
///
/// The driver may rely on each of the first `len` writable bytes. So the status byte counts only if
/// all bytes before it were written.
pub(crate) fn used_len(data_len: u32, written: u32) -> u32 {
    if written >= data_len { data_len + 1 } else { written }
}

/// The bounds that requests are checked against.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Limits {
    /// Size of the disk in bytes, a multiple of 512.
    pub(crate) size: u64,
    /// Whether the disk is read-only.
    pub(crate) read_only: bool,
}

/// Request types (5.2.6).
mod kind {
    pub(crate) const IN: u32 = 0;
    pub(crate) const OUT: u32 = 1;
    pub(crate) const FLUSH: u32 = 4;
    pub(crate) const GET_ID: u32 = 8;
    pub(crate) const DISCARD: u32 = 11;
    pub(crate) const WRITE_ZEROES: u32 = 13;
}

/// Parses `chain`. The ranges of a discard or write-zeroes go to `ranges`, which is cleared first.
///
/// A `QueueError` cannot occur for memory of a chain that was popped from a queue.
pub(crate) fn parse<'a>(
    chain: &'a Chain,
    ram: &GuestRam,
    limits: Limits,
    ranges: &mut Vec<Range>,
) -> Result<Result<Parsed<'a>, NoStatus>, QueueError> {
    ranges.clear();
    let writable = chain.writable();
    let split = writable.len().checked_sub(1).and_then(|data_len| writable.split_at(data_len));
    let Some((to, status)) = split else { return Ok(Err(NoStatus)) };
    let Some(status) = status.iter().next() else { return Ok(Err(NoStatus)) };
    let command = command(chain.readable(), to, ram, limits, ranges)?;
    Ok(Ok(Parsed { command, status, data_len: to.len() }))
}

fn command<'a>(
    readable: Buffers<'a>,
    to: Buffers<'a>,
    ram: &GuestRam,
    limits: Limits,
    ranges: &mut Vec<Range>,
) -> Result<Command<'a>, QueueError> {
    let failed = Ok(Command::Fail(Status::IoError));
    let Some((header, from)) = readable.split_at(HEADER_LEN) else { return failed };
    let mut bytes = [0; HEADER_LEN as usize];
    header.read(ram, &mut bytes)?;
    let (kind, sector) = (le_u32(&bytes[0..4]), le_u64(&bytes[8..16]));
    match kind {
        kind::OUT | kind::DISCARD | kind::WRITE_ZEROES if limits.read_only => failed,
        kind::IN => Ok(match limits.range_of_data(sector, to) {
            Some(offset) => Command::Read { offset, to },
            None => Command::Fail(Status::IoError),
        }),
        kind::OUT => Ok(match limits.range_of_data(sector, from) {
            Some(offset) => Command::Write { offset, from },
            None => Command::Fail(Status::IoError),
        }),
        kind::FLUSH => Ok(Command::Flush),
        kind::GET_ID if to.len() < SERIAL_LEN => failed,
        kind::GET_ID => Ok(Command::GetId { to }),
        kind::DISCARD | kind::WRITE_ZEROES => {
            let status = parse_ranges(from, ram, limits, kind, ranges)?;
            Ok(match (status, kind) {
                (Status::Ok, kind::DISCARD) => Command::Discard,
                (Status::Ok, _) => Command::WriteZeroes,
                (status, _) => Command::Fail(status),
            })
        }
        _ => Ok(Command::Fail(Status::Unsupported)),
    }
}

/// Parses the ranges of a discard or write-zeroes, and returns the status.
fn parse_ranges(
    mut from: Buffers<'_>,
    ram: &GuestRam,
    limits: Limits,
    kind: u32,
    ranges: &mut Vec<Range>,
) -> Result<Status, QueueError> {
    let count = from.len() / RANGE_LEN;
    let max_sectors = if kind == kind::WRITE_ZEROES { MAX_ZEROES_SECTORS } else { MAX_DISCARD_SECTORS };
    if count == 0 || count > MAX_RANGES || !from.len().is_multiple_of(RANGE_LEN) {
        return Ok(Status::IoError);
    }
    while let Some((one, rest)) = from.split_at(RANGE_LEN) {
        let mut bytes = [0; RANGE_LEN as usize];
        one.read(ram, &mut bytes)?;
        let (sector, count, flags) = (le_u64(&bytes[0..8]), le_u32(&bytes[8..12]), le_u32(&bytes[12..16]));
        let known = if kind == kind::WRITE_ZEROES { UNMAP } else { 0 };
        if flags & !known != 0 {
            return Ok(Status::Unsupported);
        }
        let len = u64::from(count) * SECTOR;
        let Some(offset) = limits.range(sector, len).filter(|_| count <= max_sectors) else {
            return Ok(Status::IoError);
        };
        ranges.push(Range { offset, len, unmap: flags & UNMAP != 0 });
        from = rest;
    }
    Ok(Status::Ok)
}

impl Limits {
    /// The offset of `sector` in bytes, if the `len` bytes from there lie within the disk.
    fn range(self, sector: u64, len: u64) -> Option<u64> {
        let offset = sector.checked_mul(SECTOR)?;
        let end = offset.checked_add(len)?;
        (end <= self.size).then_some(offset)
    }

    /// As `range`, for data: whole sectors, at most [`MAX_DATA`] bytes in at most [`MAX_BUFFERS`]
    /// buffers.
    fn range_of_data(self, sector: u64, data: Buffers<'_>) -> Option<u64> {
        let len = u64::from(data.len());
        let whole = len > 0 && len <= MAX_DATA && len.is_multiple_of(SECTOR);
        self.range(sector, len).filter(|_| whole && data.iter().nth(MAX_BUFFERS).is_none())
    }
}

fn le_u32(bytes: &[u8]) -> u32 {
    u32::from_le_bytes(bytes.try_into().expect("four bytes"))
}

fn le_u64(bytes: &[u8]) -> u64 {
    u64::from_le_bytes(bytes.try_into().expect("eight bytes"))
}
