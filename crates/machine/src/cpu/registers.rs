//! The registers with which a vCPU is entered: flat segments, and those of each boot protocol.

use kvm_bindings::{kvm_fpu, kvm_lapic_state, kvm_regs, kvm_segment, kvm_sregs};
use kvm_ioctls::VcpuFd;
use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::kvm::{Ioctl, KvmError};
use crate::layout;

const CR0_PE: u64 = 1;
const CR0_ET: u64 = 1 << 4;
const CR0_PG: u64 = 1 << 31;
const CR4_PAE: u64 = 1 << 5;
const EFER_LME: u64 = 1 << 8;
const EFER_LMA: u64 = 1 << 10;
/// The one flag that is always set (bit 1).
const RFLAGS: u64 = 2;

/// Selectors, which are offsets into the boot GDT: `__BOOT_CS` and `__BOOT_DS` of the Linux boot
/// protocol.
const CODE: u16 = 0x10;
const DATA: u16 = 0x18;
const TASK: u16 = 0x20;

/// Offsets of LINT0 and LINT1 in the APIC's local vector table, and delivery modes.
const LAPIC_LVT_LINT0: usize = 0x350;
const LAPIC_LVT_LINT1: usize = 0x360;
const DELIVER_NMI: u32 = 0x400;
const DELIVER_EXT_INT: u32 = 0x700;

/// A segment with base 0, of the given type (SDM, volume 3, 3.4.5).
fn segment(selector: u16, kind: u8, limit: u32, long: bool) -> kvm_segment {
    let code_or_data = selector != TASK;
    let code = selector == CODE;
    kvm_segment {
        base: 0,
        limit,
        selector,
        type_: kind,
        present: 1,
        dpl: 0,
        db: (code_or_data && !(code && long)).into(),
        s: code_or_data.into(),
        l: (code && long).into(),
        g: code_or_data.into(),
        avl: 0,
        unusable: 0,
        padding: 0,
    }
}

/// The boot segments: code, data, task.
fn segments(long: bool) -> [kvm_segment; 3] {
    const EXECUTE_READ_ACCESSED: u8 = 0xb;
    const READ_WRITE_ACCESSED: u8 = 0x3;
    const TASK_BUSY: u8 = 0xb;
    [
        segment(CODE, EXECUTE_READ_ACCESSED, u32::MAX, long),
        segment(DATA, READ_WRITE_ACCESSED, u32::MAX, long),
        segment(TASK, TASK_BUSY, 0x67, long),
    ]
}

/// The descriptor of a segment, as it is in memory.
fn descriptor(s: &kvm_segment) -> u64 {
    let limit = u64::from(if s.g == 1 { s.limit >> 12 } else { s.limit });
    let access = u64::from(s.type_) | u64::from(s.s) << 4 | u64::from(s.dpl) << 5 | u64::from(s.present) << 7;
    let flags = u64::from(s.avl) | u64::from(s.l) << 1 | u64::from(s.db) << 2 | u64::from(s.g) << 3;
    let (low, high) = (limit & 0xffff, limit >> 16);
    low | (s.base & 0xff_ffff) << 16 | access << 40 | high << 48 | flags << 52 | (s.base >> 24 & 0xff) << 56
}

/// Writes the GDT with the boot segments. The IDT behind it stays empty.
pub(crate) fn write_gdt(ram: &GuestRam, long: bool) {
    let mut table = [0; 5];
    for s in segments(long) {
        table[usize::from(s.selector) / 8] = descriptor(&s);
    }
    for (i, entry) in table.into_iter().enumerate() {
        let addr = GuestAddress(layout::BOOT_GDT + 8 * i as u64);
        ram.memory().write_obj(entry, addr).expect("the first MiB is RAM");
    }
}

/// Segments and descriptor tables, which both protocols have in common.
fn flat_sregs(vcpu: &VcpuFd, long: bool) -> Result<kvm_sregs, KvmError> {
    let mut sregs = vcpu.get_sregs().ioctl("KVM_GET_SREGS")?;
    let [code, data, task] = segments(long);
    sregs.cs = code;
    (sregs.ds, sregs.es, sregs.fs, sregs.gs, sregs.ss) = (data, data, data, data, data);
    sregs.tr = task;
    sregs.gdt.base = layout::BOOT_GDT;
    sregs.gdt.limit = 5 * 8 - 1;
    sregs.idt.base = layout::BOOT_IDT;
    sregs.idt.limit = 7;
    Ok(sregs)
}

/// Sets the registers for PVH: 32-bit protected mode without paging, `%ebx` pointing to the start
/// info.
pub(crate) fn set_for_pvh(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let mut sregs = flat_sregs(vcpu, false)?;
    sregs.cr0 = CR0_PE | CR0_ET;
    sregs.cr4 = 0;
    sregs.efer = 0;
    vcpu.set_sregs(&sregs).ioctl("KVM_SET_SREGS")?;
    let regs = kvm_regs { rflags: RFLAGS, rip: entry, rbx: layout::PVH_START_INFO, ..Default::default() };
    vcpu.set_regs(&regs).ioctl("KVM_SET_REGS")
}

/// Sets the registers for Linux 64-bit: long mode with the boot page tables, `%rsi` pointing to the
/// zero page.
pub(crate) fn set_for_linux64(vcpu: &VcpuFd, entry: u64) -> Result<(), KvmError> {
    let mut sregs = flat_sregs(vcpu, true)?;
    sregs.cr3 = layout::BOOT_PML4;
    sregs.cr4 = CR4_PAE;
    sregs.cr0 = CR0_PE | CR0_ET | CR0_PG;
    sregs.efer = EFER_LME | EFER_LMA;
    vcpu.set_sregs(&sregs).ioctl("KVM_SET_SREGS")?;
    let regs = kvm_regs {
        rflags: RFLAGS,
        rip: entry,
        rsp: layout::BOOT_STACK,
        rbp: layout::BOOT_STACK,
        rsi: layout::ZERO_PAGE,
        ..Default::default()
    };
    vcpu.set_regs(&regs).ioctl("KVM_SET_REGS")
}

/// Sets the floating-point unit to its state after `FNINIT`, with all exceptions masked.
pub(crate) fn set_fpu(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let fpu = kvm_fpu { fcw: 0x37f, mxcsr: 0x1f80, ..Default::default() };
    vcpu.set_fpu(&fpu).ioctl("KVM_SET_FPU")
}

/// Sets the local APIC's pins as a BIOS leaves them: the PIC's interrupts on LINT0, NMIs on LINT1.
pub(crate) fn set_lapic(vcpu: &VcpuFd) -> Result<(), KvmError> {
    let mut lapic = vcpu.get_lapic().ioctl("KVM_GET_LAPIC")?;
    set_delivery(&mut lapic, LAPIC_LVT_LINT0, DELIVER_EXT_INT);
    set_delivery(&mut lapic, LAPIC_LVT_LINT1, DELIVER_NMI);
    vcpu.set_lapic(&lapic).ioctl("KVM_SET_LAPIC")
}

fn set_delivery(lapic: &mut kvm_lapic_state, register: usize, mode: u32) {
    const DELIVERY_MODE: u32 = 0x700;
    let bytes = &mut lapic.regs[register..register + 4];
    let old = bytes.iter().rev().fold(0u32, |value, byte| value << 8 | u32::from(byte.cast_unsigned()));
    let new = old & !DELIVERY_MODE | mode;
    for (byte, value) in bytes.iter_mut().zip(new.to_le_bytes()) {
        *byte = value.cast_signed();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn flat_segments_have_their_well_known_descriptors() {
        let [code, data, task] = segments(false).map(|s| descriptor(&s));
        assert_eq!((code, data), (0x00cf_9b00_0000_ffff, 0x00cf_9300_0000_ffff));
        assert_eq!(task, 0x0000_8b00_0000_0067);
        assert_eq!(descriptor(&segments(true)[0]), 0x00af_9b00_0000_ffff);
    }
}
