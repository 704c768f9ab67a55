//! Entropy devices of real guests.

use std::collections::BTreeSet;

use anyhow::{Context, ensure};
use serde_json::json;
use vesta_tests::disks::{DiskGuest, output_of};
use vesta_tests::on_each_transport;

on_each_transport! {
    fn the_guest_reads_random_bytes(transport) {
        let script = "\
            echo FROM $(cat /sys/class/misc/hw_random/rng_current)\n\
            for i in 1 2; do echo BYTES $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | hexdump -v -e '/1 \"%02x\"'); done\n\
            poweroff -f";
        let output = output_of(&mut DiskGuest::new(transport)?.entropy(json!({})).run(script)?)?;
        ensure!(output.contains("FROM virtio_rng"), "{output}");
        let bytes: Vec<_> = output.lines().filter_map(|line| line.split("BYTES ").nth(1)).collect();
        ensure!(bytes.len() == 2 && bytes[0].len() == 32 && bytes[0] != bytes[1], "{output}");
        Ok(())
    }

    /// The driver is unbound during a read and bound again to the same device.
    fn the_guest_reads_random_bytes_after_a_driver_rebind(transport) {
        let script = "\
            cd /sys/bus/virtio/drivers/virtio_rng\n\
            id=$(basename $(ls -d virtio*))\n\
            for i in 1 2 3; do\n\
              cat /dev/hwrng > /dev/null 2>&1 & reader=$!\n\
              echo $id > unbind\n\
              wait $reader\n\
              echo GONE $(cat /sys/class/misc/hw_random/rng_current)\n\
              echo $id > bind\n\
              echo BYTES $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | hexdump -v -e '/1 \"%02x\"')\n\
            done\n\
            poweroff -f";
        let output = output_of(&mut DiskGuest::new(transport)?.entropy(json!({})).run(script)?)?;
        ensure!(output.matches("GONE none").count() == 3, "{output}");
        let bytes: BTreeSet<_> = output.lines().filter_map(|line| line.split("BYTES ").nth(1)).collect();
        ensure!(bytes.len() == 3 && bytes.iter().all(|bytes| bytes.len() == 32), "{output}");
        Ok(())
    }

    /// 4 KiB are available at once, 12 more at 4 KiB per second. The guest's kernel reads some
    /// itself meanwhile.
    fn a_rate_limit_delays_random_bytes(transport) {
        let limit = json!({"rate_limiter": {"bandwidth": {"size": 4096, "refill_time": 1000}}});
        let script = "\
            read before rest < /proc/uptime\n\
            dd if=/dev/hwrng of=/dev/null bs=512 count=32 iflag=fullblock 2>/dev/null\n\
            read after rest < /proc/uptime\n\
            echo TOOK $before $after\n\
            poweroff -f";
        let output = output_of(&mut DiskGuest::new(transport)?.entropy(limit).run(script)?)?;
        let line = output.lines().find_map(|line| line.split_once("TOOK ")).context("no TOOK")?.1;
        let (before, after) = line.trim().split_once(' ').context("the line has two numbers")?;
        let took = after.parse::<f64>()? - before.parse::<f64>()?;
        // The clock has steps of 10 ms.
        ensure!((2.97..30.0).contains(&took), "it took {took} s");
        Ok(())
    }
}
