//! The registers as the debugger knows them, in the order of `target.xml`.
//!
//! All but the selectors of segments and the upper half of their flags can be changed: a selector
//! without its descriptor would leave the vCPU in a state that no instruction leads to.

use gdbstub::arch::{Arch, Registers};

use crate::vcpu::debug::CpuRegisters;

/// x86-64, for `gdbstub`.
pub(super) enum X86_64 {}

impl Arch for X86_64 {
    type Usize = u64;
    type Registers = GdbRegisters;
    type BreakpointKind = usize;
    type RegId = ();

    fn target_description_xml() -> Option<&'static str> {
        Some(include_str!("target.xml"))
    }
}

/// Bytes of all registers.
const SIZE: usize = 16 * 8 + 8 + 4 + 6 * 4 + 8 * 10 + 8 * 4 + 16 * 16 + 4 + 2 * 8 + 6 * 8;

/// Where the selectors begin: after the general registers, `rip` and `eflags`.
const SELECTORS: usize = 17 * 8 + 4;

/// The registers of one vCPU, as the debugger's bytes.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct GdbRegisters {
    bytes: [u8; SIZE],
    pc: u64,
}

impl Default for GdbRegisters {
    fn default() -> Self {
        GdbRegisters { bytes: [0; SIZE], pc: 0 }
    }
}

impl Registers for GdbRegisters {
    type ProgramCounter = u64;

    fn pc(&self) -> u64 {
        self.pc
    }

    fn gdb_serialize(&self, mut write_byte: impl FnMut(Option<u8>)) {
        self.bytes.iter().for_each(|byte| write_byte(Some(*byte)));
    }

    fn gdb_deserialize(&mut self, bytes: &[u8]) -> Result<(), ()> {
        self.bytes = bytes.try_into().map_err(|_| ())?;
        Ok(())
    }
}

impl GdbRegisters {
    /// The debugger's view of a vCPU.
    pub(super) fn of(cpu: &CpuRegisters) -> Self {
        let mut bytes = Vec::with_capacity(SIZE);
        let mut cpu = *cpu;
        transfer(&mut cpu, &mut |register| bytes.extend_from_slice(register));
        let pc = cpu.general.rip;
        GdbRegisters { bytes: bytes.try_into().expect("`transfer` has all registers"), pc }
    }

    /// Changes the registers of a vCPU to these. False if they change what cannot be changed.
    pub(super) fn apply_to(&self, cpu: &mut CpuRegisters) -> bool {
        let selectors = SELECTORS..SELECTORS + 6 * 4;
        if GdbRegisters::of(cpu).bytes[selectors.clone()] != self.bytes[selectors] {
            return false;
        }
        let mut rest = &self.bytes[..];
        transfer(cpu, &mut |register| {
            let (this, after) = rest.split_at(register.len());
            register.copy_from_slice(this);
            rest = after;
        });
        true
    }
}

/// Calls `each` with the bytes of every register, in order, and stores what it leaves there.
fn transfer(cpu: &mut CpuRegisters, each: &mut dyn FnMut(&mut [u8])) {
    let CpuRegisters { general, system, float } = cpu;
    let g = general;
    for register in [
        &mut g.rax, &mut g.rbx, &mut g.rcx, &mut g.rdx, &mut g.rsi, &mut g.rdi, &mut g.rbp, &mut g.rsp,
        &mut g.r8, &mut g.r9, &mut g.r10, &mut g.r11, &mut g.r12, &mut g.r13, &mut g.r14, &mut g.r15,
        &mut g.rip,
    ] {
        wide(register, each);
    }
    let mut flags = g.rflags as u32;
    narrow(&mut flags, each);
    g.rflags = g.rflags & !0xffff_ffff | u64::from(flags);

    let s = system;
    for segment in [&s.cs, &s.ss, &s.ds, &s.es, &s.fs, &s.gs] {
        narrow(&mut u32::from(segment.selector), each);
    }

    let f = float;
    for register in &mut f.fpr {
        each(&mut register[..10]);
    }
    let mut control = u32::from(f.fcw);
    narrow(&mut control, each);
    f.fcw = control as u16;
    let mut status = u32::from(f.fsw);
    narrow(&mut status, each);
    f.fsw = status as u16;
    let mut tags = full_tags(f.ftwx);
    narrow(&mut tags, each);
    f.ftwx = short_tags(tags);
    // Instruction and operand pointers of 64 bits, as selector and offset.
    for pointer in [&mut f.last_ip, &mut f.last_dp] {
        let (mut high, mut low) = ((*pointer >> 32) as u32, *pointer as u32);
        narrow(&mut high, each);
        narrow(&mut low, each);
        *pointer = u64::from(high) << 32 | u64::from(low);
    }
    let mut opcode = u32::from(f.last_opcode);
    narrow(&mut opcode, each);
    f.last_opcode = opcode as u16;

    f.xmm.iter_mut().for_each(|register| each(register));
    narrow(&mut f.mxcsr, each);
    for register in [
        &mut s.fs.base,
        &mut s.gs.base,
        &mut s.cr0,
        &mut s.cr2,
        &mut s.cr3,
        &mut s.cr4,
        &mut s.cr8,
        &mut s.efer,
    ] {
        wide(register, each);
    }
}

fn wide(register: &mut u64, each: &mut dyn FnMut(&mut [u8])) {
    let mut bytes = register.to_le_bytes();
    each(&mut bytes);
    *register = u64::from_le_bytes(bytes);
}

fn narrow(register: &mut u32, each: &mut dyn FnMut(&mut [u8])) {
    let mut bytes = register.to_le_bytes();
    each(&mut bytes);
    *register = u32::from_le_bytes(bytes);
}

/// The tag word with two bits for each register, 3 for an empty one, from one bit for each.
fn full_tags(short: u8) -> u32 {
    (0..8).filter(|index| short & 1 << index == 0).map(|index| 3 << (2 * index)).sum()
}

fn short_tags(full: u32) -> u8 {
    (0..8).filter(|index| full >> (2 * index) & 3 != 3).map(|index| 1 << index).sum()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Each byte of the structure has another value, as far as it is shown.
    fn cpu() -> CpuRegisters {
        let mut cpu = CpuRegisters::default();
        let mut next = 0_u8;
        let mut cursor = Vec::new();
        transfer(&mut cpu, &mut |register| {
            for byte in register {
                next = next.wrapping_add(1);
                *byte = next;
                cursor.push(next);
            }
        });
        assert_eq!(cursor.len(), SIZE);
        cpu
    }

    #[test]
    fn description_names_as_many_bits_as_there_are_bytes() {
        let xml = X86_64::target_description_xml().unwrap();
        let bits = xml.split("bitsize=\"").skip(1);
        let bits: usize = bits.map(|rest| rest.split('"').next().unwrap().parse::<usize>().unwrap()).sum();
        assert_eq!(bits, 8 * SIZE);
        let names: Vec<_> = xml.split("<reg name=\"").skip(1).collect();
        assert!(names[0].starts_with("rax") && names[16].starts_with("rip") && names[18].starts_with("cs"));
    }

    #[test]
    fn unchanged_registers_change_nothing() {
        let before = cpu();
        let mut after = before;
        assert!(GdbRegisters::of(&before).apply_to(&mut after));
        assert_eq!(before, after);
    }

    #[test]
    fn registers_are_where_the_description_says() {
        let mut cpu = cpu();
        cpu.general.rip = 0x1122_3344_5566_7788;
        let mut view = GdbRegisters::of(&cpu);
        assert_eq!(view.pc(), cpu.general.rip);
        assert_eq!(view.bytes[16 * 8..17 * 8], cpu.general.rip.to_le_bytes());
        view.bytes[..8].copy_from_slice(&5_u64.to_le_bytes());
        view.bytes[SIZE - 8..].copy_from_slice(&0x500_u64.to_le_bytes());
        assert!(view.apply_to(&mut cpu));
        assert_eq!((cpu.general.rax, cpu.system.efer), (5, 0x500));
    }

    #[test]
    fn selectors_cannot_be_changed() {
        let mut cpu = cpu();
        let mut view = GdbRegisters::of(&cpu);
        view.bytes[SELECTORS] ^= 8;
        let before = cpu;
        assert!(!view.apply_to(&mut cpu));
        assert_eq!(before, cpu);
    }

    #[test]
    fn packet_of_another_length_is_refused() {
        let mut view = GdbRegisters::default();
        assert_eq!(view.gdb_deserialize(&[0; SIZE - 1]), Err(()));
        assert_eq!(view.gdb_deserialize(&[1; SIZE]), Ok(()));
    }

    #[test]
    fn tags_are_empty_or_valid() {
        assert_eq!((full_tags(0), full_tags(0xff), full_tags(1)), (0xffff, 0, 0xfffc));
        assert!((0..=255).all(|short| short_tags(full_tags(short)) == short));
    }
}
