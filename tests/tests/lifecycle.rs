//! A running Linux guest: pause and resume, Ctrl+Alt+Del, signals, and requests that are refused.

use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::guest::{BOOT_ARGS, BOOT_TIMEOUT, Guest, Kernel, TIMEOUT, start, vmm_with_api};
use vesta_tests::vmm::Vmm;

/// Works all the time, and prints a line again and again.
const BUSY: &str = "\
n=0
while :; do
  i=0
  while [ $i -lt 2000 ]; do i=$((i+1)); done
  n=$((n+1))
  echo \"tick $n\"
done";

/// A guest that runs `script`, once the script has printed `ready`.
fn running(kernel: Kernel, script: &str) -> Result<(Vmm, ApiClient)> {
    let (vmm, mut api) = vmm_with_api(&[])?;
    let guest = Guest::linux(kernel, &format!("echo ready\n{script}"), vmm.dir())?;
    guest.boot_args(&format!("{BOOT_ARGS} i8042.noaux i8042.nomux i8042.dumbkbd")).put(&mut api)?;
    start(&mut api)?;
    vmm.wait_for_output("ready", BOOT_TIMEOUT)?;
    Ok((vmm, api))
}

fn vcpu_time(vmm: &Vmm) -> Result<Duration> {
    vmm.thread_time("fc_vcpu 0")?.context("there is no thread fc_vcpu 0")
}

fn set_state(api: &mut ApiClient, state: &str) -> Result<()> {
    assert_eq!(api.patch("/vm", &json!({"state": state}))?.ok()?.status, 204);
    Ok(())
}

fn state(api: &mut ApiClient) -> Result<String> {
    let info = api.get("/")?.ok()?.json()?;
    Ok(info["state"].as_str().context("GET / has a state")?.to_owned())
}

#[test]
fn a_paused_guest_uses_no_cpu_until_it_is_resumed() -> Result<()> {
    let (vmm, mut api) = running(Kernel::quickest(), BUSY)?;
    vmm.wait_for_output("tick 2", BOOT_TIMEOUT)?;
    assert_eq!(state(&mut api)?, "Running");

    set_state(&mut api, "Paused")?;
    assert_eq!(state(&mut api)?, "Paused");
    // Output from before the pause may still be in the pipe.
    std::thread::sleep(Duration::from_millis(300));
    let (printed, used) = (vmm.stdout.len(), vcpu_time(&vmm)?);
    // The second that is measured.
    std::thread::sleep(Duration::from_secs(1));
    assert_eq!(vmm.stdout.len(), printed, "output while it was paused");
    assert_eq!(vcpu_time(&vmm)?, used, "its vCPU ran while it was paused");

    set_state(&mut api, "Resumed")?;
    vmm.stdout.wait_for_more_than(printed, TIMEOUT)?;
    assert_eq!(state(&mut api)?, "Running");
    // The shell counts on from where it was.
    let ticks: Vec<u64> =
        vmm.stdout.lines().iter().filter_map(|line| line.text.strip_prefix("tick ")?.parse().ok()).collect();
    ensure!(ticks.windows(2).all(|pair| pair[1] == pair[0] + 1), "ticks are missing: {ticks:?}");
    Ok(())
}

#[test]
fn a_guest_can_be_paused_many_times() -> Result<()> {
    let (vmm, mut api) = running(Kernel::quickest(), BUSY)?;
    for _ in 0..20 {
        set_state(&mut api, "Paused")?;
        // A second time changes nothing.
        set_state(&mut api, "Paused")?;
        set_state(&mut api, "Resumed")?;
        set_state(&mut api, "Resumed")?;
    }
    let printed = vmm.stdout.len();
    vmm.stdout.wait_for_more_than(printed, TIMEOUT)
}

/// A kernel without virtual terminals (`CONFIG_VT`), like the tuned one, ignores Ctrl+Alt+Del.
fn ctrl_alt_del_reaches_init_of(kernel: Kernel) -> Result<()> {
    let script = "\
echo 0 > /proc/sys/kernel/ctrl-alt-del
trap 'echo interrupted; reboot -f' INT
echo listening
while :; do sleep 0.1; done";
    let (mut vmm, mut api) = running(kernel, script)?;
    vmm.wait_for_output("listening", BOOT_TIMEOUT)?;
    api.put("/actions", &json!({"action_type": "SendCtrlAltDel"}))?.ok()?;
    vmm.wait_for_output("interrupted", BOOT_TIMEOUT)?;
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
    Ok(())
}

#[test]
fn ctrl_alt_del_reaches_init_of_debian_6_1() -> Result<()> {
    ctrl_alt_del_reaches_init_of(Kernel::Debian6_1)
}

#[test]
fn ctrl_alt_del_reaches_init_of_debian_6_12() -> Result<()> {
    ctrl_alt_del_reaches_init_of(Kernel::Debian6_12)
}

#[test]
fn sigterm_ends_the_monitor_at_once() -> Result<()> {
    let (mut vmm, _api) = running(Kernel::quickest(), BUSY)?;
    vmm.signal(Signal::TERM)?;
    let status = vmm.exit_status(Duration::from_secs(5))?;
    ensure!(status.success() || status.signal() == Some(15), "it ended with {status}");
    Ok(())
}

#[test]
fn preboot_requests_are_refused_after_the_start() -> Result<()> {
    let (vmm, mut api) = running(Kernel::quickest(), BUSY)?;
    let refused = [
        api.put("/actions", &json!({"action_type": "InstanceStart"}))?,
        api.put("/machine-config", &json!({"vcpu_count": 1, "mem_size_mib": 256}))?,
        api.patch("/machine-config", &json!({"mem_size_mib": 256}))?,
        api.put("/boot-source", &json!({"kernel_image_path": "/nonexistent"}))?,
        api.put("/serial", &json!({"serial_out_path": "/nonexistent"}))?,
    ];
    for response in refused {
        assert_eq!(response.status, 400);
        ensure!(!response.fault().is_empty(), "an error without a text: {response:?}");
    }
    assert_eq!(state(&mut api)?, "Running");
    assert_eq!(api.get("/machine-config")?.json()?["mem_size_mib"], 128);
    let printed = vmm.stdout.len();
    vmm.stdout.wait_for_more_than(printed, TIMEOUT)
}

#[test]
fn serial_output_can_go_to_a_file() -> Result<()> {
    let (mut vmm, mut api) = vmm_with_api(&[])?;
    let file = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": file}))?.ok()?;
    Guest::linux(Kernel::quickest(), "echo into the file; reboot -f", vmm.dir())?.put(&mut api)?;
    start(&mut api)?;
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
    ensure!(
        std::fs::read_to_string(&file)?.contains("into the file\r\n"),
        "the file has no line of the guest's"
    );
    ensure!(!vmm.stdout.text().contains("into the file"), "it is on standard output too");
    Ok(())
}
