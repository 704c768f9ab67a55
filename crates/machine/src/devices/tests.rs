//! Tests: names, order and addresses of devices.

use block::disk::Disk;
use config::{Drive, Entropy};
use virtio::transport::{mmio as mmio_transport, pci as pci_transport};

use super::*;

fn drive(id: &str, root: bool, partuuid: Option<&str>) -> (Drive, Disk) {
    let file = tempfile::NamedTempFile::new().unwrap();
    let drive = Drive {
        drive_id: id.to_owned(),
        is_root_device: root,
        partuuid: partuuid.map(str::to_owned),
        cache_type: config::CacheType::Unsafe,
        is_read_only: false,
        path_on_host: Some(file.path().to_owned()),
        rate_limiter: None,
        io_engine: None,
        socket: None,
        num_queues: None,
        io_threads: None,
        queue_size: None,
        overlay: None,
        lock: None,
    };
    let disk = Disk::open(&block::disk::DiskOptions::of(&drive)).unwrap();
    (drive, disk)
}

#[test]
fn devices_have_adjacent_addresses_on_the_command_line() {
    let setup = DeviceSetup {
        drives: vec![drive("data", false, None), drive("rootfs", true, None)],
        networks: vec![],
        entropy: Some(Entropy::default()),
        vsock: None,
        metadata: None,
        pci: false,
    };
    assert_eq!(
        setup.boot_args(&setup.addresses().unwrap()),
        "root=/dev/vda rw pci=off virtio_mmio.device=4K@0xc0001000:5 \
         virtio_mmio.device=4K@0xc0002000:6 virtio_mmio.device=4K@0xc0003000:7"
    );
}

#[test]
fn root_partition_is_named_by_its_uuid() {
    let drives = vec![drive("r", true, Some("0eaa91a0-01"))];
    let setup = DeviceSetup { drives, pci: true, ..DeviceSetup::default() };
    assert_eq!(setup.boot_args(&setup.addresses().unwrap()), "root=PARTUUID=0eaa91a0-01 rw");
}

#[test]
fn more_devices_than_addresses_are_refused() {
    for (pci, max) in [(false, mmio_transport::MAX_DEVICES), (true, pci_transport::MAX_DEVICES)] {
        let drives = (0..max).map(|i| drive(&format!("d{i}"), false, None)).collect();
        let mut setup = DeviceSetup { drives, pci, ..DeviceSetup::default() };
        setup.addresses().unwrap();
        setup.entropy = Some(Entropy::default());
        let error = setup.addresses().unwrap_err();
        assert!(matches!(error, DeviceError::TooMany { count, max: m, .. } if count == max + 1 && m == max));
    }
}

fn names(setup: &mut DeviceSetup, saved: Option<&DevicesState>) -> Result<Vec<String>, DeviceError> {
    let planned = table::plan(setup, saved)?;
    Ok(planned.iter().map(|device| device.name().to_owned()).collect())
}

#[test]
fn devices_are_numbered_by_kind_and_the_root_drive_is_first() {
    let mut setup = DeviceSetup {
        drives: vec![drive("data", false, None), drive("rootfs", true, None), drive("b", false, None)],
        entropy: Some(Entropy::default()),
        vsock: Some(VsockSetup { guest_cid: 3, sockets: vsock::HostSockets::default() }),
        ..DeviceSetup::default()
    };
    let expected = ["drive rootfs", "drive data", "drive b", "entropy", "vsock"];
    assert_eq!(names(&mut setup, None).unwrap(), expected);
}

#[test]
fn saved_devices_must_be_the_same_by_name() {
    let saved = DevicesState { pci: None, devices: Vec::new() };
    let setup = || DeviceSetup { entropy: Some(Entropy::default()), ..DeviceSetup::default() };
    let error = names(&mut setup(), Some(&saved)).unwrap_err().to_string();
    assert_eq!(error, "virtio devices: the machine has [entropy]; it was saved with []");
    assert_eq!(names(&mut DeviceSetup::default(), Some(&saved)).unwrap(), [""; 0]);
}

#[test]
fn shared_workers_are_as_many_as_the_network_asks_for() {
    let network = serde_json::from_value(serde_json::json!({
        "iface_id": "eth0", "host_dev_name": "tap0", "num_queues": 4, "io_threads": 4,
    }));
    let network: config::NetworkInterface = network.unwrap();
    let networks = vec![(network, net::NetBackend::unplugged(4))];
    let mut setup = DeviceSetup { networks, entropy: Some(Entropy::default()), ..DeviceSetup::default() };
    let planned = table::plan(&mut setup, None).unwrap();
    let needs: Vec<_> = planned.iter().map(|device| device.io_workers().unwrap()).collect();
    assert_eq!(needs, [IoWorkers::Shared(4), IoWorkers::Shared(1)]);
}
