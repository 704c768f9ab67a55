//! Networks of guests after a restore, and of a fork's child.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use vesta_tests::api::ApiClient;
use vesta_tests::guest::{BOOT_TIMEOUT, TIMEOUT, Transport, ignore};
use vesta_tests::host_net::{HostNet, NetGuest};
use vesta_tests::on_each_transport;
use vesta_tests::process::Orphans;
use vesta_tests::serial_file::{wait_for_text, word};
use vesta_tests::snapshots::{Files, pause, unconfigured};
use vesta_tests::traffic;

const TOOL: &str = env!("CARGO_BIN_EXE_net-tool");
const UP: &str = "ip address add 10.0.0.2/24 dev eth0; ip link set eth0 up";
const OLD_MAC: &str = "06:00:ac:10:00:02";
const NEW_MAC: &str = "06:00:ac:10:00:77";

/// A restored guest knows by its reseeded random generator.
const IS_ANOTHER: &str = "dmesg | grep -q 'virtual machine fork'";

/// Makes the guest rebind the driver of its network card.
const REBIND: &str = "dev=$(basename $(readlink /sys/class/net/eth0/device))\n\
    echo $dev > /sys/bus/virtio/drivers/virtio_net/unbind; echo $dev > /sys/bus/virtio/drivers/virtio_net/bind\n";

fn host() -> Result<HostNet> {
    let net = HostNet::new()?;
    net.tap("tap0", "10.0.0.1/24", "")?;
    net.use_common_mac("tap0")?;
    Ok(net)
}

on_each_transport! {
    /// The error names the tap that the guest had, which is not created.
    fn a_restored_guest_uses_another_tap_and_mac_address(transport) {
        let net = host()?;
        let vmm = NetGuest::new(transport, TOOL)?.tap("tap0", json!({"guest_mac": OLD_MAC})).boot(&format!(
            "{UP}\nnet-tool serve 7000 &\nuntil {IS_ANOTHER}; do sleep 0.1; done\n\
             echo OLD $(cat /sys/class/net/eth0/address)\nnet-tool upload 10.0.0.1:7000 1 100000\n\
             {REBIND}{UP}\necho NEW $(cat /sys/class/net/eth0/address)\nnet-tool upload 10.0.0.1:7000 2 100000\n\
             poweroff -f"
        ))?;
        vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
        traffic::upload("10.0.0.2:7000", 7, 100_000)?;
        let home = tempfile::tempdir()?;
        let files = Files::new(home.path(), "one");
        let mut api = vmm.ready_client(TIMEOUT)?;
        pause(&mut api)?;
        api.put("/snapshot/create", &files.create("Full"))?.ok()?;
        drop(vmm);
        net.ip("link delete tap0")?;

        let (mut vmm, mut api) = unconfigured(transport)?;
        let refused = api.put("/snapshot/load", &files.load())?;
        ensure!(refused.status == 400 && refused.fault().contains("tap tap0: does not exist"), "{refused:?}");
        ensure!(!net.has("tap0"), "a tap was made for a guest that had another");
        net.tap("tap1", "10.0.0.1/24", "")?;
        net.use_common_mac("tap1")?;
        net.serve("10.0.0.1:7000")?;
        let mut load = files.load();
        load["network_overrides"] =
            json!([{"iface_id": "eth0", "host_dev_name": "tap1", "guest_mac": NEW_MAC}]);
        api.put("/snapshot/load", &load)?.ok()?;
        let shown = api.get("/vm/config")?.json()?;
        let shown = &shown["network-interfaces"][0];
        ensure!(shown["host_dev_name"] == "tap1" && shown["guest_mac"] == NEW_MAC, "{shown}");
        let (code, output) = vmm.finish(BOOT_TIMEOUT)?;
        ensure!(code == 0, "exit code {code}: {output}");
        ensure!(word(&output, "OLD ")? == OLD_MAC && word(&output, "NEW ")? == NEW_MAC, "{output}");
        for seed in [1, 2] {
            ensure!(output.contains(&format!("UPLOADED 10.0.0.1:7000 {seed}")), "{output}");
        }
        Ok(())
    }

    fn forked_children_use_their_own_networks_and_mmds(transport) {
        children_have_their_networks(transport, "tap")
    }
}

#[test]
fn forked_children_can_use_vhost() -> Result<()> {
    if std::fs::File::open("/dev/vhost-net").is_err() {
        ignore("there is no vhost-net here");
    }
    children_have_their_networks(Transport::Mmio, "vhost")
}

/// A parent with a network and the metadata service; a child with another network and address, one
/// without any.
fn children_have_their_networks(transport: Transport, backend: &str) -> Result<()> {
    let net = host()?;
    net.tap("tap1", "10.0.1.1/24", "")?;
    net.tap("tapm", "", "")?;
    net.serve("10.0.1.1:7000")?;
    let vmm = NetGuest::new(transport, TOOL)?
        .tap("tap0", json!({"guest_mac": OLD_MAC, "backend": backend}))
        .tap("tapm", json!({}))
        .mmds(json!({"version": "V1", "network_interfaces": ["eth1"]}))
        .boot(&format!(
            "{UP}\nip address add 192.168.77.2/24 dev eth1; ip link set eth1 up; ip route add 169.254.169.254 dev eth1\n\
             net-tool serve 7000 &\nuntil {IS_ANOTHER}; do sleep 0.1; done\n\
             case $(wget -q -O - http://169.254.169.254/who) in\n\
             networked)\n\
             ip address add 10.0.1.2/24 dev eth0\n\
             echo OLD $(cat /sys/class/net/eth0/address)\nnet-tool upload 10.0.1.1:7000 1 100000\n\
             {REBIND}ip address add 10.0.1.2/24 dev eth0; ip link set eth0 up\n\
             echo NEW $(cat /sys/class/net/eth0/address)\nnet-tool upload 10.0.1.1:7000 2 100000;;\n\
             alone)\n\
             until [ $(cat /sys/class/net/eth0/carrier) = 0 ]; do sleep 0.1; done\n\
             echo CARRIER $(cat /sys/class/net/eth0/carrier) $(cat /sys/class/net/eth1/carrier);;\n\
             esac\necho LAST\npoweroff -f"
        ))?;
    vmm.wait_for_output("SERVING", BOOT_TIMEOUT)?;
    let mut api = vmm.ready_client(TIMEOUT)?;
    api.put("/mmds", &json!({"who": "parent"}))?.ok()?;
    let home = tempfile::tempdir()?;
    let child = |id: &str, overrides: Value| {
        let serial = json!({"serial_out_path": home.path().join(id)});
        let socket = home.path().join(format!("{id}.sock"));
        json!({"id": id, "serial": serial, "mmds": {"who": id}, "network_overrides": overrides, "api_socket": socket})
    };

    for (tap, named) in [("tap0", "tap tap0: in use"), ("tap9", "tap tap9: does not exist")] {
        let bad = child("bad", json!([{"iface_id": "eth0", "host_dev_name": tap}]));
        let refused = api.put("/fork", &json!({"children": [bad]}))?;
        ensure!(refused.status == 400 && refused.fault().contains(named), "{refused:?}");
        ensure!(refused.fault().contains("child bad"), "{refused:?}");
    }
    let own = json!([{"iface_id": "eth0", "host_dev_name": "tap1", "guest_mac": NEW_MAC}]);
    let mut alone = child("alone", json!([]));
    alone["resume"] = json!(false);
    let reply = api.put("/fork", &json!({"children": [child("networked", own), alone]}))?.ok()?.json()?;
    let children = Orphans::of_fork(&reply)?;
    traffic::upload("10.0.0.2:7000", 7, 1 << 20).context("the parent after the fork")?;

    let mut api = ApiClient::new(&home.path().join("alone.sock"));
    let shown = api.get("/vm/config")?.json()?;
    let shown = &shown["network-interfaces"][0];
    ensure!(shown.get("host_dev_name").is_none_or(Value::is_null), "{shown}");
    ensure!(shown["guest_mac"] == OLD_MAC, "{shown}");
    api.patch("/vm", &json!({"state": "Resumed"}))?.ok()?;

    let output_of = |id: &str| wait_for_text(&home.path().join(Path::new(id)), "LAST", BOOT_TIMEOUT);
    let networked = output_of("networked")?;
    ensure!(word(&networked, "OLD ")? == OLD_MAC && word(&networked, "NEW ")? == NEW_MAC, "{networked}");
    for seed in [1, 2] {
        ensure!(networked.contains(&format!("UPLOADED 10.0.1.1:7000 {seed}")), "{networked}");
    }
    ensure!(word(&output_of("alone")?, "CARRIER ")? == "0 1");
    children.wait(TIMEOUT)?;
    traffic::upload("10.0.0.2:7000", 8, 1 << 20).context("the parent after its children have ended")?;
    Ok(())
}
