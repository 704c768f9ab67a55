//! The DSDT: the devices that a guest cannot find by probing, and how deep the platform can sleep.

use acpi_tables::aml::{
    Device, EISAName, IO, Interrupt, Memory32Fixed, Name, Package, Path, ResourceTemplate, Scope,
};
use acpi_tables::sdt::Sdt;
use acpi_tables::{Aml, AmlSink};

use super::{OEM_ID, OEM_REVISION, SLEEP_TYPE_S5};
use crate::devices::Place;
use crate::layout;

/// The whole table.
pub(super) fn table(devices: &[Place]) -> impl Aml {
    let mut body = Vec::new();
    Name::new("_S5_".into(), &Package::new(vec![&SLEEP_TYPE_S5, &ZERO, &ZERO, &ZERO]))
        .to_aml_bytes(&mut body);
    serial_port(&mut body);
    keyboard(&mut body);
    for (number, place) in (0..).zip(devices) {
        virtio_device(&mut body, number, *place);
    }

    let mut table = Sdt::new(*b"DSDT", 36, 2, OEM_ID, *b"VSTADSDT", OEM_REVISION);
    table.append_slice(&body);
    table
}

const ZERO: u8 = 0;

/// Edge-triggered, active high, not shared: how an ISA device interrupts.
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

/// A virtio-mmio device: Linux knows the id `LNRO0005`.
fn virtio_device(sink: &mut dyn AmlSink, number: u32, place: Place) {
    let window = Memory32Fixed::new(true, place.addr as u32, 0x1000);
    Scope::new(
        "_SB_".into(),
        vec![&Device::new(
            Path::new(&format!("V{number:03}")),
            vec![
                &Name::new("_HID".into(), &"LNRO0005"),
                &Name::new("_UID".into(), &number),
                &Name::new("_CCA".into(), &1u8),
                &Name::new("_CRS".into(), &ResourceTemplate::new(vec![&window, &isa_interrupt(place.irq)])),
            ],
        )],
    )
    .to_aml_bytes(sink);
}
