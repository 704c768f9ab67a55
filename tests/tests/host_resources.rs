//! Resources of the host in a guest: huge pages, clocks, and a serial port without a reader.

use std::fs;
use std::path::{Path, PathBuf};
use std::time::Duration;

use serde_json::json;
use vesta_tests::counting::counting;
use vesta_tests::elf::Elf;
use vesta_tests::guest::{Guest, Kernel, ignore, start, vmm_path, vmm_with_api};
use vesta_tests::snapshots::{Files, pause};
use vesta_tests::vmm::{Vmm, VmmBuilder};

/// The longest boot on an emulated host.
const BOOT_TIMEOUT: Duration = Duration::from_mins(1);

/// Boots without the API; the guest runs `script`.
fn boot(kernel: Kernel, script: &str, shape: impl FnOnce(Guest) -> Guest) -> Vmm {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    let guest = Guest::linux(kernel, script, builder.dir()).unwrap();
    builder.arg("--no-api").with_config(&shape(guest).config()).unwrap().spawn().unwrap()
}

#[test]
fn the_guest_has_kvmclock_x2apic_and_the_tsc_deadline_timer() {
    let what = "dmesg | grep -iE 'kvm-clock|x2apic|deadline'\npoweroff -f";
    let mut vmm = boot(Kernel::quickest(), what, |guest| guest);
    let (code, output) = vmm.finish(BOOT_TIMEOUT).unwrap();
    assert_eq!(code, 0, "{output}");
    for feature in ["clocksource kvm-clock", "x2apic", "TSC deadline timer"] {
        assert!(output.contains(feature), "{feature} is missing: {output}");
    }
}

#[test]
fn both_kinds_of_huge_pages_are_used_if_available() {
    let mut vmm = boot(Kernel::quickest(), "poweroff -f", |guest| Guest {
        machine: json!({ "huge_pages": "Transparent" }),
        ..guest
    });
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT).unwrap(), 0);

    let Some(_pool) = Pool::of(64) else { ignore("the host has no 64 huge pages to give") };
    let mut vmm = boot(Kernel::quickest(), "poweroff -f", |guest| Guest {
        machine: json!({ "huge_pages": "2M" }),
        ..guest
    });
    assert_eq!(vmm.exit_code(BOOT_TIMEOUT).unwrap(), 0);
}

/// Pages in the host's pool of 2 MiB pages, as long as this value lives.
struct Pool(String);

impl Pool {
    const PATH: &str = "/proc/sys/vm/nr_hugepages";

    fn of(pages: u32) -> Option<Pool> {
        let pool = Pool(fs::read_to_string(Pool::PATH).unwrap());
        fs::write(Pool::PATH, (pages + 16).to_string()).unwrap();
        let there: u32 = fs::read_to_string(Pool::PATH).unwrap().trim().parse().unwrap();
        (there >= pages).then_some(pool)
    }
}

impl Drop for Pool {
    fn drop(&mut self) {
        fs::write(Pool::PATH, self.0.trim()).unwrap();
    }
}

/// A cgroup with a limit on huge pages. Its processes must have ended when it is dropped.
struct Group {
    path: PathBuf,
    /// Whether the root group's children had no limits before.
    enabled: bool,
}

impl Group {
    const ROOT: &str = "/sys/fs/cgroup";

    fn new() -> Option<Group> {
        let root = Path::new(Group::ROOT);
        let has = |file: &str| {
            let controllers = fs::read_to_string(root.join(file)).unwrap_or_default();
            controllers.split_whitespace().any(|controller| controller == "hugetlb")
        };
        if !has("cgroup.controllers") {
            return None;
        }
        let enabled = !has("cgroup.subtree_control");
        if enabled {
            fs::write(root.join("cgroup.subtree_control"), "+hugetlb").unwrap();
        }
        let path = root.join(format!("vesta-test-{}", std::process::id()));
        fs::create_dir(&path).unwrap();
        Some(Group { path, enabled })
    }

    fn limit(&self, pages: u64) {
        fs::write(self.path.join("hugetlb.2MB.max"), (pages << 21).to_string()).unwrap();
    }

    fn take(&self, vmm: &Vmm) {
        fs::write(self.path.join("cgroup.procs"), vmm.pid().to_string()).unwrap();
    }
}

impl Drop for Group {
    fn drop(&mut self) {
        fs::remove_dir(&self.path).unwrap();
        if self.enabled {
            fs::write(Path::new(Group::ROOT).join("cgroup.subtree_control"), "-hugetlb").unwrap();
        }
    }
}

#[test]
fn cgroup_limit_on_huge_pages_is_named() {
    const LIMIT: &str = "hugetlb.2MB.max";
    let Some(group) = Group::new() else { ignore("the host has no hugetlb controller of cgroup v2") };
    let Some(_pool) = Pool::of(64) else { ignore("the host has no 64 huge pages to give") };

    // The limit is hit by the monitor's own first write to guest memory.
    group.limit(0);
    let (mut vmm, mut api) = vmm_with_api(&[]).unwrap();
    group.take(&vmm);
    let kernel = vmm.dir().join("kernel");
    // mov edi, 0x1000000; page: mov [edi], edi; add edi, 4096; jmp page
    let code = [0xbf, 0, 0, 0, 1, 0x89, 0x3f, 0x81, 0xc7, 0, 0x10, 0, 0, 0xeb, 0xf6];
    fs::write(&kernel, Elf::of(&code).bytes()).unwrap();
    let guest = Guest { machine: json!({ "huge_pages": "2M" }), ..Guest::bare(&kernel) };
    guest.put(&mut api).unwrap();
    let refused = api.put("/actions", &json!({ "action_type": "InstanceStart" })).unwrap();
    assert!(refused.status == 400 && refused.fault().contains(LIMIT), "{refused:?}");
    assert_eq!(api.get("/").unwrap().json().unwrap()["state"], "Not started");

    // The limit is hit by the guest, later.
    group.limit(10);
    start(&mut api).unwrap();
    let (code, output) = vmm.finish(BOOT_TIMEOUT).unwrap();
    assert!(code == 1 && output.contains(LIMIT), "{code} {output}");

    // The limit is hit by a load. Its memory file has ordinary pages.
    let (saved, mut api, _serial) = counting(&json!({})).unwrap();
    let files = Files::new(saved.dir(), "a");
    pause(&mut api).unwrap();
    api.put("/snapshot/create", &files.create("Full")).unwrap().ok().unwrap();
    group.limit(0);
    let (vmm, mut api) = vmm_with_api(&[]).unwrap();
    group.take(&vmm);
    let mut load = files.load();
    load["huge_pages"] = json!("2M");
    let refused = api.put("/snapshot/load", &load).unwrap();
    assert!(refused.status == 400 && refused.fault().contains(LIMIT), "{refused:?}");
    load["huge_pages"] = json!("None");
    api.put("/snapshot/load", &load).unwrap().ok().unwrap();
}

#[test]
fn a_triple_fault_is_reported_and_ends_with_status_0() {
    let mut vmm = boot(Kernel::quickest(), "reboot -f", |guest| {
        guest.boot_args("console=ttyS0 quiet panic=-1 reboot=t")
    });
    let (code, output) = vmm.finish(BOOT_TIMEOUT).unwrap();
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("triple fault") && output.contains("RIP"), "{output}");
}

#[test]
fn a_serial_fifo_without_reader_does_not_block_the_guest() {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    // More than the monitor and the FIFO buffer together.
    let script = "i=0; while [ $i -lt 1100 ]; do echo 0123456789012345678901234567890123456789012345678901234567890123456789; i=$((i+1)); done\npoweroff -f";
    let guest = Guest::linux(Kernel::quickest(), script, builder.dir()).unwrap();
    let fifo = builder.dir().join("fifo");
    rustix::fs::mkfifoat(rustix::fs::CWD, &fifo, rustix::fs::Mode::from_raw_mode(0o600)).unwrap();
    let unread = std::fs::OpenOptions::new().read(true).write(true).open(&fifo).unwrap();
    rustix::pipe::fcntl_setpipe_size(&unread, 4096).unwrap();
    let mut config = guest.config();
    config["serial"] = json!({"serial_out_path": fifo});
    let mut vmm = builder.arg("--no-api").with_config(&config).unwrap().spawn().unwrap();
    let (code, output) = vmm.finish(BOOT_TIMEOUT).unwrap();
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("bytes dropped"), "{output}");
}

#[test]
fn a_write_to_the_boot_timer_logs_the_boot_time() {
    let builder = VmmBuilder::new(&vmm_path()).unwrap();
    let guest = Guest::linux(Kernel::Tuned, "devmem 0xC0000000 8 123\npoweroff -f", builder.dir()).unwrap();
    let mut vmm =
        builder.arg("--no-api").arg("--boot-timer").with_config(&guest.config()).unwrap().spawn().unwrap();
    let (code, output) = vmm.finish(BOOT_TIMEOUT).unwrap();
    assert_eq!(code, 0, "{output}");
    assert!(output.contains("Guest-boot-time ="), "{output}");
}
