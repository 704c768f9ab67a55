//! Entropy in real guests.

use anyhow::ensure;
use serde_json::json;
use vesta_tests::disks::{DiskGuest, said};
use vesta_tests::on_each_transport;

on_each_transport! {
    fn the_guest_draws_random_bytes_from_its_host(transport) {
        let script = "\
            echo FROM $(cat /sys/class/misc/hw_random/rng_current)\n\
            for i in 1 2; do echo BYTES $(dd if=/dev/hwrng bs=16 count=1 2>/dev/null | hexdump -v -e '/1 \"%02x\"'); done\n\
            poweroff -f";
        let said = said(&mut DiskGuest::new(transport)?.entropy(json!({})).run(script)?)?;
        ensure!(said.contains("FROM virtio_rng"), "{said}");
        let bytes: Vec<_> = said.lines().filter_map(|line| line.split("BYTES ").nth(1)).collect();
        ensure!(bytes.len() == 2 && bytes[0].len() == 32 && bytes[0] != bytes[1], "{said}");
        Ok(())
    }
}
