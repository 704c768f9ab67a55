//! Devices on virtio-pci: how guests find them, and how many there can be.

use std::fs::File;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::{Value, json};
use vesta_tests::guest::{BOOT, Guest, Kernel, vmm_path};
use vesta_tests::initramfs::Initramfs;
use vesta_tests::on_each_kernel;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// Where busybox is, for initial RAM disks that need more than a script.
fn busybox() -> std::path::PathBuf {
    std::env::var_os(vesta_tests::guest::env::BUSYBOX).expect("the runner names it").into()
}

/// `count` disks of 1 MiB and 512 bytes for each that came before.
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

fn said(mut vmm: Vmm) -> Result<String> {
    let (code, said) = vmm.finish(BOOT)?;
    assert_eq!(code, 0, "{said}");
    Ok(said)
}

on_each_kernel! {
    /// The drivers are the kernel's own, and interrupts are messages.
    fn the_guest_finds_its_devices_on_the_bus_and_uses_them(kernel) {
        let script = "echo CLASSES $(cat /sys/bus/pci/devices/*/class)\n\
                      echo SIZES $(cat /sys/block/vda/size) $(cat /sys/block/vdb/size)\n\
                      echo written | dd of=/dev/vdb bs=512 seek=7 conv=sync,fsync 2>/dev/null\n\
                      echo BACK $(dd if=/dev/vdb bs=512 skip=7 count=1 iflag=direct 2>/dev/null | head -n 1)\n\
                      echo VECTORS $(grep -c 'MSI.*virtio' /proc/interrupts)\n\
                      poweroff -f";
        let said = said(boot(kernel, script, 2, "")?)?;
        assert!(said.contains("CLASSES 0x060000 0x018000 0x018000 0xff0000"), "{said}");
        assert!(said.contains("SIZES 2048 2049"), "{said}");
        assert!(said.contains("BACK written"), "{said}");
        let vectors = said.lines().find_map(|line| line.split("VECTORS ").nth(1)).context("no VECTORS")?;
        assert!(vectors.trim().parse::<u32>()? >= 2, "{said}");
        Ok(())
    }
}

#[test]
fn all_31_slots_can_be_taken() -> Result<()> {
    let script = "for d in /sys/block/vd*; do echo DISK $(cat $d/serial) $(cat $d/size); done\npoweroff -f";
    let said = said(boot(Kernel::Tuned, script, 31, "")?)?;
    for number in 0..31 {
        assert!(said.contains(&format!("DISK disk{number} {}", 2048 + number)), "disk{number}: {said}");
    }
    Ok(())
}

#[test]
fn one_device_more_than_slots_is_refused_with_the_bound() -> Result<()> {
    let (code, said) = boot(Kernel::Tuned, "", 32, "")?.finish(BOOT)?;
    assert_eq!(code, 152);
    assert!(said.contains("32 are configured; at most 31, one for each PCI slot"), "{said}");
    Ok(())
}

#[test]
fn a_guest_without_acpi_probes_the_bus() -> Result<()> {
    let script = "echo SIZE $(cat /sys/block/vda/size)\n\
                  echo BACK $(echo kept | dd of=/dev/vda conv=fsync 2>/dev/null; head -c 4 /dev/vda)\nreboot -f";
    let said = said(boot(Kernel::Tuned, script, 1, "acpi=off")?)?;
    assert!(said.contains("SIZE 2048") && said.contains("BACK kept"), "{said}");
    Ok(())
}
