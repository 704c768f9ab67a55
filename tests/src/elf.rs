//! Null guests: ELF files of a few instructions with a PVH note, and broken ELF files.
//!
//! A PVH guest is entered at the address in its note, in 32-bit protected mode without paging, with
//! flat segments. Such guests start in microseconds and run on a software KVM too.

/// The address at which null guests are loaded and entered.
pub const LOAD_ADDRESS: u32 = 0x10_0000;
/// The guest-physical address of the boot timer, and the byte to write there.
pub const BOOT_TIMER: (u32, u8) = (0xC000_0000, 123);
/// Its address in Firecracker up to version 1.12.
const BOOT_TIMER_UNTIL_1_12: u32 = 0xD000_0000;
/// A guest-physical address in the MMIO gap without a device.
pub const NOTHING_THERE: u32 = 0xD000_0000;

/// The type of the note with the entry point: `XEN_ELFNOTE_PHYS32_ENTRY`.
const PHYS32_ENTRY: u32 = 18;
const PT_LOAD: u32 = 1;
const PT_NOTE: u32 = 4;
const HEADER_SIZE: usize = 64;
const PROGRAM_HEADER_SIZE: usize = 56;

/// A loadable segment.
#[derive(Debug, Clone)]
pub struct Segment {
    /// Guest-physical address.
    pub address: u64,
    /// Its bytes in the file.
    pub content: Vec<u8>,
    /// Its size in memory; at least its size in the file.
    pub memory_size: u64,
    /// A false size in the file for the header.
    pub claimed_size: Option<u64>,
}

impl Segment {
    /// A segment of these bytes.
    pub fn new(address: u64, content: &[u8]) -> Segment {
        Segment { address, content: content.to_vec(), memory_size: content.len() as u64, claimed_size: None }
    }
}

/// A builder of ELF files.
#[derive(Debug, Clone)]
pub struct Elf {
    /// Its loadable segments.
    pub segments: Vec<Segment>,
    /// The ELF header's entry.
    pub entry: u64,
    /// The PVH note's entry; `None` for no note.
    pub pvh_entry: Option<u32>,
}

impl Elf {
    /// A PVH guest that runs `code` at [`LOAD_ADDRESS`].
    pub fn of(code: &[u8]) -> Elf {
        Elf {
            segments: vec![Segment::new(LOAD_ADDRESS.into(), code)],
            entry: LOAD_ADDRESS.into(),
            pvh_entry: Some(LOAD_ADDRESS),
        }
    }

    /// The bytes of the file.
    pub fn bytes(&self) -> Vec<u8> {
        let note = self.pvh_entry.map(pvh_note);
        let count = self.segments.len() + usize::from(note.is_some());
        let mut data_at = HEADER_SIZE + count * PROGRAM_HEADER_SIZE;
        let mut headers = Vec::new();
        let mut data = Vec::new();
        let mut add = |kind, address, content: &[u8], file_size: u64, memory_size| {
            headers.extend(program_header(kind, data_at as u64, address, file_size, memory_size));
            data.extend_from_slice(content);
            data_at += content.len();
        };
        for segment in &self.segments {
            let file_size = segment.claimed_size.unwrap_or(segment.content.len() as u64);
            add(PT_LOAD, segment.address, &segment.content, file_size, segment.memory_size.max(file_size));
        }
        if let Some(note) = &note {
            add(PT_NOTE, 0, note, note.len() as u64, note.len() as u64);
        }
        let mut file = elf_header(self.entry, u16::try_from(count).expect("few segments"));
        file.extend(headers);
        file.extend(data);
        file
    }
}

/// Writes the boot timer's byte and halts.
pub fn null_guest() -> Elf {
    let mut code = write_byte(BOOT_TIMER.0, BOOT_TIMER.1);
    code.extend(HALT);
    Elf::of(&code)
}

/// Writes the boot timer's byte at each address that a version of Firecracker uses, ours first, and
/// halts. A monitor without a device there ignores the write.
pub fn null_guest_of_any_monitor() -> Elf {
    let mut code = write_byte(BOOT_TIMER.0, BOOT_TIMER.1);
    code.extend(write_byte(BOOT_TIMER_UNTIL_1_12, BOOT_TIMER.1));
    code.extend(HALT);
    Elf::of(&code)
}

/// Writes the boot timer's byte this many times, then asks the keyboard controller for a reset.
pub fn timer_flood_guest(times: usize) -> Elf {
    let mut code = write_byte(BOOT_TIMER.0, BOOT_TIMER.1).repeat(times);
    code.extend(RESET);
    code.extend(HALT);
    Elf::of(&code)
}

/// Raises an exception without an interrupt descriptor table: a triple fault. Returns also the
/// address of the instruction.
pub fn triple_fault_guest() -> (Elf, u32) {
    let table = LOAD_ADDRESS + 16;
    // lidt [table]
    let mut code = vec![0x0f, 0x01, 0x1d];
    code.extend(table.to_le_bytes());
    let fault_at = LOAD_ADDRESS + u32::try_from(code.len()).expect("a few bytes");
    // ud2
    code.extend([0x0f, 0x0b]);
    code.extend(HALT);
    // The table at offset 16: a limit of 0 and a base of 0.
    code.resize(16 + 6, 0);
    (Elf::of(&code), fault_at)
}

/// Reads MMIO with an instruction that KVM cannot emulate. Returns also that instruction.
pub fn unemulatable_guest() -> (Elf, Vec<u8>) {
    // fld dword [address]
    let mut instruction = vec![0xd9, 0x05];
    instruction.extend(NOTHING_THERE.to_le_bytes());
    let mut code = instruction.clone();
    code.extend(HALT);
    (Elf::of(&code), instruction)
}

/// Loops without a halt or an exit.
pub fn spinning_guest() -> Elf {
    let mut code = write_byte(BOOT_TIMER.0, BOOT_TIMER.1);
    // jmp $
    code.extend([0xeb, 0xfe]);
    Elf::of(&code)
}

/// In a [`counting_guest`], the loop, whose first instruction counts in `eax`.
pub const LOOP: u32 = LOAD_ADDRESS + 2;
/// The next instruction, which stores the count.
pub const STORE: u32 = LOOP + 2;
/// The instruction after it.
pub const CHECK: u32 = STORE + 7;
/// The count, of 4 bytes.
pub const COUNT: u32 = LOAD_ADDRESS + 0x2000;
/// Four bytes; the guest resets itself once they are not 0.
pub const END: u32 = COUNT + 4;

/// Counts in memory, until it is told to end. The code does the same in 32-bit and 64-bit mode.
pub fn counting_guest() -> Elf {
    // xor eax, eax; inc eax; mov [COUNT], eax; cmp dword [END], 0; je to the inc
    let mut code = vec![0x31, 0xc0, 0xff, 0xc0, 0x89, 0x04, 0x25];
    code.extend(COUNT.to_le_bytes());
    code.extend([0x83, 0x3c, 0x25]);
    code.extend(END.to_le_bytes());
    code.extend([0, 0x74, 0xed]);
    code.extend(RESET);
    code.extend(HALT);
    Elf::of(&code)
}

/// Sends these bytes over the serial port, then asks the keyboard controller for a reset.
pub fn serial_guest(text: &[u8]) -> Elf {
    // mov dx, 0x3f8
    let mut code = vec![0x66, 0xba, 0xf8, 0x03];
    for &byte in text {
        // mov al, byte; out dx, al
        code.extend([0xb0, byte, 0xee]);
    }
    code.extend(RESET);
    code.extend(HALT);
    Elf::of(&code)
}

/// Asks the keyboard controller for a reset, then halts.
pub fn reset_guest() -> Elf {
    Elf::of(&[&RESET[..], &HALT].concat())
}

/// Writes each of these bytes to a port, then asks the keyboard controller for a reset.
pub fn port_guest(writes: &[(u16, u8)]) -> Elf {
    let mut code = Vec::new();
    for (port, value) in writes {
        // mov dx, port; mov al, value; out dx, al
        code.extend([&[0x66, 0xba][..], &port.to_le_bytes(), &[0xb0, *value, 0xee]].concat());
    }
    code.extend(RESET);
    code.extend(HALT);
    Elf::of(&code)
}

/// mov al, 0xfe; out 0x64, al
const RESET: [u8; 4] = [0xb0, 0xfe, 0xe6, 0x64];
/// hlt; jmp to the hlt
const HALT: [u8; 3] = [0xf4, 0xeb, 0xfd];

/// mov byte [address], value
fn write_byte(address: u32, value: u8) -> Vec<u8> {
    let mut code = vec![0xc6, 0x05];
    code.extend(address.to_le_bytes());
    code.push(value);
    code
}

fn pvh_note(entry: u32) -> Vec<u8> {
    let mut note = Vec::new();
    for number in [4, 4, PHYS32_ENTRY] {
        note.extend(u32::to_le_bytes(number));
    }
    note.extend(b"Xen\0");
    note.extend(entry.to_le_bytes());
    note
}

fn elf_header(entry: u64, program_headers: u16) -> Vec<u8> {
    // 64 bits, little-endian, version 1; then ET_EXEC, EM_X86_64.
    let mut header = b"\x7fELF\x02\x01\x01".to_vec();
    header.resize(16, 0);
    header.extend([2, 0, 62, 0]);
    header.extend(1_u32.to_le_bytes());
    header.extend(entry.to_le_bytes());
    header.extend((HEADER_SIZE as u64).to_le_bytes());
    header.extend(0_u64.to_le_bytes());
    header.extend(0_u32.to_le_bytes());
    for number in [HEADER_SIZE as u16, PROGRAM_HEADER_SIZE as u16, program_headers, 64, 0, 0] {
        header.extend(number.to_le_bytes());
    }
    header
}

fn program_header(kind: u32, offset: u64, address: u64, file_size: u64, memory_size: u64) -> Vec<u8> {
    let mut header = kind.to_le_bytes().to_vec();
    // Readable, writable, executable.
    header.extend(7_u32.to_le_bytes());
    for number in [offset, address, address, file_size, memory_size, 4] {
        header.extend(number.to_le_bytes());
    }
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn number(bytes: &[u8]) -> u64 {
        bytes.iter().rev().fold(0, |value, &byte| value << 8 | u64::from(byte))
    }

    #[test]
    fn headers_locate_the_code_and_the_note() {
        let file = null_guest().bytes();
        assert_eq!(number(&file[0x18..0x20]), u64::from(LOAD_ADDRESS));
        assert_eq!(number(&file[0x38..0x3a]), 2, "one segment and one note");
        let load = &file[64..120];
        let offset = number(&load[8..16]) as usize;
        assert_eq!(&file[offset..offset + 8], [0xc6, 0x05, 0, 0, 0, 0xc0, 123, 0xf4]);
        let note = &file[120..176];
        let offset = number(&note[8..16]) as usize;
        assert_eq!(&file[offset + 12..offset + 16], b"Xen\0");
        assert_eq!(number(&file[offset + 16..]), u64::from(LOAD_ADDRESS));
    }

    #[test]
    fn the_triple_fault_guest_loads_an_empty_table() {
        let (elf, fault_at) = triple_fault_guest();
        let code = &elf.segments[0].content;
        assert_eq!(&code[(fault_at - LOAD_ADDRESS) as usize..][..2], [0x0f, 0x0b]);
        let table = number(&code[3..7]) - u64::from(LOAD_ADDRESS);
        assert_eq!(&code[table as usize..], [0; 6]);
    }

    #[test]
    fn a_segment_can_claim_more_than_the_file_holds() {
        let mut elf = null_guest();
        elf.segments[0].claimed_size = Some(1 << 20);
        let file = elf.bytes();
        assert_eq!(number(&file[64 + 32..64 + 40]), 1 << 20);
        assert!(file.len() < 1 << 10);
    }
}
