//! The MP table (Intel MultiProcessor Specification 1.4), in which kernels without ACPI find vCPUs
//! and interrupt lines.

use memory::GuestRam;
use zerocopy::{Immutable, IntoBytes};

use super::io::write_boot_data;
use crate::layout;

/// The most vCPUs that fit into the table and its identifiers. A kernel without ACPI sees no more.
const MAX_CPUS: u8 = 128;

/// Identifier of the I/O APIC, above those of the vCPUs.
const IOAPIC_ID: u8 = 0xfe;
const APIC_VERSION: u8 = 0x14;
const SPEC_REVISION: u8 = 4;
const BUS_ISA: u8 = 0;
/// Interrupts conform to the ISA bus: edge-triggered, active high.
const CONFORMS_TO_BUS: u16 = 0;

const ENABLED: u8 = 1;
const BOOT_PROCESSOR: u8 = 2;

const ENTRY_PROCESSOR: u8 = 0;
const ENTRY_BUS: u8 = 1;
const ENTRY_IOAPIC: u8 = 2;
const ENTRY_IO_INTERRUPT: u8 = 3;
const ENTRY_LOCAL_INTERRUPT: u8 = 4;

const INT: u8 = 0;
const NMI: u8 = 1;
const EXT_INT: u8 = 3;

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct FloatingPointer {
    signature: [u8; 4],
    table: u32,
    length: u8,
    revision: u8,
    checksum: u8,
    features: [u8; 5],
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Header {
    signature: [u8; 4],
    length: u16,
    revision: u8,
    checksum: u8,
    oem: [u8; 8],
    product: [u8; 12],
    oem_table: u32,
    oem_size: u16,
    entries: u16,
    lapic: u32,
    extended_length: u16,
    extended_checksum: u8,
    reserved: u8,
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Processor {
    kind: u8,
    apic_id: u8,
    apic_version: u8,
    flags: u8,
    signature: u32,
    features: u32,
    reserved: [u32; 2],
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct BusEntry {
    kind: u8,
    id: u8,
    name: [u8; 6],
}

#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct IoApic {
    kind: u8,
    id: u8,
    version: u8,
    flags: u8,
    addr: u32,
}

/// The entry for an interrupt, from a bus to an I/O APIC or to the processors themselves.
#[repr(C)]
#[derive(IntoBytes, Immutable)]
struct Interrupt {
    kind: u8,
    interrupt: u8,
    flags: u16,
    source_bus: u8,
    source_line: u8,
    target: u8,
    target_line: u8,
}

/// Writes the table for `cpus` vCPUs, the first of which boots.
pub(super) fn write(ram: &GuestRam, cpus: u8) {
    let cpus = cpus.min(MAX_CPUS);
    let mut body = Vec::new();
    let mut entries = 0;
    let mut add = |bytes: &[u8]| {
        body.extend_from_slice(bytes);
        entries += 1;
    };
    for id in 0..cpus {
        let flags = if id == 0 { ENABLED | BOOT_PROCESSOR } else { ENABLED };
        // Family 6 with an FPU and a local APIC. The real features are in CPUID.
        let (signature, features) = (0x600, 0x201);
        let processor = Processor {
            kind: ENTRY_PROCESSOR,
            apic_id: id,
            apic_version: APIC_VERSION,
            flags,
            signature,
            features,
            reserved: [0; 2],
        };
        add(processor.as_bytes());
    }
    add(BusEntry { kind: ENTRY_BUS, id: BUS_ISA, name: *b"ISA   " }.as_bytes());
    add(IoApic {
        kind: ENTRY_IOAPIC,
        id: IOAPIC_ID,
        version: APIC_VERSION,
        flags: ENABLED,
        addr: layout::IOAPIC,
    }
    .as_bytes());
    for line in 0..layout::IOAPIC_LINES as u8 {
        let interrupt = Interrupt {
            kind: ENTRY_IO_INTERRUPT,
            interrupt: INT,
            flags: CONFORMS_TO_BUS,
            source_bus: BUS_ISA,
            source_line: line,
            target: IOAPIC_ID,
            target_line: line,
        };
        add(interrupt.as_bytes());
    }
    for (line, interrupt, target) in [(0, EXT_INT, 0), (1, NMI, 0xff)] {
        let local = Interrupt {
            kind: ENTRY_LOCAL_INTERRUPT,
            interrupt,
            flags: CONFORMS_TO_BUS,
            source_bus: BUS_ISA,
            source_line: 0,
            target,
            target_line: line,
        };
        add(local.as_bytes());
    }

    let mut header = Header {
        signature: *b"PCMP",
        length: (size_of::<Header>() + body.len()) as u16,
        revision: SPEC_REVISION,
        checksum: 0,
        oem: *b"VESTA   ",
        product: *b"MICROVM     ",
        oem_table: 0,
        oem_size: 0,
        entries,
        lapic: layout::LAPIC,
        extended_length: 0,
        extended_checksum: 0,
        reserved: 0,
    };
    header.checksum = checksum(&[header.as_bytes(), &body]);
    let table = layout::MP_TABLE + size_of::<FloatingPointer>() as u64;
    let mut pointer = FloatingPointer {
        signature: *b"_MP_",
        table: table as u32,
        length: 1,
        revision: SPEC_REVISION,
        checksum: 0,
        features: [0; 5],
    };
    pointer.checksum = checksum(&[pointer.as_bytes()]);

    let bytes = [pointer.as_bytes(), header.as_bytes(), &body].concat();
    debug_assert!(bytes.len() as u64 <= layout::MP_TABLE_MAX);
    write_boot_data(ram, layout::MP_TABLE, &bytes);
}

/// The byte that makes the sum of all bytes zero.
fn checksum(parts: &[&[u8]]) -> u8 {
    parts.iter().flat_map(|p| p.iter()).fold(0u8, |sum, byte| sum.wrapping_add(*byte)).wrapping_neg()
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn table_fits_and_sums_to_zero_for_any_number_of_vcpus() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        for cpus in [1, 2, 127, 128, 255] {
            write(&ram, cpus);
            let mut bytes = vec![0u8; layout::MP_TABLE_MAX as usize];
            ram.memory().read_slice(&mut bytes, GuestAddress(layout::MP_TABLE)).unwrap();
            let sum = |bytes: &[u8]| bytes.iter().fold(0u8, |sum, b| sum.wrapping_add(*b));
            assert_eq!(sum(&bytes[..16]), 0);
            let len = usize::from(u16::from_le_bytes([bytes[20], bytes[21]]));
            assert_eq!(sum(&bytes[16..16 + len]), 0);
            let processors = usize::from(cpus.min(MAX_CPUS));
            assert_eq!(len, 44 + processors * 20 + 8 + 8 + 24 * 8 + 2 * 8);
        }
    }
}
