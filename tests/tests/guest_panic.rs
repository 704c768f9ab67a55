//! A Linux kernel that panics says so through its pvpanic device.

use anyhow::{Context, Result, ensure};
use vesta_tests::events::EventStream;
use vesta_tests::guest::{BOOT_TIMEOUT, Guest, Kernel, busybox, start, vmm_with_api};
use vesta_tests::initramfs::Initramfs;

#[test]
fn panic_of_a_linux_kernel_is_an_event() -> Result<()> {
    let (mut vmm, mut api) = vmm_with_api(&[])?;
    let kernel = Kernel::Debian6_12;
    let mut disk = Initramfs::new(&busybox())?;
    disk.modules(&kernel.modules().context("it has modules")?, &["pvpanic-mmio"])?;
    // The last line is never reached.
    let script = "echo PANICS; echo c > /proc/sysrq-trigger; poweroff -f";
    Guest::with_initramfs(kernel, disk, script, vmm.dir())?.put(&mut api)?;
    let mut events = EventStream::open(&api)?;
    start(&mut api)?;
    events.expect("started")?;
    vmm.wait_for_output("PANICS", BOOT_TIMEOUT)?;
    let names: Vec<_> = events.rest()?.into_iter().map(|event| event.name).collect();
    ensure!(names == ["guest_panic", "reset", "exit"], "{names:?}");
    ensure!(vmm.exit_code(BOOT_TIMEOUT)? == 0);
    Ok(())
}
