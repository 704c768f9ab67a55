//! A guest of a few instructions whose driver accepts no feature, not even `VERSION_1`.
//!
//! It drives the machine's first device, an entropy device or a disk, with one request at a time
//! and without interrupts. It counts the used buffers, and sends 0, 1, 2, ... over its serial port
//! ([`crate::counting`]). On PCI it accesses the device through the window in configuration space
//! (4.1.4.9), because 32-bit code cannot map the BAR.

use crate::elf::Elf;
use crate::guest::Transport;

const DESCRIPTORS: u32 = 0x20_0000;
const AVAILABLE: u32 = 0x20_1000;
const USED: u32 = 0x20_2000;
const BUFFER: u32 = 0x20_3000;
/// The header of a read of sector 0: zeros, as all of a new guest's memory.
const READ_HEADER: u32 = 0x20_4000;
const READ_STATUS: u32 = 0x20_5000;
const QUEUE_SIZE: u32 = 8;

/// The first device's registers on virtio-mmio.
const MMIO: u32 = 0xc000_1000;
/// The first device's configuration space on PCI, behind ports 0xcf8 and 0xcfc.
const PCI_SLOT: u32 = 0x8000_0000 | 1 << 11;
/// The offset of the window in it.
const WINDOW: u32 = 0x84;

/// A register of the device: its offset on virtio-mmio, and its offset and width on PCI.
type Register = (u32, u32, u32);

const DRIVER_FEATURE_SELECT: Register = (0x24, 0x08, 4);
const DRIVER_FEATURE: Register = (0x20, 0x0c, 4);
const STATUS: Register = (0x70, 0x14, 1);
const QUEUE_SELECT: Register = (0x30, 0x16, 2);
const SIZE: Register = (0x38, 0x18, 2);
const READY: Register = (0x44, 0x1c, 2);
const ADDRESSES: [(Register, u32); 6] = [
    ((0x80, 0x20, 4), DESCRIPTORS),
    ((0x84, 0x24, 4), 0),
    ((0x90, 0x28, 4), AVAILABLE),
    ((0x94, 0x2c, 4), 0),
    ((0xa0, 0x30, 4), USED),
    ((0xa4, 0x34, 4), 0),
];
const NOTIFY: Register = (0x50, 0x6000, 2);

/// A descriptor: address, length, and flags with the next descriptor in the upper half.
type Descriptor = (u32, u32, u32);

const NEXT: u32 = 1;
const DEVICE_WRITES: u32 = 2;

/// The kernel of a guest that gets four random bytes with each request.
pub fn kernel(transport: Transport) -> Elf {
    driver(transport, &[(BUFFER, 4, DEVICE_WRITES)])
}

/// The kernel of a guest that reads sector 0 of its first drive with each request.
pub fn reader(transport: Transport) -> Elf {
    let header = (READ_HEADER, 16, NEXT | 1 << 16);
    let data = (BUFFER, 512, NEXT | DEVICE_WRITES | 2 << 16);
    driver(transport, &[header, data, (READ_STATUS, 1, DEVICE_WRITES)])
}

/// The kernel of a guest that breaks the device's queue, and halts: it makes more buffers available
/// than the queue has.
pub fn breaking_kernel(transport: Transport) -> Elf {
    let write = writer(transport);
    let mut code = start(&write, &[(BUFFER, 4, DEVICE_WRITES)]);
    // The available ring's flags and index.
    code.extend(store(AVAILABLE, (QUEUE_SIZE + 1) << 16));
    code.extend(write(NOTIFY, 0));
    code.extend([0xf4, 0xeb, 0xfd]); // hlt; jmp to the hlt
    Elf::of(&code)
}

/// The kernel of a guest that makes this chain of descriptors available again and again.
fn driver(transport: Transport, chain: &[Descriptor]) -> Elf {
    let write = writer(transport);
    let mut code = start(&write, chain);

    code.extend([0x31, 0xdb]); // xor ebx, ebx
    let again = code.len();
    code.push(0x43); // inc ebx
    // mov [available index], bx
    code.extend([&[0x66, 0x89, 0x1d][..], &(AVAILABLE + 2).to_le_bytes()].concat());
    code.extend(write(NOTIFY, 0));
    // wait: cmp [used index], bx
    code.extend([&[0x66, 0x39, 0x1d][..], &(USED + 2).to_le_bytes()].concat());
    code.extend([0x75, 0xf7]); // jne wait
    code.extend([0x8d, 0x43, 0xff]); // lea eax, [ebx - 1]
    code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]); // mov dx, 0x3f8; out dx, al
    let back = again.wrapping_sub(code.len() + 5) as u32;
    code.push(0xe9); // jmp again
    code.extend(back.to_le_bytes());
    Elf::of(&code)
}

/// Writes a value to a register of the device.
type Write = Box<dyn Fn(Register, u32) -> Vec<u8>>;

fn writer(transport: Transport) -> Write {
    Box::new(move |(mmio, pci, width): Register, value| match transport {
        Transport::Mmio => store(MMIO + mmio, value),
        Transport::Pci => [(8, pci), (12, width), (16, value)]
            .map(|(field, value)| [out(0xcf8, PCI_SLOT | (WINDOW + field)), out(0xcfc, value)].concat())
            .concat(),
    })
}

/// Starts the device, with this chain in its queue's descriptor table.
fn start(write: &Write, chain: &[Descriptor]) -> Vec<u8> {
    let mut code = Vec::new();
    for status in [0, 1, 3] {
        code.extend(write(STATUS, status));
    }
    for half in [0, 1] {
        code.extend(write(DRIVER_FEATURE_SELECT, half));
        code.extend(write(DRIVER_FEATURE, 0));
    }
    code.extend(write(STATUS, 0xb));
    code.extend(write(QUEUE_SELECT, 0));
    code.extend(write(SIZE, QUEUE_SIZE));
    for (register, address) in ADDRESSES {
        code.extend(write(register, address));
    }
    code.extend(write(READY, 1));
    code.extend(write(STATUS, 0xf));
    // All entries of the available ring name descriptor 0.
    for (at, (address, len, flags)) in (DESCRIPTORS..).step_by(16).zip(chain) {
        code.extend(store(at, *address));
        code.extend(store(at + 8, *len));
        code.extend(store(at + 12, *flags));
    }
    code
}

/// mov dword [address], value
fn store(address: u32, value: u32) -> Vec<u8> {
    [&[0xc7, 0x05][..], &address.to_le_bytes(), &value.to_le_bytes()].concat()
}

/// mov eax, value; mov dx, port; out dx, eax
fn out(port: u16, value: u32) -> Vec<u8> {
    [&[0xb8][..], &value.to_le_bytes(), &[0x66, 0xba], &port.to_le_bytes(), &[0xef]].concat()
}
