//! Packets (5.10.6): a header of 44 bytes, and after it as many bytes of data as it says.

use zerocopy::little_endian::{U16, U32, U64};
use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout};

/// The host's context id.
pub(super) const HOST_CID: u64 = 2;

/// Length of a header in bytes.
pub(super) const HEADER_LEN: u32 = size_of::<Header>() as u32;

/// `VIRTIO_VSOCK_SHUTDOWN_F_RECEIVE`: who sends it takes no more.
pub(super) const SHUTDOWN_RECEIVE: u32 = 1;
/// `VIRTIO_VSOCK_SHUTDOWN_F_SEND`: who sends it sends no more.
pub(super) const SHUTDOWN_SEND: u32 = 2;
/// Both directions.
pub(super) const SHUTDOWN_BOTH: u32 = SHUTDOWN_RECEIVE | SHUTDOWN_SEND;

/// `VIRTIO_VSOCK_SEQ_EOM`: the packet ends a message.
pub(super) const END_OF_MESSAGE: u32 = 1;

/// `struct virtio_vsock_hdr`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub(super) struct Header {
    pub(super) src_cid: U64,
    pub(super) dst_cid: U64,
    pub(super) src_port: U32,
    pub(super) dst_port: U32,
    /// Bytes of data that follow.
    pub(super) len: U32,
    pub(super) kind: U16,
    pub(super) op: U16,
    pub(super) flags: U32,
    /// How much the sender has room for in all.
    pub(super) buf_alloc: U32,
    /// How much of what it got the sender has handed on.
    pub(super) fwd_cnt: U32,
}

/// What a packet is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u16)]
pub(super) enum Op {
    /// Open a connection.
    Request = 1,
    /// It is open.
    Response = 2,
    /// There is no such connection (any more).
    Rst = 3,
    /// One side ends one or both directions.
    Shutdown = 4,
    /// Data.
    Rw = 5,
    /// Nothing but the header's account of credit.
    CreditUpdate = 6,
    /// Please tell your account of credit.
    CreditRequest = 7,
}

impl Op {
    pub(super) fn of(op: u16) -> Option<Op> {
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

/// The kinds of sockets.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u16)]
pub enum SocketKind {
    /// A stream of bytes.
    Stream = 1,
    /// A sequence of messages.
    SeqPacket = 2,
}

impl SocketKind {
    pub(super) fn of(kind: u16) -> Option<SocketKind> {
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
    fn a_header_is_44_bytes_in_the_order_of_the_specification() {
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
    fn every_operation_is_known_by_its_number_and_no_other_is() {
        for op in 0..=u16::MAX {
            assert_eq!(Op::of(op).map(|op| op as u16), (1..=7).contains(&op).then_some(op));
        }
    }
}
