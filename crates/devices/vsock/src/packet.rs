//! Packets (5.10.6): a header of 44 bytes, followed by `len` bytes of data.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The host's context ID, `VMADDR_CID_HOST`.
pub(crate) const HOST_CID: u64 = 2;

/// Length of a header in bytes.
pub(crate) const HEADER_LEN: u32 = size_of::<Header>() as u32;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: the sender of the packet will receive no more data.
pub(crate) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: the sender of the packet will send no more data.
pub(crate) const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub(crate) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `VIRTIO_VSOCK_SEQ_EOM`: the packet is the last one of a message.
pub(crate) const END_OF_MESSAGE: u32 = 1;

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(crate) struct Header {
    pub(crate) src_cid: U64,
    pub(crate) dst_cid: U64,
    pub(crate) src_port: U32,
    pub(crate) dst_port: U32,
    /// Bytes of data that follow the header.
    pub(crate) len: U32,
    pub(crate) kind: U16,
    pub(crate) op: U16,
    pub(crate) flags: U32,
    /// Size of the sender's receive buffer, in bytes.
    pub(crate) buf_alloc: U32,
    /// Bytes that the sender has received and forwarded to its application, modulo 2^32.
    pub(crate) fwd_cnt: U32,
}

/// Operation of a packet, `VIRTIO_VSOCK_OP_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(crate) enum Op {
    /// Opens a connection.
    Request = 1,
    /// Accepts a connection.
    Response = 2,
    /// Rejects or ends a connection, or says that it does not exist.
    Rst = 3,
    /// The sender ends one or both directions.
    Shutdown = 4,
    /// Carries data.
    Rw = 5,
    /// Carries nothing but `buf_alloc` and `fwd_cnt`.
    CreditUpdate = 6,
    /// Asks for a `CreditUpdate`.
    CreditRequest = 7,
}

impl Op {
    /// The operation with this number.
    pub(crate) fn of(op: u16) -> Option<Op> {
        Some(match op {
            1 => Op::Request,
            2 => Op::Response,
            3 => Op::Rst,
            4 => Op::Shutdown,
            5 => Op::Rw,
            6 => Op::CreditUpdate,
            7 => Op::CreditRequest,
            _ => return None,
        })
    }
}

/// Type of a socket, `VIRTIO_VSOCK_TYPE_*`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum SocketKind {
    /// A byte stream (`SOCK_STREAM`).
    Stream = 1,
    /// A sequence of messages (`SOCK_SEQPACKET`).
    SeqPacket = 2,
}

impl SocketKind {
    /// The type with this number.
    pub(crate) fn of(kind: u16) -> Option<SocketKind> {
        match kind {
            1 => Some(SocketKind::Stream),
            2 => Some(SocketKind::SeqPacket),
            _ => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_header_has_the_layout_of_the_specification() {
        assert_eq!(HEADER_LEN, 44);
        let header = Header {
            src_cid: 3.into(),
            dst_cid: HOST_CID.into(),
            src_port: 0x0102_0304.into(),
            dst_port: 52.into(),
            len: 7.into(),
            kind: (SocketKind::Stream as u16).into(),
            op: (Op::Rw as u16).into(),
            flags: 1.into(),
            buf_alloc: 0x1_0000.into(),
            fwd_cnt: 9.into(),
        };
        let bytes = header.as_bytes();
        assert_eq!(bytes[..20], [3, 0, 0, 0, 0, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 4, 3, 2, 1]);
        assert_eq!(bytes[20..36], [52, 0, 0, 0, 7, 0, 0, 0, 1, 0, 5, 0, 1, 0, 0, 0]);
        assert_eq!(bytes[36..], [0, 0, 1, 0, 9, 0, 0, 0]);
    }

    #[test]
    fn operations_1_to_7_are_known_and_no_others() {
        for op in 0..=u16::MAX {
            assert_eq!(Op::of(op).map(|op| op as u16), (1..=7).contains(&op).then_some(op));
        }
    }
}
