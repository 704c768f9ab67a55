//! Why a guest cannot be booted from its files. Texts name the file, the value and the bound.

use memory::MapError;

use crate::kvm::KvmError;

/// The most program headers that an ELF kernel may have.
pub(super) const MAX_PROGRAM_HEADERS: u16 = 64;

/// Why a guest cannot be booted from its files.
#[derive(Debug, thiserror::Error)]
pub enum BootError {
    /// A file cannot be read.
    #[error("cannot read the {what}: {source}")]
    Read {
        /// `kernel image` or `initrd`.
        what: &'static str,
        /// The kernel's reason.
        source: std::io::Error,
    },
    /// The kernel file is neither ELF nor `bzImage`.
    #[error("kernel image: neither an ELF file nor a bzImage: {len} bytes that begin with {magic:02x?}")]
    UnknownFormat {
        /// Length of the file.
        len: u64,
        /// The first bytes of the file.
        magic: [u8; 4],
    },
    /// The ELF file is invalid or not supported.
    #[error("kernel image: ELF: {0}")]
    Elf(#[from] ElfError),
    /// The `bzImage` is invalid or not supported.
    #[error("kernel image: bzImage: {0}")]
    BzImage(#[from] BzImageError),
    /// The initrd does not fit.
    #[error(
        "initrd: it has {len} bytes; {free} bytes of memory are free between the kernel's end at \
         {kernel_end:#x} and {limit:#x}"
    )]
    InitrdTooLarge {
        /// Length of the initrd.
        len: u64,
        /// Free bytes.
        free: u64,
        /// End address of the kernel.
        kernel_end: u64,
        /// The highest end address of an initrd.
        limit: u64,
    },
    /// The initrd has no bytes.
    #[error("initrd: the file is empty")]
    InitrdEmpty,
    /// The command line with what devices add is too long.
    #[error(
        "kernel command line: {len} bytes with what devices add; at most {max}",
        max = config::MAX_BOOT_ARGS_LEN
    )]
    CmdlineTooLong {
        /// Length in bytes, with the closing NUL.
        len: usize,
    },
    /// Kernel and initrd are so far apart or so large that the boot page tables cannot map them.
    #[error(
        "kernel image: it and its initrd are in {gib} different GiB of memory up to {end:#x}; \
         at most {max} can be mapped at the kernel's entry"
    )]
    TooFarApart {
        /// How many GiB would have to be mapped.
        gib: usize,
        /// End of the highest of them.
        end: u64,
        /// How many GiB can be mapped.
        max: usize,
    },
    /// Less memory than a guest needs to boot.
    #[error("machine-config: mem_size_mib is {mib}; a guest needs at least 2 MiB to boot")]
    TooLittleMemory {
        /// The configured size in MiB.
        mib: u64,
    },
    /// The host has no memory for the pages that are to be written.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// A vCPU's registers cannot be set.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// Why an ELF file cannot be booted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum ElfError {
    /// The file ends before something that its headers describe.
    #[error("the file is truncated: {what} ends at {end:#x}, the file at {len:#x}")]
    Truncated {
        /// The part of the file that does not fit.
        what: String,
        /// Offset at which that part would end.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// The file is for another machine, or not of an executable type.
    #[error("{what} is {value}; it must be {expected}")]
    Kind {
        /// The header's field.
        what: &'static str,
        /// The field's value.
        value: u16,
        /// The supported value.
        expected: &'static str,
    },
    /// The number of program headers is out of bounds.
    #[error("the file has {0} program headers; 1 to {MAX_PROGRAM_HEADERS} are supported")]
    ProgramHeaders(u16),
    /// No segment to load.
    #[error("the file has no segment to load")]
    NoSegments,
    /// A segment has more bytes in the file than in memory.
    #[error("segment {index}: {file_size:#x} bytes in the file; {mem_size:#x} bytes in memory")]
    SegmentSizes {
        /// The number of the program header.
        index: usize,
        /// Bytes in the file.
        file_size: u64,
        /// Bytes in memory.
        mem_size: u64,
    },
    /// A segment is not in RAM that a kernel may use.
    #[error(
        "segment {index}: {size:#x} bytes at {addr:#x} are outside guest memory; \
         a kernel may use {low:#x} to {high:#x}"
    )]
    SegmentOutsideRam {
        /// The number of the program header.
        index: usize,
        /// The segment's physical address.
        addr: u64,
        /// The segment's size in memory.
        size: u64,
        /// Lowest address allowed.
        low: u64,
        /// End of the first region of guest memory.
        high: u64,
    },
    /// Two segments overlap.
    #[error("segments {first} and {second} overlap at {addr:#x}")]
    SegmentsOverlap {
        /// The number of a program header.
        first: usize,
        /// The number of a program header.
        second: usize,
        /// The lowest address in both.
        addr: u64,
    },
    /// The entry point is in no segment.
    #[error("the {kind} entry point {entry:#x} is in none of the segments")]
    Entry {
        /// `PVH` or `ELF`.
        kind: &'static str,
        /// The address.
        entry: u64,
    },
    /// The PVH entry point is above 4 GiB, but entered in 32-bit mode.
    #[error("the PVH entry point is {entry:#x}; at most 0xffffffff (it is entered in 32-bit mode)")]
    PvhEntry {
        /// The address.
        entry: u64,
    },
}

/// Why a `bzImage` cannot be booted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BzImageError {
    /// The boot protocol is older than the 64-bit entry point.
    #[error("the boot protocol is {major}.{minor:02}; at least 2.12")]
    Protocol {
        /// Version, before the point.
        major: u8,
        /// Version, after the point.
        minor: u8,
    },
    /// The kernel has no 64-bit entry point.
    #[error("the kernel has no 64-bit entry point: xloadflags is {0:#x}")]
    No64BitEntry(u16),
    /// The file ends within its own setup code.
    #[error("the file is truncated: its setup code ends at {end:#x}, the file at {len:#x}")]
    Truncated {
        /// Where the setup code ends.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// `init_size`, the memory to unpack in, is less than the size of the packed kernel.
    #[error("init_size is {init_size:#x}; at least {size:#x}, the size of the packed kernel")]
    InitSize {
        /// The header's `init_size`.
        init_size: u64,
        /// Bytes to load.
        size: u64,
    },
    /// There is not enough memory to unpack the kernel in.
    #[error(
        "the kernel needs {needed:#x} bytes of memory at {addr:#x} to unpack itself; \
         guest memory ends at {end:#x}"
    )]
    DoesNotFit {
        /// Bytes needed.
        needed: u64,
        /// The kernel's preferred address.
        addr: u64,
        /// End of the first region of guest memory.
        end: u64,
    },
}
