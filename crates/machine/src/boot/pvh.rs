//! The PVH boot protocol: what `%ebx` points to when a guest is entered at its PVH entry point.

use memory::GuestRam;
use zerocopy::{Immutable, IntoBytes};

use super::io::write_boot_data;
use super::kernel::Initrd;
use super::memory_map;
use crate::layout;

/// `XEN_HVM_START_MAGIC_VALUE`.
const MAGIC: u32 = 0x336e_c578;
/// Version 1 of the structure: it has the memory map.
const VERSION: u32 = 1;

/// `hvm_start_info`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct StartInfo {
    magic: u32,
    version: u32,
    flags: u32,
    module_count: u32,
    modules: u64,
    cmdline: u64,
    rsdp: u64,
    memory_map: u64,
    memory_map_entries: u32,
    reserved: u32,
}

/// `hvm_modlist_entry`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Module {
    addr: u64,
    size: u64,
    cmdline: u64,
    reserved: u64,
}

/// `hvm_memmap_table_entry`.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct MemoryMapEntry {
    addr: u64,
    size: u64,
    kind: u32,
    reserved: u32,
}

/// Writes start info, module list and memory map into low memory.
pub(super) fn write_start_info(ram: &GuestRam, initrd: Option<Initrd>, rsdp: u64) {
    let map: Vec<MemoryMapEntry> = memory_map::ranges(ram)
        .into_iter()
        .map(|r| MemoryMapEntry { addr: r.start, size: r.size, kind: r.kind, reserved: 0 })
        .collect();
    write_boot_data(ram, layout::ZERO_PAGE, map.as_bytes());

    if let Some(initrd) = initrd {
        let module = Module { addr: initrd.start, size: initrd.len, cmdline: 0, reserved: 0 };
        write_boot_data(ram, layout::PVH_MODULES, module.as_bytes());
    }

    let start_info = StartInfo {
        magic: MAGIC,
        version: VERSION,
        flags: 0,
        module_count: initrd.is_some().into(),
        modules: if initrd.is_some() { layout::PVH_MODULES } else { 0 },
        cmdline: layout::CMDLINE,
        rsdp,
        memory_map: layout::ZERO_PAGE,
        memory_map_entries: map.len() as u32,
        reserved: 0,
    };
    write_boot_data(ram, layout::PVH_START_INFO, start_info.as_bytes());
}
