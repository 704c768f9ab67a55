//! From a kernel file to a guest that is ready to run its first instruction.
//!
//! Three ways in, chosen by what the file is:
//!
//! | file | protocol | entered in |
//! |---|---|---|
//! | ELF with a PVH note | PVH ([`pvh`]) | 32-bit protected mode, no paging |
//! | other ELF (`vmlinux`) | Linux 64-bit ([`linux64`]) | long mode, identity mapped ([`page_tables`]) |
//! | `bzImage` | Linux 64-bit ([`linux64`]) | long mode, identity mapped ([`page_tables`]) |
//!
//! # Invariants
//!
//! - What a user supplies (kernel, initrd) is laid only where RAM is, above the first MiB, and never over one another. A file that
//!   says otherwise is refused before anything of it is loaded.
//! - The first MiB holds what this room writes: boot data below 640 KiB, firmware tables above ([`crate::layout`]).
//!
//! # Errors
//!
//! [`BootError`]: names the file's part, the value and the bound.

mod bzimage;
mod cmdline;
mod elf;
mod linux64;
mod memory_map;
mod mp_table;
mod page_tables;
mod pvh;

use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::ops::Range;

use kvm_ioctls::VcpuFd;
use memory::{GuestRam, MapError};
use vm_memory::{Bytes, GuestAddress, GuestMemoryBackend};

use crate::cpu::registers;
use crate::kvm::KvmError;
use crate::layout;

pub(crate) use page_tables::write_page_tables;

/// What to boot: opened files and a command line that the configuration has checked.
#[derive(Debug)]
pub struct BootFiles {
    /// An ELF file or a `bzImage`.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The command line as the user gave it.
    pub cmdline: String,
}

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
    #[error(
        "the kernel image is neither an ELF file nor a bzImage ({len} bytes, beginning with {magic:02x?})"
    )]
    UnknownFormat {
        /// Length of the file.
        len: u64,
        /// Its first bytes.
        magic: [u8; 4],
    },
    /// The ELF file lies or is of the wrong kind.
    #[error("the kernel image is no ELF file that can be booted: {0}")]
    Elf(#[from] elf::ElfError),
    /// The `bzImage` lies or is too old.
    #[error("the kernel image is no bzImage that can be booted: {0}")]
    BzImage(#[from] bzimage::BzImageError),
    /// The initrd does not fit.
    #[error(
        "the initrd does not fit: it is {len} bytes long, and {free} bytes of memory are free between the kernel's end at \
         {kernel_end:#x} and {limit:#x}"
    )]
    InitrdTooLarge {
        /// Length of the initrd.
        len: u64,
        /// What would fit.
        free: u64,
        /// Where the kernel ends.
        kernel_end: u64,
        /// The highest address an initrd may reach.
        limit: u64,
    },
    /// An initrd without a byte in it.
    #[error("the initrd is empty")]
    InitrdEmpty,
    /// The command line with the devices' part.
    #[error("the kernel command line is {len} bytes long with what devices add: at most {max} fit", max = config::MAX_BOOT_ARGS_LEN)]
    CmdlineTooLong {
        /// Its length in bytes, with the closing NUL.
        len: usize,
    },
    /// Kernel and initrd are so far apart or so large that the boot page tables cannot map them.
    #[error(
        "kernel image: it and its initrd lie in {gib} different GiB of memory up to {end:#x}: at most {max} can be mapped at its entry"
    )]
    TooFarApart {
        /// How many GiB would have to be mapped.
        gib: usize,
        /// Where the highest of them ends.
        end: u64,
        /// How many can be.
        max: usize,
    },
    /// Memory below what any boot needs.
    #[error("mem_size_mib is {mib}: a guest needs at least 2 MiB to boot")]
    TooLittleMemory {
        /// What was given.
        mib: u64,
    },
    /// The host does not give the memory that is to be written.
    #[error(transparent)]
    Memory(#[from] MapError),
    /// Setting a vCPU's registers failed.
    #[error(transparent)]
    Kvm(#[from] KvmError),
}

/// A kernel in guest memory, and how to enter it.
#[derive(Debug, Clone, PartialEq, Eq)]
struct LoadedKernel {
    entry: Entry,
    /// The memory that the kernel is in, and that it needs at its entry.
    used: Vec<Range<u64>>,
    /// One past the last byte of it in the first region of guest memory, where an initrd goes.
    end: u64,
    /// An initrd must end at or below this.
    initrd_limit: u64,
}

/// How a kernel is entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Entry {
    /// PVH, at this address.
    Pvh(u64),
    /// The Linux 64-bit protocol, at this address, with the header that a `bzImage` brings.
    Linux64 { address: u64, header: Option<bzimage::SetupHeader> },
}

/// Where an initrd lies.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Initrd {
    start: u64,
    len: u64,
}

/// A booted guest's way in: what [`load`] found and placed. Made into registers by [`Loaded::set_up_vcpu`].
#[derive(Debug)]
pub struct Loaded {
    entry: Entry,
}

/// Loads kernel, initrd and command line into `ram` and writes what the kernel's protocol wants beside them.
///
/// `device_args` are appended to the command line. `rsdp` is where the ACPI tables' root is.
pub fn load(
    ram: &GuestRam,
    mut files: BootFiles,
    device_args: &str,
    cpus: u8,
    rsdp: u64,
) -> Result<Loaded, BootError> {
    if ram.regions()[0].size < layout::HIGH_RAM * 2 {
        return Err(BootError::TooLittleMemory { mib: ram.size() >> 20 });
    }
    let kernel = load_kernel(ram, &mut files.kernel)?;
    let initrd = files.initrd.as_mut().map(|file| load_initrd(ram, file, &kernel)).transpose()?;
    let cmdline_len = cmdline::write(ram, &files.cmdline, device_args)?;
    mp_table::write(ram, cpus);
    match kernel.entry {
        Entry::Pvh(_) => pvh::write_start_info(ram, initrd, rsdp),
        Entry::Linux64 { ref header, .. } => {
            linux64::write_zero_page(ram, header.as_ref(), initrd, cmdline_len, rsdp);
            let initrd = initrd.map(|initrd| initrd.start..initrd.start + initrd.len);
            write_page_tables(ram, kernel.used.into_iter().chain(initrd))?;
        }
    }
    registers::write_gdt(ram, matches!(kernel.entry, Entry::Linux64 { .. }));
    Ok(Loaded { entry: kernel.entry })
}

impl Loaded {
    /// Sets the registers of a vCPU. All get the same ones: KVM holds all but the first until the guest starts them.
    pub fn set_up_vcpu(&self, vcpu: &VcpuFd) -> Result<(), KvmError> {
        match self.entry {
            Entry::Pvh(entry) => registers::set_for_pvh(vcpu, entry),
            Entry::Linux64 { address, .. } => registers::set_for_linux64(vcpu, address),
        }
    }

    /// The boot protocol's name, for the log.
    pub fn protocol(&self) -> &'static str {
        match self.entry {
            Entry::Pvh(_) => "PVH",
            Entry::Linux64 { header: Some(_), .. } => "Linux 64-bit (bzImage)",
            Entry::Linux64 { header: None, .. } => "Linux 64-bit",
        }
    }
}

fn load_kernel(ram: &GuestRam, file: &mut File) -> Result<LoadedKernel, BootError> {
    let len = file_len(file, "kernel image")?;
    let mut magic = [0; 4];
    read_at(file, 0, &mut magic[..len.min(4) as usize], "kernel image")?;
    if magic == elf::MAGIC {
        return elf::load(ram, file, len);
    }
    match bzimage::SetupHeader::read(file, len)? {
        Some(header) => bzimage::load(ram, file, len, header),
        None => Err(BootError::UnknownFormat { len, magic }),
    }
}

fn load_initrd(ram: &GuestRam, file: &mut File, kernel: &LoadedKernel) -> Result<Initrd, BootError> {
    let len = file_len(file, "initrd")?;
    if len == 0 {
        return Err(BootError::InitrdEmpty);
    }
    let limit = kernel.initrd_limit.min(ram.regions()[0].size);
    let start = limit.checked_sub(len).map(|start| start & !0xfff).filter(|start| *start >= kernel.end);
    let Some(start) = start else {
        let free = limit.saturating_sub(kernel.end);
        return Err(BootError::InitrdTooLarge { len, free, kernel_end: kernel.end, limit });
    };
    copy_to_guest(ram, file, 0, start, len, "initrd")?;
    Ok(Initrd { start, len })
}

/// Writes into the first MiB, which every guest that is booted has.
fn write_boot_data(ram: &GuestRam, addr: u64, data: &[u8]) {
    debug_assert!(addr + data.len() as u64 <= layout::HIGH_RAM);
    ram.memory().write_slice(data, GuestAddress(addr)).expect("the first MiB is RAM");
}

/// The length of a file or block device.
fn file_len(file: &mut File, what: &'static str) -> Result<u64, BootError> {
    file.seek(SeekFrom::End(0)).map_err(|source| BootError::Read { what, source })
}

fn read_at(file: &mut File, offset: u64, data: &mut [u8], what: &'static str) -> Result<(), BootError> {
    file.seek(SeekFrom::Start(offset))
        .and_then(|_| file.read_exact(data))
        .map_err(|source| BootError::Read { what, source })
}

/// Copies `len` bytes of a file straight into guest memory. The caller has checked that they are RAM.
fn copy_to_guest(
    ram: &GuestRam,
    file: &mut File,
    offset: u64,
    addr: u64,
    len: u64,
    what: &'static str,
) -> Result<(), BootError> {
    debug_assert!(ram.contains(addr, len));
    ram.populate(addr, len)?;
    let failed = |source| BootError::Read { what, source };
    file.seek(SeekFrom::Start(offset)).map_err(failed)?;
    let mut guest = ram.memory().get_slice(GuestAddress(addr), len as usize).expect("the caller checked");
    vm_memory::ReadVolatile::read_exact_volatile(file, &mut guest)
        .map_err(|e| std::io::Error::other(e.to_string()))
        .map_err(failed)
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;

    fn ram() -> GuestRam {
        GuestRam::map(16, HugePages::None, false).unwrap()
    }

    #[test]
    fn initrd_lies_at_the_top_and_never_over_the_kernel() {
        let ram = ram();
        let kernel =
            LoadedKernel { entry: Entry::Pvh(0), used: Vec::new(), end: 12 << 20, initrd_limit: u64::MAX };
        let mut file = tempfile::tempfile().unwrap();
        file.set_len(5000).unwrap();
        let initrd = load_initrd(&ram, &mut file, &kernel).unwrap();
        assert_eq!(initrd, Initrd { start: (16 << 20) - 8192, len: 5000 });
        file.set_len((4 << 20) + 1).unwrap();
        let error = load_initrd(&ram, &mut file, &kernel).unwrap_err();
        assert!(matches!(error, BootError::InitrdTooLarge { free: 0x40_0000, .. }), "{error}");
        file.set_len(0).unwrap();
        assert!(matches!(load_initrd(&ram, &mut file, &kernel), Err(BootError::InitrdEmpty)));
    }

    #[test]
    fn a_file_that_is_no_kernel_is_named_with_its_beginning() {
        use std::io::Write;
        for content in [&b""[..], b"M", b"#!/bin/sh\nexit\n", &[0; 4096]] {
            let mut file = tempfile::tempfile().unwrap();
            file.write_all(content).unwrap();
            let error = load_kernel(&ram(), &mut file).unwrap_err();
            assert!(
                matches!(error, BootError::UnknownFormat { len, .. } if len == content.len() as u64),
                "{error}"
            );
        }
    }
}
