//! What guests other than Linux do, done by guests of a few instructions.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use anyhow::{Result, ensure};
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::counting::{is_consecutive, wait_for_bytes};
use vesta_tests::elf::{Elf, reset_guest};
use vesta_tests::guest::{Guest, TIMEOUT, Transport, start, vmm_with_api};
use vesta_tests::minimal_driver;
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::snapshots::{Files, pause, resume, save_live, unconfigured};
use vesta_tests::vmm::Vmm;

/// A guest with an entropy device that counts into the returned file.
fn counting_guest(kernel: &Elf, transport: Transport) -> Result<(Vmm, ApiClient, PathBuf)> {
    let (vmm, mut api) = unconfigured(transport)?;
    let (image, serial) = (vmm.dir().join("kernel"), vmm.dir().join("serial"));
    fs::write(&image, kernel.bytes())?;
    Guest::bare(&image).mem_mib(16).put(&mut api)?;
    api.put("/entropy", &json!({}))?.ok()?;
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    start(&mut api)?;
    Ok((vmm, api, serial))
}

/// Checks that a guest resumes counting from a snapshot, in another monitor.
fn counts_on_from(files: &Files, transport: Transport) -> Result<()> {
    let (vmm, mut api) = unconfigured(transport)?;
    let serial = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    api.put("/snapshot/load", &files.load())?.ok()?;
    let output = wait_for_bytes(&serial, 20)?;
    ensure!(is_consecutive(&output), "{output:?}");
    Ok(())
}

/// Checks that a guest continues counting in a child of a fork.
fn counts_on_in_a_child(api: &mut ApiClient, dir: &Path, id: &str) -> Result<()> {
    let serial = dir.join(format!("{id}.serial"));
    let child = json!({"id": id, "serial": {"serial_out_path": serial}});
    let reply = api.put("/fork", &json!({"children": [child]}))?.ok()?.json()?;
    let orphans = Orphans::of_fork(&reply)?;
    let output = wait_for_bytes(&serial, 20)?;
    ensure!(is_consecutive(&output), "{output:?}");
    orphans.kill(TIMEOUT)
}

on_each_transport! {
    fn a_driver_that_accepts_no_feature_works(transport) {
        let (vmm, mut api, serial) = counting_guest(&minimal_driver::kernel(transport), transport)?;
        let output = wait_for_bytes(&serial, 300)?;
        ensure!(is_consecutive(&output) && output[0] == 0, "{output:?}");
        let files = Files::new(vmm.dir(), "saved");
        pause(&mut api)?;
        api.put("/snapshot/create", &files.create("Full"))?.ok()?;
        counts_on_from(&files, transport)?;
        resume(&mut api)?;
        counts_on_in_a_child(&mut api, vmm.dir(), "child")?;
        ensure!(is_consecutive(&wait_for_bytes(&serial, 300)?), "the parent counts on");
        Ok(())
    }

    /// Interrupts are enabled, but neither the interrupt controllers nor the descriptor table are
    /// programmed.
    fn a_guest_saved_before_it_programs_its_pic_resumes(transport) {
        // sti; mov dx, 0x3f8; xor eax, eax; again: out dx, al; inc eax; jmp again
        let kernel = Elf::of(&[0xfb, 0x66, 0xba, 0xf8, 0x03, 0x31, 0xc0, 0xee, 0x40, 0xeb, 0xfc]);
        let (vmm, mut api, serial) = counting_guest(&kernel, transport)?;
        for moment in 0..6 {
            wait_for_bytes(&serial, moment * 7)?;
            let files = Files::new(vmm.dir(), &moment.to_string());
            match moment % 3 {
                0 => {
                    pause(&mut api)?;
                    api.put("/snapshot/create", &files.create("Full"))?.ok()?;
                    resume(&mut api)?;
                    counts_on_from(&files, transport)?;
                }
                1 => {
                    save_live(&mut api, &files.create("Full"))?;
                    counts_on_from(&files, transport)?;
                }
                _ => counts_on_in_a_child(&mut api, vmm.dir(), &format!("child{moment}"))?,
            }
        }
        ensure!(is_consecutive(&wait_for_bytes(&serial, 10)?));
        Ok(())
    }
}

#[test]
fn a_guest_that_polls_its_cmos_clock_reads_the_date() -> Result<()> {
    let read = |register: u8| [0xb0, register, 0xe6, 0x70, 0xe4, 0x71];
    let mut code = read(0x0a).to_vec();
    // again while an update is in progress: test al, 0x80; jnz to the start
    code.extend([0xa8, 0x80, 0x75, 0xf6]);
    for register in [0x32, 0x09, 0x08, 0x07, 0x04, 0x02, 0x00] {
        code.extend(read(register));
        // mov dx, 0x3f8; out dx, al
        code.extend([0x66, 0xba, 0xf8, 0x03, 0xee]);
    }
    code.extend(&reset_guest().segments[0].content);
    let (mut vmm, mut api) = vmm_with_api(&[])?;
    let (image, serial) = (vmm.dir().join("kernel"), vmm.dir().join("serial"));
    fs::write(&image, Elf::of(&code).bytes())?;
    Guest::bare(&image).mem_mib(16).put(&mut api)?;
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    let seconds = || SystemTime::now().duration_since(UNIX_EPOCH).unwrap_or_default().as_secs();
    let before = seconds();
    start(&mut api)?;
    assert_eq!(vmm.exit_code(TIMEOUT)?, 0);
    let after = seconds();
    let output: Vec<u64> =
        fs::read(&serial)?.iter().map(|byte| u64::from(byte >> 4) * 10 + u64::from(byte & 15)).collect();
    let [century, year, month, day, hours, minutes, seconds] = output[..] else {
        anyhow::bail!("output: {output:?}")
    };
    // Days of the months before, in a year that begins in March.
    let (y, m) = (century * 100 + year - u64::from(month < 3), (month + 9) % 12);
    let days = y * 365 + y / 4 - y / 100 + y / 400 + (m * 306 + 5) / 10 + day - 1 - 719_468;
    let read = days * 86_400 + hours * 3600 + minutes * 60 + seconds;
    ensure!((before..=after).contains(&read), "{read} is not between {before} and {after}");
    Ok(())
}
