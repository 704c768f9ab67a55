//! Strategies for property tests of this and other crates: any configuration that passes its
//! checks.
//!
//! Each struct is built field by field. So a new field does not compile until it is added here.

use std::path::PathBuf;

use proptest::prelude::*;

use crate::absent::{Absent, AbsentList};
use crate::{
    Bitmap, BootSource, CacheType, CpuConfig, CpuConfigSource, CpuTemplate, CpuidModifier, CpuidRegister,
    Drive, Entropy, HugePages, IoEngine, KvmCapability, LogLevel, Logger, MAX_DRIVE_QUEUES, MAX_MEM_SIZE_MIB,
    MAX_QUEUE_PAIRS, MAX_REFILL_TIME_MS, MIN_MTU, MacAddress, MachineConfig, Metrics, MmdsConfig,
    MmdsVersion, MsrModifier, NetBackendKind, NetworkInterface, Overlay, RateLimiter, RegisterModifier,
    Serial, TokenBucket, VmConfig, Vsock,
};

/// Paths that JSON can represent.
fn path() -> impl Strategy<Value = PathBuf> {
    "[ -~]{1,40}".prop_map(PathBuf::from)
}

fn boot_source() -> impl Strategy<Value = BootSource> {
    (path(), prop::option::of(path()), prop::option::of("[ -~]{0,200}")).prop_map(
        |(kernel_image_path, initrd_path, boot_args)| BootSource {
            kernel_image_path,
            initrd_path,
            boot_args,
        },
    )
}

fn machine_config() -> impl Strategy<Value = MachineConfig> {
    let pages = prop::sample::select(vec![HugePages::None, HugePages::Transparent, HugePages::Hugetlbfs2M]);
    let template = prop::sample::select(vec![
        CpuTemplate::C3,
        CpuTemplate::T2,
        CpuTemplate::T2S,
        CpuTemplate::T2CL,
        CpuTemplate::T2A,
        CpuTemplate::None,
    ]);
    (1..=64_u8, any::<bool>(), 1..=MAX_MEM_SIZE_MIB / 2, any::<bool>(), pages, prop::option::of(template))
        .prop_map(|(cores, smt, pairs, track_dirty_pages, huge_pages, cpu_template)| MachineConfig {
            vcpu_count: if smt { 2 * cores } else { cores },
            mem_size_mib: 2 * pairs,
            smt,
            cpu_template,
            track_dirty_pages,
            huge_pages,
            gdb_socket_path: None,
        })
}

/// Any custom CPU template that passes [`CpuConfig::check`].
pub fn cpu_config() -> impl Strategy<Value = CpuConfig> {
    let capability = prop_oneof![
        any::<u32>().prop_map(KvmCapability::Require),
        any::<u32>().prop_map(KvmCapability::Ignore),
    ];
    let register = (prop::sample::select(CpuidRegister::ALL.to_vec()), any::<(u64, u64)>()).prop_map(
        |(register, (mask, value))| RegisterModifier { register, bitmap: Bitmap::new(mask, value) },
    );
    let leaf = (any::<(u32, u32)>(), 0..=7_u32, prop::collection::vec(register, 0..5))
        .prop_map(|((leaf, subleaf), flags, modifiers)| CpuidModifier { leaf, subleaf, flags, modifiers });
    let msr = any::<(u32, u64, u64)>()
        .prop_map(|(addr, mask, value)| MsrModifier { addr, bitmap: Bitmap::new(mask, value) });
    let list = 0..4;
    (
        prop::collection::vec(capability, list.clone()),
        prop::collection::vec(leaf, list.clone()),
        prop::collection::vec(msr, list),
    )
        .prop_map(|(kvm_capabilities, cpuid_modifiers, msr_modifiers)| CpuConfig {
            kvm_capabilities,
            cpuid_modifiers,
            msr_modifiers,
        })
}

fn logger() -> impl Strategy<Value = Logger> {
    let level = prop::sample::select(vec![
        LogLevel::Off,
        LogLevel::Trace,
        LogLevel::Debug,
        LogLevel::Info,
        LogLevel::Warning,
        LogLevel::Error,
    ]);
    (
        prop::option::of(path()),
        prop::option::of(level),
        any::<Option<bool>>(),
        any::<Option<bool>>(),
        prop::option::of("[a-z:]{0,20}"),
    )
        .prop_map(|(log_path, level, show_level, show_log_origin, module)| Logger {
            log_path,
            level,
            show_level,
            show_log_origin,
            module,
        })
}

fn bucket() -> impl Strategy<Value = TokenBucket> {
    (any::<u64>(), any::<Option<u64>>(), 0..=MAX_REFILL_TIME_MS)
        .prop_map(|(size, one_time_burst, refill_time)| TokenBucket { size, one_time_burst, refill_time })
}

fn rate_limiter() -> impl Strategy<Value = Option<RateLimiter>> {
    prop::option::of(
        (prop::option::of(bucket()), prop::option::of(bucket()))
            .prop_map(|(bandwidth, ops)| RateLimiter { bandwidth, ops }),
    )
}

fn serial() -> impl Strategy<Value = Serial> {
    (prop::option::of(path()), prop::option::of(bucket()))
        .prop_map(|(serial_out_path, rate_limiter)| Serial { serial_out_path, rate_limiter })
}

fn vsock() -> impl Strategy<Value = Vsock> {
    // Longer than the other path, so that they differ.
    let seqpacket = prop::option::of("[ -~]{41,50}");
    (any::<u32>(), path(), prop::option::of("[a-z]{1,9}"), seqpacket).prop_map(
        |(guest_cid, uds_path, vsock_id, seqpacket)| Vsock {
            guest_cid,
            uds_path,
            vsock_id,
            seqpacket_uds_path: seqpacket.map(PathBuf::from),
        },
    )
}

fn overlay() -> impl Strategy<Value = Overlay> {
    (path(), prop::collection::vec(path(), 0..3), prop::option::of(0..=16_u64 << 20))
        .prop_map(|(path, layers, size_mib)| Overlay { path, layers, size_mib })
}

/// A drive without an id, not the root device.
fn drive() -> impl Strategy<Value = Drive> {
    let partuuid = prop::option::of("[0-9a-f]{8}-[0-9]{2}");
    let io_engine = prop::option::of(prop::sample::select(vec![IoEngine::Sync, IoEngine::Async]));
    let cache_type = prop::sample::select(vec![CacheType::Unsafe, CacheType::Writeback]);
    let queues = prop::option::of((1..=MAX_DRIVE_QUEUES).prop_flat_map(|queues| {
        (Just(queues), prop::option::of(1..=queues), prop::option::of((4..=10_u32).prop_map(|n| 1_u16 << n)))
    }));
    (
        (partuuid, cache_type, any::<bool>(), path(), rate_limiter()),
        (io_engine, queues, prop::option::of(overlay()), any::<Option<bool>>()),
    )
        .prop_map(
            |(
                (partuuid, cache_type, is_read_only, path, rate_limiter),
                (io_engine, queues, overlay, lock),
            )| {
                let (num_queues, io_threads, queue_size) = match queues {
                    Some((queues, threads, size)) => (Some(queues), threads, size),
                    None => (None, None, None),
                };
                Drive {
                    drive_id: String::new(),
                    is_root_device: false,
                    partuuid,
                    cache_type,
                    is_read_only,
                    path_on_host: Some(path),
                    rate_limiter,
                    io_engine,
                    socket: None,
                    num_queues,
                    io_threads: io_threads.filter(|_| overlay.is_none()),
                    queue_size,
                    overlay,
                    lock,
                }
            },
        )
}

fn drives() -> impl Strategy<Value = Vec<Drive>> {
    (prop::collection::vec(drive(), 0..4), any::<bool>(), "[a-zA-Z0-9_]{0,20}").prop_map(
        |(mut drives, root, id)| {
            for (at, drive) in drives.iter_mut().enumerate() {
                drive.drive_id = format!("{id}{at}");
                drive.is_root_device = root && at == 0;
            }
            drives
        },
    )
}

/// An interface whose id, tap, descriptors, socket and address are those of number `at`.
fn network(at: u8) -> impl Strategy<Value = NetworkInterface> {
    #[derive(Debug, Clone, Copy, PartialEq)]
    enum Kind {
        Tap,
        Descriptors,
        Vhost,
        Passt,
    }
    let kind = prop::sample::select(vec![Kind::Tap, Kind::Descriptors, Kind::Vhost, Kind::Passt]);
    let queues = prop::option::of((1..=MAX_QUEUE_PAIRS).prop_flat_map(|pairs| {
        (Just(pairs), prop::option::of(1..=pairs), prop::option::of((6..=10_u32).prop_map(|n| 1_u16 << n)))
    }));
    let mac = prop::option::of(any::<[u8; 4]>());
    let limiters = (rate_limiter(), rate_limiter());
    (kind, queues, mac, prop::option::of(MIN_MTU..), limiters).prop_map(
        move |(kind, queues, mac, mtu, (rx, tx))| {
            let queues = queues.filter(|_| kind != Kind::Passt);
            let (num_queues, io_threads, queue_size) = match queues {
                Some((pairs, threads, size)) => (Some(pairs), threads, size),
                None => (None, None, None),
            };
            let name = format!("tap{at}");
            let first = 100 * i32::from(at);
            NetworkInterface {
                iface_id: format!("eth{at}"),
                host_dev_name: matches!(kind, Kind::Tap | Kind::Vhost).then_some(name),
                guest_mac: mac.map(|[a, b, c, d]| MacAddress([6, at, a, b, c, d])),
                mtu,
                rx_rate_limiter: rx.filter(|_| kind != Kind::Vhost),
                tx_rate_limiter: tx.filter(|_| kind != Kind::Vhost),
                backend: match kind {
                    Kind::Tap | Kind::Descriptors => NetBackendKind::Tap,
                    Kind::Vhost => NetBackendKind::Vhost,
                    Kind::Passt => NetBackendKind::Passt,
                },
                fds: (kind == Kind::Descriptors)
                    .then(|| (first..first + i32::from(num_queues.unwrap_or(1))).collect()),
                socket: (kind == Kind::Passt).then(|| format!("/run/passt{at}").into()),
                num_queues,
                io_threads,
                queue_size,
            }
        },
    )
}

/// The metadata service, through those of `networks` that can reach it.
fn mmds(networks: &[NetworkInterface]) -> BoxedStrategy<Option<MmdsConfig>> {
    let reach =
        |network: &&NetworkInterface| network.backend != NetBackendKind::Vhost && network.num_queues() == 1;
    let ids: Vec<_> = networks.iter().filter(reach).map(|network| network.iface_id.clone()).collect();
    if ids.is_empty() {
        return Just(None).boxed();
    }
    let version = prop::sample::select(vec![MmdsVersion::V1, MmdsVersion::V2]);
    let address = prop::option::of((1..=254_u8, any::<u8>()));
    let count = ids.len();
    (version, prop::sample::subsequence(ids, 1..=count), address, any::<bool>())
        .prop_map(|(version, network_interfaces, address, imds_compat)| {
            Some(MmdsConfig {
                version,
                network_interfaces,
                ipv4_address: address.map(|(c, d)| [169, 254, c, d].into()),
                imds_compat,
            })
        })
        .boxed()
}

fn metrics() -> impl Strategy<Value = Metrics> {
    let properties = prop::collection::btree_map("\\PC{0,4}", "\\PC{0,8}", 0..3);
    (path(), any::<bool>(), properties).prop_map(|(metrics_path, emit_id, properties)| Metrics {
        metrics_path,
        emit_id,
        properties,
    })
}

/// Any configuration that passes [`VmConfig::check`].
pub fn vm_config() -> impl Strategy<Value = VmConfig> {
    let networks = (0..4_usize)
        .prop_flat_map(|count| (0..count).map(|at| network(at as u8)).collect::<Vec<_>>())
        .prop_flat_map(|networks| (mmds(&networks), Just(networks)));
    let entropy = rate_limiter().prop_map(|rate_limiter| Entropy { rate_limiter });
    (
        (
            boot_source(),
            machine_config(),
            (prop::option::of(logger()), prop::option::of(metrics())),
            prop::option::of(serial()),
        ),
        (drives(), prop::option::of(entropy), prop::option::of(vsock()), networks),
        prop::option::of(cpu_config().prop_map(CpuConfigSource::Inline)),
    )
        .prop_map(
            |(
                (boot_source, machine_config, (logger, metrics), serial),
                (drives, entropy, vsock, (mmds_config, network_interfaces)),
                cpu_config,
            )| {
                VmConfig {
                    boot_source,
                    machine_config,
                    logger,
                    serial,
                    drives,
                    entropy,
                    vsock,
                    mmds_config,
                    network_interfaces,
                    balloon: Absent,
                    cpu_config,
                    memory_hotplug: Absent,
                    metrics,
                    pmem: AbsentList,
                }
            },
        )
}
