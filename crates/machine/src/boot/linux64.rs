//! The Linux 64-bit boot protocol: the zero page that `%rsi` points to.

use memory::GuestRam;

use super::io::write_boot_data;
use super::kernel::Initrd;
use super::memory_map;
use super::setup_header::{HEADER_OFFSET, SetupHeader};
use crate::layout;

/// Offsets in the zero page (Linux: Documentation/arch/x86/zero-page.rst, boot.rst).
mod offset {
    pub(super) const ACPI_RSDP_ADDR: usize = 0x070;
    pub(super) const EXT_RAMDISK_IMAGE: usize = 0x0c0;
    pub(super) const EXT_RAMDISK_SIZE: usize = 0x0c4;
    pub(super) const E820_ENTRIES: usize = 0x1e8;
    pub(super) const BOOT_FLAG: usize = 0x1fe;
    pub(super) const HEADER_MAGIC: usize = 0x202;
    pub(super) const VERSION: usize = 0x206;
    pub(super) const TYPE_OF_LOADER: usize = 0x210;
    pub(super) const LOADFLAGS: usize = 0x211;
    pub(super) const RAMDISK_IMAGE: usize = 0x218;
    pub(super) const RAMDISK_SIZE: usize = 0x21c;
    pub(super) const CMD_LINE_PTR: usize = 0x228;
    pub(super) const KERNEL_ALIGNMENT: usize = 0x230;
    pub(super) const CMDLINE_SIZE: usize = 0x238;
    pub(super) const E820_TABLE: usize = 0x2d0;
}

const PAGE_SIZE: usize = 4096;
/// A boot loader without an assigned number.
const LOADER_UNDEFINED: u8 = 0xff;
/// The protected-mode code is loaded at 1 MiB or above.
const LOADED_HIGH: u8 = 1;

/// Writes the zero page. `header` is that of a `bzImage`; for an ELF kernel a minimal one is
/// written.
pub(super) fn write_zero_page(
    ram: &GuestRam,
    header: Option<&SetupHeader>,
    initrd: Option<Initrd>,
    cmdline_len: usize,
    rsdp: u64,
) {
    let mut page = [0; PAGE_SIZE];
    match header {
        Some(header) => put(&mut page, HEADER_OFFSET, header.bytes()),
        None => {
            put(&mut page, offset::BOOT_FLAG, &0xaa55u16.to_le_bytes());
            put(&mut page, offset::HEADER_MAGIC, b"HdrS");
            put(&mut page, offset::VERSION, &0x020fu16.to_le_bytes());
            put(&mut page, offset::KERNEL_ALIGNMENT, &0x0100_0000u32.to_le_bytes());
        }
    }
    page[offset::TYPE_OF_LOADER] = LOADER_UNDEFINED;
    page[offset::LOADFLAGS] |= LOADED_HIGH;
    put(&mut page, offset::CMD_LINE_PTR, &(layout::CMDLINE as u32).to_le_bytes());
    put(&mut page, offset::CMDLINE_SIZE, &(cmdline_len as u32).to_le_bytes());
    put(&mut page, offset::ACPI_RSDP_ADDR, &rsdp.to_le_bytes());
    if let Some(initrd) = initrd {
        put(&mut page, offset::RAMDISK_IMAGE, &(initrd.start as u32).to_le_bytes());
        put(&mut page, offset::EXT_RAMDISK_IMAGE, &((initrd.start >> 32) as u32).to_le_bytes());
        put(&mut page, offset::RAMDISK_SIZE, &(initrd.len as u32).to_le_bytes());
        put(&mut page, offset::EXT_RAMDISK_SIZE, &((initrd.len >> 32) as u32).to_le_bytes());
    }
    let map = memory_map::ranges(ram);
    page[offset::E820_ENTRIES] = map.len() as u8;
    for (i, range) in map.iter().enumerate() {
        let at = offset::E820_TABLE + 20 * i;
        put(&mut page, at, &range.start.to_le_bytes());
        put(&mut page, at + 8, &range.size.to_le_bytes());
        put(&mut page, at + 16, &range.kind.to_le_bytes());
    }
    write_boot_data(ram, layout::ZERO_PAGE, &page);
}

fn put(page: &mut [u8; PAGE_SIZE], at: usize, bytes: &[u8]) {
    page[at..at + bytes.len()].copy_from_slice(bytes);
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn zero_page_describes_initrd_command_line_and_memory() {
        let ram = GuestRam::map(128, HugePages::None, false).unwrap();
        let initrd = Initrd { start: 0x1_2345_6000, len: 0x1_0000_0001 };
        write_zero_page(&ram, None, Some(initrd), 77, 0xe_0000);
        let read =
            |at: usize| ram.memory().read_obj::<u32>(GuestAddress(layout::ZERO_PAGE + at as u64)).unwrap();
        assert_eq!(read(offset::HEADER_MAGIC), u32::from_le_bytes(*b"HdrS"));
        assert_eq!((read(offset::RAMDISK_IMAGE), read(offset::EXT_RAMDISK_IMAGE)), (0x2345_6000, 1));
        assert_eq!((read(offset::RAMDISK_SIZE), read(offset::EXT_RAMDISK_SIZE)), (1, 1));
        assert_eq!((read(offset::CMD_LINE_PTR), read(offset::CMDLINE_SIZE)), (0x2_0000, 77));
        assert_eq!(read(offset::ACPI_RSDP_ADDR), 0xe_0000);
        assert_eq!(read(offset::E820_ENTRIES) & 0xff, 4);
    }
}
