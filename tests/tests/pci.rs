//! virtio-pci: how guests find devices, and how many there can be.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vesta_tests::guest::{BOOT_TIMEOUT, Guest, Kernel, vmm_path};
use vesta_tests::initramfs::Initramfs;
use vesta_tests::on_each_kernel;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// The path of busybox, for initramfs images that need more than a script.
fn busybox() -> std::path::PathBuf {
    std::env::var_os(vesta_tests::guest::env::BUSYBOX).expect("the runner names it").into()
}

/// `count` disks of 1 MiB, each 512 bytes larger than the one before.
fn disks(dir: &Path, count: u64) -> Result<Value> {
    let disk = |number: u64| {
        let path = dir.join(format!("disk{number}"));
        File::create(&path)?.set_len((1 << 20) + 512 * number)?;
        Ok(json!({"drive_id": format!("disk{number}"), "path_on_host": path, "is_root_device": false}))
    };
    (0..count).map(disk).collect()
}

/// A guest with disks on PCI and an entropy device, which runs `script` with its drivers loaded.
fn boot(kernel: Kernel, script: &str, count: u64, more_args: &str) -> Result<Vmm> {
    let builder = VmmBuilder::new(&vmm_path())?;
    let mut initramfs = Initramfs::new(&busybox())?;
    if let Some(modules) = kernel.modules() {
        // Newer kernels have the first built in.
        let drivers = ["virtio_pci", "virtio_blk"];
        let present: Vec<_> = drivers.into_iter().filter(|name| modules.file(name).exists()).collect();
        initramfs.modules(&modules, &present)?;
    }
    let initrd = builder.dir().join("initramfs");
    std::fs::write(&initrd, initramfs.finish(script))?;
    let mut guest = Guest::bare(&kernel.image());
    guest.initrd = Some(initrd);
    guest.boot_args = Some(format!("{} {more_args}", vesta_tests::guest::BOOT_ARGS));
    let mut config = guest.config();
    config["drives"] = disks(builder.dir(), count)?;
    if count < 31 {
        config["entropy"] = json!({});
    }
    builder.arg("--enable-pci").arg("--no-api").with_config(&config)?.spawn()
}

fn output_of(mut vmm: Vmm) -> Result<String> {
    let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
    assert_eq!(code, 0, "{output}");
    Ok(output)
}

on_each_kernel! {
    /// The kernel's own drivers are bound, and interrupts are MSI-X.
    fn the_guest_uses_its_devices_on_the_pci_bus(kernel) {
        let script = "echo CLASSES $(cat /sys/bus/pci/devices/*/class)\n\
                      echo SIZES $(cat /sys/block/vda/size) $(cat /sys/block/vdb/size)\n\
                      echo written | dd of=/dev/vdb bs=512 seek=7 conv=sync,fsync 2>/dev/null\n\
                      echo BACK $(dd if=/dev/vdb bs=512 skip=7 count=1 iflag=direct 2>/dev/null | head -n 1)\n\
                      echo VECTORS $(grep -c 'MSI.*virtio' /proc/interrupts)\n\
                      poweroff -f";
        let output = output_of(boot(kernel, script, 2, "")?)?;
        assert!(output.contains("CLASSES 0x060000 0x018000 0x018000 0xff0000"), "{output}");
        assert!(output.contains("SIZES 2048 2049"), "{output}");
        assert!(output.contains("BACK written"), "{output}");
        let vectors = output.lines().find_map(|line| line.split("VECTORS ").nth(1)).context("no VECTORS")?;
        assert!(vectors.trim().parse::<u32>()? >= 2, "{output}");
        Ok(())
    }
}

#[test]
fn all_31_slots_can_be_used() -> Result<()> {
    let script = "for d in /sys/block/vd*; do echo DISK $(cat $d/serial) $(cat $d/size); done\npoweroff -f";
    let output = output_of(boot(Kernel::Tuned, script, 31, "")?)?;
    for number in 0..31 {
        assert!(output.contains(&format!("DISK disk{number} {}", 2048 + number)), "disk{number}: {output}");
    }
    Ok(())
}

#[test]
fn more_devices_than_slots_are_refused_with_the_bound() -> Result<()> {
    let (code, output) = boot(Kernel::Tuned, "", 32, "")?.finish(BOOT_TIMEOUT)?;
    assert_eq!(code, 152);
    assert!(output.contains("32 are configured; at most 31, one for each PCI slot"), "{output}");
    Ok(())
}

#[test]
fn a_guest_without_acpi_probes_the_bus() -> Result<()> {
    let script = "echo SIZE $(cat /sys/block/vda/size)\n\
                  echo BACK $(echo kept | dd of=/dev/vda conv=fsync 2>/dev/null; head -c 4 /dev/vda)\nreboot -f";
    let output = output_of(boot(Kernel::Tuned, script, 1, "acpi=off")?)?;
    assert!(output.contains("SIZE 2048") && output.contains("BACK kept"), "{output}");
    Ok(())
}
