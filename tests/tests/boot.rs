//! Linux boots: three kernels, processors, memory, and every way to end.

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vesta_tests::guest::{BOOT_ARGS, BOOT_TIMEOUT, Guest, Kernel, start, vmm_path, vmm_with_api};
use vesta_tests::on_each_kernel;
use vesta_tests::vmm::VmmBuilder;

/// Prints the guest's resources, and powers off.
const HELLO: &str = "\
echo \"hello from $(uname -r): $(nproc) vcpus, $(awk '/^MemTotal/ {print $2}' /proc/meminfo) KiB\"
poweroff -f";

/// Boots from a configuration file, and checks what the guest prints and how it ends.
fn says_hello(kernel: Kernel, vcpus: u32, mem_mib: u32) -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let guest = Guest::linux(kernel, HELLO, builder.dir())?.vcpus(vcpus).mem_mib(mem_mib);
    let mut vmm = builder.with_config(&guest.config())?.spawn()?;
    check_hello(&vmm.wait_for_output("hello from", BOOT_TIMEOUT)?, vcpus, mem_mib)?;
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0, "after the guest powered off");
    Ok(())
}

fn check_hello(line: &str, vcpus: u32, mem_mib: u32) -> Result<()> {
    let (_, found) = line.rsplit_once(": ").context("the line has two parts")?;
    let (found_vcpus, found_kib) = found.split_once(" vcpus, ").context("the line has two numbers")?;
    assert_eq!(found_vcpus, vcpus.to_string());
    let found_kib: u32 = found_kib.trim_end_matches(" KiB").parse()?;
    // The kernel does not count memory that it uses itself (its image, a descriptor for each page).
    let most = mem_mib * 1024;
    let least = most - most / 20 - 64 * 1024;
    ensure!(
        (least..=most).contains(&found_kib),
        "{found_kib} KiB of memory are not {mem_mib} MiB less a little"
    );
    Ok(())
}

on_each_kernel! {
    fn says_hello_with_1_vcpu_and_128_mib(kernel) {
        says_hello(kernel, 1, 128)
    }

    fn says_hello_with_2_vcpus_and_3_5_gib(kernel) {
        says_hello(kernel, 2, 3584)
    }

    fn says_hello_with_4_vcpus_and_5_gib(kernel) {
        says_hello(kernel, 4, 5120)
    }

    fn starts_over_the_api(kernel) {
        let (mut vmm, mut api) = vmm_with_api(&[])?;
        Guest::linux(kernel, HELLO, vmm.dir())?.put(&mut api)?;
        start(&mut api)?;
        check_hello(&vmm.wait_for_output("hello from", BOOT_TIMEOUT)?, 1, 128)?;
        assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
        Ok(())
    }

    fn reboot_by_the_keyboard_controller_ends_with_0(kernel) {
        ends_with_0(kernel, "console=ttyS0 quiet panic=-1 reboot=k", "reboot -f")
    }

    fn reboot_by_acpi_ends_with_0(kernel) {
        ends_with_0(kernel, "console=ttyS0 quiet panic=-1 reboot=acpi", "reboot -f")
    }
}

fn ends_with_0(kernel: Kernel, boot_args: &str, script: &str) -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let guest = Guest::linux(kernel, &format!("echo ending\n{script}"), builder.dir())?.boot_args(boot_args);
    let mut vmm = builder.with_config(&guest.config())?.spawn()?;
    vmm.wait_for_output("ending", BOOT_TIMEOUT)?;
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
    Ok(())
}

/// Without ACPI the kernel finds its processors and interrupts in the MP table.
#[test]
fn boots_without_acpi() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let guest = Guest::linux(Kernel::Tuned, &HELLO.replace("poweroff", "reboot"), builder.dir())?
        .boot_args(&format!("{BOOT_ARGS} acpi=off"))
        .vcpus(2);
    let mut vmm = builder.with_config(&guest.config())?.spawn()?;
    check_hello(&vmm.wait_for_output("hello from", BOOT_TIMEOUT)?, 2, 128)?;
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
    Ok(())
}

#[test]
fn the_guest_gets_its_command_line_unchanged() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let boot_args = format!("{BOOT_ARGS} vesta.word=\"two words\" vesta.last");
    let guest = Guest::linux(Kernel::quickest(), "cat /proc/cmdline; reboot -f", builder.dir())?
        .boot_args(&boot_args);
    let vmm = builder.with_config(&guest.config())?.spawn()?;
    let line = vmm.wait_for_output("vesta.last", BOOT_TIMEOUT)?;
    ensure!(line.starts_with(&boot_args), "the guest's command line is {line}");
    Ok(())
}

/// The default command line turns the serial port off; only the boot timer shows that the guest
/// runs.
#[test]
fn boots_with_the_default_command_line() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api").arg("--boot-timer");
    let script = "echo 'on no console'; devmem 0xc0000000 8 123; reboot -f";
    let guest = Guest { boot_args: None, ..Guest::linux(Kernel::quickest(), script, builder.dir())? };
    let mut vmm = builder.with_config(&guest.config())?.spawn()?;
    vmm.wait_for_output("Guest-boot-time =", BOOT_TIMEOUT)?;
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
    assert!(!vmm.stdout.text().contains("on no console"), "the serial port is off");
    Ok(())
}

#[test]
fn threads_of_a_core_are_siblings_with_smt() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let script = "\
cd /sys/devices/system/cpu
echo \"siblings: $(cat cpu0/topology/thread_siblings_list) $(cat cpu2/topology/thread_siblings_list)\"
reboot -f";
    let mut guest = Guest::linux(Kernel::quickest(), script, builder.dir())?.vcpus(4);
    guest.machine = json!({"smt": true});
    let vmm = builder.with_config(&guest.config())?.spawn()?;
    assert_eq!(vmm.wait_for_output("siblings:", BOOT_TIMEOUT)?, "siblings: 0-1 2-3");
    Ok(())
}

#[test]
fn guest_time_agrees_with_host_time() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api");
    let script = "\
cd /sys/devices/system/clocksource/clocksource0
echo \"clocks: $(cat available_clocksource)\"
reboot -f";
    let guest = Guest::linux(Kernel::quickest(), script, builder.dir())?;
    let vmm = builder.with_config(&guest.config())?.spawn()?;
    let line = vmm.wait_for_output("clocks:", BOOT_TIMEOUT)?;
    ensure!(line.contains("kvm-clock"), "{line}");
    Ok(())
}
