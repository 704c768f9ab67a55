//! The monitor without Linux: guests of a few instructions, which run on a software KVM too.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::elf::{
    Elf, LOAD_ADDRESS, null_guest, reset_guest, serial_guest, spinning_guest, triple_fault_guest,
    unemulatable_guest,
};
use vesta_tests::guest::{Guest, TIMEOUT, start, vmm_path, vmm_with_api};
use vesta_tests::vmm::{Vmm, VmmBuilder};

const BOOTED: &str = "Guest-boot-time =";
/// The length of the null guest's first instruction.
const BOOT_TIMER_WRITE: usize = 7;

/// Starts this guest over the API of a monitor with a boot timer.
fn started(elf: &Elf) -> Result<(Vmm, ApiClient)> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    put(&vmm, &mut api, elf)?;
    start(&mut api)?;
    Ok((vmm, api))
}

fn put(vmm: &Vmm, api: &mut ApiClient, elf: &Elf) -> Result<()> {
    let kernel = vmm.dir().join("kernel");
    std::fs::write(&kernel, elf.bytes())?;
    Guest::bare(&kernel).put(api)
}

#[test]
fn the_first_instruction_runs_when_started_over_the_api() -> Result<()> {
    let (vmm, _api) = started(&null_guest())?;
    let line = vmm.wait_for_output(BOOTED, TIMEOUT)?;
    // `Guest-boot-time = N us M ms, X CPU us Y CPU ms`
    let numbers: Vec<u64> = line.split([' ', ',']).filter_map(|word| word.parse().ok()).collect();
    ensure!(numbers.len() >= 4, "the boot timer's line is {line}");
    Ok(())
}

#[test]
fn the_first_instruction_runs_when_started_from_a_file() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api").arg("--boot-timer");
    let kernel = builder.dir().join("kernel");
    std::fs::write(&kernel, null_guest().bytes())?;
    let vmm = builder.with_config(&Guest::bare(&kernel).config())?.spawn()?;
    vmm.wait_for_output(BOOTED, TIMEOUT)?;
    Ok(())
}

#[test]
fn the_api_answers_beside_a_guest_from_a_file() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.with_api().arg("--boot-timer");
    let kernel = builder.dir().join("kernel");
    std::fs::write(&kernel, null_guest().bytes())?;
    let vmm = builder.with_config(&Guest::bare(&kernel).config())?.spawn()?;
    vmm.wait_for_output(BOOTED, TIMEOUT)?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    assert_eq!(api.get("/")?.json()?["state"], "Running");
    let config = api.get("/vm/config")?.ok()?.json()?;
    assert_eq!(config["boot-source"]["kernel_image_path"], json!(kernel));
    assert_eq!(config["machine-config"]["mem_size_mib"], 128);
    Ok(())
}

#[test]
fn without_its_option_there_is_no_boot_timer() -> Result<()> {
    let (mut vmm, mut api) = vmm_with_api(&[])?;
    let mut elf = null_guest();
    // The same write, then the end: the write has been handled when the monitor ends.
    elf.segments[0].content.truncate(BOOT_TIMER_WRITE);
    elf.segments[0].content.extend(&reset_guest().segments[0].content);
    put(&vmm, &mut api, &elf)?;
    start(&mut api)?;
    let (code, printed) = vmm.finish(TIMEOUT)?;
    assert_eq!(code, 0);
    ensure!(!printed.contains(BOOTED), "{printed}");
    Ok(())
}

#[test]
fn serial_output_goes_to_standard_output() -> Result<()> {
    let (mut vmm, _api) = started(&serial_guest(b"hello by serial\r\n"))?;
    vmm.wait_for_output("hello by serial", TIMEOUT)?;
    assert_eq!(vmm.exit_code(TIMEOUT)?, 0);
    Ok(())
}

#[test]
fn serial_output_goes_to_the_configured_file() -> Result<()> {
    let (mut vmm, mut api) = vmm_with_api(&[])?;
    let file = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": file}))?.ok()?;
    put(&vmm, &mut api, &serial_guest(b"\x00bytes\xff\n"))?;
    start(&mut api)?;
    let (code, printed) = vmm.finish(TIMEOUT)?;
    assert_eq!(code, 0);
    assert_eq!(std::fs::read(&file)?, b"\x00bytes\xff\n");
    ensure!(!printed.contains("bytes"), "it is on standard output too: {printed}");
    Ok(())
}

#[test]
fn a_reset_by_the_keyboard_controller_ends_with_0() -> Result<()> {
    let (mut vmm, _api) = started(&reset_guest())?;
    assert_eq!(vmm.exit_code(TIMEOUT)?, 0);
    Ok(())
}

#[test]
fn every_vcpu_has_a_named_thread() -> Result<()> {
    let (vmm, mut api) = vmm_with_api(&["--boot-timer"])?;
    put(&vmm, &mut api, &null_guest())?;
    api.patch("/machine-config", &json!({"vcpu_count": 4}))?.ok()?;
    start(&mut api)?;
    vmm.wait_for_output(BOOTED, TIMEOUT)?;
    let names: Vec<String> = vmm.threads()?.into_iter().map(|thread| thread.name).collect();
    for name in ["fc_api", "fc_vcpu 0", "fc_vcpu 1", "fc_vcpu 2", "fc_vcpu 3"] {
        ensure!(names.iter().any(|thread| thread == name), "no thread is called {name}: {names:?}");
    }
    Ok(())
}

#[test]
fn a_guest_that_never_exits_can_be_paused_and_resumed() -> Result<()> {
    let (vmm, mut api) = started(&spinning_guest())?;
    vmm.wait_for_output(BOOTED, TIMEOUT)?;
    let time = || vmm.thread_time("fc_vcpu 0")?.context("there is no thread fc_vcpu 0");
    api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
    let used = time()?;
    // The time that is measured.
    std::thread::sleep(Duration::from_millis(300));
    assert_eq!(time()?, used, "its vCPU ran while it was paused");
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
    let deadline = std::time::Instant::now() + TIMEOUT;
    while time()? == used {
        ensure!(std::time::Instant::now() < deadline, "its vCPU did not run after it was resumed");
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

#[test]
fn a_guest_that_never_exits_ends_at_once_with_its_monitor() -> Result<()> {
    let (mut vmm, _api) = started(&spinning_guest())?;
    vmm.wait_for_output(BOOTED, TIMEOUT)?;
    vmm.signal(Signal::TERM)?;
    let status = vmm.exit_status(Duration::from_secs(5))?;
    ensure!(status.success() || status.signal() == Some(15), "it ended with {status}");
    Ok(())
}

/// Some kernels reboot this way (`reboot=t`), so it is no failure of the monitor.
///
/// If the processor's state is lost with the fault (on AMD it is undefined), the monitor can only
/// say so.
#[test]
fn a_triple_fault_is_reported_with_its_address() -> Result<()> {
    let (elf, fault_at) = triple_fault_guest();
    let (mut vmm, _api) = started(&elf)?;
    let (code, printed) = vmm.finish(TIMEOUT)?;
    assert_eq!(code, 0);
    let printed = printed.to_lowercase();
    ensure!(printed.contains("rip"), "no RIP in: {printed}");
    let real = printed.contains(&format!("{fault_at:x}"));
    // After a shutdown, kvm-amd resets the vCPU before it reports the exit.
    let reset = printed.contains("fff0");
    ensure!(real || reset, "neither {fault_at:#x} nor the reset vector in: {printed}");
    Ok(())
}

#[test]
fn an_unemulated_instruction_is_reported_with_its_bytes() -> Result<()> {
    let (elf, instruction) = unemulatable_guest();
    let (mut vmm, _api) = started(&elf)?;
    let (code, printed) = vmm.finish(TIMEOUT)?;
    assert_ne!(code, 0, "a guest that died is not a good end");
    let printed = printed.to_lowercase();
    ensure!(
        printed.contains("rip") && printed.contains(&format!("{LOAD_ADDRESS:x}")),
        "no RIP in: {printed}"
    );
    // However the bytes are separated.
    let digits: String = printed.replace("0x", "").chars().filter(char::is_ascii_hexdigit).collect();
    let bytes = instruction.iter().rev().fold(String::new(), |after, byte| format!("{byte:02x}{after}"));
    ensure!(digits.contains(&bytes), "the instruction {bytes} is not in: {printed}");
    Ok(())
}
