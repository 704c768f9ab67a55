//! Guests of a few instructions that print consecutive numbers, so their output shows whether they
//! resumed where they were paused.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Result, bail};
use serde_json::json;

use crate::api::ApiClient;
use crate::elf::Elf;
use crate::guest::{Guest, TIMEOUT, start, vmm_path};
use crate::vmm::{Vmm, VmmBuilder};

/// The kernel of a guest that sends the bytes 0, 1, 2, ... over its serial port without end.
pub fn kernel() -> Elf {
    // mov dx, 0x3f8; xor eax, eax; again: out dx, al; inc eax; jmp again
    Elf::of(&[0x66, 0xba, 0xf8, 0x03, 0x31, 0xc0, 0xee, 0x40, 0xeb, 0xfc])
}

/// A guest that sends the bytes 0, 1, 2, ... over its serial port, which goes to the returned file.
/// Its id is `parent`.
pub fn counting(machine: &serde_json::Value) -> Result<(Vmm, ApiClient, PathBuf)> {
    run(&kernel(), machine)
}

/// As [`counting`], with the monitor of this builder.
pub fn counting_in(builder: VmmBuilder) -> Result<(Vmm, ApiClient, PathBuf)> {
    run_in(builder, &kernel(), &json!({}), &[])
}

/// As [`counting`], with these drives, which it does not use.
pub fn counting_with(drives: &[serde_json::Value]) -> Result<(Vmm, ApiClient, PathBuf)> {
    run_with(&kernel(), &json!({}), drives)
}

/// As [`counting`], with `mib` MiB of memory. Every page from 16 MiB on has data.
pub fn filled(mib: u32, machine: &serde_json::Value) -> Result<(Vmm, ApiClient, PathBuf)> {
    let pages = ((mib - 16) << 8).to_le_bytes();
    let code = [
        &[0xbf, 0x00, 0x00, 0x00, 0x01][..],   // mov edi, 0x1000000
        &[0xb9],                               // mov ecx, pages
        &pages,                                //
        &[0x89, 0x3f],                         // page: mov [edi], edi
        &[0x81, 0xc7, 0x00, 0x10, 0x00, 0x00], // add edi, 4096
        &[0x49],                               // dec ecx
        &[0x75, 0xf5],                         // jnz page
        &[0x66, 0xba, 0xf8, 0x03],             // mov dx, 0x3f8
        &[0x31, 0xc0],                         // xor eax, eax
        &[0xee, 0x40, 0xeb, 0xfc],             // again: out dx, al; inc eax; jmp again
    ]
    .concat();
    let mut machine = machine.clone();
    machine["mem_size_mib"] = json!(mib);
    run(&Elf::of(&code), &machine)
}

/// As [`counting`], but before each number it checks that each of 1024 pages from 8 MiB on holds
/// that number, and increments it there. If a page is wrong, it repeats the number instead of
/// counting.
pub fn sweeping(machine: &serde_json::Value) -> Result<(Vmm, ApiClient, PathBuf)> {
    let code = [
        &[0x66, 0xba, 0xf8, 0x03][..],         // mov dx, 0x3f8
        &[0x31, 0xc0],                         // xor eax, eax
        &[0xbf, 0x00, 0x00, 0x80, 0x00],       // again: mov edi, 0x800000
        &[0xb9, 0x00, 0x04, 0x00, 0x00],       // mov ecx, 1024
        &[0x38, 0x07],                         // page: cmp [edi], al
        &[0x75, 0x10],                         // jne wrong
        &[0xfe, 0x07],                         // inc byte [edi]
        &[0x81, 0xc7, 0x00, 0x10, 0x00, 0x00], // add edi, 4096
        &[0x49],                               // dec ecx
        &[0x75, 0xf1],                         // jnz page
        &[0xee],                               // out dx, al
        &[0x40],                               // inc eax
        &[0xeb, 0xe3],                         // jmp again
        &[0x48],                               // wrong: dec eax
        &[0xee, 0xeb, 0xfd],                   // same: out dx, al; jmp same
    ]
    .concat();
    run(&Elf::of(&code), machine)
}

/// The address of KVM's wall clock in the guest of [`with_clocks`].
pub const WALL_CLOCK: u64 = 0x90_0000;

/// As [`counting`], with KVM's two clocks enabled, which KVM writes to guest memory when a vCPU's
/// registers are set. The guest does not read them.
pub fn with_clocks() -> Result<(Vmm, ApiClient, PathBuf)> {
    let code = [
        &[0x31, 0xd2][..],               // xor edx, edx
        &[0xb9, 0x00, 0x4d, 0x56, 0x4b], // mov ecx, MSR_KVM_WALL_CLOCK_NEW
        &[0xb8, 0x00, 0x00, 0x90, 0x00], // mov eax, WALL_CLOCK
        &[0x0f, 0x30],                   // wrmsr
        &[0xb9, 0x01, 0x4d, 0x56, 0x4b], // mov ecx, MSR_KVM_SYSTEM_TIME_NEW
        &[0xb8, 0x01, 0x10, 0x90, 0x00], // mov eax, WALL_CLOCK + 0x1000 + 1 (enabled)
        &[0x0f, 0x30],                   // wrmsr
        &[0x66, 0xba, 0xf8, 0x03],       // mov dx, 0x3f8
        &[0x31, 0xc0],                   // xor eax, eax
        &[0xee, 0x40, 0xeb, 0xfc],       // again: out dx, al; inc eax; jmp again
    ]
    .concat();
    run(&Elf::of(&code), &json!({}))
}

fn run(kernel: &Elf, machine: &serde_json::Value) -> Result<(Vmm, ApiClient, PathBuf)> {
    run_with(kernel, machine, &[])
}

fn run_with(
    kernel: &Elf,
    machine: &serde_json::Value,
    drives: &[serde_json::Value],
) -> Result<(Vmm, ApiClient, PathBuf)> {
    run_in(VmmBuilder::new(&vmm_path())?, kernel, machine, drives)
}

fn run_in(
    builder: VmmBuilder,
    kernel: &Elf,
    machine: &serde_json::Value,
    drives: &[serde_json::Value],
) -> Result<(Vmm, ApiClient, PathBuf)> {
    let vmm = builder.with_api().arg("--id").arg("parent").spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let image = vmm.dir().join("kernel");
    fs::write(&image, kernel.bytes())?;
    let guest = Guest { machine: machine.clone(), ..Guest::bare(&image).mem_mib(16) };
    guest.put(&mut api)?;
    for drive in drives {
        let id = drive["drive_id"].as_str().unwrap_or_default();
        api.put(&format!("/drives/{id}"), drive)?.ok()?;
    }
    let serial = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    start(&mut api)?;
    wait_for_bytes(&serial, 10)?;
    Ok((vmm, api, serial))
}

/// A monitor without a configured guest, whose guest's output will be in the returned file.
pub fn unconfigured() -> Result<(Vmm, ApiClient, PathBuf)> {
    let vmm = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let serial = vmm.dir().join("serial");
    api.put("/serial", &json!({"serial_out_path": serial}))?.ok()?;
    Ok((vmm, api, serial))
}

/// Restores a snapshot in a new monitor, with the guest's output in the returned file.
pub fn restored(load: &serde_json::Value) -> Result<(Vmm, ApiClient, PathBuf)> {
    let (vmm, mut api, serial) = unconfigured()?;
    api.put("/snapshot/load", load)?.ok()?;
    Ok((vmm, api, serial))
}

/// Waits until the guest has written that many more bytes to its serial port. Returns all bytes.
pub fn wait_for_bytes(serial: &Path, more: usize) -> Result<Vec<u8>> {
    let written = || fs::read(serial).unwrap_or_default();
    let wanted = written().len() + more;
    let deadline = Instant::now() + TIMEOUT;
    while written().len() < wanted {
        if Instant::now() > deadline {
            bail!("the guest has written no more to {}", serial.display());
        }
        std::thread::yield_now();
    }
    Ok(written())
}

/// Whether each byte is the one before plus one.
pub fn is_consecutive(bytes: &[u8]) -> bool {
    bytes.windows(2).all(|pair| pair[1] == pair[0].wrapping_add(1))
}
