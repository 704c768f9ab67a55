//! Other network backends of real guests: passt, vhost, macvtaps and inherited descriptors, with
//! and without root. Taps by name are in `net`.

use std::fs::File;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use rustix::process::Signal;
use serde_json::json;
use tempfile::TempDir;
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT, Transport, ignore};
use vesta_tests::host_net::{HostNet, NetGuest};
use vesta_tests::net_script::{UP, both_ways, check_both_ways, host, host_with_queues, output_of};
use vesta_tests::on_each_transport;
use vesta_tests::passt::Passt;
use vesta_tests::process::Orphans;
use vesta_tests::serial_file::{wait_for_text, word};
use vesta_tests::snapshots::{pause, resume};
use vesta_tests::traffic;
use vesta_tests::unprivileged::{self, KvmAccess};

const TOOL: &str = env!("CARGO_BIN_EXE_net-tool");
const MIB: u64 = 1 << 20;
const MAC: &str = "06:00:ac:10:00:02";

/// Gives a guest of passt the host's address. The host's loopback is at 192.0.2.1.
const PASST_UP: &str =
    "ip address add 192.0.2.2/24 dev eth0; ip link set eth0 up; ip route add default via 192.0.2.1";
/// The same for a guest that also has a tap.
const TAP_UP: &str = "ip address add 10.0.0.2/24 dev eth1; ip link set eth1 up";

/// passt gives its guest an interface with a default route. A server listens on the loopback.
fn serve_behind_passt(net: &HostNet) -> Result<()> {
    net.tap("out0", "192.0.2.2/24", "")?;
    net.ip("route add default via 192.0.2.1")?;
    net.serve("127.0.0.1:7000")
}

/// A passt, and a guest with it and a tap. They are dropped in this order.
fn guest_with_passt_and_tap() -> Result<(NetGuest, Passt, TempDir, HostNet)> {
    let net = host()?;
    serve_behind_passt(&net)?;
    let home = tempfile::tempdir()?;
    unprivileged::give(home.path())?;
    let socket = home.path().join("passt.sock");
    let passt = Passt::start(&socket, &[])?;
    let guest = NetGuest::new(Transport::Mmio, TOOL)?
        .interface(json!({"backend": "passt", "socket": socket}))
        .tap("tap0", json!({}));
    Ok((guest, passt, home, net))
}

fn needs_vhost() {
    if File::open("/dev/vhost-net").is_err() {
        ignore("there is no vhost-net here");
    }
}

on_each_transport! {
    /// Neither the monitor nor passt has any privilege, as the kernel confirms.
    fn passt_connects_guest_and_host_loopback_without_root(transport) {
        let net = HostNet::new()?;
        serve_behind_passt(&net)?;
        let kvm = KvmAccess::new()?;
        let guest = NetGuest::unprivileged(&kvm, transport, TOOL)?;
        let socket = guest.dir().join("passt.sock");
        let passt = Passt::start(&socket, &["--tcp-ports", "7001"])?;
        let vmm = guest.interface(json!({"backend": "passt", "socket": socket})).boot(&format!(
            "{PASST_UP}\nnet-tool upload 192.0.2.1:7000 1 1000000\nnet-tool download 192.0.2.1:7000 2 1000000\n\
             net-tool serve 7001"
        ))?;
        vmm.wait_for_output("UPLOADED 192.0.2.1:7000 1", BOOT_TIMEOUT)?;
        unprivileged::check_is_nobody(passt.pid())?;
        unprivileged::check_is_nobody(vmm.pid())?;
        unprivileged::check_has_no_capability(vmm.pid())?;
        vmm.wait_for_output("DOWNLOADED 192.0.2.1:7000 2", BOOT_TIMEOUT)?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        traffic::upload("127.0.0.1:7001", 3, 1_000_000)?;
        traffic::download("127.0.0.1:7001", 4, 1_000_000)?;
        Ok(())
    }

    /// The kernel serves queues and interrupts; the monitor starts and stops them.
    fn data_crosses_vhost_in_both_directions(transport) {
        needs_vhost();
        let _net = host()?;
        let vmm = NetGuest::new(transport, TOOL)?
            .tap("tap0", json!({"backend": "vhost"}))
            .boot(&format!("{UP}\n{both}\necho AGAIN\n{both}\npoweroff -f", both = both_ways(8 * MIB)))?;
        vmm.wait_for_output("AGAIN", BOOT_TIMEOUT)?;
        // During a transfer.
        let mut api = vmm.ready_client(TIMEOUT)?;
        for _ in 0..5 {
            pause(&mut api)?;
            resume(&mut api)?;
        }
        let output = output_of(vmm)?;
        ensure!(output.matches("UPLOADED").count() == 2 && output.matches("DOWNLOADED").count() == 2, "{output}");
        Ok(())
    }

    /// All queue pairs carry data, also after pauses, and after the guest has used fewer.
    fn vhost_queue_pairs_share_the_load(transport) {
        needs_vhost();
        let _net = host_with_queues()?;
        let vmm = NetGuest::new(transport, TOOL)?
            .vcpus(2)
            .tap("tap0", json!({"backend": "vhost", "num_queues": 2, "io_threads": 2}))
            .program("ethtool")?
            .boot(&format!(
                "{UP}\n{}\necho GOING\n{}\n{}\nethtool -L eth0 combined 1\n{}\n\
                 ethtool -L eth0 combined 2\n{}\n{}\npoweroff -f",
                kicks("FIRST"),
                on_each_cpu(MIB),
                kicks("MIDDLE"),
                both_ways(MIB / 4),
                on_each_cpu(MIB / 4),
                kicks("LAST"),
            ))?;
        vmm.wait_for_output("GOING", BOOT_TIMEOUT)?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        for _ in 0..5 {
            pause(&mut api)?;
            resume(&mut api)?;
        }
        let output = output_of(vmm)?;
        check_each_pair_sent(&output, "FIRST", "MIDDLE")?;
        check_each_pair_sent(&output, "MIDDLE", "LAST")?;
        ensure!(output.matches("UPLOADED").count() == 5 && output.matches("DOWNLOADED").count() == 5, "{output}");
        Ok(())
    }
}

/// The guest sends and receives on each of its two processors, which have a queue pair each.
fn on_each_cpu(bytes: u64) -> String {
    let tool = |what| format!("taskset $cpu net-tool {what} 10.0.0.1:7000 $cpu {bytes} &");
    format!("for cpu in 1 2; do {} {} done; wait", tool("upload"), tool("download"))
}

/// Makes the guest print, after `mark`, the number of kicks of each queue.
fn kicks(mark: &str) -> String {
    format!("ethtool -S eth0 | grep kicks | sed 's/^ */{mark} /'")
}

/// Checks that the guest has sent through each queue between two marks. Each kick of a transmit
/// queue comes with a frame.
fn check_each_pair_sent(output: &str, before: &str, after: &str) -> Result<()> {
    for queue in ["tx0", "tx1"] {
        let kicks = |mark| -> Result<u64> {
            word(output, &format!("{mark} {queue}_kicks: "))?.parse().context("a number of kicks")
        };
        ensure!(kicks(before)? < kicks(after)?, "{queue} was not used from {before} to {after}: {output}");
    }
    Ok(())
}

/// Both queue pairs carry data, and a monitor that may not open a tap can use an inherited one.
#[test]
fn data_crosses_inherited_tap_queues_without_root() -> Result<()> {
    let net = host_with_queues()?;
    let kvm = KvmAccess::new()?;
    let queues = net.open_tap("tap0", 2)?;
    let vmm = NetGuest::unprivileged(&kvm, Transport::Pci, TOOL)?
        .vcpus(2)
        .descriptors(queues, json!({}))?
        .program("ethtool")?
        .boot(&format!(
            "{UP}\n{}\n{}\n{}\nethtool -L eth0 combined 1\n{}\npoweroff -f",
            kicks("FIRST"),
            on_each_cpu(MIB / 4),
            kicks("LAST"),
            both_ways(MIB / 4),
        ))?;
    vmm.wait_for_output("UPLOADED", BOOT_TIMEOUT)?;
    unprivileged::check_is_nobody(vmm.pid())?;
    unprivileged::check_has_no_capability(vmm.pid())?;
    let output = output_of(vmm)?;
    check_each_pair_sent(&output, "FIRST", "LAST")?;
    ensure!(output.matches("UPLOADED").count() == 3 && output.matches("DOWNLOADED").count() == 3, "{output}");
    Ok(())
}

/// The guest has the macvtap's address. Deleting the macvtap takes the link down, though its
/// device file gives no error.
#[test]
fn data_crosses_a_macvtap_until_it_is_deleted() -> Result<()> {
    let net = HostNet::new()?;
    let device = net.macvtap("mv0", MAC, "10.0.0.1/24")?;
    net.serve("10.0.0.1:7000")?;
    let device = device.display().to_string();
    let vmm = NetGuest::new(Transport::Mmio, TOOL)?.tap(&device, json!({"guest_mac": MAC})).boot(&format!(
        "{UP}\n{}\necho READY\nuntil [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done\npoweroff -f",
        both_ways(MIB)
    ))?;
    vmm.wait_for_output("READY", BOOT_TIMEOUT)?;
    net.ip("link delete mv0")?;
    let output = output_of(vmm)?;
    check_both_ways(&output)?;
    ensure!(output.contains("the link is down") && output.contains(&device), "{output}");
    Ok(())
}

#[test]
fn a_dead_passt_takes_only_its_own_link_down() -> Result<()> {
    let (guest, passt, _home, _net) = guest_with_passt_and_tap()?;
    let vmm = guest.boot(&format!(
        "{PASST_UP}\n{TAP_UP}\nnet-tool upload 192.0.2.1:7000 7 100000\n\
         net-tool download 192.0.2.1:7000 8 1000000000 > /dev/null &\necho READY\n\
         until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done\necho DOWN\n{}\n\
         ping -c 1 -W 1 192.0.2.1 > /dev/null || echo SILENT\n\
         echo CARRIERS $(cat /sys/class/net/eth0/carrier) $(cat /sys/class/net/eth1/carrier)\npoweroff -f",
        both_ways(MIB / 4)
    ))?;
    vmm.wait_for_output("READY", BOOT_TIMEOUT)?;
    passt.signal(Signal::KILL)?;
    vmm.wait_for_output("DOWN", TIMEOUT)?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    pause(&mut api)?;
    resume(&mut api)?;
    let output = output_of(vmm)?;
    check_both_ways(&output)?;
    ensure!(word(&output, "CARRIERS ")? == "0 1" && output.contains("SILENT"), "{output}");
    ensure!(output.contains("the link is down") && output.contains("passt.sock"), "{output}");
    Ok(())
}

#[test]
fn a_stalled_passt_delays_nothing_else() -> Result<()> {
    let (guest, passt, _home, _net) = guest_with_passt_and_tap()?;
    let vmm = guest.boot(&format!(
        "{PASST_UP}\n{TAP_UP}\nnet-tool serve 7000 &\nnet-tool upload 192.0.2.1:7000 7 100000\n\
         echo READY\nnet-tool flood 192.0.2.1:9\nnet-tool upload 192.0.2.1:7000 8 100000\npoweroff -f"
    ))?;
    vmm.wait_for_output("READY", BOOT_TIMEOUT)?;
    passt.signal(Signal::STOP)?;
    // Even the guest's own queue is full.
    vmm.wait_for_output("STUFFED", BOOT_TIMEOUT)?;
    traffic::upload("10.0.0.2:7000", 3, 2 * MIB).context("the other network")?;
    traffic::download("10.0.0.2:7000", 4, 2 * MIB).context("the other network")?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    pause(&mut api)?;
    resume(&mut api)?;
    traffic::upload("10.0.0.2:7000", 5, MIB).context("the other network, after a pause")?;
    ensure!(!vmm.stdout.text().contains("192.0.2.1:7000 8"), "{}", vmm.stdout.text());
    passt.signal(Signal::CONT)?;
    let output = output_of(vmm)?;
    ensure!(output.contains("UPLOADED 192.0.2.1:7000 8"), "{output}");
    ensure!(!output.contains("the link is down"), "{output}");
    Ok(())
}

#[test]
fn parent_and_forked_child_use_their_own_tap_descriptors() -> Result<()> {
    let net = HostNet::new()?;
    net.tap("tap0", "10.0.0.1/24", "")?;
    net.tap("tap1", "10.0.1.1/24", "")?;
    net.serve("10.0.1.1:7000")?;
    let mut guest = NetGuest::new(Transport::Mmio, TOOL)?.descriptors(net.open_tap("tap0", 1)?, json!({}))?;
    let mut childs = net.open_tap("tap1", 1)?;
    let childs = guest.inherit(childs.pop().context("one queue")?)?;
    let vmm = guest.boot(&format!(
        "{UP}\nip address add 10.0.1.2/24 dev eth0\nnet-tool serve 7000 &\n\
         until dmesg | grep -q 'virtual machine fork'; do sleep 0.1; done\n\
         net-tool upload 10.0.1.1:7000 1 1000000\nnet-tool download 10.0.1.1:7000 2 1000000\necho LAST\npoweroff -f"
    ))?;
    vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
    traffic::upload("10.0.0.2:7000", 3, MIB)?;
    let home = tempfile::tempdir()?;
    let serial: PathBuf = home.path().join("serial");
    let mut api = vmm.ready_client(TIMEOUT)?;
    let child = json!({
        "id": "child",
        "serial": {"serial_out_path": serial},
        "network_overrides": [{"iface_id": "eth0", "fds": [childs]}],
    });
    let reply = api.put("/fork", &json!({"children": [child]}))?.ok()?.json()?;
    let children = Orphans::of_fork(&reply)?;
    let output = wait_for_text(Path::new(&serial), "LAST", BOOT_TIMEOUT)?;
    for done in ["UPLOADED 10.0.1.1:7000 1", "DOWNLOADED 10.0.1.1:7000 2"] {
        ensure!(output.contains(done), "{output}");
    }
    children.wait(TIMEOUT)?;
    traffic::download("10.0.0.2:7000", 4, MIB).context("the parent after the fork")?;
    Ok(())
}
