//! The ACPI tables: vCPUs, interrupt controllers, devices, power-off and reset.
//!
//! The platform is *hardware-reduced* (ACPI 6.5, 4.1): it has no SCI, no PM timer and no SMI. Power
//! management is left with the registers for sleep (a guest's `poweroff`) and reset (its `reboot`),
//! at ports.
//!
//! All tables are in the reserved part of the first MiB, between [`layout::ACPI_TABLES`] and
//! [`layout::ACPI_TABLES_END`]. The root pointer is at [`layout::RSDP`].

mod dsdt;
mod oem;

use acpi_tables::Aml;
use acpi_tables::fadt::{FADTBuilder, Flags, PmProfile};
use acpi_tables::gas::{AccessSize, AddressSpace, GAS};
use acpi_tables::madt::{EnabledStatus, IoApic, LocalInterruptController, MADT, ProcessorLocalApic};
use acpi_tables::mcfg::MCFG;
use acpi_tables::rsdp::Rsdp;
use acpi_tables::xsdt::XSDT;
use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::devices::DeviceAddresses;
use crate::layout;

use oem::{OEM_ID, OEM_REVISION};

/// The FADT's `Hypervisor Vendor Identity`.
const HYPERVISOR_ID: [u8; 8] = *b"VESTAKVM";

/// The I/O APIC's identifier, above those of all vCPUs.
const IOAPIC_ID: u8 = 0xfe;

/// `iapc_boot_arch`: there is an i8042 keyboard controller.
const BOOT_ARCH_8042: u16 = 1 << 1;
/// `iapc_boot_arch`: there is no VGA.
const BOOT_ARCH_NO_VGA: u16 = 1 << 2;
/// `iapc_boot_arch`: there is no CMOS clock. In fact there is one, for guests that do not look
/// here; Linux uses a better clock.
const BOOT_ARCH_NO_CMOS_RTC: u16 = 1 << 5;

/// Writes all tables, for `cpus` vCPUs and these virtio devices. Returns the address of the root
/// pointer.
pub(crate) fn write_tables(ram: &GuestRam, cpus: u8, devices: &DeviceAddresses) -> u64 {
    let mut writer = Writer { ram, next: layout::ACPI_TABLES };
    let dsdt = writer.add(&dsdt::table(devices));
    let fadt = writer.add(&fadt(dsdt));
    let madt = writer.add(&madt(cpus));
    let mut xsdt = XSDT::new(OEM_ID, *b"VSTAXSDT", OEM_REVISION);
    xsdt.add_entry(fadt);
    xsdt.add_entry(madt);
    if let DeviceAddresses::Pci(_) = devices {
        xsdt.add_entry(writer.add(&mcfg()));
    }
    let xsdt = writer.add(&xsdt);
    writer.write_at(layout::RSDP, &Rsdp::new(OEM_ID, xsdt));
    layout::RSDP
}

/// Writes tables one after another.
struct Writer<'a> {
    ram: &'a GuestRam,
    next: u64,
}

impl Writer<'_> {
    /// Writes `table` at the next address, which is returned.
    fn add(&mut self, table: &dyn Aml) -> u64 {
        let addr = self.next;
        let end = self.write_at(addr, table);
        assert!(end <= layout::ACPI_TABLES_END, "the ACPI tables of any configuration fit");
        self.next = end.next_multiple_of(64);
        addr
    }

    /// Writes `table` at `addr`. Returns the address behind it.
    fn write_at(&self, addr: u64, table: &dyn Aml) -> u64 {
        let mut bytes = Vec::new();
        table.to_aml_bytes(&mut bytes);
        self.ram.memory().write_slice(&bytes, GuestAddress(addr)).expect("the first MiB is RAM");
        addr + bytes.len() as u64
    }
}

/// The FADT: the registers of the platform.
fn fadt(dsdt: u64) -> impl Aml {
    let port = |port: u16| GAS::new(AddressSpace::SystemIo, 8, 0, AccessSize::ByteAccess, port.into());
    let mut fadt = FADTBuilder::new(OEM_ID, *b"VSTAFADT", OEM_REVISION)
        .dsdt_64(dsdt)
        .preferred_pm_profile(PmProfile::EnterpriseServer)
        .flag(Flags::HwReducedAcpi)
        .flag(Flags::ResetRegSup)
        // These two flags mean that the fixed hardware has no power and no sleep button.
        .flag(Flags::PwrButton)
        .flag(Flags::SlpButton);
    fadt.iapc_boot_arch = (BOOT_ARCH_8042 | BOOT_ARCH_NO_VGA | BOOT_ARCH_NO_CMOS_RTC).into();
    fadt.reset_reg = port(layout::ACPI_RESET);
    fadt.reset_value = layout::ACPI_RESET_VALUE;
    fadt.sleep_control_reg = port(layout::ACPI_SLEEP_CONTROL);
    fadt.sleep_status_reg = port(layout::ACPI_SLEEP_STATUS);
    fadt.hypervisor_vendor_identity = u64::from_le_bytes(HYPERVISOR_ID).into();
    fadt.finalize()
}

/// The MADT: vCPUs and interrupt controllers.
fn madt(cpus: u8) -> impl Aml {
    let mut madt =
        MADT::new(OEM_ID, *b"VSTAMADT", OEM_REVISION, LocalInterruptController::Address(layout::LAPIC));
    for id in 0..cpus {
        madt.add_structure(ProcessorLocalApic::new(id, id, EnabledStatus::Enabled));
    }
    madt.add_structure(IoApic::new(IOAPIC_ID, layout::IOAPIC, 0));
    madt
}

/// The MCFG: the PCI configuration spaces of bus 0.
fn mcfg() -> impl Aml {
    let mut mcfg = MCFG::new(OEM_ID, *b"VSTAMCFG", OEM_REVISION);
    mcfg.add_ecam(layout::ECAM, 0, 0, 0);
    mcfg
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::devices::MmioWindow;
    use config::HugePages;

    fn read(ram: &GuestRam, addr: u64, len: usize) -> Vec<u8> {
        let mut bytes = vec![0; len];
        ram.memory().read_slice(&mut bytes, GuestAddress(addr)).unwrap();
        bytes
    }

    fn u64_at(bytes: &[u8], at: usize) -> u64 {
        u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap())
    }

    fn table(ram: &GuestRam, addr: u64) -> Vec<u8> {
        let len = ram.memory().read_obj::<u32>(GuestAddress(addr + 4)).unwrap();
        read(ram, addr, len as usize)
    }

    /// The names of all tables. Checks that each sums to zero.
    fn tables(devices: &DeviceAddresses) -> Vec<String> {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        let rsdp = read(&ram, write_tables(&ram, 128, devices), 36);
        assert_eq!(&rsdp[..8], b"RSD PTR ");
        let xsdt = table(&ram, u64_at(&rsdp, 24));
        let mut tables: Vec<_> = xsdt[36..].chunks(8).map(|entry| table(&ram, u64_at(entry, 0))).collect();
        tables.push(table(&ram, u64_at(&tables[0], 140)));
        tables.push(xsdt);
        for t in &tables {
            assert_eq!(t.iter().fold(0u8, |sum, b| sum.wrapping_add(*b)), 0);
        }
        tables.iter().map(|t| String::from_utf8_lossy(&t[..4]).into_owned()).collect()
    }

    #[test]
    fn root_pointer_leads_to_every_table_and_each_sums_to_zero() {
        let window = |n: u64| MmioWindow { addr: 0xc000_1000 + n * 0x1000, irq: 5 + n as u32 };
        assert_eq!(
            tables(&DeviceAddresses::Mmio((0..19).map(window).collect())),
            ["FACP", "APIC", "DSDT", "XSDT"]
        );
        assert_eq!(tables(&DeviceAddresses::Pci(31)), ["FACP", "APIC", "MCFG", "DSDT", "XSDT"]);
    }
}
