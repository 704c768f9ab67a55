//! Where everything but RAM lies in the guest: physical addresses, ports and interrupt lines.
//!
//! The layout is Firecracker's, so that guests and tools that know one know the other. RAM itself is laid out by
//! [`memory::layout`].

/// Boot GDT, five entries.
pub const BOOT_GDT: u64 = 0x500;
/// Boot IDT, empty.
pub const BOOT_IDT: u64 = 0x528;
/// PVH start info, followed by its module list.
pub const PVH_START_INFO: u64 = 0x6000;
/// PVH module list.
pub const PVH_MODULES: u64 = 0x6040;
/// The Linux zero page, or the PVH memory map.
pub const ZERO_PAGE: u64 = 0x7000;
/// Top of the stack that a kernel is entered with.
pub const BOOT_STACK: u64 = 0x8ff0;
/// Page tables for the 64-bit entry: the level-4 table, then as many pages as needed up to
/// [`BOOT_TABLES_END`].
pub const BOOT_PML4: u64 = 0x9000;
/// End of the page tables for the 64-bit entry, at the latest.
pub const BOOT_TABLES_END: u64 = CMDLINE;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;

/// End of the low RAM that the guest may use; from here to [`RSDP`] are the firmware's tables.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The MP table lies where a kernel looks for it: the last KiB of low memory and what follows.
pub const MP_TABLE: u64 = LOW_RAM_END;
/// Most bytes of MP table; the ACPI tables follow.
pub const MP_TABLE_MAX: u64 = 0x1400;
/// ACPI tables, up to [`ACPI_TABLES_END`].
pub const ACPI_TABLES: u64 = MP_TABLE + MP_TABLE_MAX;
/// Where the ACPI tables end at the latest.
pub const ACPI_TABLES_END: u64 = VM_GENERATION_ID;
/// The page of the VM generation id.
pub const VM_GENERATION_ID: u64 = 0xd_e000;
/// The page of the VMClock.
pub const VMCLOCK: u64 = 0xd_f000;
/// The ACPI root pointer, where a BIOS would have it.
pub const RSDP: u64 = 0xe_0000;
/// The kernel and everything else that a user supplies lie from here upwards.
pub const HIGH_RAM: u64 = 0x10_0000;

/// The boot timer: a guest writes [`BOOT_TIMER_MAGIC`] here to say that it has come so far.
pub const BOOT_TIMER: u64 = 0xc000_0000;
/// Windows of virtio-mmio devices, one after another.
pub const VIRTIO_MMIO: u64 = BOOT_TIMER + 0x1000;
/// What the boot timer wants to be written.
pub const BOOT_TIMER_MAGIC: u8 = 123;
/// PCI configuration space (ECAM): 256 MiB set aside.
pub const ECAM: u64 = 0xeec0_0000;
/// Size of [`ECAM`].
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// Where the registers of PCI devices are: 64-bit BARs, in the hole that RAM leaves for them.
pub const PCI_BARS: std::ops::Range<u64> = memory::layout::MMIO64_START..memory::layout::MMIO64_END;
/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel needs for itself.
pub const KVM_TSS: usize = 0xfffb_d000;

/// First serial port: eight ports.
pub const COM1: u16 = 0x3f8;
/// Its interrupt line.
pub const COM1_IRQ: u32 = 4;
/// The interrupt line of the generic event device: COM2's, which there is not.
pub const GENERIC_EVENT_IRQ: u32 = 3;

/// Keyboard controller: data at 0x60, command at 0x64.
pub const I8042: u16 = 0x60;
/// Its interrupt line.
pub const I8042_IRQ: u32 = 1;
/// CMOS clock: index at 0x70, data at 0x71.
pub const CMOS: u16 = 0x70;
/// ACPI sleep control register: one port. (The status register is the next one, reset the one after.)
pub const ACPI_SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub const ACPI_SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register.
pub const ACPI_RESET: u16 = 0x602;

/// Interrupt lines of the I/O APIC.
pub const IOAPIC_LINES: u32 = 24;
