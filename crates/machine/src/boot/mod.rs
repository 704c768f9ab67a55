//! From a kernel file to a guest that is ready to run its first instruction.
//!
//! The kernel file decides how the guest is entered:
//!
//! | file | protocol | entered in |
//! |---|---|---|
//! | ELF with a PVH note | PVH ([`pvh`]) | 32-bit protected mode, no paging |
//! | other ELF (`vmlinux`) | Linux 64-bit ([`linux64`]) | long mode, identity mapping |
//! | `bzImage` | Linux 64-bit ([`linux64`]) | long mode, identity mapping |
//!
//! | module | what it is about |
//! |---|---|
//! | `elf`, `bzimage` | loading either kind of kernel |
//! | `setup_header` | the header of a `bzImage` |
//! | `kernel` | the result: a kernel and an initrd in guest memory |
//! | `cmdline`, `memory_map`, `mp_table` | data that both protocols need |
//! | `page_tables` | the identity mapping |
//! | `io` | reading files, writing guest memory |
//!
//! # Invariants
//!
//! - The user's files (kernel, initrd) are loaded only into RAM above the first MiB, and do not
//!   overlap. A file with other addresses is refused before any of it is loaded.
//! - This module writes boot data below 639 KiB, and the MP table from there on
//!   ([`crate::layout`]).

mod bzimage;
mod cmdline;
mod elf;
mod error;
mod io;
mod kernel;
mod linux64;
mod memory_map;
mod mp_table;
mod page_tables;
mod pvh;
mod setup_header;

use std::fs::File;

use kvm_ioctls::VcpuFd;
use memory::GuestRam;

use crate::cpu::registers;
use crate::kvm::KvmError;
use crate::layout;

use io::{copy_to_guest, file_len, read_at};
use kernel::{Entry, Initrd, LoadedKernel};
use setup_header::SetupHeader;

pub use error::{BootError, BzImageError, ElfError};
pub(crate) use page_tables::write_page_tables;

/// What to boot: open files, and a command line that the configuration has checked.
#[derive(Debug)]
pub struct BootFiles {
    /// An ELF file or a `bzImage`.
    pub kernel: File,
    /// The initial RAM disk.
    pub initrd: Option<File>,
    /// The command line as the user gave it.
    pub cmdline: String,
}

/// A loaded kernel, ready to be entered.
#[derive(Debug)]
pub struct Loaded {
    entry: Entry,
}

/// Loads kernel, initrd and command line into `ram`, and writes the data that the boot protocol
/// needs.
///
/// `device_args` are added to the command line. `rsdp` is the address of the ACPI root pointer.
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
    /// Sets the registers of a vCPU. All vCPUs get the same ones: KVM holds all but the first until
    /// the guest starts them.
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
    match SetupHeader::read(file, len)? {
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

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;

    fn ram() -> GuestRam {
        GuestRam::map(16, HugePages::None, false).unwrap()
    }

    #[test]
    fn initrd_goes_to_the_top_and_not_over_the_kernel() {
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
    fn unknown_kernel_format_is_refused_with_its_first_bytes() {
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
