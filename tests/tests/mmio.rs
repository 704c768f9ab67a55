//! virtio-mmio: a window and an interrupt line for each device.

use std::collections::BTreeSet;

use anyhow::{Result, ensure};
use serde_json::json;
use vesta_tests::disks::{DiskGuest, MIB, disk, drive, output_of};
use vesta_tests::guest::{BOOT_TIMEOUT, Transport};

/// `count` disks of 1 MiB and an entropy device.
fn guest(count: u64) -> Result<DiskGuest> {
    let mut guest = DiskGuest::new(Transport::Mmio)?.entropy(json!({}));
    for number in 0..count {
        let name = format!("disk{number}");
        let path = disk(guest.dir(), &name, 1)?;
        std::fs::OpenOptions::new().write(true).open(&path)?.set_len(MIB + 512 * number)?;
        guest = guest.drive(drive(&name, &path));
    }
    Ok(guest)
}

/// Lines 5 to 23, each with interrupts for its device.
fn all_lines_interrupt(guest: DiskGuest) -> Result<()> {
    let script = "\
        for d in /sys/block/vd*; do\n\
          echo DISK $(cat $d/serial) $(cat $d/size)\n\
          dd if=/dev/$(basename $d) of=/dev/null bs=4096 count=4 iflag=direct 2>/dev/null || echo FAILED $d\n\
        done\n\
        dd if=/dev/hwrng of=/dev/null bs=16 count=1 2>/dev/null || echo FAILED hwrng\n\
        grep virtio /proc/interrupts\n\
        reboot -f";
    let output = output_of(&mut guest.run(script)?)?;
    ensure!(!output.contains("FAILED"), "{output}");
    for number in 0..18 {
        ensure!(output.contains(&format!("DISK disk{number} {}", 2048 + number)), "disk{number}: {output}");
    }
    // For example: `23:    5   IO-APIC  23-edge   virtio18`.
    let line = |text: &str| {
        let words: Vec<_> = text.split_whitespace().collect();
        let count: u32 = words.get(1)?.parse().ok()?;
        let line = words.iter().find_map(|word| word.strip_suffix("-edge"))?.parse::<u32>().ok()?;
        (count > 0).then_some(line)
    };
    let lines: BTreeSet<_> = output.lines().filter(|text| text.contains("virtio")).filter_map(line).collect();
    ensure!(lines == (5..=23).collect(), "{lines:?}: {output}");
    Ok(())
}

#[test]
fn all_19_interrupt_lines_can_be_used() -> Result<()> {
    all_lines_interrupt(guest(18)?)
}

/// The guest finds them in the MP table and on its command line.
#[test]
fn all_19_interrupt_lines_can_be_used_without_acpi() -> Result<()> {
    all_lines_interrupt(guest(18)?.more_boot_args("acpi=off"))
}

#[test]
fn more_devices_than_interrupt_lines_are_refused() -> Result<()> {
    let (code, output) = guest(19)?.run("")?.finish(BOOT_TIMEOUT)?;
    assert_eq!(code, 152);
    ensure!(output.contains("20 are configured; at most 19, one for each interrupt line"), "{output}");
    Ok(())
}
