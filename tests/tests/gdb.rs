//! Debugging a Linux guest by gdb, with the symbols of its kernel.

use anyhow::{Result, ensure};
use serde_json::json;
use vesta_tests::gdb::Gdb;
use vesta_tests::guest::{BOOT_TIMEOUT, Guest, Kernel, start, vmm_with_api};

/// The tuned kernel is not relocated when it starts, and has symbols.
#[test]
fn gdb_debugs_a_linux_kernel_from_its_entry_to_its_end() -> Result<()> {
    let (mut vmm, mut api) = vmm_with_api(&[])?;
    let kernel = Kernel::Tuned;
    let socket = vmm.dir().join("gdb.sock");
    let mut guest = Guest::linux(kernel, "echo the guest ends; reboot -f", vmm.dir())?.vcpus(2);
    guest.machine = json!({"gdb_socket_path": socket});
    guest.put(&mut api)?;
    start(&mut api)?;

    let mut gdb = Gdb::start(Some(&kernel.image()), BOOT_TIMEOUT)?;
    gdb.run(&format!("target remote {}", socket.display()))?;
    // The kernel has no page tables yet, so this breakpoint needs a debug register.
    gdb.run("break start_kernel")?;
    let hit = gdb.run("continue")?;
    ensure!(hit.contains("hit Breakpoint 1") && hit.contains("start_kernel"), "{hit}");
    let threads = gdb.run("info threads")?;
    ensure!(threads.contains("(vCPU 0)") && threads.contains("(vCPU 1)"), "{threads}");
    let banner = gdb.run("x/s linux_banner")?;
    ensure!(banner.contains("Linux version 6."), "{banner}");
    let registers = gdb.run("info registers rip cs gs_base cr3 efer")?;
    ensure!(registers.contains("<start_kernel>"), "{registers}");
    let before = gdb.run("print/x $rip")?;
    let after = gdb.run("stepi")? + &gdb.run("print/x $rip")?;
    ensure!(!after.contains(before.split('=').next_back().unwrap_or_default().trim()), "{before} {after}");
    gdb.run("delete")?;

    // From now on the kernel's code is mapped: an instruction in memory, hit on several vCPUs.
    gdb.run("break rest_init")?;
    let hit = gdb.run("continue")?;
    ensure!(hit.contains("hit Breakpoint 2") && hit.contains("rest_init"), "{hit}");
    let trace = gdb.run("info registers rsp")?;
    ensure!(trace.contains("0xffffffff"), "{trace}");
    gdb.run("delete")?;

    gdb.run("watch *(int *)&system_state")?;
    let changed = gdb.run("continue")?;
    ensure!(changed.contains("Old value = 0") && changed.contains("New value = 1"), "{changed}");
    gdb.run("delete")?;

    // The second vCPU starts from here.
    gdb.run("break start_secondary")?;
    let hit = gdb.run("continue")?;
    ensure!(hit.contains("Thread 2 hit") || hit.contains("Thread 1.2 hit"), "{hit}");
    gdb.run("delete")?;

    gdb.begin("continue")?;
    let interrupted = gdb.interrupt()?;
    ensure!(interrupted.contains("SIGINT"), "{interrupted}");
    gdb.run("detach")?;
    vmm.wait_for_output("the guest ends", BOOT_TIMEOUT)?;
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
    Ok(())
}
