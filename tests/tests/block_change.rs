//! Drives that are set, patched and emptied: the API, new disks under a running guest, read-only
//! drives and discards.

use std::fs::{self, File};
use std::io::Write as _;
use std::path::Path;

use anyhow::{Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::disks::{DiskGuest, MIB, bytes_at, disk, drive, output_of, space_of, with};
use vesta_tests::guest::{BOOT_TIMEOUT, Guest, Kernel, TIMEOUT, Transport, start, vmm_path};
use vesta_tests::host_devices::{LoopDevice, NullDevice, SmallFs};
use vesta_tests::on_each_transport;
use vesta_tests::vmm::VmmBuilder;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

/// Patches a drive to this path.
fn change(api: &mut ApiClient, id: &str, path: &Path) -> Result<()> {
    api.patch(&format!("/drives/{id}"), &json!({"drive_id": id, "path_on_host": path}))?.ok().map(drop)
}

on_each_transport! {
    /// A drive without a size gets a real disk, then another disk, then one that has grown.
    fn a_patched_path_takes_effect_at_once(transport) {
        let script = "\
            is() { until [ $(cat /sys/block/vda/size) = $1 ]; do usleep 10000; done; }\n\
            is 0; echo EMPTY\n\
            is 8192; echo FIRST $(head -c 5 /dev/vda)\n\
            is 2048; echo SECOND $(head -c 6 /dev/vda)\n\
            is 16384; dd if=/dev/zero of=/dev/vda bs=512 seek=16383 count=1 oflag=direct 2>/dev/null && echo GROWN\n\
            is 4096; echo OVERLAID $(head -c 4 /dev/vda)\n\
            echo NEW | dd of=/dev/vda bs=512 conv=sync oflag=direct 2>/dev/null; echo HOLDS $(head -c 3 /dev/vda)\n\
            until [ $(cat /sys/block/vdb/size) = 8192 ]; do usleep 10000; done; echo STILL $(head -c 3 /dev/vda)\n\
            echo LATER $(head -c 5 /dev/vdb)\n\
            poweroff -f";
        let guest = DiskGuest::new(transport)?;
        let empty = disk(guest.dir(), "empty", 0)?;
        let mut vmm = guest.drive(drive("pool", &empty)).drive(drive("other", &empty)).run(script)?;
        vmm.wait_for_output("EMPTY", BOOT_TIMEOUT)?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        let missing = api.patch("/drives/pool", &json!({"drive_id": "pool", "path_on_host": "/nowhere"}))?;
        ensure!(missing.status == 400 && missing.fault().contains("/nowhere"), "{missing:?}");
        let (first, second) = (disk(vmm.dir(), "first", 4)?, disk(vmm.dir(), "second", 1)?);
        for (path, text) in [(&first, "HELLO"), (&second, "WORLDS")] {
            File::options().write(true).open(path)?.write_all(text.as_bytes())?;
        }
        change(&mut api, "pool", &first)?;
        vmm.wait_for_output("FIRST HELLO", BOOT_TIMEOUT)?;
        change(&mut api, "pool", &second)?;
        vmm.wait_for_output("SECOND WORLDS", BOOT_TIMEOUT)?;
        // The same path again reports a new size.
        File::options().write(true).open(&second)?.set_len(8 * MIB)?;
        change(&mut api, "pool", &second)?;
        vmm.wait_for_output("GROWN", BOOT_TIMEOUT)?;
        // A disk with an overlay replaces one without.
        let base = vmm.dir().join("base");
        fs::write(&base, b"BASE".repeat(512 << 10))?;
        let overlay = vmm.dir().join("overlay");
        let overlaid = json!({"drive_id": "pool", "path_on_host": base, "overlay": {"path": overlay}});
        api.patch("/drives/pool", &overlaid)?.ok()?;
        vmm.wait_for_output("OVERLAID BASE", BOOT_TIMEOUT)?;
        vmm.wait_for_output("HOLDS NEW", BOOT_TIMEOUT)?;
        // The same disk again is no change.
        api.patch("/drives/pool", &overlaid)?.ok()?;
        change(&mut api, "pool", &base)?;
        // The disk is in use: another drive cannot use it, and keeps its own.
        let other = json!({"drive_id": "other", "path_on_host": base, "overlay": {"path": overlay}});
        let refused = api.patch("/drives/other", &other)?;
        ensure!(refused.status == 400 && refused.fault().contains("overlay"), "{refused:?}");
        ensure!(fs::read(&base)? == b"BASE".repeat(512 << 10), "the base has changed");
        change(&mut api, "other", &first)?;
        let output = output_of(&mut vmm)?;
        ensure!(output.contains("STILL NEW") && output.contains("LATER HELLO"), "{output}");
        Ok(())
    }

    fn a_read_only_drive_stays_read_only_with_another_disk(transport) {
        let script = "\
            echo RO $(cat /sys/block/vda/ro)\n\
            dd if=/dev/zero of=/dev/vda bs=512 count=1 oflag=direct 2>/dev/null || echo REFUSED\n\
            blkdiscard /dev/vda 2>/dev/null || echo NOT DISCARDED\n\
            until [ $(cat /sys/block/vda/size) = 2048 ]; do usleep 10000; done\n\
            echo RO AGAIN $(cat /sys/block/vda/ro)\n\
            dd if=/dev/zero of=/dev/vda bs=512 count=1 oflag=direct 2>/dev/null || echo REFUSED AGAIN\n\
            poweroff -f";
        let guest = DiskGuest::new(transport)?;
        let (first, second) = (guest.dir().join("first"), guest.dir().join("second"));
        fs::write(&first, vec![b'1'; 4 << 20])?;
        fs::write(&second, vec![b'2'; 1 << 20])?;
        let mut vmm = guest.drive(with(drive("ro", &first), &json!({"is_read_only": true}))).run(script)?;
        vmm.wait_for_output("NOT DISCARDED", BOOT_TIMEOUT)?;
        change(&mut vmm.ready_client(TIMEOUT)?, "ro", &second)?;
        let unchanged = [(first, b'1'), (second, b'2')];
        let output = output_of(&mut vmm)?;
        for mark in ["RO 1", "REFUSED", "NOT DISCARDED", "RO AGAIN 1", "REFUSED AGAIN"] {
            ensure!(output.contains(mark), "no {mark}: {output}");
        }
        for (path, byte) in unchanged {
            ensure!(fs::read(&path)?.iter().all(|&found| found == byte), "{} has changed", path.display());
        }
        Ok(())
    }

    /// Raw files and overlays. Discarded sectors of an overlay read as zeros, not as the base.
    fn discarded_sectors_free_host_space_and_read_as_zeros(transport) {
        let fill = "dd if=/dev/zero bs=64k count=64 2>/dev/null | tr '\\0' x | dd of=/dev/vd$d bs=64k oflag=direct iflag=fullblock 2>/dev/null\n\
                    echo FULL vd$d $(dd if=/dev/vd$d bs=64k iflag=direct 2>/dev/null | tr -d -c x | wc -c)";
        let script = format!("\
            for d in a b c d e; do\n{fill}\ndone\n\
            echo LIMITS $(cat /sys/block/vda/queue/discard_max_bytes) $(cat /sys/block/vda/queue/write_zeroes_max_bytes)\n\
            blkdiscard /dev/vda && blkdiscard /dev/vdd\n\
            disk-tool zero vdb 0 4194304 keep\n\
            disk-tool zero vdc 0 4194304 free\n\
            disk-tool zero vde 1048576 1048576 free\n\
            for d in a b c d e; do echo ZEROS vd$d $(dd if=/dev/vd$d bs=64k iflag=direct 2>/dev/null | tr -d -c '\\0' | wc -c); done\n\
            poweroff -f");
        let mut guest = DiskGuest::new(transport)?.tool(TOOL);
        let keep = tempfile::tempdir()?;
        for (id, overlay) in [("a", false), ("b", false), ("c", false), ("d", true), ("e", true)] {
            let path = disk(keep.path(), id, 4)?;
            let mut fields = json!({});
            if overlay {
                fs::write(&path, vec![b'b'; 4 << 20])?;
                fields = json!({"overlay": {"path": keep.path().join(format!("{id}.overlay"))}});
            }
            guest = guest.drive(with(drive(id, &path), &fields));
        }
        let output = output_of(&mut guest.run(&script)?)?;
        for (dev, zeros) in [("vda", 4), ("vdb", 4), ("vdc", 4), ("vdd", 4), ("vde", 1)] {
            ensure!(output.contains(&format!("FULL {dev} 4194304")), "{output}");
            ensure!(output.contains(&format!("ZEROS {dev} {}", zeros * MIB)), "{output}");
        }
        ensure!(!output.contains("LIMITS 0") && !output.contains(" 0\r"), "{output}");
        let space = |name| space_of(&keep.path().join(name));
        ensure!(space("a")? < MIB, "a discarded file takes {} bytes", space("a")?);
        ensure!(space("b")? >= 4 * MIB, "a zeroed file that was to keep its space takes {} bytes", space("b")?);
        ensure!(space("c")? < MIB, "a zeroed file takes {} bytes", space("c")?);
        ensure!(space("d.overlay")? < MIB, "a discarded overlay takes {} bytes", space("d.overlay")?);
        let part = space("e.overlay")?;
        ensure!((3 * MIB..4 * MIB).contains(&part), "three quarters of an overlay take {part} bytes");
        ensure!(bytes_at(&keep.path().join("a"), 0, 4 << 20)?.iter().all(|&byte| byte == 0), "it is not zeros");
        Ok(())
    }

    fn drives_are_set_over_the_api_and_invalid_ones_refused(transport) {
        let builder = transport.args().iter().fold(VmmBuilder::new(&vmm_path())?, VmmBuilder::arg);
        let script = "echo SIZE $(cat /sys/block/vda/size)\npoweroff -f";
        let guest = Guest::linux(Kernel::Tuned, script, builder.dir())?;
        let mut vmm = builder.with_api().spawn()?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        guest.put(&mut api)?;
        let good = disk(vmm.dir(), "good", 4)?;
        api.put("/drives/d", &with(drive("d", &good), &json!({"rate_limiter": {}})))?.ok()?;
        let refused: [(&str, Value, &str); 4] = [
            ("/drives/d", drive("d", Path::new("/nowhere")), "/nowhere"),
            ("/drives/other", drive("d", &good), "other"),
            ("/drives/d", with(drive("d", &good), &json!({"color": 1})), "color"),
            ("/drives/d", json!({"drive_id": "d", "is_root_device": false, "socket": "/s"}), "vhost-user"),
        ];
        for (path, body, named) in refused {
            let answer = api.put(path, &body)?;
            ensure!(answer.status == 400 && answer.fault().contains(named), "{named}: {answer:?}");
        }
        let config = api.get("/vm/config")?.json()?;
        ensure!(config["drives"][0]["path_on_host"] == json!(good), "{config}");
        start(&mut api)?;
        let output = output_of(&mut vmm)?;
        ensure!(output.contains("SIZE 8192"), "{output}");
        Ok(())
    }
}

#[test]
fn devices_are_found_without_acpi() -> Result<()> {
    let guest = DiskGuest::new(Transport::Mmio)?.more_boot_args("acpi=off");
    let path = disk(guest.dir(), "d", 4)?;
    let mut vmm = guest.drive(drive("d", &path)).run("echo SIZE $(cat /sys/block/vda/size)\nreboot -f")?;
    let output = output_of(&mut vmm)?;
    ensure!(output.contains("SIZE 8192"), "{output}");
    Ok(())
}

/// Case 13: block devices of the host without discard, loop devices, and an overlay on tmpfs.
/// Zeroed sectors read as zeros, a discard that the host does not support is no error, and other
/// sectors do not change.
#[test]
fn zeroed_sectors_read_as_zeros_on_any_host_storage() -> Result<()> {
    let guest = DiskGuest::new(Transport::Mmio)?.tool(TOOL);
    let null = NullDevice::new(8, 0)?;
    let attached = LoopDevice::new(&disk(guest.dir(), "loop", 8)?)?;
    let fs = SmallFs::new(32 * MIB)?;
    let in_memory = disk(&fs.path(), "file", 8)?;
    let overlay = json!({"overlay": {"path": fs.path().join("overlay")}});
    let drives = [
        drive("null", null.path()),
        drive("loop", attached.path()),
        drive("memory", &in_memory),
        with(drive("overlaid", &disk(guest.dir(), "base", 8)?), &overlay),
    ];
    let mut guest = guest;
    for (index, drive) in drives.into_iter().enumerate() {
        let engine = ["Async", "Sync"][index % 2];
        guest = guest.drive(with(drive, &json!({"io_engine": engine, "cache_type": "Writeback"})));
    }
    // Each MiB in turn: zeroed and allocated, untouched, zeroed and freed, untouched, discarded.
    // The rest has a file system.
    let script = "\
        x() { dd if=/dev/$1 bs=1M skip=$2 count=1 iflag=direct 2>/dev/null | tr -d -c \"$3\" | wc -c; }\n\
        for d in vda vdb vdc vdd; do\n\
          dd if=/dev/zero bs=64k count=80 2>/dev/null | tr '\\0' x | dd of=/dev/$d bs=64k oflag=direct iflag=fullblock 2>/dev/null\n\
          disk-tool zero $d 0 1048576 keep\n\
          disk-tool zero $d 2097152 1048576 free\n\
          blkdiscard -o 4194304 -l 1048576 /dev/$d && echo DISCARDED $d\n\
          echo BYTES $d $(x $d 0 '\\0') $(x $d 1 x) $(x $d 2 '\\0') $(x $d 3 x) $(( $(x $d 4 x) + $(x $d 4 '\\0') ))\n\
          mke2fs -F /dev/$d >/dev/null 2>&1; mkdir -p /m; mount -t ext2 /dev/$d /m || mount -t ext4 /dev/$d /m\n\
          echo text > /m/file; sync; fstrim /m; echo TRIM $d $?; umount /m\n\
          mount -t ext2 /dev/$d /m || mount -t ext4 /dev/$d /m; echo FOUND $d $(cat /m/file); umount /m\n\
        done\n\
        poweroff -f";
    let output = output_of(&mut guest.run(script)?)?;
    for dev in ["vda", "vdb", "vdc", "vdd"] {
        for mark in ["ZEROED ", "DISCARDED ", "FOUND "] {
            ensure!(output.contains(&format!("{mark}{dev}")), "no {mark}{dev}: {output}");
        }
        let bytes = [MIB; 5].map(|bytes| bytes.to_string()).join(" ");
        ensure!(output.contains(&format!("BYTES {dev} {bytes}")), "{dev}: {output}");
        ensure!(output.contains(&format!("FOUND {dev} text")), "{dev}: {output}");
    }
    ensure!(!output.contains("FAILED") && !output.contains("I/O error"), "{output}");
    Ok(())
}
