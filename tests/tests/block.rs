//! Disks and entropy in real guests.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::guest::{BOOT, Guest, Kernel, SOON, start, vmm_path};
use vesta_tests::vmm::{Vmm, VmmBuilder};

const MIB: u64 = 1 << 20;

/// A guest that runs `script` from its initial RAM disk and has these drives, and an entropy device.
fn boot(script: &str, drives: impl FnOnce(&Path) -> Value) -> Vmm {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    let guest = Guest::linux(Kernel::Tuned, script, builder.dir()).unwrap();
    let mut config = guest.config();
    config["drives"] = drives(builder.dir());
    config["entropy"] = json!({});
    builder.with_api().with_config(&config).unwrap().spawn().unwrap()
}

/// What the guest said, once it has ended well.
fn said(vmm: &mut Vmm) -> String {
    let (code, said) = vmm.finish(BOOT).unwrap();
    assert_eq!(code, 0, "{said}");
    said
}

/// An empty disk of `mib` MiB.
fn disk(dir: &Path, name: &str, mib: u64) -> PathBuf {
    let path = dir.join(name);
    File::create(&path).unwrap().set_len(mib * MIB).unwrap();
    path
}

fn drive(id: &str, path: &Path) -> Value {
    json!({"drive_id": id, "path_on_host": path, "is_root_device": false})
}

fn bytes_at(path: &Path, offset: u64, len: usize) -> Vec<u8> {
    let mut file = File::open(path).unwrap();
    file.seek(SeekFrom::Start(offset)).unwrap();
    let mut bytes = vec![0; len];
    file.read_exact(&mut bytes).unwrap();
    bytes
}

/// An ext4 file system whose /sbin/init is a shell script.
fn root_disk(dir: &Path, script: &str) -> PathBuf {
    let tree = dir.join("tree");
    for sub in ["bin", "sbin", "dev", "proc", "sys"] {
        fs::create_dir_all(tree.join(sub)).unwrap();
    }
    fs::copy(std::env::var_os("VESTA_BUSYBOX").unwrap(), tree.join("bin/busybox")).unwrap();
    let init = format!("#!/bin/busybox sh\n/bin/busybox mount -t proc none /proc\n{script}\n");
    fs::write(tree.join("sbin/init"), init).unwrap();
    for program in ["bin/busybox", "sbin/init"] {
        let mode = std::os::unix::fs::PermissionsExt::from_mode(0o755);
        fs::set_permissions(tree.join(program), mode).unwrap();
    }
    let image = disk(dir, "root.ext4", 32);
    let made = Command::new("/sbin/mke2fs").args(["-q", "-t", "ext4", "-d"]).arg(&tree).arg(&image).status();
    assert!(made.unwrap().success());
    image
}

/// Boots from a root disk, without an initial RAM disk.
fn boot_from_disk(script: &str, root: impl FnOnce(PathBuf) -> Value) -> Vmm {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    let image = root_disk(builder.dir(), script);
    let guest = Guest::bare(&Kernel::Tuned.image()).boot_args("console=ttyS0 quiet panic=-1 reboot=k");
    let mut config = guest.config();
    config["drives"] = json!([root(image)]);
    builder.with_api().with_config(&config).unwrap().spawn().unwrap()
}

#[test]
fn a_root_disk_is_mounted_and_written() {
    let script = "echo ROOT $(/bin/busybox grep ' / ' /proc/mounts)\n/bin/busybox touch /written && echo WROTE\n/bin/busybox poweroff -f";
    let mut vmm = boot_from_disk(
        script,
        |path| json!({"drive_id": "rootfs", "path_on_host": path, "is_root_device": true}),
    );
    let said = said(&mut vmm);
    assert!(said.contains("ROOT /dev/root / ext4 rw") && said.contains("WROTE"), "{said}");
}

#[test]
fn a_read_only_root_disk_cannot_be_written() {
    let script = "echo ROOT $(/bin/busybox grep ' / ' /proc/mounts)\n/bin/busybox mount -o remount,rw / || echo REFUSED\n/bin/busybox poweroff -f";
    let mut vmm = boot_from_disk(
        script,
        |path| json!({"drive_id": "rootfs", "path_on_host": path, "is_root_device": true, "is_read_only": true}),
    );
    let said = said(&mut vmm);
    assert!(said.contains("ext4 ro") && said.contains("REFUSED"), "{said}");
}

#[test]
fn an_overlay_takes_the_writes_and_the_base_stays_as_it_is() {
    let script = "/bin/busybox sh -c 'echo kept > /kept; /bin/busybox sync'\necho HAS $(/bin/busybox cat /kept)\n/bin/busybox poweroff -f";
    let mut before = Vec::new();
    let mut base = PathBuf::new();
    let mut vmm = boot_from_disk(script, |path| {
        before = fs::read(&path).unwrap();
        base.clone_from(&path);
        let overlay = path.with_file_name("overlay");
        json!({"drive_id": "rootfs", "path_on_host": path, "is_root_device": true, "overlay": {"path": overlay}})
    });
    let said = said(&mut vmm);
    assert!(said.contains("HAS kept"), "{said}");
    assert!(fs::read(&base).unwrap() == before, "the base has changed");
    assert!(fs::metadata(base.with_file_name("overlay")).unwrap().len() > 0);
}

#[test]
fn what_is_flushed_to_an_overlay_outlives_a_killed_monitor() {
    let script = "dd if=/dev/zero bs=4k count=64 2>/dev/null | tr '\\0' x | dd of=/dev/vda bs=4k conv=fsync 2>/dev/null\necho FLUSHED\nwhile :; do sleep 1; done";
    let keep = tempfile::tempdir().unwrap();
    let base = disk(keep.path(), "base", 16);
    let overlay = keep.path().join("overlay");
    let with = |script: &str| {
        boot(script, |_| {
            json!([{"drive_id": "d", "path_on_host": base, "is_root_device": false, "cache_type": "Writeback",
                    "overlay": {"path": overlay}}])
        })
    };
    let vmm = with(script);
    vmm.wait_for_output("FLUSHED", BOOT).unwrap();
    // A kill without warning.
    drop(vmm);
    let mut again =
        with("echo COUNT $(dd if=/dev/vda bs=4k count=64 2>/dev/null | tr -d -c x | wc -c)\npoweroff -f");
    let said = said(&mut again);
    assert!(said.contains("COUNT 262144"), "{said}");
}

#[test]
fn both_engines_read_and_write() {
    let script = "for d in vda vdb; do echo $d-was-here | dd of=/dev/$d bs=512 seek=100 conv=sync,fsync 2>/dev/null; done\npoweroff -f";
    let mut paths = Vec::new();
    let keep = tempfile::tempdir().unwrap();
    let mut vmm = boot(script, |_| {
        let drives = ["Sync", "Async"].map(|engine| {
            let path = disk(keep.path(), engine, 16);
            paths.push(path.clone());
            json!({"drive_id": engine, "path_on_host": path, "is_root_device": false, "io_engine": engine})
        });
        json!(drives)
    });
    said(&mut vmm);
    for (path, name) in paths.iter().zip(["vda", "vdb"]) {
        assert!(bytes_at(path, 51200, 32).starts_with(format!("{name}-was-here").as_bytes()), "{name}");
    }
}

#[test]
fn sixteen_disks_at_once_are_told_apart_by_their_serial_numbers() {
    let script = "for d in /sys/block/vd?; do echo DISK $(cat $d/serial) $(cat $d/size); done\npoweroff -f";
    let mut vmm = boot(script, |dir| {
        (0..16).map(|i| drive(&format!("disk{i}"), &disk(dir, &format!("d{i}"), i + 1))).collect()
    });
    let said = said(&mut vmm);
    for i in 0..16 {
        assert!(said.contains(&format!("DISK disk{i} {}", (i + 1) * 2048)), "disk{i}: {said}");
    }
}

#[test]
fn a_patched_path_is_another_disk_at_once() {
    let script = "echo SIZE $(cat /sys/block/vda/size)\necho READY\nuntil [ $(cat /sys/block/vda/size) = 8192 ]; do sleep 0.05; done\necho NOW $(head -c 5 /dev/vda)\npoweroff -f";
    let mut vmm = boot(script, |dir| json!([drive("pool", &disk(dir, "empty", 0))]));
    vmm.wait_for_output("READY", BOOT).unwrap();
    let second = disk(vmm.dir(), "second", 4);
    File::options().write(true).open(&second).unwrap().write_all(b"HELLO").unwrap();
    let mut api: ApiClient = vmm.ready_client(SOON).unwrap();
    let missing =
        api.patch("/drives/pool", &json!({"drive_id": "pool", "path_on_host": "/nowhere"})).unwrap();
    assert_eq!(missing.status, 400);
    assert!(missing.fault().contains("/nowhere"), "{missing:?}");
    api.patch("/drives/pool", &json!({"drive_id": "pool", "path_on_host": second})).unwrap().ok().unwrap();
    let said = said(&mut vmm);
    assert!(said.contains("SIZE 0") && said.contains("NOW HELLO"), "{said}");
}

#[test]
fn a_driver_can_be_unbound_and_bound_again() {
    let script = "echo one | dd of=/dev/vda bs=512 conv=sync,fsync 2>/dev/null\n\
                  dev=$(basename $(readlink /sys/block/vda/device))\n\
                  for i in 1 2 3; do echo $dev > /sys/bus/virtio/drivers/virtio_blk/unbind; echo $dev > /sys/bus/virtio/drivers/virtio_blk/bind; done\n\
                  echo AGAIN $(head -c 3 /dev/vda)\npoweroff -f";
    let mut vmm = boot(script, |dir| json!([drive("d", &disk(dir, "d", 4))]));
    let said = said(&mut vmm);
    assert!(said.contains("AGAIN one"), "{said}");
}

#[test]
fn a_pause_in_the_middle_of_writes_loses_none() {
    let script = "i=0; while [ $i -lt 300 ]; do echo $i | dd of=/dev/vda bs=512 seek=$i conv=sync,notrunc oflag=direct 2>/dev/null; i=$((i+1)); [ $i = 20 ] && echo WRITING; done\n\
                  i=0; bad=0; while [ $i -lt 300 ]; do [ \"$(dd if=/dev/vda bs=512 skip=$i count=1 2>/dev/null | head -n 1)\" = $i ] || bad=$((bad+1)); i=$((i+1)); done; echo BAD $bad\npoweroff -f";
    let mut vmm = boot(script, |dir| json!([drive("d", &disk(dir, "d", 4))]));
    vmm.wait_for_output("WRITING", BOOT).unwrap();
    let mut api = vmm.ready_client(SOON).unwrap();
    for _ in 0..20 {
        api.patch("/vm", &json!({"state": "Paused"})).unwrap().ok().unwrap();
        api.patch("/vm", &json!({"state": "Resumed"})).unwrap().ok().unwrap();
    }
    let said = said(&mut vmm);
    assert!(said.contains("BAD 0"), "{said}");
}

#[test]
fn the_guest_draws_random_bytes_from_its_host() {
    let script = "echo FROM $(cat /sys/class/misc/hw_random/rng_current)\n\
                  for i in 1 2; do echo BYTES $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | hexdump -v -e '/1 \"%02x\"'); done\npoweroff -f";
    let mut vmm = boot(script, |_| json!([]));
    let said = said(&mut vmm);
    assert!(said.contains("FROM virtio_rng"), "{said}");
    let bytes: Vec<_> = said.lines().filter_map(|line| line.split("BYTES ").nth(1)).collect();
    assert!(bytes.len() == 2 && bytes[0].len() == 32 && bytes[0] != bytes[1], "{said}");
}

#[test]
fn devices_are_found_without_acpi() {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    let script = "echo SIZE $(cat /sys/block/vda/size)\nreboot -f";
    let guest = Guest::linux(Kernel::Tuned, script, builder.dir())
        .unwrap()
        .boot_args("console=ttyS0 quiet panic=-1 reboot=k acpi=off");
    let mut config = guest.config();
    config["drives"] = json!([drive("d", &disk(builder.dir(), "d", 4))]);
    let mut vmm = builder.arg("--no-api").with_config(&config).unwrap().spawn().unwrap();
    let said = said(&mut vmm);
    assert!(said.contains("SIZE 8192"), "{said}");
}

#[test]
fn drives_are_set_over_the_api_and_bad_ones_change_nothing() {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    let guest =
        Guest::linux(Kernel::Tuned, "echo SIZE $(cat /sys/block/vda/size)\npoweroff -f", builder.dir())
            .unwrap();
    let mut vmm = builder.with_api().spawn().unwrap();
    let mut api = vmm.ready_client(SOON).unwrap();
    guest.put(&mut api).unwrap();
    let good = disk(vmm.dir(), "good", 4);
    let mut body = drive("d", &good);
    body["rate_limiter"] = json!({});
    api.put("/drives/d", &body).unwrap().ok().unwrap();
    for (path, body, named) in [
        ("/drives/d", drive("d", Path::new("/nowhere")), "/nowhere"),
        ("/drives/other", drive("d", &good), "other"),
        (
            "/drives/d",
            json!({"drive_id": "d", "is_root_device": false, "path_on_host": good, "color": 1}),
            "color",
        ),
        ("/drives/d", json!({"drive_id": "d", "is_root_device": false, "socket": "/s"}), "vhost-user"),
    ] {
        let refused = api.put(path, &body).unwrap();
        assert_eq!(refused.status, 400, "{refused:?}");
        assert!(refused.fault().contains(named), "{named}: {refused:?}");
    }
    assert_eq!(api.get("/vm/config").unwrap().json().unwrap()["drives"][0]["path_on_host"], json!(good));
    start(&mut api).unwrap();
    assert!(said(&mut vmm).contains("SIZE 8192"));
}
