//! The guest's address space but for RAM: physical addresses, ports and interrupt lines.
//!
//! The layout is Firecracker's, which guests and tools know. [`memory::layout`] places RAM.

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
/// Page tables for the 64-bit entry: the level-4 table (PML4), then as many pages as needed.
pub const BOOT_PML4: u64 = 0x9000;
/// The page tables for the 64-bit entry end at or before this address.
pub const BOOT_TABLES_END: u64 = CMDLINE;
/// Kernel command line.
pub const CMDLINE: u64 = 0x2_0000;

/// End of the low RAM that the guest may use. Firmware tables follow.
pub const LOW_RAM_END: u64 = 0x9_fc00;
/// The MP table, where a kernel looks for it: in the last KiB of low memory.
pub const MP_TABLE: u64 = LOW_RAM_END;
/// The most bytes of the MP table. The ACPI tables follow.
pub const MP_TABLE_MAX: u64 = 0x1400;
/// ACPI tables.
pub const ACPI_TABLES: u64 = MP_TABLE + MP_TABLE_MAX;
/// The ACPI tables end at or before this address.
pub const ACPI_TABLES_END: u64 = VM_GENERATION_ID;
/// The page of the VM generation ID.
pub const VM_GENERATION_ID: u64 = 0xd_e000;
/// The page of the VMClock.
pub const VMCLOCK: u64 = 0xd_f000;
/// The ACPI root pointer, where a BIOS would have it.
pub const RSDP: u64 = 0xe_0000;
/// Kernel and initrd are loaded at or above this address.
pub const HIGH_RAM: u64 = 0x10_0000;

/// The boot timer: a guest writes [`BOOT_TIMER_MAGIC`] here.
pub const BOOT_TIMER: u64 = 0xc000_0000;
/// The windows of virtio-mmio devices, one after another.
pub const VIRTIO_MMIO: u64 = BOOT_TIMER + 0x1000;
/// The value that makes the boot timer log a line.
pub const BOOT_TIMER_MAGIC: u8 = 123;
/// PCI configuration space (ECAM): 256 MiB are reserved.
pub const ECAM: u64 = 0xeec0_0000;
/// Bytes reserved for [`ECAM`].
pub const ECAM_SIZE: u64 = 0x1000_0000;
/// The 64-bit BARs of PCI devices, in the gap that RAM leaves for them.
pub const PCI_BARS: std::ops::Range<u64> = memory::layout::MMIO64_START..memory::layout::MMIO64_END;
/// The I/O APIC.
pub const IOAPIC: u32 = 0xfec0_0000;
/// The local APIC.
pub const LAPIC: u32 = 0xfee0_0000;
/// Three pages that KVM on Intel uses itself.
pub const KVM_TSS: usize = 0xfffb_d000;

/// First serial port: eight ports.
pub const COM1: u16 = 0x3f8;
/// COM1's interrupt line.
pub const COM1_IRQ: u32 = 4;
/// The generic event device's interrupt line. It is COM2's, which a machine does not have.
pub const GENERIC_EVENT_IRQ: u32 = 3;

/// Keyboard controller: data at 0x60, command at 0x64.
pub const I8042: u16 = 0x60;
/// The keyboard controller's interrupt line.
pub const I8042_IRQ: u32 = 1;
/// CMOS clock: index at 0x70, data at 0x71.
pub const CMOS: u16 = 0x70;
/// The pvpanic device: one port.
pub const PVPANIC: u16 = 0x505;
/// ACPI sleep control register: one port. The status register and the reset register follow.
pub const ACPI_SLEEP_CONTROL: u16 = 0x600;
/// ACPI sleep status register.
pub const ACPI_SLEEP_STATUS: u16 = 0x601;
/// ACPI reset register.
pub const ACPI_RESET: u16 = 0x602;
/// The value that resets the machine when written to [`ACPI_RESET`].
pub const ACPI_RESET_VALUE: u8 = 1;
/// The sleep type of power-off (S5) in [`ACPI_SLEEP_CONTROL`].
pub const ACPI_SLEEP_TYPE_S5: u8 = 5;

/// Number of interrupt lines of the I/O APIC.
pub const IOAPIC_LINES: u32 = 24;
