//! Networks of the host, in a network namespace for each test, and guests on them.

use std::fs::File;
use std::net::TcpListener;
use std::os::fd::{AsRawFd, OwnedFd, RawFd};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::sync::mpsc::channel;

use anyhow::{Context, Result, anyhow, ensure};
use serde_json::{Value, json};

use crate::exchange;
use crate::guest::{BOOT_ARGS, Guest, Kernel, Transport, busybox, ignore, vmm_path};
use crate::initramfs::Initramfs;
use crate::traffic;
use crate::unprivileged::{self, KvmAccess};
use crate::vmm::{Vmm, VmmBuilder};

/// A network namespace of this thread and the processes that it starts. It ends with the last of
/// them.
#[derive(Debug)]
pub struct HostNet(());

impl HostNet {
    /// Moves this thread into a new, empty namespace.
    pub fn new() -> Result<HostNet> {
        if !rustix::process::geteuid().is_root() {
            ignore("it needs root, for a network namespace with taps");
        }
        enter_new_namespace()?;
        let net = HostNet(());
        net.ip("link set lo up")?;
        Ok(net)
    }

    /// Runs `ip` with these arguments.
    pub fn ip(&self, words: &str) -> Result<()> {
        self.run("ip", words)
    }

    /// Whether there is an interface of that name.
    pub fn has(&self, name: &str) -> bool {
        self.ip(&format!("link show dev {name}")).is_ok()
    }

    /// Runs a program of the host with these arguments, separated by spaces.
    pub fn run(&self, program: &str, words: &str) -> Result<()> {
        let output = Command::new(program)
            .args(words.split_whitespace())
            .stdin(Stdio::null())
            .output()
            .with_context(|| format!("cannot run {program}"))?;
        ensure!(
            output.status.success(),
            "{program} {words}: {}",
            String::from_utf8_lossy(&output.stderr).trim()
        );
        Ok(())
    }

    /// Makes a tap that is up, with this address (`10.0.0.1/24`). `how` has more options, such as
    /// `multi_queue`.
    pub fn tap(&self, name: &str, address: &str, how: &str) -> Result<()> {
        self.ip(&format!("tuntap add dev {name} mode tap {how}"))?;
        // Without IPv6 there are no router advertisements: only the test sends packets.
        let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1");
        if !address.is_empty() {
            self.ip(&format!("address add {address} dev {name}"))?;
        }
        self.ip(&format!("link set {name} up"))
    }

    /// Opens so many queues of a tap, as a launcher does for an unprivileged monitor.
    pub fn open_tap(&self, name: &str, queues: usize) -> Result<Vec<OwnedFd>> {
        let multi = if queues > 1 { libc::IFF_MULTI_QUEUE } else { 0 };
        (0..queues).map(|_| attach(name, multi).with_context(|| format!("tap {name}"))).collect()
    }

    /// Makes a macvtap with this MAC address on one end of a veth pair, whose other end has an
    /// address (`10.0.0.1/24`). Returns the path of its device. Ignores the test if the kernel has
    /// no macvtap.
    pub fn macvtap(&self, name: &str, mac: &str, address: &str) -> Result<PathBuf> {
        let (near, far) = (format!("{name}n"), format!("{name}f"));
        // Device nodes are shared by all namespaces and named after the interface's number.
        let number = FIRST_MACVTAP + std::process::id();
        for words in [
            format!("link add {near} type veth peer name {far}"),
            format!("link add link {near} name {name} index {number} address {mac} type macvtap mode bridge"),
        ] {
            if let Err(error) = self.ip(&words) {
                if error.to_string().contains("Unknown device type") {
                    ignore("the host's kernel has no macvtap");
                }
                return Err(error);
            }
        }
        for link in [name, &near, &far] {
            let _ = std::fs::write(format!("/proc/sys/net/ipv6/conf/{link}/disable_ipv6"), "1");
            self.ip(&format!("link set {link} up"))?;
        }
        self.ip(&format!("address add {address} dev {far}"))?;
        Ok(PathBuf::from(format!("/dev/tap{number}")))
    }

    /// Gives a tap a MAC address that all such taps share. A guest that is restored in another
    /// network still has its neighbour's address, and would get no answer until it resolves it
    /// again.
    pub fn use_common_mac(&self, tap: &str) -> Result<()> {
        self.ip(&format!("link set {tap} address 02:00:00:00:00:01"))
    }

    /// Echoes connections to this address and port.
    pub fn echo(&self, address: &str) -> Result<()> {
        let listener = TcpListener::bind(address).context("an echo for the guest")?;
        std::thread::spawn(move || exchange::echo_all(listener.incoming()));
        Ok(())
    }

    /// Moves a tap, which may be in use, to a namespace of its own, so that two networks can have
    /// the same addresses. There it has this address (`10.0.0.1/24`) and an echo server at `port`.
    /// The namespace ends with this process.
    pub fn isolate_tap(&self, tap: &str, address: &str, port: u16) -> Result<()> {
        let ((at, there), (arrive, arrived), (serve, serves)) = (channel(), channel(), channel());
        let (name, address) = (tap.to_owned(), address.to_owned());
        std::thread::spawn(move || {
            let set_up = || -> Result<TcpListener> {
                let net = HostNet::new()?;
                at.send(rustix::thread::gettid())?;
                arrived.recv()?;
                net.ip(&format!("address add {address} dev {name}"))?;
                net.ip(&format!("link set {name} up"))?;
                let (address, _) = address.split_once('/').context("an address with its prefix")?;
                Ok(TcpListener::bind((address, port))?)
            };
            let listener = set_up();
            let listens = listener.as_ref().map(drop).map_err(|error| format!("{error:#}"));
            // The receiver is gone if the test has ended.
            let _ = serve.send(listens);
            if let Ok(listener) = listener {
                exchange::echo_all(listener.incoming());
            }
        });
        if let Ok(thread) = there.recv() {
            self.ip(&format!("link set {tap} netns {}", thread.as_raw_nonzero()))?;
            arrive.send(())?;
        }
        serves.recv()?.map_err(|why| anyhow!("the network of {tap}: {why}"))
    }

    /// Serves uploads and downloads at this address and port.
    pub fn serve(&self, address: &str) -> Result<()> {
        let listener = TcpListener::bind(address).context("a server for the guest")?;
        std::thread::spawn(move || traffic::serve(&listener));
        Ok(())
    }
}

#[expect(unsafe_code, reason = "a thread that changes its namespace")]
fn enter_new_namespace() -> Result<()> {
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: a new network namespace does not change this process's memory or descriptors.
    unsafe { unshare_unsafe(UnshareFlags::NEWNET) }.context("a network namespace")
}

/// The lowest number of macvtaps, far from those of other interfaces.
const FIRST_MACVTAP: u32 = 1 << 24;

/// Opens a queue of a tap, whose frames have a virtio header.
#[expect(unsafe_code, reason = "an ioctl")]
fn attach(name: &str, more: libc::c_int) -> Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    let mut ifr_name = [0; libc::IFNAMSIZ];
    ensure!(name.len() < ifr_name.len(), "the name is too long");
    for (to, from) in ifr_name.iter_mut().zip(name.bytes()) {
        *to = from.cast_signed();
    }
    let flags = libc::IFF_TAP | libc::IFF_NO_PI | libc::IFF_VNET_HDR | more;
    let ifr_ifru = libc::__c_anonymous_ifr_ifru { ifru_flags: flags as libc::c_short };
    let mut request = libc::ifreq { ifr_name, ifr_ifru };
    // SAFETY: the ioctl reads and writes a `struct ifreq`, and `request` is one that outlives the
    // call.
    let done = unsafe { libc::ioctl(file.as_raw_fd(), libc::TUNSETIFF as libc::Ioctl, &raw mut request) };
    ensure!(done >= 0, "TUNSETIFF: {}", std::io::Error::last_os_error());
    Ok(file.into())
}

/// A builder of guests with network interfaces.
#[derive(Debug)]
pub struct NetGuest {
    builder: VmmBuilder,
    guest: Guest,
    disk: Initramfs,
    interfaces: Vec<Value>,
    mmds: Option<Value>,
}

impl NetGuest {
    /// A guest with one vCPU, no interface, and `tool` as `net-tool`.
    pub fn new(transport: Transport, tool: &str) -> Result<NetGuest> {
        let builder = VmmBuilder::new(&vmm_path())?;
        NetGuest::with(builder, transport, tool)
    }

    /// The same, with the monitor of this builder.
    pub fn with(builder: VmmBuilder, transport: Transport, tool: &str) -> Result<NetGuest> {
        let builder = transport.args().iter().fold(builder.with_api(), VmmBuilder::arg);
        let guest = Guest::bare(&Kernel::Tuned.image()).boot_args(BOOT_ARGS);
        let mut disk = Initramfs::new(&busybox())?;
        disk.file("sbin/net-tool", 0o755, &std::fs::read(tool)?);
        Ok(NetGuest { builder, guest, disk, interfaces: Vec::new(), mmds: None })
    }

    /// The same, with a monitor whose only privilege is to use KVM.
    pub fn unprivileged(kvm: &KvmAccess, transport: Transport, tool: &str) -> Result<NetGuest> {
        let mut guest = NetGuest::with(kvm.vmm()?, transport, tool)?;
        guest.guest.kernel = unprivileged::copy(&guest.guest.kernel, guest.dir())?;
        Ok(guest)
    }

    /// The monitor's directory.
    pub fn dir(&self) -> &Path {
        self.builder.dir()
    }

    /// Adds an interface on this tap, with these other fields.
    #[must_use]
    pub fn tap(self, tap: &str, more: Value) -> NetGuest {
        let mut interface = json!({"host_dev_name": tap});
        merge(&mut interface, more);
        self.interface(interface)
    }

    /// Adds an interface; its id is `ethN`.
    #[must_use]
    pub fn interface(mut self, mut interface: Value) -> NetGuest {
        interface["iface_id"] = json!(format!("eth{}", self.interfaces.len()));
        self.interfaces.push(interface);
        self
    }

    /// Adds an interface on a tap whose queues the monitor inherits as these descriptors, with
    /// these other fields.
    pub fn descriptors(mut self, queues: Vec<OwnedFd>, more: Value) -> Result<NetGuest> {
        let numbers: Vec<RawFd> =
            queues.into_iter().map(|fd| self.builder.inherit(fd)).collect::<Result<_>>()?;
        let mut interface = json!({"fds": numbers, "num_queues": numbers.len()});
        merge(&mut interface, more);
        Ok(self.interface(interface))
    }

    /// Lets the monitor inherit a descriptor without an interface. Returns its number.
    pub fn inherit(&mut self, fd: OwnedFd) -> Result<RawFd> {
        self.builder.inherit(fd)
    }

    /// Sets the body of `PUT /mmds/config`.
    #[must_use]
    pub fn mmds(self, mmds: Value) -> NetGuest {
        NetGuest { mmds: Some(mmds), ..self }
    }

    /// Sets the number of vCPUs.
    #[must_use]
    pub fn vcpus(self, vcpus: u32) -> NetGuest {
        NetGuest { guest: self.guest.vcpus(vcpus), ..self }
    }

    /// Adds a program of the host to the guest, with its shared libraries.
    pub fn program(mut self, name: &str) -> Result<NetGuest> {
        self.disk.program(name)?;
        Ok(self)
    }

    /// Boots the guest, which runs `script`.
    pub fn boot(self, script: &str) -> Result<Vmm> {
        let NetGuest { builder, guest, disk, interfaces, mmds } = self;
        let initrd = builder.dir().join("initramfs");
        std::fs::write(&initrd, disk.finish(&format!("ip link set lo up\n{script}")))?;
        let mut guest = guest;
        guest.initrd = Some(initrd);
        let mut config = guest.config();
        config["network-interfaces"] = json!(interfaces);
        if let Some(mmds) = mmds {
            config["mmds-config"] = mmds;
        }
        builder.with_config(&config)?.spawn()
    }
}

fn merge(into: &mut Value, more: Value) {
    if let (Some(into), Value::Object(more)) = (into.as_object_mut(), more) {
        into.extend(more);
    }
}
