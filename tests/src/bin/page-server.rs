//! `page-server`: a page server in the style of Firecracker's, which serves the page faults of a
//! restored guest from its memory file.
//!
//! `page-server SOCKET IMAGE FAULTS` serves that many faults and ends. `all` serves them until the
//! monitor ends, `none` only accepts the connection, and `except:OFFSET` serves all faults but
//! those in the page at that offset of the image. It prints `LISTENING` when it listens, and
//! `WITHHELD` at a fault that it does not serve.
//!
//! `page-server SOCKET IMAGE FAULTS forked` listens, and serves in a child process whose id it
//! prints. The parent ends when it reads a byte from standard input.

use std::fs::File;
use std::io::{IoSliceMut, Read};
use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, FromRawFd, OwnedFd};
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixListener;
use std::process::Command;

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::{FdFlags, fcntl_setfd};
use rustix::net::{RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, recvmsg};
use serde_json::Value;

const PAGE: u64 = 4096;
const UFFD_EVENT_PAGEFAULT: u8 = 0x12;
/// `UFFDIO_COPY` of linux/userfaultfd.h.
const UFFDIO_COPY: libc::Ioctl = 0xc028_aa03;

/// `struct uffd_msg`.
#[repr(C)]
#[derive(Default)]
struct Message {
    event: u8,
    reserved: [u8; 7],
    args: [u64; 3],
}

fn main() -> Result<()> {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match *args.as_slice() {
        [socket, image, faults] => {
            let listener = UnixListener::bind(socket).with_context(|| socket.to_owned())?;
            println!("LISTENING");
            answer(&listener, image, faults)
        }
        [socket, image, faults, "forked"] => {
            let listener = UnixListener::bind(socket).with_context(|| socket.to_owned())?;
            fcntl_setfd(&listener, FdFlags::empty())?;
            let fd = listener.as_raw_fd().to_string();
            let serving =
                Command::new(std::env::current_exe()?).args(["--inherited", &fd, image, faults]).spawn()?;
            println!("LISTENING\n{}", serving.id());
            std::io::stdin().read_exact(&mut [0]).context("standard input was closed")
        }
        ["--inherited", fd, image, faults] => {
            // SAFETY: this process has inherited the descriptor, and nothing else in it owns it.
            let listener = unsafe { UnixListener::from_raw_fd(fd.parse()?) };
            answer(&listener, image, faults)
        }
        _ => bail!("page-server SOCKET IMAGE FAULTS [forked]"),
    }
}

/// Accepts a monitor and serves so many of its faults.
fn answer(listener: &UnixListener, image: &str, faults: &str) -> Result<()> {
    let image = File::open(image).with_context(|| image.to_owned())?;
    let (stream, _) = listener.accept()?;
    if faults == "none" {
        println!("STALLED");
        // Until the monitor ends, or this process is killed.
        poll(&mut [PollFd::new(&stream, PollFlags::RDHUP)], None)?;
        return Ok(());
    }
    let mut bytes = vec![0; 64 << 10];
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(1))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let got = recvmsg(&stream, &mut [IoSliceMut::new(&mut bytes)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    let Some(RecvAncillaryMessage::ScmRights(mut fds)) = ancillary.drain().next() else {
        bail!("the monitor's message has no userfaultfd")
    };
    let userfault = fds.next().context("the monitor's message has no userfaultfd")?;
    let regions: Vec<Value> = serde_json::from_slice(&bytes[..got.bytes])?;
    let withheld = faults.strip_prefix("except:").map(str::parse::<u64>).transpose()?;
    let mut left = if faults == "all" || withheld.is_some() { u64::MAX } else { faults.parse()? };
    while left > 0 {
        let mut ready = [PollFd::new(&userfault, PollFlags::IN), PollFd::new(&stream, PollFlags::RDHUP)];
        poll(&mut ready, None)?;
        if ready[0].revents().contains(PollFlags::IN) {
            serve(&userfault, &image, &regions, withheld)?;
            left -= 1;
        } else if !ready[1].revents().is_empty() {
            break;
        }
    }
    Ok(())
}

/// Serves one event, unless it is a fault in the page at the offset `withheld`.
fn serve(userfault: &OwnedFd, image: &File, regions: &[Value], withheld: Option<u64>) -> Result<()> {
    let mut message = Message::default();
    // SAFETY: the kernel writes at most one message, which the buffer holds.
    let read = unsafe { libc::read(userfault.as_raw_fd(), (&raw mut message).cast(), size_of::<Message>()) };
    if read != size_of::<Message>().cast_signed() || message.event != UFFD_EVENT_PAGEFAULT {
        return Ok(());
    }
    let address = message.args[1] & !(PAGE - 1);
    let field = |region: &Value, name: &str| region[name].as_u64().unwrap_or(0);
    let inside = |region: &&Value| {
        let base = field(region, "base_host_virt_addr");
        (base..base + field(region, "size")).contains(&address)
    };
    let region = regions
        .iter()
        .find(inside)
        .with_context(|| format!("page fault at {address:#x} is outside all regions"))?;
    let offset = field(region, "offset") + address - field(region, "base_host_virt_addr");
    if withheld == Some(offset) {
        println!("WITHHELD");
        return Ok(());
    }
    let mut page = [0; PAGE as usize];
    image.read_exact_at(&mut page, offset)?;
    let mut copy = [address, page.as_ptr() as u64, PAGE, 0, 0];
    // SAFETY: `struct uffdio_copy` is five numbers, and the page that it names outlives the call.
    let copied = unsafe { libc::ioctl(userfault.as_raw_fd(), UFFDIO_COPY, copy.as_mut_ptr()) };
    let error = std::io::Error::last_os_error();
    // Two vCPUs may fault in the same page.
    if copied != 0 && error.raw_os_error() != Some(libc::EEXIST) {
        return Err(error.into());
    }
    Ok(())
}
