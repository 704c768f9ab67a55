//! Guests that are not Linux, and Linux before it is ready for anything.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vesta_tests::guest::{BOOT, Guest, Kernel, SOON, env, given, start, vmm_path, vmm_with_api};
use vesta_tests::on_each_transport;
use vesta_tests::snapshots::{Files, go_on, pause, resume};
use vesta_tests::vmm::VmmBuilder;

/// What memtest86+ draws once it tests memory, and on how many processors.
const TESTING: &str = "Testing:";
/// The Escape key, which ends memtest86+ with a reset.
const ESCAPE: &[u8] = b"\x1b";

#[test]
fn memtest86_tests_memory_on_two_vcpus_and_resets() -> Result<()> {
    let builder = VmmBuilder::new(&vmm_path())?.arg("--no-api").with_input();
    let guest = Guest::bare(&given(env::MEMTEST)).vcpus(2).mem_mib(8).boot_args("console=ttyS0,115200");
    let mut vmm = builder.with_config(&guest.config())?.spawn()?;
    std::thread::sleep(Duration::from_secs(20));
    vmm.type_in(ESCAPE)?;
    let (code, said) = vmm.finish(BOOT)?;
    eprintln!("{:?}", said);
    ensure!(said.contains(TESTING));
    assert_eq!(code, 0);
    Ok(())
}
