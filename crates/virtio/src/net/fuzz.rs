//! What the fuzz target of this device connects it to: networks made of sockets, and a service that answers in their place.

use std::collections::VecDeque;
use std::os::fd::OwnedFd;

use super::detour::{Detour, HEAD_LEN};
use super::stream::Stream;
use super::tap::Tap;
use super::{NetBackend, NetSetup};
use crate::worker::Nanos;

/// The network takes what there is.
pub(crate) fn drain(wire: &OwnedFd) {
    let mut bytes = [0; 4096];
    while rustix::net::recv(wire, &mut bytes, rustix::net::RecvFlags::empty()).is_ok_and(|(len, _)| len > 0) {
    }
}

/// Something like a network, and its own end of it: one for each pair of queues.
pub(crate) fn setup(stream: bool, pairs: u16, with_service: bool) -> (NetSetup, Vec<OwnedFd>) {
    use rustix::net::{AddressFamily, SocketFlags, SocketType, socketpair};
    let kind = if stream { SocketType::STREAM } else { SocketType::SEQPACKET };
    let pair = |_| {
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        socketpair(AddressFamily::UNIX, kind, flags, None).expect("sockets can be made")
    };
    let (mut ours, theirs): (Vec<_>, Vec<_>) = (0..pairs).map(pair).unzip();
    let backend = if stream {
        NetBackend::stream(Stream::new("fuzzed".into(), ours.swap_remove(0)))
    } else {
        NetBackend::tap(Tap::pretend(ours))
    };
    let detour = with_service.then(|| Box::<Service>::default() as Box<dyn Detour>);
    (NetSetup { backend, detour }, theirs)
}

/// Takes frames to addresses that begin with an odd byte, and sends each back, once at once and once later.
#[derive(Default)]
struct Service {
    answers: VecDeque<(Nanos, Vec<u8>)>,
}

impl Detour for Service {
    fn wants(&self, head: &[u8]) -> bool {
        assert!(head.len() <= HEAD_LEN);
        head.first().is_some_and(|byte| byte & 1 != 0)
    }

    fn push(&mut self, frame: &[u8], now: Nanos) {
        if self.answers.len() < 16 {
            self.answers.push_back((0, frame.to_vec()));
            self.answers.push_back((now.saturating_add(1_000_000), frame.to_vec()));
        }
    }

    fn pop(&mut self, frame: &mut Vec<u8>, now: Nanos) -> bool {
        assert!(frame.is_empty());
        let Some((_, answer)) = self.answers.pop_front_if(|(at, _)| *at <= now) else { return false };
        frame.extend(answer);
        true
    }

    fn deadline(&mut self, _now: Nanos) -> Option<Nanos> {
        self.answers.front().map(|(at, _)| *at)
    }

    fn reset(&mut self) {
        self.answers.clear();
    }
}
