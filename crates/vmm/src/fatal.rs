//! Fatal signals: each ends the process at once, with an exit code of its own.
//!
//! The handlers run on the alternate stack of the thread, so that an overflow of its own stack is
//! reported too. They allocate nothing and wait for no lock, because the thread that they interrupt
//! may hold any.

use std::ffi::CStr;

use crate::exit::ExitCode;
use crate::line::Line;
use crate::personality::{Personality, SHUTDOWN_BY_SIGNAL};
use crate::{alt_stack, counts, crash_report, last_line, logger, signals, terminal};

/// The signals, their names, and the code to exit with.
const FATAL: [(libc::c_int, &str, ExitCode); 6] = [
    (libc::SIGSYS, "SIGSYS", ExitCode::BadSyscall),
    (libc::SIGBUS, "SIGBUS", ExitCode::BusError),
    (libc::SIGSEGV, "SIGSEGV", ExitCode::SegmentationFault),
    (libc::SIGXFSZ, "SIGXFSZ", ExitCode::FileSize),
    (libc::SIGXCPU, "SIGXCPU", ExitCode::CpuTime),
    (libc::SIGILL, "SIGILL", ExitCode::IllegalInstruction),
];

/// A fault at most this many bytes from the stack pointer is a stack overflow: functions touch
/// their frames page by page.
const STACK_FAULT_DISTANCE: usize = 4096;

/// Installs the handlers, and gives this thread and those that it starts an alternate stack.
pub(crate) fn install() -> std::io::Result<()> {
    alt_stack::install();
    sync::thread::set_start_hook(|_| alt_stack::install());
    for (signal, ..) in FATAL {
        signals::handle(signal, on_fatal)?;
    }
    signals::handle(libc::SIGABRT, on_abort)
}

extern "C" fn on_fatal(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) {
    terminal::restore();
    let (name, mut code) = FATAL
        .iter()
        .find(|(fatal, ..)| *fatal == signal)
        .map_or(("?", ExitCode::Generic), |(_, name, code)| (*name, *code));
    let fault = Fault::read(signal, info, context);
    if Personality::of_this_process() == Personality::Firecracker {
        if signal == libc::SIGSYS && fault.is_none() {
            code = ExitCode::Unexpected;
        }
        logger::write_if_free(shutdown_line(signal, info, fault.as_ref()).as_bytes());
    }
    let mut line = Line::default();
    line.push(b"Error: signal ");
    line.push_number(u64::from(signal.unsigned_abs()));
    line.push(b" (");
    line.push(name.as_bytes());
    line.push(b") ended this monitor: thread ");
    line.push(thread_name(&mut [0; 16]));
    if let Some(fault) = &fault {
        fault.describe(&mut line);
    }
    line.push(b"; exit_code=");
    line.push_number(u64::from((code as i32).unsigned_abs()));
    line.push(b"\n");
    // A SIGSYS that a process sent is no forbidden system call.
    if signal != libc::SIGSYS || fault.is_some() {
        counts::signal(signal);
    }
    crash_report::write(line.as_bytes());
    last_line::write_short();
    signals::exit_now(code)
}

/// Firecracker's line about a fatal signal.
fn shutdown_line(signal: libc::c_int, info: *const libc::siginfo_t, fault: Option<&Fault>) -> Line {
    let mut line = Line::default();
    if let Some(Fault::SystemCall(number)) = fault {
        line.push(b"Shutting down VM after intercepting a bad syscall (");
        line.push_number(u64::from(*number));
        line.push(b").\n");
        return line;
    }
    // SAFETY: with SA_SIGINFO the kernel passes a whole `siginfo_t`.
    let code = if info.is_null() { 0 } else { unsafe { (*info).si_code } };
    line.push(SHUTDOWN_BY_SIGNAL.as_bytes());
    line.push_number(u64::from(signal.unsigned_abs()));
    line.push(if code < 0 { b", code -" } else { b", code " });
    line.push_number(u64::from(code.unsigned_abs()));
    line.push(b".\n");
    line
}

/// `abort` raises SIGABRT, which has its default action here. Where the kernel does not apply that,
/// the process exits with the code that a shell reports.
extern "C" fn on_abort(signal: libc::c_int, _: *mut libc::siginfo_t, _: *mut libc::c_void) {
    terminal::restore();
    if signals::is_init() {
        signals::exit_now(ExitCode::Aborted)
    }
    signals::raise_default(signal);
}

/// The cause of a signal that the kernel raised.
enum Fault {
    /// SIGSYS: the number of the forbidden system call.
    SystemCall(u32),
    /// SIGSEGV and SIGBUS: the address, and the stack pointer then.
    Memory { address: usize, stack_pointer: usize, is_bus_error: bool },
    /// SIGILL: the address of the instruction.
    Instruction(usize),
}

impl Fault {
    /// `None` for a signal that a process sent.
    fn read(signal: libc::c_int, info: *mut libc::siginfo_t, context: *mut libc::c_void) -> Option<Fault> {
        if info.is_null() || context.is_null() {
            return None;
        }
        // SAFETY: with SA_SIGINFO the kernel passes a whole `siginfo_t`.
        let info_ref = unsafe { &*info };
        if info_ref.si_code <= 0 {
            return None;
        }
        if signal == libc::SIGSYS {
            // SAFETY: as above; for SIGSYS it begins like this.
            return Some(Fault::SystemCall(unsafe { (*info.cast::<SigsysInfo>()).syscall }));
        }
        // SAFETY: as above; the field is plain bytes for every signal, and means something for
        // those below.
        let address = unsafe { info_ref.si_addr() } as usize;
        match signal {
            libc::SIGSEGV | libc::SIGBUS => {
                // SAFETY: with SA_SIGINFO the kernel passes a whole `ucontext_t`.
                let registers = unsafe { &(*context.cast::<libc::ucontext_t>()).uc_mcontext.gregs };
                let stack_pointer = registers[libc::REG_RSP as usize].cast_unsigned() as usize;
                Some(Fault::Memory { address, stack_pointer, is_bus_error: signal == libc::SIGBUS })
            }
            libc::SIGILL => Some(Fault::Instruction(address)),
            _ => None,
        }
    }

    fn describe(&self, line: &mut Line) {
        match self {
            Fault::SystemCall(number) => {
                line.push(b", forbidden system call ");
                line.push_number(u64::from(*number));
            }
            Fault::Memory { address, stack_pointer, is_bus_error } => {
                line.push(b", address 0x");
                line.push_hex(*address as u64);
                if address.abs_diff(*stack_pointer) <= STACK_FAULT_DISTANCE {
                    line.push(b", stack overflow");
                }
                if *is_bus_error {
                    // The causes for guest memory: there is no huge page, or its contents cannot be
                    // read.
                    line.push(b", no huge page within the pool and hugetlb.2MB.max of its cgroup, or a disk error under a memory file");
                }
            }
            Fault::Instruction(address) => {
                line.push(b", instruction at 0x");
                line.push_hex(*address as u64);
            }
        }
    }
}

/// The beginning of `siginfo_t` for SIGSYS.
#[repr(C)]
struct SigsysInfo {
    signal: i32,
    errno: i32,
    code: i32,
    call_addr: *const libc::c_void,
    syscall: u32,
}

/// The name of this thread in the kernel.
fn thread_name(buffer: &mut [u8; 16]) -> &[u8] {
    // SAFETY: the kernel writes at most 16 bytes, its end included.
    unsafe { libc::prctl(libc::PR_GET_NAME, buffer.as_mut_ptr()) };
    CStr::from_bytes_until_nul(buffer).map_or(b"?", CStr::to_bytes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::subprocess;

    /// Uses all of this thread's stack. The address keeps each frame alive.
    #[expect(unconditional_recursion, reason = "that is the point")]
    fn overflow(above: &[u8; 512]) -> u8 {
        let mut frame = *std::hint::black_box(above);
        frame[0] = frame[0].wrapping_add(1);
        overflow(std::hint::black_box(&frame)).wrapping_add(frame[1])
    }

    #[test]
    fn stack_overflow_of_a_thread_is_reported() {
        if subprocess::is_one() {
            install().unwrap();
            let io = sync::thread::spawn("io 1", Some(512 << 10), || overflow(&[0; 512]));
            io.unwrap().join().unwrap();
            return;
        }
        let ended = subprocess::again("fatal::tests::stack_overflow_of_a_thread_is_reported");
        assert_eq!(ended.status.code(), Some(ExitCode::SegmentationFault as i32), "{ended:?}");
        let text = "Error: signal 11 (SIGSEGV) ended this monitor: thread io 1, address 0x";
        assert!(ended.stderr.contains(text), "{ended:?}");
        assert!(ended.stderr.contains(", stack overflow; exit_code=150\n"), "{ended:?}");
    }

    #[test]
    fn fault_while_the_log_is_locked_is_reported() {
        if subprocess::is_one() {
            logger::install("a");
            install().unwrap();
            let _held = logger::hold();
            // SAFETY: raising a signal has no precondition.
            unsafe { libc::raise(libc::SIGBUS) };
            return;
        }
        let ended = subprocess::again("fatal::tests::fault_while_the_log_is_locked_is_reported");
        assert_eq!(ended.status.code(), Some(ExitCode::BusError as i32), "{ended:?}");
        assert!(ended.stderr.contains("signal 7 (SIGBUS) ended this monitor"), "{ended:?}");
    }

    #[test]
    fn bus_error_names_its_likely_causes() {
        if subprocess::is_one() {
            install().unwrap();
            let file = tempfile::tempfile().unwrap();
            let fd = std::os::fd::AsRawFd::as_raw_fd(&file);
            // SAFETY: a new mapping at an address of the kernel's choice.
            let page =
                unsafe { libc::mmap(std::ptr::null_mut(), 4096, libc::PROT_READ, libc::MAP_SHARED, fd, 0) };
            assert_ne!(page, libc::MAP_FAILED);
            // SAFETY: it is mapped. The file is empty, so that the access raises SIGBUS.
            unsafe { std::ptr::read_volatile(page.cast::<u8>()) };
            return;
        }
        let ended = subprocess::again("fatal::tests::bus_error_names_its_likely_causes");
        assert_eq!(ended.status.code(), Some(ExitCode::BusError as i32), "{ended:?}");
        assert!(ended.stderr.contains("hugetlb.2MB.max"), "{ended:?}");
        assert!(ended.stderr.contains("exit_code=149"), "{ended:?}");
    }

    #[test]
    fn fault_is_written_to_the_log_file() {
        if subprocess::is_one() {
            logger::install("a");
            let path = std::env::var_os("LOG").unwrap().into();
            logger::set_up(&config::Logger { log_path: Some(path), ..config::Logger::default() }).unwrap();
            install().unwrap();
            // SAFETY: raising a signal has no precondition.
            unsafe { libc::raise(libc::SIGILL) };
            return;
        }
        let dir = tempfile::tempdir().unwrap();
        let log = dir.path().join("log");
        let ended = subprocess::again_with("fatal::tests::fault_is_written_to_the_log_file", "LOG", &log);
        assert_eq!(ended.status.code(), Some(ExitCode::IllegalInstruction as i32), "{ended:?}");
        let text = std::fs::read_to_string(log).unwrap();
        assert!(text.contains("Error: signal 4 (SIGILL) ended this monitor"), "{text}");
    }

    #[test]
    fn abort_ends_init_of_a_namespace_with_134() {
        if subprocess::is_one() {
            install().unwrap();
            std::process::abort();
        }
        let ended = subprocess::again_as_init("fatal::tests::abort_ends_init_of_a_namespace_with_134");
        assert_eq!(ended.status.code(), Some(134), "{ended:?}");
    }

    #[test]
    fn abort_ends_other_processes_by_its_signal() {
        use std::os::unix::process::ExitStatusExt;
        if subprocess::is_one() {
            install().unwrap();
            std::process::abort();
        }
        let ended = subprocess::again("fatal::tests::abort_ends_other_processes_by_its_signal");
        assert_eq!(ended.status.signal(), Some(libc::SIGABRT), "{ended:?}");
    }
}
