//! Entry point of the fuzz target: a hostile guest and a hostile host on the socket device.

use std::fs;
use std::io::Write;
use std::os::fd::OwnedFd;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, Shutdown, SocketAddrUnix, SocketFlags, SocketType, connect, recv,
    send, shutdown, socket_with,
};
use virtio::fuzz::{BASE, DATA, Input, MAX_ACTS, SIZE, common_act, new_guest};
use virtio::testing::{DriverQueue, Guest, Kind, RUNNING, TestWorker};
use vm_memory::{Bytes, GuestAddress};
use zerocopy::IntoBytes;

use crate::device::Vsock;
use crate::host_sockets::HostSockets;
use crate::listener::Listener;
use crate::packet::{HOST_CID, Header, SocketKind};
use crate::state::VsockState;
use socket_file::SocketFile;

/// The ports that host servers listen on, with their socket types.
const SERVED: [(u32, SocketKind); 2] = [(1, SocketKind::Stream), (2, SocketKind::SeqPacket)];
const CLIENTS: usize = 8;

/// The host: a directory with the device's sockets and one server of each type, and the sockets of
/// its programs.
pub(crate) struct Host {
    dir: PathBuf,
    servers: Vec<Listener>,
    _files: Vec<SocketFile>,
    ends: Vec<OwnedFd>,
}

impl Host {
    /// A host, and the sockets for its device. A thread may have only one at a time.
    pub(crate) fn new() -> (Host, HostSockets) {
        let thread = format!("{:?}", std::thread::current().id());
        let dir = std::env::temp_dir().join(format!("vesta-fuzz-{}-{thread}", std::process::id()));
        fs::create_dir(&dir).expect("a directory can be created");
        let bind = |name: &str, kind| Listener::bind(&dir.join(name), kind).expect("a socket can be made");
        let (stream, stream_file) = bind("v", SocketKind::Stream);
        let (messages, messages_file) = bind("m", SocketKind::SeqPacket);
        let served = SERVED.map(|(port, kind)| bind(&format!("v_{port}"), kind));
        let (servers, server_files): (Vec<_>, Vec<_>) = served.into_iter().unzip();
        let files = [stream_file, messages_file].into_iter().chain(server_files).collect();
        let path = dir.join("v");
        let host = Host { dir, servers, _files: files, ends: Vec::new() };
        (host, HostSockets { listeners: vec![stream, messages], path: Some(path) })
    }

    /// Does one thing that a program on the host may do.
    pub(crate) fn act(&mut self, act: u8, which: u8, number: u16) {
        let count = self.ends.len().max(1);
        let which = usize::from(which) % count;
        match act % 8 {
            0 | 1 if self.ends.len() < CLIENTS => {
                let (name, kind) =
                    [("v", SocketType::STREAM), ("m", SocketType::SEQPACKET)][usize::from(act >> 7)];
                let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
                let client =
                    socket_with(AddressFamily::UNIX, kind, flags, None).expect("a socket can be made");
                let address = SocketAddrUnix::new(self.dir.join(name)).expect("it is short enough");
                if connect(&client, &address).is_err() {
                    return;
                }
                let request = match number % 8 {
                    0 => "CONN".to_owned(),
                    1 => "GET / HTTP/1.1\r\n".to_owned(),
                    _ => format!("CONNECT {}\n", number % 4),
                };
                // A new socket takes all of it.
                let _ = send(&client, request.as_bytes(), SendFlags::NOSIGNAL);
                self.ends.push(client);
            }
            2 if self.ends.len() < CLIENTS => {
                if let Ok(peer) = self.servers[usize::from(act >> 7)].accept() {
                    self.ends.push(peer);
                }
            }
            3 | 4 => {
                if let Some(end) = self.ends.get(which) {
                    let _ = send(end, &vec![number as u8; usize::from(number) * 4], SendFlags::NOSIGNAL);
                }
            }
            5 => {
                if let Some(end) = self.ends.get(which) {
                    let _ = recv(end, &mut vec![0; usize::from(number) * 4 + 1], RecvFlags::empty());
                }
            }
            6 => {
                if let Some(end) = self.ends.get(which) {
                    let how = [Shutdown::Read, Shutdown::Write, Shutdown::Both][usize::from(number % 3)];
                    let _ = shutdown(end, how);
                }
            }
            _ => {
                if which < self.ends.len() {
                    self.ends.remove(which);
                }
            }
        }
    }

    /// A host client that has sent its `CONNECT` line.
    pub(crate) fn connect(&self, port: u32) -> UnixStream {
        let mut client = UnixStream::connect(self.dir.join("v")).expect("the device listens");
        client.write_all(format!("CONNECT {port}\n").as_bytes()).expect("a new socket is empty");
        client
    }
}

impl Drop for Host {
    fn drop(&mut self) {
        // If this fails, the next host cannot create its directory, and reports that.
        let _ = fs::remove_dir_all(&self.dir);
    }
}

/// The driver's three queues.
pub(crate) struct Driver {
    pub(crate) queues: [DriverQueue; 3],
    data: u64,
}

impl Driver {
    /// Starts the device as a correct driver does, with queues at `base` and buffers at `data`.
    pub(crate) fn start(guest: &mut Guest, base: u64, size: u16, data: u64, event_idx: bool) -> Driver {
        let features = guest.negotiate(event_idx);
        let step = DriverQueue::bytes(size);
        let queues = [0, 1, 2].map(|index| DriverQueue::new(&guest.ram, base + step * index, size, features));
        for (index, queue) in (0..).zip(&queues) {
            guest.select_queue(index);
            guest.set_up_queue(&queue.state());
        }
        guest.map_vectors();
        guest.set_status(RUNNING);
        guest.worker.run();
        Driver { queues, data }
    }

    /// Fills the RX queue with buffers of `len` bytes.
    pub(crate) fn give_buffers(&mut self, guest: &mut Guest, len: u32) {
        // Used chains are taken as long as they are valid.
        while self.queues[0].take_used_if_sane().is_some() {}
        while self.queues[0].add(&[], &[(self.data, len)]).is_some() {}
        self.queues[0].publish();
        guest.kick(0);
        guest.kick(2);
    }

    /// Sends a packet with `len` bytes of data, which are what is in memory.
    pub(crate) fn send(&mut self, guest: &mut Guest, header: &[u8], len: u32) {
        while self.queues[1].take_used_if_sane().is_some() {}
        let at = self.data + 0x4000;
        guest.ram.memory().write_slice(header, GuestAddress(at)).expect("it is in RAM");
        let head = (at, header.len() as u32);
        let data = (self.data, len);
        let added =
            if len > 0 { self.queues[1].add(&[head, data], &[]) } else { self.queues[1].add(&[head], &[]) };
        if added.is_some() {
            self.queues[1].publish();
            guest.kick(1);
        }
    }
}

/// A header made of a few numbers, mostly with ports of connections that may exist.
pub(crate) fn header(cid: u64, op: u8, kind: u8, ports: u8, flags: u8, numbers: [u32; 3]) -> Vec<u8> {
    let host_port = match ports % 8 {
        0 => SERVED[usize::from(kind >= 150)].0,
        7 => numbers[0],
        n => (1 << 30) + u32::from(n) - 1,
    };
    let header = Header {
        src_cid: if op == 255 { u64::from(numbers[0]) } else { cid }.into(),
        dst_cid: if op == 254 { u64::from(numbers[0]) } else { HOST_CID }.into(),
        src_port: u32::from(ports >> 3 & 3).into(),
        dst_port: host_port.into(),
        len: numbers[0].into(),
        kind: if kind < 150 {
            1
        } else if kind < 250 {
            2
        } else {
            u16::from(kind % 4)
        }
        .into(),
        op: u16::from(op % 9).into(),
        flags: u32::from(flags % 5).into(),
        buf_alloc: numbers[1].into(),
        fwd_cnt: numbers[2].into(),
    };
    header.as_bytes().to_vec()
}

/// Runs a hostile guest and a hostile host on a socket device. The first byte of `data` selects the
/// transport.
pub fn device(data: &[u8]) {
    const CID: u32 = 3;
    let mut input = Input(data);
    let kind = if input.u8() & 1 == 0 { Kind::Mmio } else { Kind::Pci };
    let (mut host, sockets) = Host::new();
    let (device, mut control) = Vsock::new(CID, sockets);
    let mut guest = new_guest(kind, Box::new(device));
    let start = |guest: &mut Guest, event_idx| Driver::start(guest, BASE, SIZE, DATA, event_idx);
    let mut driver = start(&mut guest, true);
    driver.give_buffers(&mut guest, 0x1000);
    // The queue of the acts that are common to all devices.
    let mut other = None;
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        match input.u8() % 32 {
            0 => guest.worker.advance(u64::from(input.u32()) << 4),
            1 => control.reset_connections(),
            2 => {
                let mut state = guest.save();
                let own: VsockState = state.common().device.decode().expect("the state is this device's");
                // The old one is dropped first: a thread may have only one host.
                let ram = guest.ram.clone();
                drop((guest, host));
                let (new_host, sockets) = Host::new();
                let device;
                (device, control) = Vsock::restore(&own, None, sockets);
                let mut copy = Guest::with(kind, Box::new(device), ram, TestWorker::new());
                copy.restore(&state).expect("what was saved can be restored");
                (guest, host) = (copy, new_host);
            }
            3 => {
                drop(guest.worker.pause());
                host.act(input.u8(), input.u8(), input.u16());
                guest.worker.resume();
            }
            4 => driver = start(&mut guest, input.u8() & 1 == 0),
            16..20 => driver.give_buffers(&mut guest, u32::from(input.u16()) % 0x2000 + 1),
            20..26 => {
                let len = u32::from(input.u16());
                let (op, kind, ports, flags) = (input.u8(), input.u8(), input.u8(), input.u8());
                let stated_len = if input.u8() < 240 { len } else { input.u32() };
                let header =
                    header(CID.into(), op, kind, ports, flags, [stated_len, input.u32(), input.u8().into()]);
                driver.send(&mut guest, &header, len);
            }
            26..32 => host.act(input.u8(), input.u8(), input.u16()),
            act => {
                // These may break the rings. Sometimes a correct driver starts again after that.
                common_act(act.max(5), &mut input, &mut guest, &mut other);
                if input.u8().is_multiple_of(4) {
                    driver = start(&mut guest, true);
                }
            }
        }
        guest.worker.run();
    }
    // A reset must always lead to a working device: a host client reaches the guest.
    let mut driver = start(&mut guest, true);
    let _client = host.connect(5);
    driver.give_buffers(&mut guest, 0x1000);
    guest.worker.advance(10_000_000_000);
    assert!(driver.queues[0].take_used().is_some(), "the device does not work after a reset");
}

#[cfg(test)]
mod tests {
    use super::*;
    use virtio::fuzz::seeded;

    #[test]
    fn random_guests_do_not_break_vsock() {
        seeded(device, 1_500);
    }
}
