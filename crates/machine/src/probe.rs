//! Whether this host's KVM runs unmodified guests.
//!
//! A software KVM (PVM) has no hardware virtualization: it interprets a guest's kernel, and stops
//! at the first instruction that it does not know. So the probe runs tiny guests, with instructions
//! that every kernel executes and a software KVM cannot.

use std::time::Duration;

use config::HugePages;
use kvm_ioctls::{VcpuExit, VcpuFd};
use memory::GuestRam;
use vm_memory::{Bytes, GuestAddress};

use crate::boot::write_page_tables;
use crate::cpu::registers;
use crate::cpu::{Cpuid, Topology};
use crate::kvm::{Ioctl, Kvm, KvmError};
use crate::layout;
use crate::vcpu::internal_error;
use crate::vcpu_signal::{self, ThreadVcpu};

/// The port to which a guest writes 1 when it is done.
const DONE_PORT: u16 = 0x80;
/// `mov al, 1; out 0x80, al; hlt`
const WRITE_DONE: [u8; 5] = [0xb0, 0x01, 0xe6, DONE_PORT as u8, 0xf4];
/// The exception handler.
const HANDLER: u64 = layout::HIGH_RAM + 0x1000;
/// The interrupt descriptor table.
const IDT: u64 = layout::HIGH_RAM + 0x2000;
/// How long a guest of a few instructions may take.
const TIME_LIMIT: Duration = Duration::from_secs(5);

/// An instruction that kernels execute, and guest code that executes it. `%rsi` points to 4 KiB of
/// memory.
struct Trial {
    instruction: &'static str,
    code: &'static [u8],
    /// Whether the code raises an exception, whose handler then reports success.
    by_exception: bool,
}

const TRIALS: [Trial; 3] = [
    Trial { instruction: "int3", code: &[0xcc], by_exception: true },
    // lock cmpxchg16b [rsi]
    Trial { instruction: "lock cmpxchg16b", code: &[0xf0, 0x48, 0x0f, 0xc7, 0x0e], by_exception: false },
    Trial {
        instruction: "xsave",
        code: &[
            0x0f, 0x20, 0xe0, // mov rax, cr4
            0x0d, 0x00, 0x00, 0x04, 0x00, // or eax, CR4.OSXSAVE
            0x0f, 0x22, 0xe0, // mov cr4, rax
            0xb8, 0x03, 0x00, 0x00, 0x00, // mov eax, 3 (x87 and SSE)
            0x31, 0xd2, // xor edx, edx
            0x0f, 0xae, 0x26, // xsave [rsi]
        ],
        by_exception: false,
    },
];

/// What the probe found. `Display` is one line.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Report {
    /// KVM cannot be used, for this reason.
    Unusable(String),
    /// A software KVM: these instructions do not run. Each comes with what happened instead.
    Software(Vec<(&'static str, String)>),
    /// All instructions ran.
    Ordinary,
}

impl Report {
    /// Whether this host boots unmodified kernels.
    pub fn runs_unmodified_guests(&self) -> bool {
        *self == Report::Ordinary
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Report::Unusable(why) => write!(f, "KVM cannot be used here: {why}"),
            Report::Ordinary => write!(f, "this KVM runs unmodified guests"),
            Report::Software(failed) => {
                write!(f, "this KVM cannot run unmodified guests: ")?;
                for (i, (instruction, what)) in failed.iter().enumerate() {
                    // Instructions that fail in the same way are listed together.
                    let alike = failed.get(i + 1).is_some_and(|(_, next)| next == what);
                    match alike {
                        true => write!(f, "{instruction}, ")?,
                        false if i + 1 < failed.len() => write!(f, "{instruction} ({what}), ")?,
                        false => write!(f, "{instruction} ({what})")?,
                    }
                }
                Ok(())
            }
        }
    }
}

/// Probes this host's KVM.
pub fn probe() -> Report {
    match try_all() {
        Ok(failed) if failed.is_empty() => Report::Ordinary,
        Ok(failed) => Report::Software(failed),
        Err(error) => Report::Unusable(error.to_string()),
    }
}

fn try_all() -> Result<Vec<(&'static str, String)>, KvmError> {
    let kvm = Kvm::open()?;
    vcpu_signal::install_handler().map_err(|e| kvm_ioctls::Error::new(e.errno())).ioctl("sigaction")?;
    let cpuid = Cpuid::new(&kvm, Topology::new(1, false))?;
    let mut failed = Vec::new();
    for trial in &TRIALS {
        let ram = GuestRam::map(4, HugePages::None, false)
            .map_err(|_| kvm_ioctls::Error::new(libc::ENOMEM))
            .ioctl("mmap")?;
        write_guest(&ram, trial);
        let (vm, vcpu) = kvm.create_vm()?.map_ram(ram, false)?.create_lone_vcpu()?;
        vcpu.set_cpuid2(&cpuid.for_vcpu(0)?).ioctl("KVM_SET_CPUID2")?;
        registers::set_for_linux64(&vcpu, layout::HIGH_RAM)?;
        let mut sregs = vcpu.get_sregs().ioctl("KVM_GET_SREGS")?;
        (sregs.idt.base, sregs.idt.limit) = (IDT, 4 * 16 - 1);
        vcpu.set_sregs(&sregs).ioctl("KVM_SET_SREGS")?;
        if let Err(what) = run(vcpu, vm.shared_fd().run_size()) {
            failed.push((trial.instruction, what));
        }
    }
    Ok(failed)
}

fn write_guest(ram: &GuestRam, trial: &Trial) {
    write_page_tables(ram, std::iter::empty()).expect("the first GiB is always mapped");
    registers::write_gdt(ram, true);
    let write = |addr: u64, bytes: &[u8]| {
        ram.memory().write_slice(bytes, GuestAddress(addr)).expect("4 MiB of RAM hold the probe");
    };
    let after: &[u8] = if trial.by_exception { &[0xf4] } else { &WRITE_DONE };
    write(layout::HIGH_RAM, &[trial.code, after].concat());
    write(HANDLER, &WRITE_DONE);
    // An interrupt gate for the breakpoint exception, 3 (SDM, volume 3, 6.14.1).
    let gate = (HANDLER & 0xffff) | 0x10 << 16 | 0x8e00 << 32 | (HANDLER >> 16) << 48;
    write(IDT + 3 * 16, &gate.to_le_bytes());
}

/// Runs a guest until it is done. The error says what happened instead.
fn run(vcpu: VcpuFd, run_size: usize) -> Result<(), String> {
    let (done, finished) = std::sync::mpsc::channel();
    let thread = sync::thread::spawn("probe", None, move || {
        let result = run_here(vcpu, run_size);
        let _ = done.send(());
        result
    })
    .map_err(|error| format!("cannot start a thread: {error}"))?;
    while let Err(std::sync::mpsc::RecvTimeoutError::Timeout) = finished.recv_timeout(TIME_LIMIT) {
        vcpu_signal::send(&thread);
    }
    thread.join().unwrap_or_else(|_| Err("the probe's own thread failed".to_owned()))
}

fn run_here(vcpu: VcpuFd, run_size: usize) -> Result<(), String> {
    let mut vcpu = ThreadVcpu::new(vcpu, run_size);
    Err(match vcpu.run() {
        Ok(VcpuExit::IoOut(DONE_PORT, [1])) => return Ok(()),
        Ok(VcpuExit::InternalError) => internal_error(vcpu.internal_suberror()),
        Ok(exit) => format!("{exit:?}"),
        Err(e) if e.errno() == libc::EINTR => format!("not done after {} s", TIME_LIMIT.as_secs()),
        Err(e) => format!("KVM_RUN: {e}"),
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn report_says_which_instruction_fails() {
        let alike = Report::Software(vec![("int3", "x".to_owned()), ("xsave", "x".to_owned())]);
        assert_eq!(alike.to_string(), "this KVM cannot run unmodified guests: int3, xsave (x)");
        let report = Report::Software(vec![("int3", "x".to_owned()), ("xsave", "y".to_owned())]);
        assert!(!report.runs_unmodified_guests());
        assert_eq!(report.to_string(), "this KVM cannot run unmodified guests: int3 (x), xsave (y)");
        assert!(Report::Ordinary.runs_unmodified_guests());
    }

    #[test]
    fn probe_of_this_host_ends() {
        println!("{}", probe());
    }
}
