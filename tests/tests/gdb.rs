//! Debugging a Linux guest by gdb, with the symbols of its kernel.
//!
//! QEMU's emulated AMD-V neither intercepts `int3` nor has debug registers for guests, so there are
//! no breakpoints here (but in `null_gdb`).

use anyhow::{Result, ensure};
use serde_json::json;
use vesta_tests::gdb::Gdb;
use vesta_tests::guest::{BOOT_TIMEOUT, Guest, Kernel, TIMEOUT, vmm_path};
use vesta_tests::vmm::VmmBuilder;

/// The tuned kernel has symbols, and runs where it was linked.
#[test]
fn gdb_steps_interrupts_and_reads_a_linux_kernel() -> Result<()> {
    let kernel = Kernel::Tuned;
    let builder = VmmBuilder::new(&vmm_path())?.with_api().with_input();
    let socket = builder.dir().join("gdb.sock");
    let script = "echo ready for a line; read line; echo the guest ends; reboot -f";
    let mut guest = Guest::linux(kernel, script, builder.dir())?.vcpus(2);
    guest.machine = json!({"gdb_socket_path": socket});
    let mut vmm = builder.with_config(&guest.config())?.spawn()?;
    vmm.ready_client(TIMEOUT)?;
    vmm.wait_for_output("the guest waits for a debugger", TIMEOUT)?;

    let mut gdb = Gdb::start(Some(&kernel.image()), BOOT_TIMEOUT)?;
    gdb.run(&format!("target remote {}", socket.display()))?;
    let entry = gdb.run("print/x $rip")?;
    ensure!(gdb.run("stepi")?.contains("0x"), "it does not step");
    let next = gdb.run("print/x $rip")?;
    let address = |printed: &str| printed.split('=').next_back().map(|value| value.trim().to_owned());
    ensure!(address(&entry) != address(&next), "{entry} {next}");

    gdb.begin("continue")?;
    vmm.wait_for_output("ready for a line", BOOT_TIMEOUT)?;
    let interrupted = gdb.interrupt()?;
    ensure!(interrupted.contains("SIGINT"), "{interrupted}");
    for vcpu in 0..2 {
        gdb.run(&format!("thread {}", vcpu + 1))?;
        let registers = gdb.run("info registers rip cr0 cr3 efer")?;
        ensure!(registers.contains("cr0            0x8005003"), "vCPU {vcpu}: {registers}");
        // By the page tables of either, also if it is in a process.
        let banner = gdb.run("x/s (char *)&linux_banner")?;
        ensure!(banner.contains("Linux version 6."), "vCPU {vcpu}: {banner}");
    }

    let threads = gdb.run("info threads")?;
    ensure!(threads.contains("(vCPU 0)") && threads.contains("(vCPU 1)"), "{threads}");
    ensure!(gdb.run("detach")?.contains("detached"), "it is attached");
    vmm.type_in(b"end\n")?;
    vmm.wait_for_output("the guest ends", BOOT_TIMEOUT)?;
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
    Ok(())
}
