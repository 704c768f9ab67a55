//! Opens, creates and reads the file of an overlay. Everything read from it is checked before it is
//! used.

use std::fs::{File, OpenOptions};
use std::io;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
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
use crate::host_file::is_same_inode;
use crate::host_file::lock::LockHolder;

/// A boot of the host. A page cache does not outlive it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct HostBoot {
    /// `boot_id` of the kernel; zeros where `/proc` is missing, as in a jail.
    pub(crate) id: [u8; 16],
    /// Time of the boot, in seconds since 1970.
    pub(crate) time: u64,
}

impl HostBoot {
    /// Matches no boot of any host: that of a session whose commit map is not to be used.
    pub(crate) const INVALID: HostBoot = HostBoot { id: [0xff; 16], time: u64::MAX };

    pub(crate) fn now() -> Self {
        let id = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").ok();
        let id = id.and_then(|text| u128::from_str_radix(&text.trim().replace('-', ""), 16).ok());
        let now = rustix::time::clock_gettime(rustix::time::ClockId::Realtime).tv_sec;
        let up = rustix::time::clock_gettime(rustix::time::ClockId::Boottime).tv_sec;
        HostBoot { id: id.unwrap_or(0).to_be_bytes(), time: now.saturating_sub(up).max(0).cast_unsigned() }
    }

    /// Whether `session` began during this boot.
    pub(crate) fn is_of(&self, session: &Session) -> bool {
        if is_invalidated(session) {
            return false;
        }
        if self.id != [0; 16] && session.boot_id != [0; 16] {
            return self.id == session.boot_id;
        }
        // Both clocks are rounded to seconds. A reboot takes longer than that.
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

/// The file of an overlay, opened twice.
#[derive(Debug)]
pub(crate) struct Opened {
    /// For the contents.
    pub(crate) file: File,
    /// For the lock, and for syncs beside those of the queue. The kernel may keep `file` open for a
    /// while after its `io_uring` was closed, which must not keep the lock.
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
    // The open of a FIFO without a writer must not block. It is refused below.
    let mut options = options.clone();
    options.custom_flags(OFlags::NONBLOCK.bits().cast_signed());
    let open = || options.open(path).map_err(|e| io_error("open", path, e));
    // A file that appears at this moment counts as new.
    let is_new = !path.exists();
    let look = |file: &File| file.metadata().map_err(|e| io_error("read the metadata", path, e));
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
    if !is_same_inode(&locked, &metadata) {
        // The file was replaced at this moment.
        return Err(OverlayError::InUse { path: path.into(), holder: LockHolder::Unknown });
    }
    // `io_uring` would not wait for a file with `O_NONBLOCK`.
    rustix::fs::fcntl_getfl(&file)
        .and_then(|flags| rustix::fs::fcntl_setfl(&file, flags - OFlags::NONBLOCK))
        .map_err(|e| io_error("open", path, e))?;
    Ok(Opened { len: metadata.len(), file, lock, is_new })
}

/// Whether the file has no data, so that an overlay can be created in it.
pub(crate) fn is_blank(file: &File, len: u64) -> bool {
    len == 0 || rustix::fs::seek(file, SeekFrom::Data(0)) == Err(Errno::NXIO)
}

/// Checks that an overlay on the disk that `backing` identifies can have `size` bytes.
pub(crate) fn check_size(path: &Path, backing: BackingId, size: u64) -> Result<(), OverlayError> {
    let refused = |why: String| OverlayError::Size { path: path.into(), size, why };
    if !size.is_multiple_of(SECTOR) {
        return Err(refused("it must be a multiple of 512".into()));
    }
    if size < backing.size {
        return Err(refused(format!("at least the {} bytes of the disk below", backing.size)));
    }
    if size > MAX_VIRTUAL_SIZE {
        return Err(refused(format!("at most {MAX_VIRTUAL_SIZE} bytes")));
    }
    Ok(())
}

/// Creates an overlay of `size` bytes, which was checked, in a blank file. Returns the file's
/// length.
pub(crate) fn create(file: &File, path: &Path, backing: BackingId, size: u64) -> Result<u64, OverlayError> {
    let mut uuid = [0; 16];
    rustix::rand::getrandom(&mut uuid, rustix::rand::GetRandomFlags::empty())
        .map_err(|e| io_error("create the id", path, e))?;
    let header = new_header(uuid, backing, size);
    let session = Session {
        sessions: 0.into(),
        boot_id: [0; 16],
        boot_time: 0.into(),
        state: CLOSED.into(),
        crc: 0.into(),
    };
    let len = Layout::of(size).file_len;
    file.set_len(len).map_err(|e| io_error("set the size", path, e))?;
    // The header comes last: a file without it is blank, and the next attempt starts over.
    let written = file
        .write_all_at(session.sealed().as_bytes(), SESSION_OFFSET)
        .and_then(|()| file.write_all_at(header.as_bytes(), 0));
    written.map_err(|e| io_error("write the header", path, e))?;
    Ok(len)
}

/// The header of an overlay of `size` bytes on the disk that `backing` identifies.
pub(crate) fn new_header(uuid: [u8; 16], backing: BackingId, size: u64) -> Header {
    let header = Header {
        magic: MAGIC,
        version: VERSION.into(),
        block_size: (SECTOR as u32).into(),
        virtual_size: size.into(),
        uuid,
        base_size: backing.size.into(),
        base_uuid: backing.uuid,
        base_sessions: backing.sessions.into(),
        base_fingerprint: backing.fingerprint.into(),
        crc: 0.into(),
    };
    header.sealed()
}

/// Reads and checks the header and the session of a file of `len` bytes.
pub(crate) fn read_headers(file: &File, path: &Path, len: u64) -> Result<(Header, Session), OverlayError> {
    let mut header = Header::new_zeroed();
    let mut session = Session::new_zeroed();
    let not_an_overlay = || OverlayError::NotAnOverlay { path: path.into() };
    let unreadable = |e| io_error("read the header", path, e);
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
        return Err(damaged("wrong checksum"));
    }
    let size = header.virtual_size.get();
    if header.block_size.get() != SECTOR as u32 {
        return Err(damaged("its block size is not 512"));
    }
    if size % SECTOR != 0 || size > MAX_VIRTUAL_SIZE || header.base_size.get() > size {
        return Err(damaged("its sizes are impossible"));
    }
    let needed = Layout::of(size).file_len;
    if len < needed {
        return Err(OverlayError::Truncated { path: path.into(), len, needed });
    }
    file.read_exact_at(session.as_mut_bytes(), SESSION_OFFSET).map_err(unreadable)?;
    if !session.is_sealed() {
        return Err(damaged("wrong session checksum"));
    }
    Ok((header, session))
}

/// Checks that the overlay was created on the disk that `backing` identifies.
pub(crate) fn check_base(header: &Header, path: &Path, backing: BackingId) -> Result<(), OverlayError> {
    let what = if header.base_size.get() != backing.size {
        format!("that one had {} bytes, this one has {}", header.base_size, backing.size)
    } else if header.base_uuid != backing.uuid {
        "it has another top layer".into()
    } else if header.base_sessions.get() != backing.sessions {
        "the layer below was written to after the overlay was created".into()
    } else if header.base_fingerprint.get() != backing.fingerprint {
        "its contents differ".into()
    } else {
        return Ok(());
    };
    Err(OverlayError::WrongBase { path: path.into(), what })
}

/// The maps of a file, as read.
pub(crate) struct Maps {
    /// The allocated sectors.
    pub(crate) map: Map,
    /// The allocated sectors that the durable map lacks.
    pub(crate) missing_in_durable: Dirty,
    /// Whether the commit map was used.
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
    let unreadable = |e| io_error("read the map", path, e);
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
            "overlay {}: a sync failed in its last session; it has what the guest had flushed before",
            path.display()
        );
    } else {
        log::warn!(
            "overlay {}: it was not closed before the host went down; it has what the guest had flushed",
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
            // Pages are aligned to the file system's blocks. Where not, the page around the data is
            // read.
            Ok(data) => at = at.max(start + (data.max(start) - start) / PAGE_BYTES * PAGE_BYTES),
            Err(Errno::NXIO) => break,
            // The file system does not support `SEEK_DATA`: everything is read.
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

/// Makes a range of the file read as zeros.
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
