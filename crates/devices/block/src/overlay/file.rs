//! The overlay's file: opening and making it, and reading what it says, which is believed only after it was checked.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, MetadataExt, OpenOptionsExt};
use std::path::Path;

use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom};
use rustix::io::Errno;
use zerocopy::{FromZeros, IntoBytes};

use super::error::OverlayError;
use super::format::{
    BackingId, CLOSED, Header, Layout, MAGIC, MAX_VIRTUAL_SIZE, OPEN, SESSION_OFFSET, Session, VERSION,
};
use super::map::{Dirty, Map, PAGE_BYTES};
use crate::SECTOR;
use crate::host_file::lock::LockHolder;

/// A start of the host: page caches do not live longer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostBoot {
    /// The kernel's name for it; zeros where `/proc` is not there, as in a jail.
    pub(crate) id: [u8; 16],
    /// When it was, in seconds since 1970.
    pub(crate) time: u64,
}

impl HostBoot {
    /// No start of any host: that of a session whose map B is not to be believed.
    pub(crate) const INVALID: HostBoot = HostBoot { id: [0xff; 16], time: u64::MAX };

    pub(crate) fn now() -> Self {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let id = id.and_then(|text| u128::from_str_radix(&text.trim().replace('-', ""), 16).ok());
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
        let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec;
        HostBoot { id: id.unwrap_or(0).to_be_bytes(), time: now.saturating_sub(up).max(0).cast_unsigned() }
    }

    /// Whether `session` was session_open since this start.
    pub(crate) fn is_of(&self, session: &Session) -> bool {
        if is_invalidated(session) {
            return false;
        }
        if self.id != [0; 16] && session.boot_id != [0; 16] {
            return self.id == session.boot_id;
        }
        // Both clocks are rounded to seconds. An earlier start lies further back than that: a host needs longer to start.
        self.time.abs_diff(session.boot_time.get()) <= 1
    }
}

/// Whether a sync of the overlay failed in this session.
pub(crate) fn is_invalidated(session: &Session) -> bool {
    let HostBoot { id, time } = HostBoot::INVALID;
    (session.boot_id, session.boot_time.get()) == (id, time)
}

pub(crate) fn io_error(what: &'static str, path: &Path, source: impl Into<io::Error>) -> OverlayError {
    OverlayError::Io { what, path: path.into(), source: source.into() }
}

/// An overlay's file, open twice.
#[derive(Debug)]
pub(crate) struct Opened {
    /// For its contents.
    pub(crate) file: File,
    /// For the lock, and for syncs beside those of the disk's queue. The kernel may keep `file` for a while after its `io_uring` was
    /// closed, and must not keep the lock.
    pub(crate) lock: File,
    /// Its length in bytes.
    pub(crate) len: u64,
    /// Whether the file is new.
    pub(crate) is_new: bool,
}

/// Opens and locks the overlay at `path`.
pub(crate) fn open(
    path: &Path,
    options: &OpenOptions,
    operation: FlockOperation,
) -> Result<Opened, OverlayError> {
    // A FIFO without a writer must not mark_allocated us up; what is no file is refused below.
    let mut options = options.clone();
    options.custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    let open = || options.open(path).map_err(|e| io_error("open", path, e));
    // One that appears in this very moment only counts as new.
    let is_new = !path.exists();
    let look = |file: &File| file.metadata().map_err(|e| io_error("read the size of", path, e));
    let lock = open()?;
    match rustix::fs::flock(&lock, operation) {
        Ok(()) => {}
        Err(Errno::WOULDBLOCK) => {
            return Err(OverlayError::InUse { path: path.into(), holder: LockHolder::of(&lock) });
        }
        Err(e) => return Err(io_error("lock", path, e)),
    }
    let file = open()?;
    let (locked, metadata) = (look(&lock)?, look(&file)?);
    if !metadata.is_file() {
        return Err(OverlayError::NotAFile { path: path.into() });
    }
    if (locked.dev(), locked.ino()) != (metadata.dev(), metadata.ino()) {
        // Somebody put another file there in this very moment.
        return Err(OverlayError::InUse { path: path.into(), holder: LockHolder::Unknown });
    }
    // io_uring would not wait for a file that is opened like that.
    rustix::fs::fcntl_getfl(&file)
        .and_then(|flags| rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK))
        .map_err(|e| io_error("open", path, e))?;
    Ok(Opened { len: metadata.len(), file, lock, is_new })
}

/// Whether the file has no byte of data: a new overlay can be made in it.
pub(crate) fn is_blank(file: &File, len: u64) -> bool {
    len == 0 || rustix::fs::seek(file, SeekFrom::Data(0)) == Err(Errno::NXIO)
}

/// Whether two open files are the same one.
pub(crate) fn is_same_file(one: &File, other: &File) -> io::Result<bool> {
    let (one, other) = (one.metadata()?, other.metadata()?);
    Ok((one.dev(), one.ino()) == (other.dev(), other.ino()))
}

/// Checks that an overlay on what `beneath` describes can have `size` bytes.
pub(crate) fn check_size(path: &Path, beneath: BackingId, size: u64) -> Result<(), OverlayError> {
    let refused = |why: String| OverlayError::Size { path: path.into(), size, why };
    if !size.is_multiple_of(SECTOR) {
        return Err(refused("it must be a multiple of 512".into()));
    }
    if size < beneath.size {
        return Err(refused(format!("the disk beneath has {} bytes", beneath.size)));
    }
    if size > MAX_VIRTUAL_SIZE {
        return Err(refused(format!("at most {MAX_VIRTUAL_SIZE} bytes")));
    }
    Ok(())
}

/// Makes a new overlay of `size` bytes, which was checked, in a blank file; the file's length.
pub(crate) fn create(file: &File, path: &Path, beneath: BackingId, size: u64) -> Result<u64, OverlayError> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| io_error("name", path, e))?;
    let header = new_header(uuid, beneath, size);
    let session = Session {
        sessions: 0.into(),
        boot_id: [0; 16],
        boot_time: 0.into(),
        state: CLOSED.into(),
        crc: 0.into(),
    };
    let len = Layout::of(size).file_len;
    file.set_len(len).map_err(|e| io_error("set the size of", path, e))?;
    // The header comes last: a file without it is blank, and the next attempt begins anew.
    let written = file
        .write_all_at(session.sealed().as_bytes(), SESSION_OFFSET)
        .and_then(|()| file.write_all_at(header.as_bytes(), 0));
    written.map_err(|e| io_error("write the header of", path, e))?;
    Ok(len)
}

/// The header of an overlay of `size` bytes on what `beneath` describes.
pub(crate) fn new_header(uuid: [u8; 16], beneath: BackingId, size: u64) -> Header {
    let header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        block_size: (SECTOR as u32).into(),
        virtual_size: size.into(),
        uuid,
        base_size: beneath.size.into(),
        base_uuid: beneath.uuid,
        base_sessions: beneath.sessions.into(),
        base_fingerprint: beneath.fingerprint.into(),
        crc: 0.into(),
    };
    header.sealed()
}

/// Reads and checks the header and the session of a file of `len` bytes.
pub(crate) fn read_headers(file: &File, path: &Path, len: u64) -> Result<(Header, Session), OverlayError> {
    let mut header = Header::new_zeroed();
    let mut session = Session::new_zeroed();
    let not_an_overlay = || OverlayError::NotAnOverlay { path: path.into() };
    let unreadable = |e| io_error("read the header of", path, e);
    match file.read_exact_at(header.as_mut_bytes(), 0) {
        Ok(()) => {}
        Err(e) if e.kind() == io::ErrorKind::UnexpectedEof => return Err(not_an_overlay()),
        Err(e) => return Err(unreadable(e)),
    }
    if header.magic != MAGIC {
        return Err(not_an_overlay());
    }
    if header.version.get() != VERSION {
        return Err(OverlayError::Version { path: path.into(), version: header.version.get() });
    }
    let damaged = |what| OverlayError::Damaged { path: path.into(), what };
    if !header.is_sealed() {
        return Err(damaged("its checksum is wrong"));
    }
    let size = header.virtual_size.get();
    if header.block_size.get() != SECTOR as u32 {
        return Err(damaged("its block size is not 512"));
    }
    if size % SECTOR != 0 || size > MAX_VIRTUAL_SIZE || header.base_size.get() > size {
        return Err(damaged("its sizes are not possible"));
    }
    let needed = Layout::of(size).file_len;
    if len < needed {
        return Err(OverlayError::Truncated { path: path.into(), len, needed });
    }
    file.read_exact_at(session.as_mut_bytes(), SESSION_OFFSET).map_err(unreadable)?;
    if !session.is_sealed() {
        return Err(damaged("the checksum of its session is wrong"));
    }
    Ok((header, session))
}

/// Checks that the overlay was made on what lies beneath it now.
pub(crate) fn check_base(header: &Header, path: &Path, beneath: BackingId) -> Result<(), OverlayError> {
    let what = if header.base_size.get() != beneath.size {
        format!("it was made on one of {} bytes, this one has {}", header.base_size, beneath.size)
    } else if header.base_uuid != beneath.uuid {
        "it was made on another layer".into()
    } else if header.base_sessions.get() != beneath.sessions {
        "the layer beneath was written to after it was made".into()
    } else if header.base_fingerprint.get() != beneath.fingerprint {
        "its contents differ from those that it was made on".into()
    } else {
        return Ok(());
    };
    Err(OverlayError::WrongBase { path: path.into(), what })
}

/// What the maps of a file say.
pub(crate) struct Maps {
    /// What the overlay holds.
    pub(crate) map: Map,
    /// What of it map A does not have.
    pub(crate) missing_in_durable: Dirty,
    /// Whether map B was believed.
    pub(crate) trust_commit_map: bool,
}

pub(crate) fn read_maps(
    file: &File,
    path: &Path,
    header: &Header,
    session: &Session,
) -> Result<Maps, OverlayError> {
    let layout = Layout::of(header.virtual_size.get());
    let mut map = Map::new(header.virtual_size.get() / SECTOR);
    let len = map.page_count() * PAGE_BYTES;
    let unreadable = |e| io_error("read the map of", path, e);
    for_each_page(file, layout.durable_map, len, |page, bytes| map.merge(page, bytes)).map_err(unreadable)?;

    let trust_commit_map = session.state.get() != OPEN || HostBoot::now().is_of(session);
    let mut missing_in_durable = Dirty::default();
    if trust_commit_map {
        let merge = |page, bytes: &[u8; PAGE_BYTES as usize]| {
            let before = map.bytes(page, 0..=(PAGE_BYTES / 8 - 1) as u16);
            if before.iter().zip(bytes).any(|(a, b)| b & !a != 0) {
                map.merge(page, bytes);
                missing_in_durable.mark_page(page);
            }
        };
        for_each_page(file, layout.commit_map, len, merge).map_err(unreadable)?;
    } else if is_invalidated(session) {
        log::warn!(
            "overlay {}: a sync failed when it was last in use: it holds what the guest had flushed before that",
            path.display()
        );
    } else {
        log::warn!(
            "overlay {} was not closed before the host went down: it holds what the guest had flushed",
            path.display()
        );
    }
    Ok(Maps { map, missing_in_durable, trust_commit_map })
}

/// Calls `visit` with each 4 KiB page that has data in the `len` bytes from `start`.
fn for_each_page(
    file: &File,
    start: u64,
    len: u64,
    mut visit: impl FnMut(u64, &[u8; PAGE_BYTES as usize]),
) -> io::Result<()> {
    let end = start + len;
    let mut bytes = [0; PAGE_BYTES as usize];
    let mut at = start;
    while at < end {
        match rustix::fs::seek(file, SeekFrom::Data(at)) {
            // Pages are aligned as the file system's blocks are, or better; where not, a page is read for its part.
            Ok(data) => at = at.max(start + (data.max(start) - start) / PAGE_BYTES * PAGE_BYTES),
            Err(Errno::NXIO) => break,
            // A file system that does not tell holes from data: everything is read.
            Err(_) => {}
        }
        if at >= end {
            break;
        }
        file.read_exact_at(&mut bytes, at)?;
        visit((at - start) / PAGE_BYTES, &bytes);
        at += PAGE_BYTES;
    }
    Ok(())
}

/// Lets a range of the file read as zeros.
pub(crate) fn clear(file: &File, start: u64, len: u64) -> io::Result<()> {
    if len == 0 {
        return Ok(());
    }
    let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
    match rustix::fs::fallocate(file, mode, start, len) {
        Err(Errno::OPNOTSUPP | Errno::NOSYS) => {}
        result => return Ok(result?),
    }
    let zeros = [0; PAGE_BYTES as usize];
    let mut at = start;
    while at < start + len {
        let count = (start + len - at).min(PAGE_BYTES);
        file.write_all_at(&zeros[..count as usize], at)?;
        at += count;
    }
    Ok(())
}
