//! Shows what a microVM is and how it is configured.
//!
//! ```console
//! $ cargo run -p vesta-client --example describe -- vm.sock
//! vm-1: Running, Firecracker 1.17.0's API, vesta-vmm 0.1.0
//! 2 vCPU, 256 MiB
//! drive rootfs: /images/rootfs.ext4
//! ```

use std::error::Error;

use vesta_client::Client;

fn main() -> Result<(), Box<dyn Error>> {
    let socket = std::env::args_os().nth(1).ok_or("usage: describe SOCKET")?;
    let mut client = Client::new(socket);
    let info = client.instance()?;
    let api = client.version()?;
    println!(
        "{}: {:?}, Firecracker {api}'s API, {} {}",
        info.id, info.state, info.app_name, info.vmm_version
    );
    let config = client.vm_config()?;
    println!("{} vCPU, {} MiB", config.machine_config.vcpu_count, config.machine_config.mem_size_mib);
    for drive in config.drives {
        let path = drive.path_on_host.unwrap_or_default();
        println!("drive {}: {}", drive.drive_id, path.display());
    }
    Ok(())
}
