//! The groups of devices: which counter has which of Firecracker's names.
//!
//! Groups of devices that this version does not have are there with zeros, as Firecracker has them
//! without such devices. So are fields for which there is nothing to count here.

use block::BlockStats;
use machine::stats::{DeviceStats, DevicesStats, KeyboardStats, SerialStats};
use net::NetStats;
use sync::LatencyTotals;
use virtio::device::TransportStats;

use super::report::{Group, Of, Value};

/// The groups `block_ID` of drives, and `block`.
pub(super) fn block(drives: &[DeviceStats<BlockStats>]) -> Vec<Group> {
    per_device("block", "drive", drives, block_fields)
}

/// The groups `net_ID` of network interfaces, and `net`.
pub(super) fn net(networks: &[DeviceStats<NetStats>]) -> Vec<Group> {
    per_device("net", "interface", networks, net_fields)
}

type Fields = Vec<(&'static str, Value)>;

/// The group of each device of a kind, and that of all of them.
fn per_device<S: Default>(
    name: &'static str,
    label: &'static str,
    devices: &[DeviceStats<S>],
    fields: fn(&S, &TransportStats) -> Fields,
) -> Vec<Group> {
    let of_device = |device: &DeviceStats<S>| Group {
        name,
        of: Of::Device { label, id: device.id.clone() },
        fields: fields(&device.stats, &device.transport),
    };
    let mut groups: Vec<_> = devices.iter().map(of_device).collect();
    let zeros = fields(&S::default(), &TransportStats::default());
    groups.push(Group { name, of: Of::AllDevices, fields: zeros });
    groups
}

fn block_fields(stats: &BlockStats, transport: &TransportStats) -> Fields {
    let count = |counter: &sync::Counter| Value::Count(counter.get());
    vec![
        ("activate_fails", count(&stats.activate_fails)),
        ("cfg_fails", Value::Count(0)),
        ("no_avail_buffer", count(&stats.no_avail_buffer)),
        ("event_fails", count(&transport.device_errors)),
        ("execute_fails", count(&stats.execute_fails)),
        ("invalid_reqs_count", count(&stats.invalid_reqs_count)),
        ("flush_count", count(&stats.flush_count)),
        ("queue_event_count", count(&stats.queue_event_count)),
        ("rate_limiter_event_count", count(&stats.rate_limiter_event_count)),
        ("update_count", count(&stats.update_count)),
        ("update_fails", count(&stats.update_fails)),
        ("read_bytes", count(&stats.read_bytes)),
        ("write_bytes", count(&stats.write_bytes)),
        ("read_count", count(&stats.read_count)),
        ("write_count", count(&stats.write_count)),
        ("read_agg", Value::Latency(stats.read_latency.get())),
        ("write_agg", Value::Latency(stats.write_latency.get())),
        ("rate_limiter_throttled_events", count(&stats.rate_limiter_throttled_events)),
        ("io_engine_throttled_events", count(&stats.engine_throttled_events)),
        ("remaining_reqs_count", count(&stats.remaining_reqs_count)),
    ]
}

fn net_fields(stats: &NetStats, transport: &TransportStats) -> Fields {
    let count = |counter: &sync::Counter| Value::Count(counter.get());
    vec![
        ("activate_fails", count(&stats.activate_fails)),
        ("cfg_fails", Value::Count(0)),
        ("mac_address_updates", Value::Count(0)),
        ("no_rx_avail_buffer", count(&stats.no_rx_avail_buffer)),
        ("no_tx_avail_buffer", count(&stats.no_tx_avail_buffer)),
        ("event_fails", Value::Count(transport.device_errors.get() + stats.ctrl_fails.get())),
        ("rx_queue_event_count", count(&stats.rx_queue_event_count)),
        ("rx_event_rate_limiter_count", count(&stats.rx_rate_limiter_event_count)),
        ("rx_rate_limiter_throttled", count(&stats.rx_rate_limiter_throttled)),
        ("rx_tap_event_count", count(&stats.rx_tap_event_count)),
        ("rx_bytes_count", count(&stats.rx_bytes_count)),
        ("rx_packets_count", count(&stats.rx_packets_count)),
        ("rx_fails", count(&stats.rx_fails)),
        // One read of the backend is one frame.
        ("rx_count", count(&stats.rx_packets_count)),
        ("tap_read_fails", count(&stats.tap_read_fails)),
        ("tap_write_fails", count(&stats.tap_write_fails)),
        ("tap_write_agg", Value::Latency(stats.tap_write_latency.get())),
        ("tx_bytes_count", count(&stats.tx_bytes_count)),
        ("tx_malformed_frames", count(&stats.tx_malformed_frames)),
        ("tx_fails", Value::Count(stats.tap_write_fails.get() + stats.tx_malformed_frames.get())),
        ("tx_count", count(&stats.tx_packets_count)),
        ("tx_packets_count", count(&stats.tx_packets_count)),
        ("tx_queue_event_count", count(&stats.tx_queue_event_count)),
        ("tx_rate_limiter_event_count", count(&stats.tx_rate_limiter_event_count)),
        ("tx_rate_limiter_throttled", count(&stats.tx_rate_limiter_throttled)),
        ("tx_spoofed_mac_count", count(&stats.tx_spoofed_mac_count)),
        ("tx_remaining_reqs_count", count(&stats.tx_remaining_reqs_count)),
    ]
}

/// The group `i8042`.
pub(super) fn i8042(stats: Option<&KeyboardStats>) -> Group {
    let none = KeyboardStats::default();
    let stats = stats.unwrap_or(&none);
    Group::counts(
        "i8042",
        &[
            ("error_count", stats.refused_keys.get()),
            ("missed_read_count", stats.missed_reads.get()),
            ("missed_write_count", stats.missed_writes.get()),
            ("read_count", stats.reads.get()),
            ("reset_count", stats.resets.get()),
            ("write_count", stats.writes.get()),
        ],
    )
}

/// The group `uart`.
pub(super) fn uart(stats: Option<&SerialStats>) -> Group {
    let none = SerialStats::default();
    let stats = stats.unwrap_or(&none);
    Group::counts(
        "uart",
        &[
            ("error_count", 0),
            ("flush_count", 0),
            ("missed_read_count", 0),
            ("missed_write_count", stats.dropped.get()),
            ("read_count", stats.read.get()),
            ("write_count", stats.written.get()),
            ("rate_limiter_dropped_bytes", stats.limited.get()),
        ],
    )
}

/// The group `mmds`.
pub(super) fn mmds(stats: Option<&mmds::stats::Stats>) -> Group {
    let none = mmds::stats::Stats::default();
    let stats = stats.unwrap_or(&none);
    Group::counts(
        "mmds",
        &[
            ("rx_accepted", stats.rx_accepted.get()),
            ("rx_accepted_err", stats.rx_accepted_err.get()),
            ("rx_accepted_unusual", stats.rx_accepted_unusual.get()),
            ("rx_bad_eth", stats.rx_bad_eth.get()),
            ("rx_invalid_token", stats.rx_invalid_token.get()),
            ("rx_no_token", stats.rx_no_token.get()),
            ("rx_count", stats.rx_count.get()),
            ("tx_bytes", stats.tx_bytes.get()),
            ("tx_count", stats.tx_count.get()),
            ("tx_errors", stats.tx_errors.get()),
            ("tx_frames", stats.tx_frames.get()),
            ("connections_created", stats.connections_created.get()),
            ("connections_destroyed", stats.connections_destroyed.get()),
        ],
    )
}

/// The group `vsock`.
pub(super) fn vsock(device: Option<&DeviceStats<vsock::VsockStats>>) -> Group {
    let none = vsock::VsockStats::default();
    let stats = device.map_or(&none, |device| &*device.stats);
    Group::counts(
        "vsock",
        &[
            ("activate_fails", stats.activate_fails.get()),
            ("cfg_fails", 0),
            ("rx_queue_event_fails", 0),
            ("tx_queue_event_fails", 0),
            ("ev_queue_event_fails", 0),
            ("muxer_event_fails", device.map_or(0, |device| device.transport.device_errors.get())),
            ("conn_event_fails", 0),
            ("rx_queue_event_count", stats.rx_queue_event_count.get()),
            ("tx_queue_event_count", stats.tx_queue_event_count.get()),
            ("rx_bytes_count", stats.rx_bytes_count.get()),
            ("tx_bytes_count", stats.tx_bytes_count.get()),
            ("rx_packets_count", stats.rx_packets_count.get()),
            ("tx_packets_count", stats.tx_packets_count.get()),
            ("conns_added", stats.conns_added.get()),
            ("conns_killed", stats.conns_killed.get()),
            ("conns_removed", stats.conns_removed.get()),
            ("killq_resync", 0),
            ("tx_flush_fails", 0),
            ("tx_write_fails", stats.tx_write_fails.get()),
            ("rx_read_fails", stats.rx_read_fails.get()),
        ],
    )
}

/// The group `entropy`.
pub(super) fn entropy(device: Option<&DeviceStats<entropy::EntropyStats>>) -> Group {
    let none = entropy::EntropyStats::default();
    let stats = device.map_or(&none, |device| &*device.stats);
    Group::counts(
        "entropy",
        &[
            ("activate_fails", stats.activate_fails.get()),
            ("entropy_event_fails", stats.entropy_event_fails.get()),
            ("entropy_event_count", stats.entropy_event_count.get()),
            ("entropy_bytes", stats.entropy_bytes.get()),
            ("host_rng_fails", stats.host_rng_fails.get()),
            ("entropy_rate_limiter_throttled", stats.entropy_rate_limiter_throttled.get()),
            ("rate_limiter_event_count", stats.rate_limiter_event_count.get()),
        ],
    )
}

/// The group `interrupts`: of all virtio devices.
pub(super) fn interrupts(devices: Option<&DevicesStats>) -> Group {
    let sum =
        |of: fn(&TransportStats) -> u64| devices.map_or(0, |devices| devices.transports().map(of).sum());
    Group::counts(
        "interrupts",
        &[
            ("triggers", sum(|transport| transport.interrupts.get())),
            ("config_updates", sum(|transport| transport.vector_updates.get())),
        ],
    )
}

/// The group `balloon`, of a device that this version does not have.
pub(super) fn balloon() -> Group {
    Group::counts(
        "balloon",
        &[
            "activate_fails",
            "inflate_count",
            "stats_updates_count",
            "stats_update_fails",
            "deflate_count",
            "event_fails",
            "free_page_report_count",
            "free_page_report_freed",
            "free_page_report_fails",
            "free_page_hint_count",
            "free_page_hint_freed",
            "free_page_hint_fails",
        ]
        .map(|name| (name, 0)),
    )
}

/// The group `pmem`, of devices that this version does not have.
pub(super) fn pmem() -> Group {
    Group::counts(
        "pmem",
        &[
            "activate_fails",
            "cfg_fails",
            "event_fails",
            "queue_event_count",
            "rate_limiter_throttled_events",
            "rate_limiter_event_count",
        ]
        .map(|name| (name, 0)),
    )
}

/// The group `memory_hotplug`, of a device that this version does not have.
pub(super) fn memory_hotplug() -> Group {
    let (count, latency) = (Value::Count(0), Value::Latency(LatencyTotals::default()));
    Group::new(
        "memory_hotplug",
        vec![
            ("activate_fails", count),
            ("queue_event_fails", count),
            ("queue_event_count", count),
            ("plug_agg", latency),
            ("plug_count", count),
            ("plug_bytes", count),
            ("plug_fails", count),
            ("unplug_agg", latency),
            ("unplug_count", count),
            ("unplug_bytes", count),
            ("unplug_fails", count),
            ("unplug_discard_fails", count),
            ("unplug_all_agg", latency),
            ("unplug_all_count", count),
            ("unplug_all_fails", count),
            ("state_agg", latency),
            ("state_count", count),
            ("state_fails", count),
        ],
    )
}

/// Counters that Firecracker does not have.
pub(super) fn own(devices: &DevicesStats) -> Vec<Group> {
    let drive = |device: &DeviceStats<BlockStats>| Group {
        name: "block",
        of: Of::Device { label: "drive", id: device.id.clone() },
        fields: vec![("discard_count", Value::Count(device.stats.discard_count.get()))],
    };
    let network = |device: &DeviceStats<NetStats>| Group {
        name: "net",
        of: Of::Device { label: "interface", id: device.id.clone() },
        fields: vec![
            ("rx_late_frames", Value::Count(device.stats.rx_late_frames.get())),
            ("intercepted_rx_count", Value::Count(device.stats.intercepted_rx_count.get())),
            ("intercepted_tx_count", Value::Count(device.stats.intercepted_tx_count.get())),
            ("ctrl_fails", Value::Count(device.stats.ctrl_fails.get())),
            ("update_count", Value::Count(device.stats.update_count.get())),
        ],
    };
    let vsock = |device: &DeviceStats<vsock::VsockStats>| {
        let malformed = device.stats.malformed_count.get();
        let refused = device.stats.conns_refused.get();
        Group::counts("vsock", &[("malformed_count", malformed), ("conns_refused", refused)])
    };
    let drives = devices.drives.iter().map(drive);
    drives.chain(devices.networks.iter().map(network)).chain(devices.vsock.iter().map(vsock)).collect()
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;

    use super::super::deltas::{Deltas, LineValue};
    use super::super::report::Report;
    use super::*;

    fn device<S: Default>(id: &str) -> DeviceStats<S> {
        DeviceStats { id: id.to_owned(), stats: Arc::default(), transport: Arc::default() }
    }

    /// The number of a counter in a line of these groups.
    fn number(groups: Vec<Group>, key: &str, field: &str) -> u64 {
        let line = Deltas::default().next(&Report { groups });
        let group = line.iter().find(|group| group.key == key).unwrap();
        match group.fields.iter().find(|(name, _)| *name == field).unwrap().1 {
            LineValue::Number(number) => number,
            LineValue::Micros { sum, .. } => sum,
        }
    }

    #[test]
    fn each_network_has_a_group_and_all_have_a_sum() {
        let networks = [device::<NetStats>("eth0"), device("eth1")];
        networks[0].stats.tx_packets_count.add(3);
        networks[1].stats.tx_packets_count.add(4);
        networks[1].stats.tx_malformed_frames.add(1);
        networks[1].stats.tap_write_fails.add(2);
        networks[1].stats.tap_write_latency.record_many(8_000, 4);
        networks[1].transport.device_errors.add(1);
        for (key, field, expected) in [
            ("net_eth0", "tx_packets_count", 3),
            ("net_eth1", "tx_count", 4),
            ("net", "tx_packets_count", 7),
            ("net_eth1", "tx_fails", 3),
            ("net", "event_fails", 1),
            ("net_eth1", "tap_write_agg", 8),
            ("net", "tap_write_agg", 8),
        ] {
            assert_eq!(number(net(&networks), key, field), expected, "{key}.{field}");
        }
    }

    #[test]
    fn interrupts_are_those_of_all_devices() {
        let devices = DevicesStats {
            drives: vec![device("a"), device("b")],
            networks: vec![device("c")],
            entropy: Some(device("")),
            vsock: Some(device("")),
            metadata: None,
        };
        for transport in devices.transports() {
            transport.interrupts.add(2);
            transport.vector_updates.add(1);
        }
        assert_eq!(number(vec![interrupts(Some(&devices))], "interrupts", "triggers"), 10);
        assert_eq!(number(vec![interrupts(Some(&devices))], "interrupts", "config_updates"), 5);
        assert_eq!(number(vec![interrupts(None)], "interrupts", "triggers"), 0);
    }

    #[test]
    fn counters_of_single_devices_have_their_names() {
        let (socket, random) = (device::<vsock::VsockStats>(""), device::<entropy::EntropyStats>(""));
        socket.stats.conns_killed.add(5);
        random.stats.host_rng_fails.add(6);
        assert_eq!(number(vec![vsock(Some(&socket))], "vsock", "conns_killed"), 5);
        assert_eq!(number(vec![entropy(Some(&random))], "entropy", "host_rng_fails"), 6);
        let service = mmds::stats::Stats::default();
        service.rx_no_token.add(7);
        assert_eq!(number(vec![super::mmds(Some(&service))], "mmds", "rx_no_token"), 7);
    }
}
