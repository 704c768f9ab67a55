//! Connecting to a page server: the message with the regions and the userfaultfd.

use std::io::{self, IoSlice};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, OwnedFd};
use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use config::HugePages;
use rustix::net::sockopt::{Timeout, set_socket_timeout};
use rustix::net::{
    AddressFamily, SendAncillaryBuffer, SendAncillaryMessage, SendFlags, SocketAddrUnix, SocketFlags,
    SocketType,
};
use serde::Serialize;

use super::error::PageServerError;
use super::monitor::PageServer;
use crate::backing::Backing;
use crate::layout::MemoryLayout;
use crate::ram::GuestRam;
use crate::server_link::ServerLink;
use crate::sys::peer;
use crate::sys::userfault::Userfault;

/// How long a server may take to accept the connection and the message.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

/// One region in the message.
#[derive(Serialize)]
struct RegionMapping {
    base_host_virt_addr: u64,
    size: u64,
    offset: u64,
    page_size: u64,
    /// In bytes, despite its name, as in Firecracker.
    page_size_kib: u64,
}

impl GuestRam {
    /// Maps memory of this layout whose page faults the page server at `socket` answers.
    pub fn from_page_server(
        layout: &MemoryLayout,
        socket: &Path,
        huge_pages: HugePages,
        track_dirty_pages: bool,
    ) -> Result<(Self, PageServer), PageServerError> {
        let hugetlb = huge_pages == HugePages::Hugetlbfs2M;
        let userfault = Userfault::open(hugetlb).map_err(PageServerError::Userfault)?;
        let path = socket.to_path_buf();
        let connect_error =
            |e: rustix::io::Errno| PageServerError::Connect { path: path.clone(), source: e.into() };
        let socket = connect(socket).map_err(connect_error)?;
        let listener = peer::listener_pidfd(socket.as_fd());
        let link = Arc::new(ServerLink { path, userfault, socket, listener });
        let backing = Backing::PageServer(Arc::clone(&link));
        let ram = Self::build(layout.clone(), huge_pages, track_dirty_pages, backing)?;
        for span in ram.spans() {
            let size = span.len();
            let register = link.userfault.register(*span);
            register.map_err(|source| PageServerError::Register { size, source })?;
        }
        send_regions(&link, &ram)?;
        Ok((ram.clone(), PageServer::new(ram, link)))
    }
}

/// Connects to the socket at `path`, within [`CONNECT_TIMEOUT`].
fn connect(path: &Path) -> rustix::io::Result<OwnedFd> {
    let address = SocketAddrUnix::new(path)?;
    let socket =
        rustix::net::socket_with(AddressFamily::UNIX, SocketType::STREAM, SocketFlags::CLOEXEC, None)?;
    set_socket_timeout(&socket, Timeout::Send, Some(CONNECT_TIMEOUT))?;
    rustix::net::connect(&socket, &address).map_err(|e| match e {
        // The kernel's error if the backlog stays full for the whole timeout.
        rustix::io::Errno::AGAIN => rustix::io::Errno::TIMEDOUT,
        e => e,
    })?;
    Ok(socket)
}

fn send_regions(link: &ServerLink, ram: &GuestRam) -> Result<(), PageServerError> {
    let page_size = ram.page_size();
    let regions: Vec<_> = ram
        .layout()
        .regions()
        .iter()
        .zip(ram.spans())
        .map(|(region, span)| RegionMapping {
            base_host_virt_addr: span.addr(),
            size: region.size,
            offset: region.offset,
            page_size,
            page_size_kib: page_size,
        })
        .collect();
    let message = serde_json::to_vec(&regions).expect("numbers can be encoded in JSON");
    let ServerLink { path, userfault, socket, .. } = link;
    let failed = |source| PageServerError::Send { path: path.clone(), source };
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    let fds = [userfault.as_fd()];
    assert!(ancillary.push(SendAncillaryMessage::ScmRights(&fds)), "there is space for one descriptor");
    let sent = rustix::net::sendmsg(socket, &[IoSlice::new(&message)], &mut ancillary, SendFlags::NOSIGNAL)
        .map_err(|e| failed(e.into()))?;
    // 64 regions are 10 KiB, far below a socket's buffer: the message is sent whole or not at all.
    if sent == message.len() { Ok(()) } else { Err(failed(io::ErrorKind::WriteZero.into())) }
}
