//! The contents of a disk for tools: a base, with or without overlays, read and never written.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use config::{CacheType, IoEngine, Overlay};
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::options::DiskOptions;
use super::{Disk, DiskError};
use crate::SECTOR;

/// A read-only disk, with the contents that a guest would see.
///
/// Its files are locked for reading: a disk that a monitor writes to is refused, and no monitor can
/// write to it meanwhile.
#[derive(Debug)]
pub struct DiskImage {
    disk: Disk,
    /// By number, the base first.
    files: Vec<Arc<File>>,
}

/// A range of a disk whose bytes are stored in one place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ImageExtent {
    /// Offset on the disk in bytes, a multiple of 512.
    pub offset: u64,
    /// Length in bytes, a multiple of 512.
    pub len: u64,
    /// The file that stores it: 0 is the base, then the overlays from the bottom up.
    pub layer: usize,
    /// Whether it is a hole of that file, so that it reads as zeros.
    pub is_hole: bool,
}

/// Iterator over the extents of a disk, in order and without gaps.
#[derive(Debug)]
pub struct ImageExtents<'a> {
    image: &'a DiskImage,
    next: u64,
}

impl DiskImage {
    /// Opens the disk `base` with `overlays` on it, from the bottom up. Nothing is changed.
    pub fn open(base: &Path, overlays: &[PathBuf]) -> Result<Self, DiskError> {
        let overlay = overlays.split_last().map(|(top, layers)| Overlay {
            path: top.clone(),
            layers: layers.to_vec(),
            size_mib: None,
        });
        let disk = Disk::open(&DiskOptions {
            path: base.into(),
            read_only: true,
            cache_type: CacheType::Unsafe,
            engine: Some(IoEngine::Sync),
            overlay,
            io_threads: 1,
            lock: true,
            name_is_durable: true,
        })?;
        let files = disk.layers().files();
        Ok(DiskImage { disk, files })
    }

    /// Size in bytes, a multiple of 512.
    pub fn size(&self) -> u64 {
        self.disk.size()
    }

    /// Fills `bytes` from `offset` on, which need not be aligned. Fails past the end of the disk.
    pub fn read_at(&self, mut offset: u64, mut bytes: &mut [u8]) -> io::Result<()> {
        let end = offset.checked_add(bytes.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        while !bytes.is_empty() {
            let skip = offset % SECTOR;
            let len = (skip + bytes.len() as u64).next_multiple_of(SECTOR);
            let extent = self.disk.layers().locate(None, offset - skip, len);
            let count = (extent.len - skip).min(bytes.len() as u64);
            let (now, later) = bytes.split_at_mut(count as usize);
            self.files[usize::from(extent.file)].read_exact_at(now, extent.offset + skip)?;
            offset += count;
            bytes = later;
        }
        Ok(())
    }

    /// The extents of the disk. An exporter copies those that are no holes.
    pub fn extents(&self) -> ImageExtents<'_> {
        ImageExtents { image: self, next: 0 }
    }
}

impl Iterator for ImageExtents<'_> {
    type Item = ImageExtent;

    fn next(&mut self) -> Option<ImageExtent> {
        let left = self.image.size() - self.next;
        if left == 0 {
            return None;
        }
        let found = self.image.disk.layers().locate(None, self.next, left);
        let file = &self.image.files[usize::from(found.file)];
        let (is_hole, len) = hole_or_data(file, found.offset, found.len);
        let extent = ImageExtent { offset: self.next, len, layer: found.file.into(), is_hole };
        self.next += len;
        Some(extent)
    }
}

/// Whether a hole of `file` begins at `offset`, and the length of the hole or of the data in whole
/// sectors. At most `max`, a multiple of 512.
fn hole_or_data(file: &File, offset: u64, max: u64) -> (bool, u64) {
    match rustix::fs::seek(file, SeekFrom::Data(offset)) {
        Err(Errno::NXIO) => return (true, max),
        // The file system does not support it: all is data.
        Err(_) => return (false, max),
        Ok(data) => {
            let hole = (data - offset) / SECTOR * SECTOR;
            if hole > 0 {
                return (true, hole.min(max));
            }
        }
    }
    let end = rustix::fs::seek(file, SeekFrom::Hole(offset + SECTOR)).unwrap_or(offset + max);
    (false, (end - offset).next_multiple_of(SECTOR).min(max))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::overlay::inspect::{OverlayFile, SessionState};
    use crate::tests::rig::{Rig, overlaid, pattern};

    /// A base of 1 MiB whose second half is a hole, and two overlays, the upper one larger.
    fn image(dir: &Path) -> (PathBuf, Vec<PathBuf>, Vec<u8>) {
        let base = dir.join("base");
        let mut contents = pattern(0x11, 0, 512 << 10);
        std::fs::write(&base, &contents).unwrap();
        File::options().write(true).open(&base).unwrap().set_len(1 << 20).unwrap();
        contents.resize(2 << 20, 0);
        let (first, second) = (dir.join("first"), dir.join("second"));
        let mut rig = Rig::open(&overlaid(&base, first.clone(), vec![], IoEngine::Sync));
        rig.write(4096, &[1; 8192]).unwrap();
        rig.do_now(64 << 10, crate::io_request::Request::Discard { len: 64 << 10 }).unwrap();
        drop(rig);
        let mut options = overlaid(&base, second.clone(), vec![first.clone()], IoEngine::Sync);
        options.overlay.as_mut().unwrap().size_mib = Some(2);
        let mut rig = Rig::open(&options);
        rig.write(8192, &[2; 1024]).unwrap();
        rig.write(1 << 20, &[3; 512]).unwrap();
        drop(rig);
        contents[4096..12288].fill(1);
        contents[64 << 10..128 << 10].fill(0);
        contents[8192..9216].fill(2);
        contents[1 << 20..(1 << 20) + 512].fill(3);
        (base, vec![first, second], contents)
    }

    #[test]
    fn image_has_the_contents_of_all_layers() {
        let dir = tempfile::tempdir().unwrap();
        let (base, overlays, contents) = image(dir.path());
        let before: Vec<_> = overlays.iter().map(|path| std::fs::read(path).unwrap()).collect();
        let image = DiskImage::open(&base, &overlays).unwrap();
        assert_eq!(image.size(), 2 << 20);
        for (offset, len) in [(0, 2 << 20), (4095, 2), (8191, 1026), (100, 5000), ((2 << 20) - 1, 1)] {
            let mut bytes = vec![0xee; len];
            image.read_at(offset, &mut bytes).unwrap();
            assert!(bytes == contents[offset as usize..offset as usize + len], "{len} at {offset}");
        }
        assert!(image.read_at((2 << 20) - 1, &mut [0; 2]).is_err());
        assert!(image.read_at(u64::MAX, &mut [0; 2]).is_err());
        let mut exported = vec![0; 2 << 20];
        let mut next = 0;
        for extent in image.extents() {
            assert_eq!(extent.offset, next);
            next += extent.len;
            if !extent.is_hole {
                let place = extent.offset as usize..next as usize;
                image.read_at(extent.offset, &mut exported[place]).unwrap();
            }
        }
        assert_eq!(next, 2 << 20);
        assert!(exported == contents);
        let data: u64 = image.extents().filter(|extent| !extent.is_hole).map(|extent| extent.len).sum();
        assert!(data <= 640 << 10, "{data} bytes are no holes");
        drop(image);
        for (path, before) in overlays.iter().zip(before) {
            assert!(std::fs::read(path).unwrap() == before, "{} was changed", path.display());
        }
    }

    #[test]
    fn disk_in_use_has_no_image_but_overlay_info() {
        let dir = tempfile::tempdir().unwrap();
        let (base, overlays, _) = image(dir.path());
        let options = overlaid(&base, overlays[1].clone(), overlays[..1].to_vec(), IoEngine::Sync);
        let mut rig = Rig::open(&options);
        rig.write(0, &[4; 512]).unwrap();
        assert!(DiskImage::open(&base, &overlays).is_err());
        let file = OverlayFile::open(&overlays[1]).unwrap();
        assert_eq!(file.info().state, SessionState::Open);
        let ranges: Vec<_> = file.allocated().collect();
        assert_eq!(ranges, [(0, 512), (8192, 1024), (1 << 20, 1 << 20)]);
        assert_eq!(file.info().allocated, 1536 + (1 << 20));
        drop(rig);
        let file = OverlayFile::open(&overlays[1]).unwrap();
        let info = file.info();
        assert_eq!((info.state, info.sessions, info.virtual_size), (SessionState::Closed, 2, 2 << 20));
        let first = OverlayFile::open(&overlays[0]).unwrap();
        assert_eq!(info.backing.overlay, Some((first.info().uuid, 1)));
        assert_eq!((info.backing.size, first.info().backing.overlay), (1 << 20, None));
        assert!(OverlayFile::open(&base).is_err());
    }
}
