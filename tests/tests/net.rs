//! Networks of real guests on taps: data in both directions on either transport, limits, failures
//! and the API. Other backends are in `net_backends`.

use std::fs::File;
use std::io;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde_json::json;
use vesta_tests::api::ApiClient;
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT, Transport, ignore, vmm_path};
use vesta_tests::host_net::{HostNet, NetGuest};
use vesta_tests::net_script::{UP, both_ways, check_both_ways, host, host_with_queues, output_of};
use vesta_tests::on_each_transport;
use vesta_tests::serial_file::word;
use vesta_tests::stalls::Stalls;
use vesta_tests::traffic;
use vesta_tests::vmm::VmmBuilder;

const TOOL: &str = env!("CARGO_BIN_EXE_net-tool");
const MIB: u64 = 1 << 20;

on_each_transport! {
    /// Data arrives in both directions at the same time.
    fn data_crosses_a_tap_in_both_directions(transport) {
        let _net = host()?;
        let vmm = NetGuest::new(transport, TOOL)?
            .tap("tap0", json!({"guest_mac": "06:00:AC:10:00:02"}))
            .boot(&format!("{UP}\necho MAC $(cat /sys/class/net/eth0/address)\n{}\npoweroff -f", both_ways(8 * MIB)))?;
        let output = output_of(vmm)?;
        ensure!(output.contains("MAC 06:00:ac:10:00:02"), "{output}");
        check_both_ways(&output)
    }

    /// Checksum and segmentation offloads are negotiable, and so is the MTU.
    fn data_crosses_without_offloads_and_at_other_mtus(transport) {
        let net = host()?;
        net.ip("link set tap0 mtu 9000")?;
        let vmm = NetGuest::new(transport, TOOL)?
            .tap("tap0", json!({"mtu": 9000}))
            .program("ethtool")?
            .boot(&format!(
                "{UP}\necho MTU $(cat /sys/class/net/eth0/mtu)\n\
                 ethtool -k eth0 | grep -E '^(tcp-segmentation|rx-checksumming)'\n{both}\n\
                 ethtool -K eth0 tx off rx off tso off gso off gro off\n{both}\n\
                 ip link set eth0 mtu 1400\n{both}\npoweroff -f",
                both = both_ways(2 * MIB)
            ))?;
        let output = output_of(vmm)?;
        ensure!(output.contains("MTU 9000"), "{output}");
        ensure!(output.contains("tcp-segmentation-offload: on") && output.contains("rx-checksumming: on"), "{output}");
        ensure!(output.matches("UPLOADED").count() == 3 && output.matches("DOWNLOADED").count() == 3, "{output}");
        Ok(())
    }

    /// All queue pairs carry data.
    fn queue_pairs_share_the_load(transport) {
        let _net = host_with_queues()?;
        let vmm = NetGuest::new(transport, TOOL)?
            .vcpus(2)
            .tap("tap0", json!({"num_queues": 2, "io_threads": 2}))
            .program("ethtool")?
            .boot(&format!(
                "{UP}\necho QUEUES $(ls -d /sys/class/net/eth0/queues/rx-* | wc -l)\n\
                 for i in 1 2 3 4 5 6; do net-tool upload 10.0.0.1:7000 $i {MIB} & net-tool download 10.0.0.1:7000 $i {MIB} & done; wait\n\
                 ethtool -S eth0 | grep kicks | sed 's/^ */COUNT /'\npoweroff -f"
            ))?;
        let output = output_of(vmm)?;
        ensure!(output.contains("QUEUES 2"), "{output}");
        ensure!(output.matches("UPLOADED").count() == 6 && output.matches("DOWNLOADED").count() == 6, "{output}");
        // Each kick of a transmit queue comes with a frame.
        let kicks = |queue: &str| word(&output, &format!("COUNT {queue}_kicks: "))?.parse::<u64>().context("a number");
        ensure!(kicks("tx0")? > 0 && kicks("tx1")? > 0, "{output}");
        Ok(())
    }

    /// TCP recovers all that a pause or a reset of the driver loses.
    fn traffic_survives_pauses_and_driver_rebinds(transport) {
        let _net = host()?;
        let vmm = NetGuest::new(transport, TOOL)?.tap("tap0", json!({})).boot(&format!(
            "{UP}\necho GOING\n{both}\ndev=$(basename $(readlink /sys/class/net/eth0/device))\n\
             for i in 1 2 3; do echo $dev > /sys/bus/virtio/drivers/virtio_net/unbind; echo $dev > /sys/bus/virtio/drivers/virtio_net/bind; done\n\
             {UP}\n{both}\npoweroff -f",
            both = both_ways(4 * MIB)
        ))?;
        vmm.wait_for_output("GOING", BOOT_TIMEOUT)?;
        let mut api = vmm.ready_client(TIMEOUT)?;
        for _ in 0..10 {
            api.patch("/vm", &json!({"state": "Paused"}))?.ok()?;
            api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;
        }
        let output = output_of(vmm)?;
        ensure!(output.matches("UPLOADED").count() == 2 && output.matches("DOWNLOADED").count() == 2, "{output}");
        Ok(())
    }

    /// The guest sees the link go down, and the monitor continues.
    fn deleting_a_tap_takes_the_link_down(transport) {
        a_deleted_tap_is_noticed(transport, "tap")
    }

    /// The same with vhost, where the kernel notifies no one of the deletion.
    fn deleting_a_tap_takes_the_vhost_link_down(transport) {
        if File::open("/dev/vhost-net").is_err() {
            ignore("there is no vhost-net here");
        }
        a_deleted_tap_is_noticed(transport, "vhost")
    }

    /// Frames with the guest's own address pass.
    fn frames_from_another_address_are_dropped(transport) {
        let _net = host()?;
        let as_other = "ip link set eth0 down; ip link set eth0 address 06:00:ac:10:00:99; ip link set eth0 up";
        let as_itself = "ip link set eth0 down; ip link set eth0 address 06:00:ac:10:00:02; ip link set eth0 up";
        let vmm = NetGuest::new(transport, TOOL)?
            .tap("tap0", json!({"guest_mac": "06:00:AC:10:00:02"}))
            .boot(&format!(
                "{UP}\nping -c 1 -w 10 10.0.0.1 > /dev/null && echo FIRST\n\
                 {as_other}\nping -c 2 -w 2 10.0.0.1 > /dev/null || echo SILENT\n\
                 {as_itself}\nping -c 1 -w 10 10.0.0.1 > /dev/null && echo LAST\npoweroff -f"
            ))?;
        let output = output_of(vmm)?;
        ensure!(output.contains("FIRST") && output.contains("SILENT") && output.contains("LAST"), "{output}");
        ensure!(output.contains("not the guest's"), "output: {output}");
        Ok(())
    }
}

fn a_deleted_tap_is_noticed(transport: Transport, backend: &str) -> Result<()> {
    let net = host()?;
    let mut vmm = NetGuest::new(transport, TOOL)?.tap("tap0", json!({"backend": backend})).boot(&format!(
        "{UP}\n{}\necho READY\n\
             until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done\n\
             ping -c 2 -w 2 10.0.0.1 | tail -n 2\necho ALIVE\npoweroff -f",
        both_ways(MIB)
    ))?;
    vmm.wait_for_output("READY", BOOT_TIMEOUT)?;
    net.ip("link delete tap0")?;
    vmm.wait_for_output("ALIVE", BOOT_TIMEOUT)?;
    let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
    ensure!(code == 0, "{output}");
    ensure!(output.contains("the link is down") && output.contains("100% packet loss"), "{output}");
    Ok(())
}

/// The time of a transfer that should take `want`, within a fifth and half a second for the guest
/// itself. Stalls of the host are allowed on top: a full bucket gains nothing during a stall.
fn assert_takes(
    stalls: &Stalls,
    want: Duration,
    transfer: impl FnOnce() -> io::Result<Duration>,
) -> Result<()> {
    let begun = Instant::now();
    let took = transfer()?;
    let stalled = stalls.between(begun, Instant::now());
    let slack = want.mul_f64(0.2) + Duration::from_millis(500);
    ensure!(
        took + slack > want && took < want + slack + stalled,
        "it took {took:?}, not {want:?}, and the host was stalled for {stalled:?}"
    );
    Ok(())
}

#[test]
fn rate_limits_hold_in_each_direction_and_can_be_patched() -> Result<()> {
    let _net = host()?;
    // 1 MiB per second to the guest, a quarter of that from it. The buckets are small, so the rate
    // dominates.
    let limit = |bytes: u64| json!({"bandwidth": {"size": bytes / 10, "refill_time": 100}});
    let vmm = NetGuest::new(Transport::Mmio, TOOL)?
        .tap("tap0", json!({"rx_rate_limiter": limit(MIB), "tx_rate_limiter": limit(MIB / 4)}))
        .boot(&format!("{UP}\nnet-tool serve 7000"))?;
    vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
    let guest = "10.0.0.2:7000";
    traffic::upload(guest, 1, 1000)?;
    let stalls = Stalls::watch();
    let headers = 1.05;
    let seconds = |bytes: u64, rate: u64| Duration::from_millis(1000 * bytes / rate).mul_f64(headers);
    assert_takes(&stalls, seconds(4 * MIB, MIB), || traffic::upload(guest, 2, 4 * MIB))?;
    assert_takes(&stalls, seconds(MIB, MIB / 4), || traffic::download(guest, 3, MIB))?;

    let mut api = vmm.ready_client(TIMEOUT)?;
    let off = json!({"bandwidth": {"size": 0, "refill_time": 0}});
    let patch = json!({"iface_id": "eth0", "rx_rate_limiter": limit(2 * MIB), "tx_rate_limiter": off});
    api.patch("/network-interfaces/eth0", &patch)?.ok()?;
    assert_takes(&stalls, seconds(8 * MIB, 2 * MIB), || traffic::upload(guest, 4, 8 * MIB))?;
    let unlimited = traffic::download(guest, 5, 2 * MIB)?;
    ensure!(unlimited < seconds(2 * MIB, MIB / 2), "without a limit it took {unlimited:?}");
    let shown = api.get("/vm/config")?.json()?;
    ensure!(shown["network-interfaces"][0]["rx_rate_limiter"] == limit(2 * MIB), "{shown}");

    let refused = api.patch("/network-interfaces/eth7", &json!({"iface_id": "eth7"}))?;
    ensure!(refused.status == 400 && refused.fault().contains("eth7"), "{refused:?}");
    Ok(())
}

#[test]
fn two_microvms_on_one_bridge_reach_each_other() -> Result<()> {
    let net = HostNet::new()?;
    net.ip("link add br0 type bridge")?;
    net.ip("link set br0 up")?;
    for tap in ["tap1", "tap2"] {
        net.tap(tap, "", "")?;
        net.ip(&format!("link set {tap} master br0"))?;
    }
    let boot = |tap: &str, own: &str, script: &str| {
        NetGuest::new(Transport::Pci, TOOL)?
            .tap(tap, json!({}))
            .boot(&format!("ip address add {own}/24 dev eth0; ip link set eth0 up\n{script}"))
    };
    let server = boot("tap1", "10.0.0.1", "net-tool serve 7000")?;
    server.wait_for_output("SERVING", BOOT_TIMEOUT)?;
    let client = boot("tap2", "10.0.0.2", &format!("{}\npoweroff -f", both_ways(2 * MIB)))?;
    check_both_ways(&output_of(client)?)
}

fn put(api: &mut ApiClient, id: &str, body: &serde_json::Value) -> Result<vesta_tests::api::Response> {
    api.put(&format!("/network-interfaces/{id}"), body)
}

#[test]
fn interfaces_are_set_over_the_api_and_invalid_ones_refused() -> Result<()> {
    let net = HostNet::new()?;
    net.tap("tap0", "10.0.0.1/24", "")?;
    net.tap("tap1", "", "")?;
    let vmm = VmmBuilder::new(&vmm_path())?.with_api().spawn()?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    let good = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": null, "rx_rate_limiter": {}, "tx_rate_limiter": {}});
    put(&mut api, "eth0", &good)?.ok()?;
    // The same interface again, on its own tap, replaces the old one.
    put(&mut api, "eth0", &good)?.ok()?;
    for (id, body, named) in [
        ("eth1", json!({"iface_id": "eth1", "host_dev_name": "tap0"}), "tap0"),
        ("eth1", json!({"iface_id": "eth1", "host_dev_name": "/dev/nosuchtap"}), "/dev/nosuchtap"),
        ("eth1", json!({"iface_id": "eth1", "host_dev_name": "tap1", "num_queues": 2}), "multi_queue"),
        ("eth1", json!({"iface_id": "eth1", "host_dev_name": "tap1", "guest_mac": "nonsense"}), "nonsense"),
        ("eth1", json!({"iface_id": "eth1", "host_dev_name": "tap1", "mtu": 67}), "mtu is 67"),
        ("eth1", json!({"iface_id": "eth2", "host_dev_name": "tap1"}), "eth2"),
        ("eth1", json!({"iface_id": "eth1", "host_dev_name": "tap1", "speed": 10}), "speed"),
        (
            "eth1",
            json!({"iface_id": "eth1", "backend": "passt", "socket": "/nowhere/passt"}),
            "/nowhere/passt",
        ),
        ("eth1", json!({"iface_id": "eth1", "fds": [0]}), "descriptor 0"),
        // It keeps its tap if the new one cannot be opened.
        ("eth0", json!({"iface_id": "eth0", "host_dev_name": "/dev/nosuchtap"}), "/dev/nosuchtap"),
    ] {
        let refused = put(&mut api, id, &body)?;
        ensure!(refused.status == 400 && refused.fault().contains(named), "{body}: {refused:?}");
    }
    let shown = api.get("/vm/config")?.json()?;
    let shown = &shown["network-interfaces"];
    ensure!(shown.as_array().is_some_and(|all| all.len() == 1), "{shown}");
    ensure!(shown[0]["host_dev_name"] == "tap0", "{shown}");
    put(
        &mut api,
        "eth1",
        &json!({"iface_id": "eth1", "host_dev_name": "tap1", "guest_mac": "06:00:00:00:00:01"}),
    )?
    .ok()?;
    let twin = json!({"iface_id": "eth0", "host_dev_name": "tap0", "guest_mac": "06:00:00:00:00:01"});
    let refused = put(&mut api, "eth0", &twin)?;
    ensure!(refused.status == 400 && refused.fault().contains("guest_mac"), "{refused:?}");
    let early = api.patch("/network-interfaces/eth0", &json!({"iface_id": "eth0"}))?;
    ensure!(early.status == 400, "{early:?}");

    // A tap that the monitor created exists as long as the interface uses it.
    let own = json!({"iface_id": "eth2", "host_dev_name": "own2"});
    put(&mut api, "eth2", &own)?.ok()?;
    net.ip("address add 10.0.2.1/24 dev own2")?;
    let refused =
        put(&mut api, "eth2", &json!({"iface_id": "eth2", "backend": "passt", "socket": "/nowhere/passt"}))?;
    ensure!(refused.status == 400, "{refused:?}");
    put(&mut api, "eth2", &json!({"iface_id": "eth2", "host_dev_name": "own2", "mtu": 1400}))?.ok()?;
    net.ip("address del 10.0.2.1/24 dev own2")?;
    put(&mut api, "eth2", &json!({"iface_id": "eth2", "host_dev_name": "own3"}))?.ok()?;
    ensure!(net.has("own3") && !net.has("own2"));
    Ok(())
}
