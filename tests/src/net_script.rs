//! Parts of the scripts of guests on a network of the host, and checks of their output.

use anyhow::{Result, ensure};

use crate::guest::BOOT_TIMEOUT;
use crate::host_net::HostNet;
use crate::vmm::Vmm;

/// Gives the guest the address `10.0.0.2`.
pub const UP: &str = "ip address add 10.0.0.2/24 dev eth0; ip link set eth0 up";

/// A namespace with a tap and a server on it.
pub fn host() -> Result<HostNet> {
    let net = HostNet::new()?;
    net.tap("tap0", "10.0.0.1/24", "")?;
    net.serve("10.0.0.1:7000")?;
    Ok(net)
}

/// The same with a tap of several queues.
pub fn host_with_queues() -> Result<HostNet> {
    let net = HostNet::new()?;
    net.tap("tap0", "10.0.0.1/24", "multi_queue")?;
    net.serve("10.0.0.1:7000")?;
    Ok(net)
}

/// An upload and a download at once.
pub fn both_ways(bytes: u64) -> String {
    format!("net-tool upload 10.0.0.1:7000 1 {bytes} & net-tool download 10.0.0.1:7000 2 {bytes} & wait")
}

/// Checks the output of [`both_ways`].
pub fn check_both_ways(output: &str) -> Result<()> {
    ensure!(output.contains("UPLOADED 10.0.0.1:7000 1"), "{output}");
    ensure!(output.contains("DOWNLOADED 10.0.0.1:7000 2"), "{output}");
    Ok(())
}

/// Waits for the guest's end, which must be a success, and returns its output.
pub fn output_of(mut vmm: Vmm) -> Result<String> {
    let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
    ensure!(code == 0, "exit code {code}: {output}");
    ensure!(!output.contains("FAILED"), "{output}");
    Ok(output)
}
