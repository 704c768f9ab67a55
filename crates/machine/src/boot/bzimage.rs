//! Loads a `bzImage` by the Linux/x86 boot protocol, 2.12 or newer, for its 64-bit entry point.

use std::fs::File;

use memory::GuestRam;

use super::error::{BootError, BzImageError};
use super::io::copy_to_guest;
use super::kernel::{Entry, LoadedKernel};
use super::setup_header::SetupHeader;
use crate::layout;

/// Offset of the 64-bit entry point in the protected-mode kernel.
const ENTRY_64: u64 = 0x200;

/// Loads the kernel of the file that begins with `header`.
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

/// Where the protected-mode kernel is in the file and in memory.
#[derive(Debug, PartialEq, Eq)]
struct Placed {
    /// Offset in the file.
    offset: u64,
    /// Bytes in the file.
    size: u64,
    /// Address in memory.
    addr: u64,
    /// Bytes of memory that the kernel needs at its entry.
    needed: u64,
    /// The highest end address of an initrd.
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
    // 0 means 4. The boot sector precedes these sectors.
    let setup_sectors = if header.u8(0x1f1) == 0 { 4 } else { header.u8(0x1f1) };
    let offset = (u64::from(setup_sectors) + 1) * 512;
    let size = len.checked_sub(offset).filter(|size| *size > ENTRY_64);
    let Some(size) = size else { return Err(BzImageError::Truncated { end: offset, len }) };

    // The kernel unpacks itself to its preferred address. Loaded there, it moves the least.
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
    // With XLF_CAN_BE_LOADED_ABOVE_4G an initrd may be anywhere. Else the header has a limit.
    let initrd_limit = if xloadflags & 2 != 0 { u64::MAX } else { u64::from(header.u32(0x22c)) + 1 };
    Ok(Placed { offset, size, addr, needed: init_size, initrd_limit })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::boot::setup_header::HEADER_MAX;
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
    fn relocatable_kernel_goes_lower_if_memory_is_short() {
        assert_eq!(placed(&[], 16 << 20).unwrap().addr, 0x20_0000);
        let fixed = placed(&[(0x234, &[0])], 16 << 20);
        assert!(matches!(fixed, Err(BzImageError::DoesNotFit { needed: 0x40_0000, .. })));
    }

    #[test]
    fn kernel_that_does_not_fit_is_refused() {
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
    fn init_size_below_the_kernels_size_is_refused() {
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
