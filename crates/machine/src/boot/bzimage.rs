//! Loading a `bzImage` by the Linux/x86 boot protocol, 2.12 or newer, at its 64-bit entry point.

use std::fs::File;

use memory::GuestRam;

use super::{BootError, Entry, LoadedKernel, copy_to_guest, read_at};
use crate::layout;

/// The setup header lies here in the file, and in the zero page.
pub(super) const HEADER_OFFSET: usize = 0x1f1;
/// Most bytes of setup header: it ends where the zero page's next field begins.
const HEADER_MAX: usize = 0x290 - HEADER_OFFSET;
/// The 64-bit entry point, counted from where the protected-mode kernel is loaded.
const ENTRY_64: u64 = 0x200;

/// Why a `bzImage` cannot be booted.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum BzImageError {
    /// The boot protocol is older than the 64-bit entry point.
    #[error("its boot protocol is {major}.{minor:02}: 2.12 or newer is needed")]
    Protocol {
        /// Version, before the point.
        major: u8,
        /// Version, after the point.
        minor: u8,
    },
    /// The kernel has no 64-bit entry point.
    #[error("it has no 64-bit entry point (xloadflags is {0:#x})")]
    No64BitEntry(u16),
    /// The file ends within its own setup code.
    #[error("the file is truncated: its setup code ends at {end:#x}, the file at {len:#x}")]
    Truncated {
        /// Where the setup code ends.
        end: u64,
        /// The file's length.
        len: u64,
    },
    /// The kernel says that it unpacks into less than it brings, or into nothing.
    #[error("it says that it needs {init_size:#x} bytes of memory, and is {size:#x} bytes long")]
    InitSize {
        /// The header's `init_size`.
        init_size: u64,
        /// Bytes to load.
        size: u64,
    },
    /// There is not enough memory to unpack the kernel in.
    #[error(
        "it needs {needed:#x} bytes of memory from {addr:#x} on to unpack itself: guest memory ends at {end:#x}"
    )]
    DoesNotFit {
        /// Bytes needed.
        needed: u64,
        /// From where on.
        addr: u64,
        /// End of the first region of guest memory.
        end: u64,
    },
}

/// The setup header of a `bzImage`: its bytes, with what is needed of them read out.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct SetupHeader {
    bytes: [u8; HEADER_MAX],
    /// How many of `bytes` are the header's.
    len: usize,
}

impl SetupHeader {
    /// Reads the header; `None` where the file has none, so that it is no `bzImage`.
    pub(super) fn read(file: &mut File, len: u64) -> Result<Option<Self>, BootError> {
        let mut header = SetupHeader { bytes: [0; HEADER_MAX], len: HEADER_MAX };
        if len < (HEADER_OFFSET + HEADER_MAX) as u64 {
            return Ok(None);
        }
        read_at(file, HEADER_OFFSET as u64, &mut header.bytes, "kernel image")?;
        if header.u16(0x1fe) != 0xaa55 || header.u32(0x202) != u32::from_le_bytes(*b"HdrS") {
            return Ok(None);
        }
        // The header ends where the jump at its beginning leads to.
        let end = 0x202 + usize::from(header.u8(0x201));
        header.len = (end - HEADER_OFFSET).min(HEADER_MAX);
        header.bytes[header.len..].fill(0);
        Ok(Some(header))
    }

    /// The header's bytes, for the zero page.
    pub(super) fn bytes(&self) -> &[u8] {
        &self.bytes[..self.len]
    }

    /// A byte, by its offset in the boot protocol's table.
    fn u8(&self, offset: usize) -> u8 {
        self.bytes[offset - HEADER_OFFSET]
    }

    fn u16(&self, offset: usize) -> u16 {
        u16::from_le_bytes([self.u8(offset), self.u8(offset + 1)])
    }

    fn u32(&self, offset: usize) -> u32 {
        u32::from(self.u16(offset)) | u32::from(self.u16(offset + 2)) << 16
    }

    fn u64(&self, offset: usize) -> u64 {
        u64::from(self.u32(offset)) | u64::from(self.u32(offset + 4)) << 32
    }
}

/// Loads the kernel behind `header`.
pub(super) fn load(
    ram: &GuestRam,
    file: &mut File,
    len: u64,
    header: SetupHeader,
) -> Result<LoadedKernel, BootError> {
    let placed = place(ram.regions()[0].size, len, &header)?;
    copy_to_guest(ram, file, placed.offset, placed.addr, placed.size, "kernel image")?;
    let entry = Entry::Linux64 { address: placed.addr + ENTRY_64, header: Some(header) };
    let end = placed.addr + placed.needed;
    Ok(LoadedKernel {
        entry,
        used: std::iter::once(placed.addr..end).collect(),
        end,
        initrd_limit: placed.initrd_limit,
    })
}

/// Where the protected-mode kernel lies in the file and goes in memory.
#[derive(Debug, PartialEq, Eq)]
struct Placed {
    offset: u64,
    size: u64,
    addr: u64,
    needed: u64,
    initrd_limit: u64,
}

fn place(ram_end: u64, len: u64, header: &SetupHeader) -> Result<Placed, BzImageError> {
    let version = header.u16(0x206);
    if version < 0x020c {
        let [minor, major] = version.to_le_bytes();
        return Err(BzImageError::Protocol { major, minor });
    }
    let xloadflags = header.u16(0x236);
    if xloadflags & 1 == 0 {
        return Err(BzImageError::No64BitEntry(xloadflags));
    }
    // 0 stands for 4, and the boot sector comes before.
    let setup_sectors = if header.u8(0x1f1) == 0 { 4 } else { header.u8(0x1f1) };
    let offset = (u64::from(setup_sectors) + 1) * 512;
    let size = len.checked_sub(offset).filter(|size| *size > ENTRY_64);
    let Some(size) = size else { return Err(BzImageError::Truncated { end: offset, len }) };

    // The kernel unpacks itself to its preferred address; loaded there, it has the least to move.
    let init_size = u64::from(header.u32(0x260));
    if init_size < size {
        return Err(BzImageError::InitSize { init_size, size });
    }
    let relocatable = header.u8(0x234) != 0;
    let alignment = u64::from(header.u32(0x230)).clamp(0x1000, 1 << 30);
    let fits =
        |addr: u64| addr >= layout::HIGH_RAM && addr.checked_add(init_size).is_some_and(|end| end <= ram_end);
    let preferred = header.u64(0x258);
    let lowest = layout::HIGH_RAM.next_multiple_of(alignment);
    let addr = match [preferred, lowest].into_iter().find(|addr| fits(*addr)) {
        Some(addr) if addr == preferred || relocatable => addr,
        _ => return Err(BzImageError::DoesNotFit { needed: init_size, addr: preferred, end: ram_end }),
    };
    // With XLF_CAN_BE_LOADED_ABOVE_4G an initrd may lie anywhere; otherwise the header says how high.
    let initrd_limit = if xloadflags & 2 != 0 { u64::MAX } else { u64::from(header.u32(0x22c)) + 1 };
    Ok(Placed { offset, size, addr, needed: init_size, initrd_limit })
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;
    use std::io::Write;

    const RAM_END: u64 = 128 << 20;

    /// A small image with a valid header; `patch` changes its bytes by their offset in the file.
    fn image(patch: &[(usize, &[u8])]) -> Vec<u8> {
        let mut file = vec![0; 0x2000];
        let fields: [(usize, &[u8]); 10] = [
            (0x1f1, &[3]),
            (0x1fe, &[0x55, 0xaa]),
            (0x201, &[0x6a]),
            (0x202, b"HdrS"),
            (0x206, &[0x0f, 0x02]),
            (0x22c, &0x7fff_ffffu32.to_le_bytes()),
            (0x230, &0x20_0000u32.to_le_bytes()),
            (0x234, &[1, 21, 3, 0]),
            (0x258, &0x100_0000u64.to_le_bytes()),
            (0x260, &0x40_0000u32.to_le_bytes()),
        ];
        for (at, bytes) in fields.iter().chain(patch) {
            file[*at..at + bytes.len()].copy_from_slice(bytes);
        }
        file
    }

    fn header(image: &[u8]) -> SetupHeader {
        let mut file = tempfile::tempfile().unwrap();
        file.write_all(image).unwrap();
        SetupHeader::read(&mut file, image.len() as u64).unwrap().expect("a header")
    }

    fn placed(patch: &[(usize, &[u8])], ram_end: u64) -> Result<Placed, BzImageError> {
        let image = image(patch);
        place(ram_end, image.len() as u64, &header(&image))
    }

    #[test]
    fn kernel_goes_to_its_preferred_address() {
        let placed = placed(&[], RAM_END).unwrap();
        assert_eq!((placed.offset, placed.size), (4 * 512, 0x2000 - 4 * 512));
        assert_eq!((placed.addr, placed.needed, placed.initrd_limit), (0x100_0000, 0x40_0000, u64::MAX));
    }

    #[test]
    fn kernel_goes_lower_where_memory_is_short_and_it_may() {
        assert_eq!(placed(&[], 16 << 20).unwrap().addr, 0x20_0000);
        let fixed = placed(&[(0x234, &[0])], 16 << 20);
        assert!(matches!(fixed, Err(BzImageError::DoesNotFit { needed: 0x40_0000, .. })));
    }

    #[test]
    fn kernel_that_fits_nowhere_is_refused_with_what_it_needs() {
        let refused = placed(&[(0x260, &0x4000_0000u32.to_le_bytes())], RAM_END);
        assert!(matches!(refused, Err(BzImageError::DoesNotFit { needed: 0x4000_0000, end: RAM_END, .. })));
    }

    #[test]
    fn old_or_32_bit_kernels_are_refused() {
        assert_eq!(
            placed(&[(0x206, &[0x0b, 2])], RAM_END),
            Err(BzImageError::Protocol { major: 2, minor: 11 })
        );
        assert_eq!(placed(&[(0x236, &[0, 0])], RAM_END), Err(BzImageError::No64BitEntry(0)));
    }

    #[test]
    fn a_kernel_that_lies_about_its_size_is_refused() {
        let refused = placed(&[(0x260, &1u32.to_le_bytes())], RAM_END);
        assert_eq!(refused, Err(BzImageError::InitSize { init_size: 1, size: 0x1800 }));
        let refused = placed(&[(0x1f1, &[40])], RAM_END);
        assert!(matches!(refused, Err(BzImageError::Truncated { .. })));
    }

    #[test]
    fn initrd_limit_is_honoured_without_the_above_4g_flag() {
        assert_eq!(placed(&[(0x236, &[1, 0])], RAM_END).unwrap().initrd_limit, 0x8000_0000);
    }

    proptest! {
        #[test]
        fn any_header_is_placed_in_ram_or_refused(bytes in prop::collection::vec(any::<u8>(), HEADER_MAX - 17), mib in 2u64..4096) {
            let mut image = image(&[]);
            image[0x202 + 4..0x202 + 4 + bytes.len() - 4].copy_from_slice(&bytes[4..]);
            if let Ok(placed) = place(mib << 20, image.len() as u64, &header(&image)) {
                prop_assert!(placed.addr >= layout::HIGH_RAM);
                prop_assert!(placed.addr + placed.needed <= mib << 20);
                prop_assert!(placed.size <= placed.needed);
            }
        }
    }
}
