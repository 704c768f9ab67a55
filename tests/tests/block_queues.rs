//! Many queues, many I/O threads, many disks.

use std::fs::File;
use std::time::Duration;

use anyhow::ensure;
use serde_json::json;
use vesta_tests::disks::{DiskGuest, MIB, check_file, disk, drive, flushed, output_of, with};
use vesta_tests::guest::BOOT_TIMEOUT;
use vesta_tests::on_each_transport;

const TOOL: &str = env!("CARGO_BIN_EXE_disk-tool");

on_each_transport! {
    fn each_vcpu_has_its_own_queue_and_several_threads_serve_them(transport) {
        let mut guest = DiskGuest::new(transport)?.tool(TOOL).vcpus(4);
        let mut paths = Vec::new();
        for (engine, threads) in [("Async", 4), ("Async", 2), ("Sync", 3)] {
            let id = format!("{engine}{threads}");
            let path = disk(guest.dir(), &id, 8)?;
            let fields = json!({"num_queues": 4, "io_threads": threads, "io_engine": engine, "cache_type": "Writeback"});
            guest = guest.drive(with(drive(&id, &path), &fields));
            paths.push(path);
        }
        let script = "\
            for d in a b c; do echo QUEUES vd$d $(for q in /sys/block/vd$d/mq/*; do cat $q/cpu_list; done); done\n\
            # From each vCPU through its own queue.\n\
            for cpu in 0 1 2 3; do\n\
              taskset -c $cpu dd if=/dev/vda of=/dev/null bs=4k count=100 skip=$((cpu * 200)) iflag=direct 2>/dev/null && echo READ $cpu\n\
            done\n\
            for d in a b c; do disk-tool run vd$d 17 4 150 & done; wait\n\
            echo DONE\n\
            while :; do sleep 1; done";
        let vmm = guest.run(script)?;
        vmm.wait_for_output("DONE", BOOT_TIMEOUT)?;
        let output = vmm.stdout.text();
        for dev in ["vda", "vdb", "vdc"] {
            ensure!(output.contains(&format!("QUEUES {dev} 0 1 2 3")), "{output}");
            ensure!(output.contains(&format!("VERIFIED {dev}")), "{output}");
        }
        for cpu in 0..4 {
            ensure!(output.contains(&format!("READ {cpu}")), "{output}");
        }
        for path in &paths {
            check_file(path, 17, &[150; 4])?;
        }
        // Drives in configuration files have their own threads: 4, 2 and 3, after the shared one.
        for thread in 1..=9 {
            let time = vmm.thread_time(&format!("io {thread}"))?;
            ensure!(time.is_some_and(|time| time > Duration::ZERO), "io {thread} has worked {time:?}");
        }
        ensure!(vmm.thread_time("io 10")?.is_none(), "there is an I/O thread too many");
        Ok(())
    }

    /// All report that they work before the first of them stops.
    fn sixteen_disks_with_serial_numbers_work_at_once(transport) {
        let mut guest = DiskGuest::new(transport)?.tool(TOOL).vcpus(2);
        let mut paths = Vec::new();
        for i in 0..16 {
            let path = guest.dir().join(format!("d{i}"));
            File::create(&path)?.set_len(MIB + i * 4096)?;
            let engine = ["Sync", "Async"][i as usize % 2];
            let fields = json!({"io_engine": engine, "cache_type": "Writeback"});
            guest = guest.drive(with(drive(&format!("disk{i}"), &path), &fields));
            paths.push(path);
        }
        let script = "\
            for d in /sys/block/vd?; do echo DISK $(cat $d/serial) $(cat $d/size) ${d##*/}; done\n\
            all=$(cd /sys/block; echo vd?)\n\
            for d in $all; do disk-tool until /stop $d 17 1 > /log$d & done\n\
            for d in $all; do until grep -q 'FLUSHED\\|FAILED\\|WRONG' /log$d; do usleep 10000; done; done\n\
            touch /stop; wait\n\
            cat /logvd?\n\
            poweroff -f";
        let mut vmm = guest.run(script)?;
        let output = output_of(&mut vmm)?;
        for (i, (letter, path)) in ('a'..='p').zip(&paths).enumerate() {
            let dev = format!("vd{letter}");
            let disk = format!("DISK disk{i} {} {dev}", 2048 + 8 * i);
            ensure!(output.contains(&disk), "no {disk}: {output}");
            ensure!(output.contains(&format!("VERIFIED {dev}")), "{dev}: {output}");
            let counts = flushed(&output, &dev, 1);
            ensure!(counts[0] > 0, "nothing was flushed to {dev}: {output}");
            check_file(path, 17, &counts)?;
        }
        Ok(())
    }
}
