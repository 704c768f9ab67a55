//! Root file systems on every kind of disk.

use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vesta_tests::disks::{DiskGuest, drive, output_of, partitioned, root_disk, root_drive, with};
use vesta_tests::guest::{TIMEOUT, Transport, vmm_path};
use vesta_tests::host_devices::LoopDevice;
use vesta_tests::on_each_transport;
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// Prints how the root file system is mounted, and writes to it.
const WRITE: &str = "echo ROOT $(/bin/busybox grep ' / ' /proc/mounts)\n\
                     /bin/busybox touch /written && echo WROTE\n\
                     /bin/busybox sync\n\
                     /bin/busybox poweroff -f";

/// Boots from a root disk, without an initramfs.
fn boot(transport: Transport, script: &str, root: impl FnOnce(PathBuf) -> Result<Value>) -> Result<Vmm> {
    let guest = DiskGuest::new(transport)?;
    let image = root_disk(guest.dir(), script)?;
    guest.drive(root(image)?).boot()
}

/// One of several guests in sequence, each on the layers of those before it. It adds a file to its
/// root, changes a file that all change, and overwrites the inner part of what the previous guest
/// wrote to the data disk, which held `b` everywhere. Then it prints what it sees.
const GENERATION: &str = "\
    b=/bin/busybox\n\
    $b mount -t tmpfs none /tmp\n\
    n=1; while [ -e /from$n ]; do n=$((n + 1)); done\n\
    echo $n > /from$n; echo $n > /last\n\
    $b dd if=/dev/zero bs=16k count=$((7 - 2 * n)) 2>/dev/null | $b tr '\\0' $n > /tmp/run\n\
    $b dd if=/tmp/run of=/dev/vdb bs=16k seek=$n oflag=direct conv=notrunc 2>/dev/null || echo FAILED\n\
    $b sync; echo 3 > /proc/sys/vm/drop_caches\n\
    # One request that goes through all layers.\n\
    $b dd if=/dev/vdb of=/tmp/all bs=112k count=1 iflag=direct 2>/dev/null\n\
    pieces=\n\
    for at in 0 1 2 3 4 5 6; do pieces=$pieces,$($b dd if=/tmp/all bs=16k skip=$at count=1 2>/dev/null | $b tr -s 'b1-9'); done\n\
    echo SEES $($b cat /from*) LAST $($b cat /last) DATA $pieces END\n\
    $b poweroff -f";

/// `drive` with an overlay called `top` on overlays called `layers`, all in `dir`.
fn on_layers(drive: Value, dir: &Path, top: &str, layers: &[&str]) -> Value {
    let layers: Vec<_> = layers.iter().map(|layer| dir.join(layer)).collect();
    with(drive, &json!({"overlay": {"path": dir.join(top), "layers": layers}}))
}

on_each_transport! {
    fn a_root_disk_is_mounted_and_written(transport) {
        let output = output_of(&mut boot(transport, WRITE, |image| Ok(root_drive(&image)))?)?;
        ensure!(output.contains("ROOT /dev/root / ext4 rw") && output.contains("WROTE"), "{output}");
        Ok(())
    }

    fn a_read_only_root_disk_cannot_be_written(transport) {
        let script = "echo ROOT $(/bin/busybox grep ' / ' /proc/mounts)\n\
                      /bin/busybox mount -o remount,rw / || echo REFUSED\n\
                      /bin/busybox poweroff -f";
        let read_only = json!({"is_read_only": true});
        let output = output_of(&mut boot(transport, script, |image| Ok(with(root_drive(&image), &read_only)))?)?;
        ensure!(output.contains("ext4 ro") && output.contains("REFUSED"), "{output}");
        Ok(())
    }

    fn a_root_partition_is_found_by_its_uuid_on_any_disk(transport) {
        let root = |image: PathBuf| {
            let disk = partitioned(&image, 0x5ee4_0b1d)?;
            Ok(with(root_drive(&disk), &json!({"partuuid": "5ee40b1d-01"})))
        };
        let output = output_of(&mut boot(transport, WRITE, root)?)?;
        ensure!(output.contains("ROOT /dev/root / ext4 rw") && output.contains("WROTE"), "{output}");
        Ok(())
    }

    fn a_root_disk_can_be_a_block_device_of_the_host(transport) {
        let mut device = None;
        let mut vmm = boot(transport, WRITE, |image| {
            let attached = device.insert(LoopDevice::new(&image)?);
            Ok(root_drive(attached.path()))
        })?;
        let output = output_of(&mut vmm)?;
        ensure!(output.contains("ROOT /dev/root / ext4 rw") && output.contains("WROTE"), "{output}");
        Ok(())
    }

    fn a_root_overlay_takes_all_writes_and_keeps_the_base(transport) {
        let script = "echo kept > /kept; /bin/busybox sync\n\
                      echo HAS $(/bin/busybox cat /kept)\n\
                      /bin/busybox poweroff -f";
        let mut base = None;
        let mut vmm = boot(transport, script, |image| {
            base = Some((image.clone(), fs::read(&image)?));
            let overlay = image.with_file_name("overlay");
            Ok(with(root_drive(&image), &json!({"overlay": {"path": overlay}})))
        })?;
        let output = output_of(&mut vmm)?;
        ensure!(output.contains("HAS kept"), "{output}");
        let (base, before) = base.expect("it was made");
        ensure!(fs::read(&base)? == before, "the base has changed");
        ensure!(fs::metadata(base.with_file_name("overlay"))?.len() > 0, "the overlay is empty");
        Ok(())
    }

    /// A root and a data drive with layers that two guests have written.
    fn a_guest_reads_from_two_layers_and_changes_neither(transport) {
        let keep = tempfile::tempdir()?;
        let dir = keep.path();
        let root = root_disk(dir, GENERATION)?;
        let data = dir.join("data");
        fs::write(&data, vec![b'b'; 4 << 20])?;
        let drives = |name: &str, layers: &[&str]| {
            let named = |kind: &str| -> (String, Vec<String>) {
                (format!("{kind}{name}"), layers.iter().map(|layer| format!("{kind}{layer}")).collect())
            };
            let both = [("root", root_drive(&root)), ("data", drive("data", &data))];
            both.map(|(kind, drive)| {
                let (top, layers) = named(kind);
                on_layers(drive, dir, &top, &layers.iter().map(String::as_str).collect::<Vec<_>>())
            })
        };
        let beneath = ["root.ext4", "data", "root1", "data1", "root2", "data2"];
        let mut before = Vec::new();
        let generations: [(&[&str], &str); 3] = [
            (&[], "SEES 1 LAST 1 DATA ,b,1,1,1,1,1,b END"),
            (&["1"], "SEES 1 2 LAST 2 DATA ,b,1,2,2,2,1,b END"),
            (&["1", "2"], "SEES 1 2 3 LAST 3 DATA ,b,1,2,3,2,1,b END"),
        ];
        for (index, (layers, sees)) in generations.iter().enumerate() {
            let [root, data] = drives(&(index + 1).to_string(), layers);
            // Both engines read the layers.
            let engine = ["Async", "Sync"][index % 2];
            let data = with(data, &json!({"io_engine": engine, "cache_type": "Writeback"}));
            let output = output_of(&mut DiskGuest::new(transport)?.drive(root).drive(data).boot()?)?;
            ensure!(output.contains(sees), "guest {}: no {sees}: {output}", index + 1);
            // The lower layers are unchanged.
            let now = beneath[..2 * (index + 2).min(3)].iter().map(|name| fs::read(dir.join(name)));
            let now = now.collect::<Result<Vec<_>, _>>()?;
            for (name, (old, new)) in beneath.iter().zip(before.iter().zip(&now)) {
                ensure!(old == new, "guest {} has changed {name}", index + 1);
            }
            before = now;
        }
        Ok(())
    }
}

#[test]
fn a_layer_that_does_not_fit_is_refused_by_name() -> Result<()> {
    let keep = tempfile::tempdir()?;
    let dir = keep.path();
    for (name, byte) in [("base", b'1'), ("other", b'2')] {
        fs::write(dir.join(name), vec![byte; 1 << 20])?;
    }
    // What an earlier guest wrote to each makes its layer.
    let on =
        |base: &str, top: &str, layers: &[&str]| on_layers(drive("d", &dir.join(base)), dir, top, layers);
    let write =
        "dd if=/dev/zero of=/dev/vda bs=4k count=1 oflag=direct 2>/dev/null && echo WROTE\npoweroff -f";
    for (top, layers) in [("first", vec![]), ("second", vec!["first"])] {
        let output =
            output_of(&mut DiskGuest::new(Transport::Mmio)?.drive(on("base", top, &layers)).run(write)?)?;
        ensure!(output.contains("WROTE"), "{output}");
    }
    let vmm = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let refused: [(&str, &[&str], &str, &str); 6] = [
        ("base", &["second", "first"], "second", "created on another disk"),
        ("base", &["second"], "second", "created on another disk"),
        ("base", &["first", "first"], "first", "created on another disk"),
        ("other", &["first", "second"], "first", "created on another disk"),
        ("base", &["first", "missing"], "missing", "No such file"),
        ("base", &["first", "other"], "other", "not an overlay file"),
    ];
    for (base, layers, named, why) in refused {
        let answer = api.put("/drives/d", &on(base, "top", layers))?;
        let (fault, path) = (answer.fault(), dir.join(named).display().to_string());
        ensure!(answer.status == 400, "{layers:?} on {base}: {answer:?}");
        for part in ["drive d", &path, why] {
            ensure!(fault.contains(part), "{layers:?} on {base}: no {part:?} in {fault:?}");
        }
        ensure!(!dir.join("top").exists(), "{layers:?} on {base}: an overlay was made");
    }
    api.put("/drives/d", &on("base", "top", &["first", "second"]))?.ok()?;
    // And an overlay is refused on fewer layers than it was created on.
    let answer = api.put("/drives/e", &with(on("base", "second", &[]), &json!({"drive_id": "e"})))?;
    ensure!(answer.status == 400 && answer.fault().contains("second"), "{answer:?}");
    Ok(())
}
