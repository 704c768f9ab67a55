//! The DSDT: the devices that a guest cannot find by probing, and the sleep states.

use acpi_tables::aml::{
    AddressSpace, AddressSpaceCacheable, Device, EISAName, IO, Interrupt, Memory32Fixed, Method, Name,
    Notify, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use virtio::transport::pci::{CONFIG_ADDRESS, ECAM_SIZE};

use super::oem::{OEM_ID, OEM_REVISION};
use crate::devices::{DeviceAddresses, MmioWindow};
use crate::layout;
use crate::vm_gen_id::VMCLOCK_SIZE;

/// The whole table.
pub(super) fn table(devices: &DeviceAddresses) -> impl Aml {
    let mut body = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&layout::ACPI_SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]))
        .to_aml_bytes(&mut body);
    serial_port(&mut body);
    keyboard(&mut body);
    vm_gen_id(&mut body);
    pvpanic(&mut body);
    match devices {
        DeviceAddresses::Mmio(windows) => {
            for (number, window) in (0..).zip(windows) {
                virtio_device(&mut body, number, *window);
            }
        }
        DeviceAddresses::Pci(_) => pci_bus(&mut body),
    }

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, *b"VSTADSDT", OEM_REVISION);
    table.append_slice(&body);
    table
}

const ZERO: u8 = 0;

/// The interrupt of an ISA device: edge-triggered, active high, not shared.
fn isa_interrupt(line: u32) -> Interrupt {
    Interrupt::new(true, true, false, false, line)
}

fn serial_port(sink: &mut dyn AmlSink) {
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "COM1".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0501")),
                &Name::new("_UID".into(), &ZERO),
                &Name::new("_DDN".into(), &"COM1"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(layout::COM1, layout::COM1, 1, 8),
                        &isa_interrupt(layout::COM1_IRQ),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(sink);
}

fn keyboard(sink: &mut dyn AmlSink) {
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PS2_".into(),
            vec![
                &Name::new("_HID".into(), &EISAName::new("PNP0303")),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![
                        &IO::new(layout::I8042, layout::I8042, 1, 1),
                        &IO::new(layout::I8042 + 4, layout::I8042 + 4, 1, 1),
                        &isa_interrupt(layout::I8042_IRQ),
                    ]),
                ),
            ],
        )],
    )
    .to_aml_bytes(sink);
}

/// The VM generation ID and the VMClock ([`crate::vm_gen_id`]), and the generic event device (ACPI
/// 6.5, 5.6.9), whose interrupt notifies the guest of a change of both.
fn vm_gen_id(sink: &mut dyn AmlSink) {
    const DEVICE_SPECIFIC_CHANGE: u8 = 0x80;
    let id_low = layout::VM_GENERATION_ID as u32;
    let clock = Memory32Fixed::new(false, layout::VMCLOCK as u32, VMCLOCK_SIZE);
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "VGEN".into(),
                vec![
                    // Linux's driver has matched both IDs since 5.18. The second is longer than
                    // ACPI allows: kernels that compare 8 characters match the first.
                    &Name::new("_HID".into(), &"VMGENCTR"),
                    &Name::new("_CID".into(), &"VM_Gen_Counter"),
                    &Name::new("_DDN".into(), &"VM_Gen_Counter"),
                    // Low half, high half.
                    &Name::new("ADDR".into(), &Package::new(vec![&id_low, &ZERO])),
                ],
            ),
            &Device::new(
                "VCLK".into(),
                vec![
                    &Name::new("_HID".into(), &"AMZNC10C"),
                    &Name::new("_CID".into(), &"VMCLOCK"),
                    &Name::new("_DDN".into(), &"VMCLOCK"),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&clock])),
                ],
            ),
            &Device::new(
                "GED_".into(),
                vec![
                    &Name::new("_HID".into(), &"ACPI0013"),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&isa_interrupt(layout::GENERIC_EVENT_IRQ)]),
                    ),
                    &Method::new(
                        "_EVT".into(),
                        1,
                        true,
                        vec![
                            &Notify::new(&Path::new("\\_SB_.VGEN"), &DEVICE_SPECIFIC_CHANGE),
                            &Notify::new(&Path::new("\\_SB_.VCLK"), &DEVICE_SPECIFIC_CHANGE),
                        ],
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

/// The pvpanic device. `QEMU0001` is its ID in Linux.
fn pvpanic(sink: &mut dyn AmlSink) {
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            "PEVT".into(),
            vec![
                &Name::new("_HID".into(), &"QEMU0001"),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&IO::new(layout::PVPANIC, layout::PVPANIC, 1, 1)]),
                ),
            ],
        )],
    )
    .to_aml_bytes(sink);
}

/// A virtio-mmio device. `LNRO0005` is its ID in Linux.
fn virtio_device(sink: &mut dyn AmlSink, number: u32, window: MmioWindow) {
    let registers = Memory32Fixed::new(true, window.addr as u32, 0x1000);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            Path::new(&format!("V{number:03}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &number),
                &Name::new("_CCA".into(), &1u8),
                &Name::new(
                    "_CRS".into(),
                    &ResourceTemplate::new(vec![&registers, &isa_interrupt(window.irq)]),
                ),
            ],
        )],
    )
    .to_aml_bytes(sink);
}

/// The PCI bus: its number, the ports of its configuration spaces, and the addresses for BARs. ECAM
/// is a resource of the motherboard, as the PCI Firmware Specification (4.1.2) requires.
fn pci_bus(sink: &mut dyn AmlSink) {
    let ports = IO::new(CONFIG_ADDRESS, CONFIG_ADDRESS, 1, 8);
    let bars = AddressSpace::new_memory(
        AddressSpaceCacheable::NotCacheable,
        true,
        layout::PCI_BARS.start,
        layout::PCI_BARS.end - 1,
        None,
    );
    let bus = AddressSpace::new_bus_number(0u16, 0u16);
    Scope::new(
        "_SB_".into(),
        vec![
            &Device::new(
                "PCI0".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0A08")),
                    &Name::new("_CID".into(), &EISAName::new("PNP0A03")),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new("_SEG".into(), &ZERO),
                    &Name::new("_BBN".into(), &ZERO),
                    &Name::new("_CCA".into(), &1u8),
                    &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&bus, &ports, &bars])),
                ],
            ),
            &Device::new(
                "MBRD".into(),
                vec![
                    &Name::new("_HID".into(), &EISAName::new("PNP0C02")),
                    &Name::new("_UID".into(), &ZERO),
                    &Name::new(
                        "_CRS".into(),
                        &ResourceTemplate::new(vec![&Memory32Fixed::new(
                            true,
                            layout::ECAM as u32,
                            ECAM_SIZE as u32,
                        )]),
                    ),
                ],
            ),
        ],
    )
    .to_aml_bytes(sink);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn vm_generation_id_has_the_ids_that_drivers_match() {
        let mut aml = Vec::new();
        vm_gen_id(&mut aml);
        for id in [&b"_HID\x0dVMGENCTR\0"[..], b"_CID\x0dVM_Gen_Counter\0", b"_HID\x0dAMZNC10C\0"] {
            assert!(aml.windows(id.len()).any(|bytes| bytes == id), "{}", String::from_utf8_lossy(id));
        }
    }

    #[test]
    fn pvpanic_has_the_id_that_drivers_match_and_one_port() {
        let mut aml = Vec::new();
        pvpanic(&mut aml);
        // An I/O port descriptor (ACPI 6.5, 6.4.2.5): 16-bit decode, from, to, alignment, length.
        let port = [0x47, 1, 0x05, 0x05, 0x05, 0x05, 1, 1];
        for part in [&b"_HID\x0dQEMU0001\0"[..], &port] {
            assert!(aml.windows(part.len()).any(|bytes| bytes == part), "{part:x?} in {aml:x?}");
        }
    }
}
