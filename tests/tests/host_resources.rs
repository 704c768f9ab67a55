//! What a guest has of its host: huge pages, clocks, a serial port that nobody may read.

use std::time::Duration;

use serde_json::json;
use vesta_tests::guest::{Guest, Kernel, vmm_path};
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// Longest that a whole boot may take where a host is emulated.
const BOOT: Duration = Duration::from_mins(1);

/// Boots without the API; the guest runs `script`.
fn boot(kernel: Kernel, script: &str, shape: impl FnOnce(Guest) -> Guest) -> Vmm {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    let guest = Guest::linux(kernel, script, builder.dir()).unwrap();
    builder.arg("--no-api").with_config(&shape(guest).config()).unwrap().spawn().unwrap()
}

#[test]
fn the_guest_has_kvms_clock_x2apic_and_the_deadline_timer() {
    let what = "dmesg | grep -iE 'kvm-clock|x2apic|deadline'\npoweroff -f";
    let mut vmm = boot(Kernel::quickest(), what, |guest| guest);
    let (code, said) = vmm.finish(BOOT).unwrap();
    assert_eq!(code, 0, "{said}");
    for feature in ["clocksource kvm-clock", "x2apic", "TSC deadline timer"] {
        assert!(said.contains(feature), "{feature} is missing: {said}");
    }
}

#[test]
fn huge_pages_of_both_kinds_are_taken_where_the_host_has_them() {
    let mut vmm = boot(Kernel::quickest(), "poweroff -f", |guest| Guest {
        machine: json!({ "huge_pages": "Transparent" }),
        ..guest
    });
    assert_eq!(vmm.exit_code(BOOT).unwrap(), 0);

    // The pool of 2 MiB pages: enough for this guest, and given back afterwards.
    let pool = "/proc/sys/vm/nr_hugepages";
    let before = std::fs::read_to_string(pool).unwrap();
    std::fs::write(pool, "80").unwrap();
    let enough = std::fs::read_to_string(pool).unwrap().trim().parse::<u32>().unwrap() >= 64;
    let code = enough.then(|| {
        let mut vmm = boot(Kernel::quickest(), "poweroff -f", |guest| Guest {
            machine: json!({ "huge_pages": "2M" }),
            ..guest
        });
        vmm.exit_code(BOOT)
    });
    std::fs::write(pool, before.trim()).unwrap();
    match code {
        Some(code) => assert_eq!(code.unwrap(), 0),
        None => vesta_tests::guest::ignore("the host has no 64 huge pages to give"),
    }
}

#[test]
fn reboot_by_triple_fault_ends_with_status_0_and_is_reported() {
    let mut vmm = boot(Kernel::quickest(), "reboot -f", |guest| {
        guest.boot_args("console=ttyS0 quiet panic=-1 reboot=t")
    });
    let (code, said) = vmm.finish(BOOT).unwrap();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("triple fault") && said.contains("RIP"), "{said}");
}

#[test]
fn a_serial_fifo_that_nobody_reads_does_not_stop_the_guest() {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    // More than the monitor and the FIFO hold together.
    let script = "i=0; while [ $i -lt 1100 ]; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; i=$((i+1)); done\npoweroff -f";
    let guest = Guest::linux(Kernel::quickest(), script, builder.dir()).unwrap();
    let fifo = builder.dir().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let nobody = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    rustix::pipe::fcntl_setpipe_size(&nobody, 4096).unwrap();
    let mut config = guest.config();
    config["serial"] = json!({"serial_out_path": fifo});
    let mut vmm = builder.arg("--no-api").with_config(&config).unwrap().spawn().unwrap();
    let (code, said) = vmm.finish(BOOT).unwrap();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("bytes dropped"), "{said}");
}

#[test]
fn a_guest_that_writes_to_the_boot_timer_is_timed() {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    let guest = Guest::linux(Kernel::Tuned, "devmem 0xC0000000 8 123\npoweroff -f", builder.dir()).unwrap();
    let mut vmm =
        builder.arg("--no-api").arg("--boot-timer").with_config(&guest.config()).unwrap().spawn().unwrap();
    let (code, said) = vmm.finish(BOOT).unwrap();
    assert_eq!(code, 0, "{said}");
    assert!(said.contains("Guest-boot-time ="), "{said}");
}
