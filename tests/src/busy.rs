//! Guests that use and check processors, disks, networks, vsock, timers and random numbers until a
//! disk tells them to stop.
//!
//! A guest with [`Disks`] uses only disks, processors and entropy; one on a [`BusyHost`] also a
//! network and vsock. The guest prints `WRONG ...` or `FAILED ...` where data or a device is wrong,
//! `VERIFIED ...` for each part that was right to the end, and at last `RANDOM`, `RESEEDED` (how
//! often its kernel was notified of a new VM generation) and `LAST`.

use std::fs;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};

use crate::api::ApiClient;
use crate::disks::{DiskGuest, disk, drive, output_of, with};
use crate::exchange;
use crate::guest::{BOOT_TIMEOUT, TIMEOUT, Transport};
use crate::host_net::HostNet;
use crate::process::Orphans;
use crate::serial_file::{wait_for_text_after, word};
use crate::snapshots::{Files, copy, pause, restore, resume};
use crate::vmm::Vmm;
use crate::vsock::{connect, port};

/// Keeps the processors, the disks, the timers and the source of entropy busy.
const LOAD: &str = r#"
going() { [ ! -e /stop ]; }
right=$(md5sum </bin/busybox)
( while going; do
    [ "$(md5sum </bin/busybox)" = "$right" ] || echo WRONG sum
    n=$((n+1)); echo SUM $n
  done ) &
( last=0; while going; do
    usleep 100000
    read up rest </proc/uptime; up=$(echo $up | tr -d .)
    [ $up -ge $last ] || echo WRONG time $up after $last
    last=$up; n=$((n+1)); echo TICK $n
  done ) &
( while going; do
    head -c 64 /dev/hwrng | md5sum >>/numbers
    echo NUMBER; usleep 100000
  done ) &
disk-tool until /stop vda 7 2 &
disk-tool until /stop vdb 8 2 &
"#;

/// Keeps a connection over the network and one over vsock busy, and serves connections from the
/// host.
const NETWORK_LOAD: &str = "
ip address add 10.0.0.2/24 dev eth0; ip link set eth0 up
net-tool until /stop 10.0.0.1:7 &
guest-vsock until /stop 700 &
guest-vsock serve & serves=$!
";

/// Waits until a disk says `stop`, and prints the results.
const END: &str = r#"
until dd if=/dev/vdc bs=512 count=1 iflag=direct 2>/dev/null | grep -q stop; do usleep 200000; done
touch /stop
[ -z $serves ] || kill $serves
wait
[ $(sort /numbers | uniq -d | wc -l) = 0 ] || echo WRONG numbers
echo RANDOM $(head -c 16 /dev/urandom | hexdump -v -e '/1 "%02x"')
echo RESEEDED $(dmesg | grep -c 'crng reseeded due to virtual machine fork')
echo LAST
poweroff -f"#;

/// What such a guest prints repeatedly while all is well.
const PROGRESS_MARKS: [&str; 5] = ["SUM ", "TICK ", "NUMBER", "FLUSHED vda", "FLUSHED vdb"];
/// The same for networks.
const NETWORK_PROGRESS_MARKS: [&str; 2] = ["EXCHANGED net", "EXCHANGED vsock"];

/// Paths of the programs in `tests/src/bin` that such guests run.
#[derive(Debug, Clone, Copy)]
pub struct Programs {
    /// `disk-tool`
    pub disk_tool: &'static str,
    /// `net-tool`
    pub net_tool: &'static str,
    /// `guest-vsock`
    pub guest_vsock: &'static str,
}

/// The disks of such a guest: a raw one, one with an overlay, and one that tells it to stop.
#[derive(Debug)]
pub struct Disks {
    /// The raw disk, which it writes to.
    pub raw: PathBuf,
    /// The base of the overlay.
    pub base: PathBuf,
    /// The overlay, which it writes to.
    pub overlay: PathBuf,
    /// The disk that it polls.
    pub control: PathBuf,
}

impl Disks {
    /// Makes new disks in `dir`.
    pub fn new(dir: &Path) -> Result<Disks> {
        let control = dir.join("control");
        fs::write(&control, [0; 4096])?;
        let (raw, base) = (disk(dir, "raw", 4)?, disk(dir, "base", 4)?);
        Ok(Disks { raw, base, overlay: dir.join("overlay"), control })
    }

    /// Boots a busy guest with these disks.
    pub fn guest(&self, transport: Transport, disk_tool: &str, machine: &Value) -> Result<Vmm> {
        self.add_to(DiskGuest::new(transport)?, disk_tool, machine).run(&format!("{LOAD}{END}"))
    }

    fn add_to(&self, guest: DiskGuest, disk_tool: &str, machine: &Value) -> DiskGuest {
        let raw = json!({"io_engine": "Sync", "cache_type": "Writeback"});
        let over = json!({"io_engine": "Async", "overlay": {"path": self.overlay}});
        guest
            .tool(disk_tool)
            .vcpus(2)
            .machine(machine.clone())
            .entropy(json!({}))
            .drive(with(drive("raw", &self.raw), &raw))
            .drive(with(drive("over", &self.base), &over))
            .drive(with(drive("control", &self.control), &json!({"is_read_only": true})))
    }

    /// Copies the disks that are written to. Returns also the `drives` field for `/snapshot/load`.
    pub fn copies(&self, dir: &Path, name: &str) -> Result<(Disks, Value)> {
        let path = |what: &str| dir.join(format!("{what}-{name}"));
        let copies = Disks {
            raw: copy(&self.raw, &path("raw"))?,
            base: self.base.clone(),
            overlay: copy(&self.overlay, &path("overlay"))?,
            control: copy(&self.control, &path("control"))?,
        };
        let drives = json!([
            {"drive_id": "raw", "path_on_host": copies.raw},
            {"drive_id": "over", "overlay": {"path": copies.overlay}},
            {"drive_id": "control", "path_on_host": copies.control},
        ]);
        Ok((copies, drives))
    }

    /// Tells the guest to stop.
    pub fn stop(&self) -> Result<()> {
        let mut sector = [0; 4096];
        sector[..5].copy_from_slice(b"stop\n");
        Ok(fs::write(&self.control, sector)?)
    }
}

/// The host's side of a guest that uses all devices. This thread is in its network namespace.
#[derive(Debug)]
pub struct BusyHost {
    /// Its disks.
    pub disks: Disks,
    /// The directory of disks and sockets.
    dir: PathBuf,
    net: HostNet,
}

impl BusyHost {
    /// The address and the port that the guest's network load goes to.
    const ADDRESS: (&str, u16) = ("10.0.0.1", 7);
    /// The port of the host that its vsock load goes to.
    const PORT: u32 = 700;

    /// Makes it in an empty directory.
    pub fn new(dir: &Path) -> Result<BusyHost> {
        let place = BusyHost { disks: Disks::new(dir)?, dir: dir.to_owned(), net: HostNet::new()? };
        let (address, port) = Self::ADDRESS;
        place.net.tap("tap0", &format!("{address}/24"), "")?;
        place.net.use_common_mac("tap0")?;
        place.net.echo(&format!("{address}:{port}"))?;
        place.sockets("v")?;
        Ok(place)
    }

    /// Boots a busy guest.
    pub fn guest(&self, transport: Transport, programs: Programs, machine: &Value) -> Result<Vmm> {
        let guest = DiskGuest::new(transport)?
            .program("net-tool", programs.net_tool)
            .program("guest-vsock", programs.guest_vsock)
            .device("network-interfaces", json!([{"iface_id": "eth0", "host_dev_name": "tap0"}]))
            .device("vsock", json!({"guest_cid": 3, "uds_path": self.socket("v")}));
        let guest = self.disks.add_to(guest, programs.disk_tool, machine);
        guest.run(&format!("ip link set lo up{LOAD}{NETWORK_LOAD}{END}"))
    }

    /// Makes sockets and a tap of that name for a clone of the guest. Returns the overrides for a
    /// load or a fork. Call [`BusyHost::move_tap`] before the clone runs.
    fn overrides(&self, name: &str) -> Result<Value> {
        self.net.tap(name, "", "")?;
        self.net.use_common_mac(name)?;
        Ok(json!({
            "network_overrides": [{"iface_id": "eth0", "host_dev_name": name}],
            "vsock_override": {"uds_path": self.sockets(name)?},
        }))
    }

    /// Moves that clone's tap to a network of its own, with the same addresses.
    fn move_tap(&self, name: &str) -> Result<()> {
        let (address, port) = Self::ADDRESS;
        self.net.isolate_tap(name, &format!("{address}/24"), port)
    }

    /// Restores a snapshot in a new monitor, with its guest in another network.
    pub fn restore_elsewhere(&self, transport: Transport, name: &str, load: &Value) -> Result<Vmm> {
        let load = with(with(load.clone(), &self.overrides(name)?), &json!({"resume_vm": false}));
        let (vmm, mut api) = restore(transport, &load)?;
        self.move_tap(name)?;
        resume(&mut api)?;
        connect(&self.socket(name), port::ECHO).context("the guest in another network")?;
        Ok(vmm)
    }

    /// The socket path of that clone's vsock device.
    pub fn socket(&self, name: &str) -> PathBuf {
        self.dir.join(format!("{name}.vsock"))
    }

    /// Serves the guest's vsock connections.
    fn sockets(&self, name: &str) -> Result<PathBuf> {
        let socket = self.socket(name);
        let path = format!("{}_{}", socket.display(), Self::PORT);
        let listener = UnixListener::bind(&path).context(path)?;
        std::thread::spawn(move || exchange::echo_all(listener.incoming()));
        Ok(socket)
    }
}

/// A child of a fork of such a guest.
#[derive(Debug)]
pub struct ForkedGuest {
    /// The file with the output of its guest.
    pub serial: PathBuf,
    /// Its API.
    pub api: ApiClient,
}

impl BusyHost {
    /// Forks a running microVM. The child has that id, and a network and sockets of its own.
    pub fn fork(&self, parent: &mut ApiClient, id: &str) -> Result<(ForkedGuest, Orphans)> {
        let path = |what: &str| self.dir.join(format!("{id}.{what}"));
        let (serial, api) = (path("serial"), path("api"));
        // It is resumed below, when its tap is in its namespace.
        let child = json!({
            "id": id,
            "api_socket": api,
            "serial": {"serial_out_path": serial},
            "resume": false,
        });
        let child = with(child, &self.overrides(id)?);
        let reply = parent.put("/fork", &json!({"children": [child]}))?.ok()?.json()?;
        let orphans = Orphans::of_fork(&reply)?;
        self.move_tap(id)?;
        let mut api = ApiClient::new(&api);
        resume(&mut api)?;
        Ok((ForkedGuest { serial, api }, orphans))
    }
}

/// Waits until each part of the guest's load has made progress.
pub fn wait_for_progress(vmm: &Vmm) -> Result<()> {
    wait_for_signs(vmm, &PROGRESS_MARKS)
}

/// The same for a guest with networks.
pub fn wait_for_all_progress(vmm: &Vmm) -> Result<()> {
    wait_for_signs(vmm, &[&PROGRESS_MARKS[..], &NETWORK_PROGRESS_MARKS].concat())
}

fn wait_for_signs(vmm: &Vmm, signs: &[&str]) -> Result<()> {
    let from = vmm.stdout.len();
    for sign in signs {
        vmm.stdout.wait_for_after(from, sign, BOOT_TIMEOUT)?;
    }
    Ok(())
}

/// The same for a guest with networks whose output is in a file.
pub fn wait_for_all_progress_in(serial: &Path) -> Result<()> {
    let from = fs::read(serial)?.len();
    for sign in PROGRESS_MARKS.iter().chain(&NETWORK_PROGRESS_MARKS) {
        wait_for_text_after(serial, from, sign, BOOT_TIMEOUT)?;
    }
    Ok(())
}

/// Saves the guest and kills its monitor, so that its disks do not change.
pub fn save_and_kill(vmm: Vmm, files: &Files, kind: &str) -> Result<()> {
    let mut api = vmm.ready_client(TIMEOUT)?;
    pause(&mut api)?;
    api.put("/snapshot/create", &files.create(kind))?.ok()?;
    drop(vmm);
    Ok(())
}

/// Stops the guest, checks its results, and returns its output.
pub fn finish_and_check(mut vmm: Vmm, disks: &Disks) -> Result<String> {
    disks.stop()?;
    let output = output_of(&mut vmm)?;
    check_output(&output)?;
    Ok(output)
}

/// Checks the output of a guest that has ended.
pub fn check_output(output: &str) -> Result<()> {
    for mark in ["VERIFIED vda", "VERIFIED vdb", "LAST"] {
        ensure!(output.contains(mark), "no {mark}: {output}");
    }
    for mark in ["WRONG", "FAILED", "Call Trace"] {
        ensure!(!output.contains(mark), "{mark}: {output}");
    }
    Ok(())
}

/// Checks the output of a guest with networks that was restored or forked `lives` times and lost
/// `tcp_losses` TCP connections. It loses one vsock connection in each restore or fork.
pub fn check_output_after(output: &str, lives: u32, tcp_losses: u32) -> Result<()> {
    check_output(output)?;
    for (mark, right) in [("RESEEDED ", lives), ("LOSSES vsock ", lives), ("LOSSES net ", tcp_losses)] {
        let found = word(output, mark)?;
        ensure!(found == right.to_string(), "{mark}is {found}, not {right}: {output}");
    }
    for mark in ["VERIFIED net", "VERIFIED vsock"] {
        ensure!(output.contains(mark), "no {mark}: {output}");
    }
    Ok(())
}
