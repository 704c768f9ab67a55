//! Root file systems on every kind of disk.

use std::fs;
use std::path::PathBuf;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vesta_tests::disks::{DiskGuest, partitioned, root_disk, root_drive, said, with};
use vesta_tests::guest::Transport;
use vesta_tests::host_devices::LoopDevice;
use vesta_tests::on_each_transport;
use vesta_tests::vmm::Vmm;

/// Says how the root file system is mounted, and writes to it.
const WRITE: &str = "echo ROOT $(/bin/busybox grep ' / ' /proc/mounts)\n\
                     /bin/busybox touch /written && echo WROTE\n\
                     /bin/busybox sync\n\
                     /bin/busybox poweroff -f";

/// Boots from a root disk, without an initial RAM disk.
fn boot(transport: Transport, script: &str, root: impl FnOnce(PathBuf) -> Result<Value>) -> Result<Vmm> {
    let guest = DiskGuest::new(transport)?;
    let image = root_disk(guest.dir(), script)?;
    guest.drive(root(image)?).boot()
}

on_each_transport! {
    fn a_root_disk_is_mounted_and_written(transport) {
        let said = said(&mut boot(transport, WRITE, |image| Ok(root_drive(&image)))?)?;
        ensure!(said.contains("ROOT /dev/root / ext4 rw") && said.contains("WROTE"), "{said}");
        Ok(())
    }

    fn a_read_only_root_disk_cannot_be_written(transport) {
        let script = "echo ROOT $(/bin/busybox grep ' / ' /proc/mounts)\n\
                      /bin/busybox mount -o remount,rw / || echo REFUSED\n\
                      /bin/busybox poweroff -f";
        let read_only = json!({"is_read_only": true});
        let said = said(&mut boot(transport, script, |image| Ok(with(root_drive(&image), &read_only)))?)?;
        ensure!(said.contains("ext4 ro") && said.contains("REFUSED"), "{said}");
        Ok(())
    }

    fn a_root_partition_is_found_by_its_uuid_on_whichever_disk(transport) {
        let root = |image: PathBuf| {
            let disk = partitioned(&image, 0x5ee4_0b1d)?;
            Ok(with(root_drive(&disk), &json!({"partuuid": "5ee40b1d-01"})))
        };
        let said = said(&mut boot(transport, WRITE, root)?)?;
        ensure!(said.contains("ROOT /dev/root / ext4 rw") && said.contains("WROTE"), "{said}");
        Ok(())
    }

    fn a_root_disk_may_be_a_block_device_of_the_host(transport) {
        let mut device = None;
        let mut vmm = boot(transport, WRITE, |image| {
            let attached = device.insert(LoopDevice::new(&image)?);
            Ok(root_drive(attached.path()))
        })?;
        let said = said(&mut vmm)?;
        ensure!(said.contains("ROOT /dev/root / ext4 rw") && said.contains("WROTE"), "{said}");
        Ok(())
    }

    fn a_root_overlay_takes_the_writes_and_the_base_stays_as_it_is(transport) {
        let script = "echo kept > /kept; /bin/busybox sync\n\
                      echo HAS $(/bin/busybox cat /kept)\n\
                      /bin/busybox poweroff -f";
        let mut base = None;
        let mut vmm = boot(transport, script, |image| {
            base = Some((image.clone(), fs::read(&image)?));
            let overlay = image.with_file_name("overlay");
            Ok(with(root_drive(&image), &json!({"overlay": {"path": overlay}})))
        })?;
        let said = said(&mut vmm)?;
        ensure!(said.contains("HAS kept"), "{said}");
        let (base, before) = base.expect("it was made");
        ensure!(fs::read(&base)? == before, "the base has changed");
        ensure!(fs::metadata(base.with_file_name("overlay"))?.len() > 0, "the overlay is empty");
        Ok(())
    }
}
