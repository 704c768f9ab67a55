//! Forks of Linux guests: children and parent go on from the same moment, each with a past and disks of its own.

use std::collections::BTreeSet;

use anyhow::ensure;
use serde_json::json;
use vesta_tests::disks::{DiskGuest, disk, drive, said, with};
use vesta_tests::guest::{BOOT, SOON};
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::said::{wait_for_text, word};

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

on_each_transport! {
    /// Raw disks and overlays, through both engines, forked twice in the middle of writes that are read back.
    fn each_side_of_a_fork_finds_on_its_disks_what_it_wrote_itself(transport) {
        let mut guest = DiskGuest::new(transport)?.tool(TOOL).vcpus(2).entropy(json!({}));
        let home = tempfile::tempdir()?;
        for (name, fields) in [
            ("raw", json!({"io_engine": "Sync", "cache_type": "Writeback"})),
            ("over", json!({"io_engine": "Async", "overlay": {"path": home.path().join("first-overlay")}})),
        ] {
            let path = disk(home.path(), name, 4)?;
            guest = guest.drive(with(drive(name, &path), &fields));
        }
        let script = "disk-tool run vda 7 2 128 & disk-tool run vdb 8 2 128 & wait\n\
            echo RANDOM $(head -c 16 /dev/urandom | hexdump -v -e '/1 \"%02x\"')\n\
            echo RESEEDED $(dmesg | grep -c 'crng reseeded due to virtual machine fork')\n\
            echo LAST\npoweroff -f";
        let mut vmm = guest.run(script)?;
        vmm.wait_for_output("FLUSHED", BOOT)?;
        let mut api = vmm.ready_client(SOON)?;

        let (mut children, mut alive) = (Vec::new(), Vec::new());
        for generation in 0..2 {
            let bodies = (0..2).map(|n| {
                let id = format!("g{generation}c{n}");
                let serial = home.path().join(&id);
                children.push(serial.clone());
                json!({"id": id, "serial": {"serial_out_path": serial}})
            });
            let bodies: Vec<_> = bodies.collect();
            let reply = api.put("/fork", &json!({"children": bodies}))?.ok()?.json()?;
            alive.push(Orphans::of_fork(&reply)?);
        }
        let parent = said(&mut vmm)?;
        ensure!(parent.contains("VERIFIED vda") && parent.contains("VERIFIED vdb"), "{parent}");
        ensure!(word(&parent, "RESEEDED")? == "0", "the parent is the same guest as before: {parent}");
        let mut random = BTreeSet::from([word(&parent, "RANDOM")?.to_owned()]);
        for child in &children {
            let said = wait_for_text(child, "LAST", BOOT)?;
            ensure!(said.contains("VERIFIED vda") && said.contains("VERIFIED vdb"), "{said}");
            ensure!(!said.contains("WRONG") && !said.contains("FAILED"), "{said}");
            ensure!(word(&said, "RESEEDED")? != "0", "{said}");
            random.insert(word(&said, "RANDOM")?.to_owned());
        }
        ensure!(random.len() == 5, "random numbers are repeated: {random:?}");
        alive.into_iter().try_for_each(|children| children.wait(SOON))?;
        Ok(())
    }
}
