//! What the kernel says of a network interface by name (rtnetlink): whether it is there, and who uses it if it is a tap.
//!
//! A tap that was made with `multi_queue` lets anybody attach who may open it: the kernel then spreads frames over all of their queues. Only this
//! count tells that somebody else is there.

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
/// The bits of an attribute's type that are no flags.
const NLA_TYPE_MASK: u16 = 0x3fff;
/// `struct nlmsghdr`
const HEADER_LEN: usize = 16;
/// `struct ifinfomsg`
const IFINFO_LEN: usize = 16;
/// Longer than what the kernel says of an interface, by far.
const ANSWER_LEN: usize = 64 << 10;

/// An interface.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct LinkInfo {
    /// Queues that are attached to it, those that are switched off included, where it is a tap with several; 0 elsewhere.
    pub(super) queues: u32,
}

/// The interface `name` of this process's network namespace; None if there is none.
pub(super) fn find(name: &str) -> Result<Option<LinkInfo>, Errno> {
    let flags = SocketFlags::CLOEXEC;
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, flags, None)?;
    rustix::net::send(&socket, &request(name), SendFlags::empty())?;
    let mut answer = vec![0; ANSWER_LEN];
    let (len, _) =
        rustix::io::retry_on_intr(|| rustix::net::recv(&socket, &mut answer[..], RecvFlags::empty()))?;
    read(&answer[..len])
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

fn read(answer: &[u8]) -> Result<Option<LinkInfo>, Errno> {
    let number = |at: usize| answer.get(at..at + 4).and_then(|bytes| bytes.try_into().ok());
    let kind = answer.get(4..6).map(|bytes| u16::from_ne_bytes([bytes[0], bytes[1]]));
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
    let attributes = answer.get(HEADER_LEN + IFINFO_LEN..).unwrap_or_default();
    let tun = find_in(attributes, IFLA_LINKINFO).and_then(|info| find_in(info, IFLA_INFO_DATA));
    let count = |kind| {
        let bytes = find_in(tun?, kind)?.first_chunk()?;
        Some(u32::from_ne_bytes(*bytes))
    };
    let queues = [IFLA_TUN_NUM_QUEUES, IFLA_TUN_NUM_DISABLED_QUEUES].map(|kind| count(kind).unwrap_or(0));
    Ok(Some(LinkInfo { queues: queues[0].saturating_add(queues[1]) }))
}

/// The contents of the first attribute of this type.
fn find_in(attributes: &[u8], wanted: u16) -> Option<&[u8]> {
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
    fn interfaces_are_found_by_name() {
        assert_eq!(find("lo"), Ok(Some(LinkInfo { queues: 0 })));
        assert_eq!(find("nosuchlink"), Ok(None));
    }

    #[test]
    fn answers_that_make_no_sense_are_errors() {
        for answer in [&[][..], &[0; 4], &[0; 64], &[0xff; 64]] {
            assert!(read(answer).is_err());
        }
        let mut cut = [0; 48];
        cut[4] = RTM_NEWLINK as u8;
        cut[32] = 200;
        cut[34] = IFLA_LINKINFO as u8;
        assert_eq!(read(&cut), Ok(Some(LinkInfo { queues: 0 })));
    }
}
