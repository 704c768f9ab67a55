//! Loads an ELF kernel.
//!
//! All headers are checked against the file and against guest memory before the first byte is
//! loaded. A file that is refused changes no guest memory.

use std::fs::File;

use memory::GuestRam;
use zerocopy::{FromBytes, Immutable, KnownLayout};

use super::error::{BootError, ElfError, MAX_PROGRAM_HEADERS};
use super::io::{copy_to_guest, read_at};
use super::kernel::{Entry, LoadedKernel};
use crate::layout;

/// The first bytes of an ELF file.
pub(super) const MAGIC: [u8; 4] = *b"\x7fELF";

/// The most bytes of a note segment that are read; kernels have a few hundred.
const MAX_NOTES: u64 = 64 * 1024;

const CLASS_64: u8 = 2;
const LITTLE_ENDIAN: u8 = 1;
const MACHINE_X86_64: u16 = 62;
const TYPE_EXECUTABLE: u16 = 2;
const TYPE_SHARED: u16 = 3;
const SEGMENT_LOAD: u32 = 1;
const SEGMENT_NOTE: u32 = 4;
/// `XEN_ELFNOTE_PHYS32_ENTRY`: the address of the PVH entry point.
const NOTE_PVH_ENTRY: u32 = 18;

/// `Elf64_Ehdr`.
#[repr(C)]
#[derive(Debug, FromBytes, KnownLayout, Immutable)]
struct FileHeader {
    magic: [u8; 4],
    class: u8,
    data: u8,
    ident: [u8; 10],
    kind: u16,
    machine: u16,
    version: u32,
    entry: u64,
    program_headers: u64,
    section_headers: u64,
    flags: u32,
    size: u16,
    program_header_size: u16,
    program_header_count: u16,
    section_header_size: u16,
    section_header_count: u16,
    section_names: u16,
}

/// `Elf64_Phdr`.
#[repr(C)]
#[derive(Debug, Clone, Copy, FromBytes, KnownLayout, Immutable)]
struct ProgramHeader {
    kind: u32,
    flags: u32,
    offset: u64,
    virtual_addr: u64,
    physical_addr: u64,
    file_size: u64,
    mem_size: u64,
    align: u64,
}

/// `Elf64_Nhdr`.
#[repr(C)]
#[derive(Debug, FromBytes, KnownLayout, Immutable)]
struct NoteHeader {
    name_size: u32,
    desc_size: u32,
    kind: u32,
}

/// A segment to load, checked against the file and against guest memory.
#[derive(Debug, Clone, Copy)]
struct Segment {
    index: usize,
    addr: u64,
    mem_size: u64,
    offset: u64,
    file_size: u64,
}

impl Segment {
    fn end(&self) -> u64 {
        self.addr + self.mem_size
    }

    fn contains(&self, addr: u64) -> bool {
        (self.addr..self.end()).contains(&addr)
    }
}

/// Loads the file, which has `len` bytes and begins with [`MAGIC`].
pub(super) fn load(ram: &GuestRam, file: &mut File, len: u64) -> Result<LoadedKernel, BootError> {
    let header = read_file_header(file, len)?;
    let program_headers = read_program_headers(file, len, &header)?;
    let segments = check_segments(ram, &program_headers, len)?;
    let entry = match find_pvh_entry(file, len, &program_headers)? {
        Some(entry) => Entry::Pvh(check_pvh_entry(&segments, entry)?),
        None => Entry::Linux64 { address: check_entry(&segments, "ELF", header.entry)?, header: None },
    };
    for segment in &segments {
        // Memory behind the bytes of the file is zero already, because the RAM is new.
        copy_to_guest(ram, file, segment.offset, segment.addr, segment.file_size, "kernel image")?;
    }
    // An initrd goes into the first region, so only segments there limit it.
    let first_region = ram.regions()[0].size;
    let end = segments.iter().map(Segment::end).filter(|end| *end <= first_region).max().unwrap_or(0);
    let used = segments.iter().map(|segment| segment.addr..segment.end()).collect();
    Ok(LoadedKernel { entry, used, end, initrd_limit: u64::MAX })
}

fn read_file_header(file: &mut File, len: u64) -> Result<FileHeader, BootError> {
    let mut bytes = [0; size_of::<FileHeader>()];
    check_in_file("the ELF header", 0, bytes.len() as u64, len)?;
    read_at(file, 0, &mut bytes, "kernel image")?;
    let header: FileHeader = zerocopy::transmute!(bytes);
    let wrong = |what, value, expected| Err(ElfError::Kind { what, value, expected }.into());
    if header.class != CLASS_64 {
        return wrong("the class", header.class.into(), "2 (64-bit)");
    }
    if header.data != LITTLE_ENDIAN {
        return wrong("the byte order", header.data.into(), "1 (little-endian)");
    }
    if header.machine != MACHINE_X86_64 {
        return wrong("the machine", header.machine, "62 (x86_64)");
    }
    if ![TYPE_EXECUTABLE, TYPE_SHARED].contains(&header.kind) {
        return wrong("the file type", header.kind, "2 (executable) or 3 (position-independent)");
    }
    if usize::from(header.program_header_size) != size_of::<ProgramHeader>() {
        return wrong("the size of a program header", header.program_header_size, "56");
    }
    if !(1..=MAX_PROGRAM_HEADERS).contains(&header.program_header_count) {
        return Err(ElfError::ProgramHeaders(header.program_header_count).into());
    }
    Ok(header)
}

fn read_program_headers(
    file: &mut File,
    len: u64,
    header: &FileHeader,
) -> Result<Vec<ProgramHeader>, BootError> {
    let size = usize::from(header.program_header_count) * size_of::<ProgramHeader>();
    check_in_file("the program header table", header.program_headers, size as u64, len)?;
    let mut bytes = vec![0; size];
    read_at(file, header.program_headers, &mut bytes, "kernel image")?;
    let headers = bytes.chunks_exact(size_of::<ProgramHeader>());
    Ok(headers.map(|h| ProgramHeader::read_from_bytes(h).expect("a chunk has its size")).collect())
}

/// The segments to load, sorted by address. Each is inside the file and inside RAM; none overlaps
/// another.
fn check_segments(ram: &GuestRam, headers: &[ProgramHeader], len: u64) -> Result<Vec<Segment>, ElfError> {
    let mut segments = Vec::new();
    for (index, h) in headers.iter().enumerate().filter(|(_, h)| h.kind == SEGMENT_LOAD && h.mem_size > 0) {
        if h.file_size > h.mem_size {
            return Err(ElfError::SegmentSizes { index, file_size: h.file_size, mem_size: h.mem_size });
        }
        check_in_file(&format!("segment {index}"), h.offset, h.file_size, len)?;
        if h.physical_addr < layout::HIGH_RAM || !ram.contains(h.physical_addr, h.mem_size) {
            return Err(ElfError::SegmentOutsideRam {
                index,
                addr: h.physical_addr,
                size: h.mem_size,
                low: layout::HIGH_RAM,
                high: ram.regions()[0].size,
            });
        }
        segments.push(Segment {
            index,
            addr: h.physical_addr,
            mem_size: h.mem_size,
            offset: h.offset,
            file_size: h.file_size,
        });
    }
    if segments.is_empty() {
        return Err(ElfError::NoSegments);
    }
    segments.sort_by_key(|s| s.addr);
    match segments.windows(2).find(|pair| pair[0].end() > pair[1].addr) {
        Some(pair) => Err(ElfError::SegmentsOverlap {
            first: pair[0].index.min(pair[1].index),
            second: pair[0].index.max(pair[1].index),
            addr: pair[1].addr,
        }),
        None => Ok(segments),
    }
}

/// The entry point in the PVH note, if there is one.
fn find_pvh_entry(file: &mut File, len: u64, headers: &[ProgramHeader]) -> Result<Option<u64>, BootError> {
    for (index, h) in headers.iter().enumerate().filter(|(_, h)| h.kind == SEGMENT_NOTE) {
        check_in_file(&format!("note segment {index}"), h.offset, h.file_size, len)?;
        let mut notes = vec![0; h.file_size.min(MAX_NOTES) as usize];
        read_at(file, h.offset, &mut notes, "kernel image")?;
        if let Some(entry) = pvh_entry_in(&notes) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

/// Finds the PVH note. A note is a header, a name and a value, the latter two padded to 4 bytes. An
/// invalid note ends the search.
fn pvh_entry_in(mut notes: &[u8]) -> Option<u64> {
    while let Ok((header, rest)) = NoteHeader::read_from_prefix(notes) {
        let (name, rest) = split_padded(rest, header.name_size)?;
        let (value, rest) = split_padded(rest, header.desc_size)?;
        if header.kind == NOTE_PVH_ENTRY && name == b"Xen\0" {
            return match value.len() {
                4 => value.try_into().ok().map(|b| u32::from_le_bytes(b).into()),
                8 => value.try_into().ok().map(u64::from_le_bytes),
                _ => None,
            };
        }
        notes = rest;
    }
    None
}

/// The first `len` bytes, and the bytes behind their padding to 4 bytes.
fn split_padded(bytes: &[u8], len: u32) -> Option<(&[u8], &[u8])> {
    let len = len as usize;
    let padded = len.checked_next_multiple_of(4)?;
    let field = bytes.get(..len)?;
    Some((field, bytes.get(padded..).unwrap_or_default()))
}

fn check_entry(segments: &[Segment], kind: &'static str, entry: u64) -> Result<u64, ElfError> {
    if segments.iter().any(|s| s.contains(entry)) { Ok(entry) } else { Err(ElfError::Entry { kind, entry }) }
}

/// As [`check_entry`], for an entry in 32-bit protected mode.
fn check_pvh_entry(segments: &[Segment], entry: u64) -> Result<u64, ElfError> {
    match check_entry(segments, "PVH", entry)? {
        entry if entry > u32::MAX.into() => Err(ElfError::PvhEntry { entry }),
        entry => Ok(entry),
    }
}

fn check_in_file(what: &str, offset: u64, size: u64, len: u64) -> Result<(), ElfError> {
    match offset.checked_add(size) {
        Some(end) if end <= len => Ok(()),
        end => Err(ElfError::Truncated { what: what.to_owned(), end: end.unwrap_or(u64::MAX), len }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use proptest::prelude::*;
    use std::io::Write;
    use vm_memory::{Bytes, GuestAddress};

    /// An ELF file with one note segment (if any) and the given segments `(address, content, size
    /// in memory)`.
    fn elf(entry: u64, pvh: Option<u32>, segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let count = segments.len() + usize::from(pvh.is_some());
        let mut offset = 64 + 56 * count as u64;
        let (mut headers, mut content) = (Vec::new(), Vec::<u8>::new());
        let mut add = |kind: u32, addr: u64, bytes: &[u8], mem: u64| {
            for field in [u64::from(kind), offset, addr, addr, bytes.len() as u64, mem, 0] {
                headers.extend(field.to_le_bytes());
            }
            offset += bytes.len() as u64;
            content.extend(bytes);
        };
        for (addr, bytes, mem) in segments {
            add(SEGMENT_LOAD, *addr, bytes, *mem);
        }
        if let Some(pvh) = pvh {
            let mut note = Vec::new();
            for field in [4, 4, NOTE_PVH_ENTRY] {
                note.extend(field.to_le_bytes());
            }
            note.extend(b"Xen\0");
            note.extend(pvh.to_le_bytes());
            add(SEGMENT_NOTE, 0, &note, 0);
        }
        let mut file = Vec::from(*b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0");
        file.extend([2, 0, 62, 0, 1, 0, 0, 0]);
        for field in [entry, 64, 0] {
            file.extend(field.to_le_bytes());
        }
        file.extend([0, 0, 0, 0, 64, 0, 56, 0, count as u8, 0, 0, 0, 0, 0, 0, 0]);
        file.extend(headers);
        file.extend(content);
        file
    }

    fn load_bytes(bytes: &[u8]) -> (GuestRam, Result<LoadedKernel, BootError>) {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(bytes).unwrap();
        let loaded = load(&ram, &mut file, bytes.len() as u64);
        (ram, loaded)
    }

    fn elf_error(bytes: &[u8]) -> ElfError {
        match load_bytes(bytes).1 {
            Err(BootError::Elf(error)) => error,
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn segments_are_loaded_and_the_pvh_note_wins_over_the_entry() {
        let file =
            elf(0x20_0000, Some(0x10_0004), &[(0x10_0000, b"kernel", 0x2000), (0x20_0000, b"more", 4)]);
        let (ram, loaded) = load_bytes(&file);
        let kernel = loaded.unwrap();
        assert_eq!(kernel.entry, Entry::Pvh(0x10_0004));
        assert_eq!(kernel.end, 0x20_0004);
        let mut bytes = [0; 6];
        ram.memory().read_slice(&mut bytes, GuestAddress(0x10_0000)).unwrap();
        assert_eq!(&bytes, b"kernel");
    }

    #[test]
    fn without_a_note_the_elf_entry_is_used() {
        let (_, loaded) = load_bytes(&elf(0x10_0002, None, &[(0x10_0000, b"kernel", 6)]));
        assert_eq!(loaded.unwrap().entry, Entry::Linux64 { address: 0x10_0002, header: None });
    }

    #[test]
    fn entry_of_zero_is_refused() {
        assert_eq!(
            elf_error(&elf(0, None, &[(0x10_0000, b"k", 1)])),
            ElfError::Entry { kind: "ELF", entry: 0 }
        );
        let pvh = elf(0x10_0000, Some(0), &[(0x10_0000, b"k", 1)]);
        assert_eq!(elf_error(&pvh), ElfError::Entry { kind: "PVH", entry: 0 });
    }

    #[test]
    fn pvh_entry_above_4_gib_is_refused() {
        let segment = Segment { index: 0, addr: 1 << 20, mem_size: 8 << 30, offset: 0, file_size: 0 };
        assert_eq!(check_pvh_entry(&[segment], 0xffff_ffff), Ok(0xffff_ffff));
        let entry = 1 << 32;
        assert_eq!(check_pvh_entry(&[segment], entry), Err(ElfError::PvhEntry { entry }));
    }

    #[test]
    fn segments_outside_ram_are_refused() {
        for (addr, size) in [(0xf_ffff, 1), (0, 1), (0xff_ffff, 2), (u64::MAX, 1), (0x10_0000, u64::MAX)] {
            let error = elf_error(&elf(addr, None, &[(addr, b"k", size)]));
            assert!(matches!(error, ElfError::SegmentOutsideRam { index: 0, .. }), "{error}");
        }
    }

    #[test]
    fn overlapping_segments_are_refused() {
        let file = elf(0x10_0000, None, &[(0x20_0000, b"k", 0x10), (0x10_0000, b"k", 0x10_0001)]);
        assert_eq!(elf_error(&file), ElfError::SegmentsOverlap { first: 0, second: 1, addr: 0x20_0000 });
    }

    #[test]
    fn more_in_the_file_than_in_memory_is_refused() {
        let error = elf_error(&elf(0x10_0000, None, &[(0x10_0000, b"kernel", 3)]));
        assert_eq!(error, ElfError::SegmentSizes { index: 0, file_size: 6, mem_size: 3 });
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let file = elf(0x10_0000, Some(0x10_0000), &[(0x10_0000, b"kernel", 0x2000)]);
        for len in 4..file.len() {
            let error = elf_error(&file[..len]);
            assert!(matches!(error, ElfError::Truncated { .. }), "{len}: {error}");
        }
    }

    #[test]
    fn another_machine_is_refused_by_name() {
        let mut file = elf(0x10_0000, None, &[(0x10_0000, b"k", 1)]);
        file[18] = 183;
        assert!(elf_error(&file).to_string().contains("machine is 183"));
    }

    proptest! {
        #[test]
        fn a_file_with_flipped_bytes_never_panics(flips in prop::collection::vec((4usize..200, any::<u8>()), 1..8)) {
            let mut file = elf(0x10_0000, Some(0x10_0000), &[(0x10_0000, b"kernel", 0x2000), (0x30_0000, b"x", 1)]);
            for (at, value) in flips {
                if let Some(byte) = file.get_mut(at) {
                    *byte = value;
                }
            }
            let _ = load_bytes(&file);
        }

        #[test]
        fn notes_of_any_bytes_never_panic(notes in prop::collection::vec(any::<u8>(), 0..100)) {
            let _ = pvh_entry_in(&notes);
        }
    }
}
