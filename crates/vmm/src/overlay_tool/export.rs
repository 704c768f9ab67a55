//! Writes a disk with its overlays to one image.

use std::fmt;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::str::FromStr;

use block::disk::DiskImage;
use rustix::fs::{CWD, RenameFlags, renameat_with};

use super::error::ToolError;
use super::qcow2::{self, CLUSTER};

/// Bytes that are copied at once to a raw image.
const CHUNK: u64 = 1 << 20;

/// The format of an image.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Format {
    /// The bytes of the disk, sparse.
    Raw,
    /// qcow2, version 3.
    Qcow2,
}

impl FromStr for Format {
    type Err = ();

    fn from_str(text: &str) -> Result<Self, ()> {
        match text {
            "raw" => Ok(Format::Raw),
            "qcow2" => Ok(Format::Qcow2),
            _ => Err(()),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Format::Raw => "raw",
            Format::Qcow2 => "qcow2",
        })
    }
}

/// Writes `image` to a new file at `output`, which appears when it is complete. Returns the bytes
/// of data.
///
/// Only this user may read the file, as an overlay.
pub(super) fn export(image: &DiskImage, output: &Path, format: Format) -> Result<u64, ToolError> {
    if output.symlink_metadata().is_ok() {
        return Err(ToolError::Exists { path: output.to_owned() });
    }
    let mut partial = output.as_os_str().to_owned();
    partial.push(".partial");
    let partial = PathBuf::from(partial);
    let failed = |source| ToolError::Write { path: output.to_owned(), source };
    let file = File::options().read(true).write(true).create_new(true).mode(0o600).open(&partial);
    let file = file.map_err(|source| ToolError::Write { path: partial.clone(), source })?;
    let written = match format {
        Format::Raw => write_raw(image, &file),
        Format::Qcow2 => write_qcow2(image, &file),
    };
    let named = written.and_then(|bytes| {
        file.sync_all()?;
        renameat_with(CWD, &partial, CWD, output, RenameFlags::NOREPLACE)?;
        Ok(bytes)
    });
    if named.is_err() {
        // What is left of it is of no use.
        let _ = std::fs::remove_file(&partial);
    }
    let bytes = named.map_err(|source| match source.kind() {
        io::ErrorKind::AlreadyExists => ToolError::Exists { path: output.to_owned() },
        _ => failed(source),
    })?;
    let parent = output.parent().filter(|parent| !parent.as_os_str().is_empty());
    File::open(parent.unwrap_or(Path::new("."))).and_then(|dir| dir.sync_all()).map_err(failed)?;
    Ok(bytes)
}

fn write_raw(image: &DiskImage, file: &File) -> io::Result<u64> {
    file.set_len(image.size())?;
    let (mut buffer, mut total) = (vec![0; CHUNK as usize], 0);
    for extent in image.extents().filter(|extent| !extent.is_hole) {
        let mut offset = extent.offset;
        let end = extent.offset + extent.len;
        while offset < end {
            let bytes = &mut buffer[..(end - offset).min(CHUNK) as usize];
            image.read_at(offset, bytes)?;
            file.write_all_at(bytes, offset)?;
            offset += bytes.len() as u64;
        }
        total += extent.len;
    }
    Ok(total)
}

fn write_qcow2(image: &DiskImage, file: &File) -> io::Result<u64> {
    let clusters = data_clusters(image);
    let size = image.size();
    qcow2::write(file, size, &clusters, |cluster, out| {
        let start = cluster * CLUSTER;
        let (disk, past_end) = out.split_at_mut((size - start).min(CLUSTER) as usize);
        past_end.fill(0);
        image.read_at(start, disk)
    })?;
    Ok(clusters.iter().map(|range| (range.end - range.start) * CLUSTER).sum())
}

/// The clusters that have data, as ascending ranges that do not touch.
fn data_clusters(image: &DiskImage) -> Vec<Range<u64>> {
    let mut clusters: Vec<Range<u64>> = Vec::new();
    for extent in image.extents().filter(|extent| !extent.is_hole) {
        let range = extent.offset / CLUSTER..(extent.offset + extent.len).div_ceil(CLUSTER);
        match clusters.last_mut() {
            Some(last) if range.start <= last.end => last.end = last.end.max(range.end),
            _ => clusters.push(range),
        }
    }
    clusters
}
