//! Looks up a network interface of the host by name (rtnetlink): whether it exists, and how many
//! queues are attached if it is a tap.
//!
//! Any process that may open a tap with `multi_queue` can attach more queues to it. The kernel then
//! spreads the frames over the queues of all processes. Only this count shows another user.

use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType};

const RTM_NEWLINK: u16 = 16;
const RTM_GETLINK: u16 = 18;
const NLMSG_ERROR: u16 = 2;
const NLM_F_REQUEST: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_LINKINFO: u16 = 18;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_TUN_NUM_QUEUES: u16 = 8;
const IFLA_TUN_NUM_DISABLED_QUEUES: u16 = 9;
/// The type of an attribute without its flag bits.
const NLA_TYPE_MASK: u16 = 0x3fff;
/// `struct nlmsghdr`
const HEADER_LEN: usize = 16;
/// `struct ifinfomsg`
const IFINFO_LEN: usize = 16;
/// Much longer than the kernel's reply for one interface.
const REPLY_LEN: usize = 64 << 10;

/// A network interface of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkInfo {
    /// Number of queues attached to a tap with `multi_queue`, disabled ones included. 0 for any
    /// other interface.
    pub(super) queues: u32,
}

/// Finds the interface `name` in this process's network namespace.
pub(super) fn find(name: &str) -> Result<Option<LinkInfo>, Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::send(&socket, &request(name), SendFlags::empty())?;
    let mut reply = vec![0; REPLY_LEN];
    let (len, _) =
        rustix::io::retry_on_intr(|| rustix::net::recv(&socket, &mut reply[..], RecvFlags::empty()))?;
    parse(&reply[..len])
}

fn request(name: &str) -> Vec<u8> {
    let mut attribute = name.as_bytes().to_vec();
    attribute.push(0);
    let attribute_len = 4 + attribute.len();
    attribute.resize(attribute.len().next_multiple_of(4), 0);
    let len = HEADER_LEN + IFINFO_LEN + 4 + attribute.len();
    let mut request = Vec::with_capacity(len);
    request.extend((len as u32).to_ne_bytes());
    request.extend(RTM_GETLINK.to_ne_bytes());
    request.extend(NLM_F_REQUEST.to_ne_bytes());
    request.extend([0; 8 + IFINFO_LEN]);
    request.extend((attribute_len as u16).to_ne_bytes());
    request.extend(IFLA_IFNAME.to_ne_bytes());
    request.extend(attribute);
    request
}

fn parse(reply: &[u8]) -> Result<Option<LinkInfo>, Errno> {
    let number = |at: usize| reply.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    let kind = reply.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
    match kind {
        Some(RTM_NEWLINK) => {}
        Some(NLMSG_ERROR) => {
            let error = number(HEADER_LEN).map_or(0, i32::from_ne_bytes);
            return match Errno::from_raw_os_error(error.checked_neg().unwrap_or(0)) {
                Errno::NODEV => Ok(None),
                error => Err(error),
            };
        }
        _ => return Err(Errno::PROTO),
    }
    let attributes = reply.get(HEADER_LEN + IFINFO_LEN..).unwrap_or_default();
    let tun = attribute(attributes, IFLA_LINKINFO).and_then(|info| attribute(info, IFLA_INFO_DATA));
    let count = |kind| {
        let bytes = attribute(tun?, kind)?.first_chunk()?;
        Some(u32::from_ne_bytes(*bytes))
    };
    let queues = [IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES].map(|kind| count(kind).unwrap_or(0));
    Ok(Some(LinkInfo { queues: queues[0].saturating_add(queues[1]) }))
}

/// Payload of the first attribute of the type `wanted`.
fn attribute(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
    let mut rest = attributes;
    loop {
        let len = usize::from(u16::from_ne_bytes(*rest.first_chunk()?));
        let kind = u16::from_ne_bytes(*rest.get(2..)?.first_chunk()?);
        let contents = rest.get(4..len)?;
        if kind & NLA_TYPE_MASK == wanted {
            return Some(contents);
        }
        rest = rest.get(len.next_multiple_of(4)..)?;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn find_returns_interfaces_by_name() {
        assert_eq!(find("lo"), Ok(Some(LinkInfo { queues: 0 })));
        assert_eq!(find("nosuchlink"), Ok(None));
    }

    #[test]
    fn malformed_replies_are_errors() {
        for reply in [&[][..], &[0; 4], &[0; 64], &[0xff; 64]] {
            assert!(parse(reply).is_err());
        }
        let mut cut = [0; 48];
        cut[4] = RTM_NEWLINK as u8;
        cut[32] = 200;
        cut[34] = IFLA_LINKINFO as u8;
        assert_eq!(parse(&cut), Ok(Some(LinkInfo { queues: 0 })));
    }
}
