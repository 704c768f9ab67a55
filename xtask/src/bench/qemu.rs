//! QEMU's `microvm` machine, as all benchmarks start it.

use vesta_tests::guest::Guest;
use vesta_tests::vmm::VmmBuilder;

/// Adds the arguments for this guest on KVM: its serial port on standard output, modern virtio, and
/// no default devices.
pub(super) fn microvm(builder: VmmBuilder, guest: &Guest) -> VmmBuilder {
    let fixed = [
        ["-M", "microvm"],
        ["-accel", "kvm"],
        ["-cpu", "host"],
        ["-display", "none"],
        ["-serial", "stdio"],
        ["-name", "guest,debug-threads=on"],
        ["-global", "virtio-mmio.force-legacy=false"],
    ];
    let builder = ["-nodefaults", "-no-user-config", "-no-reboot"].iter().fold(builder, VmmBuilder::arg);
    let builder = fixed.as_flattened().iter().fold(builder, VmmBuilder::arg);
    let builder = builder.arg("-smp").arg(guest.vcpus.to_string()).arg("-m").arg(guest.mem_mib.to_string());
    let builder = builder.arg("-kernel").arg(&guest.kernel);
    let builder = match &guest.initrd {
        Some(initrd) => builder.arg("-initrd").arg(initrd),
        None => builder,
    };
    builder.arg("-append").arg(guest.boot_args.as_deref().unwrap_or_default())
}
