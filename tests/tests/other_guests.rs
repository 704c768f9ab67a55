//! Guests other than Linux, and Linux during its boot.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::guest::{BOOT_TIMEOUT, Guest, Kernel, Transport, env, required_path, start, vmm_path};
use vesta_tests::on_each_transport;
use vesta_tests::snapshots::{Files, pause, restore, resume, save_live, unconfigured};
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// What memtest86+ shows of a machine with two processors in use.
const BOTH_PROCESSORS: &str = "SMP: 2T (PAR)";
/// What it shows of a test that has started.
const A_TEST: &str = "[Address test";
/// The Escape key, which ends memtest86+ with a reset.
const ESCAPE: &[u8] = b"\x1b";

/// At how many moments of its boot a guest is saved, unless [`MOMENTS_VARIABLE`] is set.
const MOMENTS: u32 = 5;
/// More moments: `VESTA_BOOT_MOMENTS=40 cargo xtask test --system boot_moment`.
const MOMENTS_VARIABLE: &str = "VESTA_BOOT_MOMENTS";
/// What the guest prints when its first program runs.
const INIT: &str = "INIT-RUNS";
/// The interval of polling a guest's progress.
const LOOK_EVERY: Duration = Duration::from_millis(2);

#[test]
fn memtest86_tests_memory_on_two_vcpus_and_resets() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api").with_input().quiet();
    let guest =
        Guest::bare(&required_path(env::MEMTEST)).vcpus(2).mem_mib(8).boot_args("console=ttyS0,115200");
    let mut vmm = builder.with_config(&guest.config())?.spawn()?;
    // It draws on a screen, without line breaks.
    while !vmm.stdout.text().contains(A_TEST) {
        vmm.stdout.wait_for_more_than(vmm.stdout.len(), BOOT_TIMEOUT)?;
    }
    vmm.type_in(ESCAPE)?;
    let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
    ensure!(output.contains(BOTH_PROCESSORS) && output.contains("Errors: 0"), "{output:?}");
    assert_eq!(code, 0);
    Ok(())
}

/// Numbers from 0 to 1000, in order and the same in each run.
fn seeded(count: u32) -> Vec<u32> {
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    let next = |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 33) as u32 % 1001
    };
    let mut numbers: Vec<u32> = (0..count).map(next).collect();
    numbers.sort_unstable();
    numbers
}

/// A Linux guest that has just started.
fn booting(transport: Transport) -> Result<(Vmm, ApiClient)> {
    let (vmm, mut api) = unconfigured(transport)?;
    Guest::linux(Kernel::quickest(), &format!("echo {INIT}; poweroff -f"), vmm.dir())?.put(&mut api)?;
    api.put("/entropy", &json!({}))?.ok()?;
    start(&mut api)?;
    Ok((vmm, api))
}

/// The time that its vCPU has run; `None` once the monitor has ended.
fn progress(vmm: &Vmm) -> Result<Option<Duration>> {
    vmm.thread_time("fc_vcpu 0")
}

/// Waits until its vCPU has run for that long. False if it got to init before.
fn waits_until(vmm: &Vmm, moment: Duration) -> Result<bool> {
    loop {
        match progress(vmm)? {
            Some(_) if vmm.stdout.text().contains(INIT) => return Ok(false),
            Some(time) if time >= moment => return Ok(true),
            Some(_) => std::thread::sleep(LOOK_EVERY),
            None => return Ok(false),
        }
    }
}

on_each_transport! {
    /// One boot, saved at many moments, paused and running in turn. Each snapshot then boots to its
    /// end.
    fn a_guest_saved_at_any_boot_moment_reaches_init(transport) {
        let (vmm, _api) = booting(transport)?;
        vmm.wait_for_output(INIT, BOOT_TIMEOUT)?;
        let whole_boot = progress(&vmm)?.context("a vCPU")?;
        drop(vmm);

        let count = std::env::var(MOMENTS_VARIABLE).map_or(Ok(MOMENTS), |count| count.parse())?;
        let (mut vmm, mut api) = booting(transport)?;
        let mut saved = Vec::new();
        for (number, moment) in seeded(count).into_iter().enumerate() {
            if !waits_until(&vmm, whole_boot * moment / 1000)? {
                break;
            }
            let files = Files::new(vmm.dir(), &number.to_string());
            if number % 2 == 0 {
                pause(&mut api)?;
                api.put("/snapshot/create", &files.create("Full"))?.ok()?;
                resume(&mut api)?;
            } else {
                save_live(&mut api, &files.create("Full"))?;
            }
            saved.push((moment, files));
        }
        ensure!(!saved.is_empty(), "it reached init before its first moment");
        vmm.wait_for_output(INIT, BOOT_TIMEOUT)?;
        assert_eq!(vmm.exit_code(BOOT_TIMEOUT)?, 0);
        for (moment, files) in saved {
            let context = || format!("saved after {moment} thousandths of its boot");
            let (mut clone, _api) = restore(transport, &files.load()).with_context(context)?;
            let (code, text) = clone.finish(BOOT_TIMEOUT).with_context(context)?;
            ensure!(code == 0 && text.contains(INIT), "{}: exit {code}:\n{text}", context());
        }
        Ok(())
    }
}
