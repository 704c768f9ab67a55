//! Frames that something answers in the network's place.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::guest::{config, wires};
use super::*;
use crate::interceptor::FrameInterceptor;
use crate::{Net, NetBackend, NetError, NetSetup};
use sync::locked;
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::testing::Kind;
use virtio::worker::Nanos;

/// Takes frames for an address, and sends each back `copies` times; and one more at `at`.
#[derive(Default)]
struct Mirror {
    copies: usize,
    answers: VecDeque<Vec<u8>>,
    at: Option<Nanos>,
    resets: Arc<Mutex<u32>>,
}

const SERVICE: [u8; 6] = [6, 1, 0x23, 0x45, 0x67, 1];

impl FrameInterceptor for Mirror {
    fn wants(&self, head: &[u8]) -> bool {
        head.starts_with(&SERVICE)
    }

    fn push(&mut self, frame: &[u8], _now: Nanos) {
        for _ in 0..self.copies {
            self.answers.push_back(frame.to_vec());
        }
    }

    fn pop(&mut self, frame: &mut Vec<u8>, now: Nanos) -> bool {
        if self.at.take_if(|at| *at <= now).is_some() {
            self.answers.push_back(super::frame(60, 99));
        }
        match self.answers.pop_front() {
            Some(answer) => {
                frame.extend(answer);
                true
            }
            None => false,
        }
    }

    fn deadline(&mut self, _now: Nanos) -> Option<Nanos> {
        self.at
    }

    fn reset(&mut self) {
        *locked(&self.resets) += 1;
    }
}

fn guest(mirror: Mirror, limits: RateLimiterConfig) -> NetGuest {
    let (tap, wires) = wires(1);
    let setup = NetSetup { backend: NetBackend::tap(tap), interceptor: Some(Box::new(mirror)) };
    let (net, control) = Net::new(config(1), setup, limits, limits, 1).unwrap();
    NetGuest::around(Kind::Mmio, net, control, wires, u64::MAX)
}

fn request(len: usize, seed: u8) -> Vec<u8> {
    let mut request = frame(len, seed);
    request[..6].copy_from_slice(&SERVICE);
    request
}

#[test]
fn frames_that_it_wants_never_reach_the_network_and_its_answers_reach_the_guest() {
    let mut guest = guest(Mirror { copies: 1, ..Mirror::default() }, RateLimiterConfig::default());
    guest.give(&[1536]);
    guest.give(&[1536]);
    guest.send(&request(1000, 1));
    guest.send(&frame(100, 2));
    assert_eq!(guest.sent().unwrap(), frame(100, 2));
    assert_eq!(guest.sent(), None);
    let came = guest.received_on(0).unwrap();
    assert_eq!((came.frame, came.header), (request(1000, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0].to_vec()));
    let stats = guest.control.stats();
    assert_eq!((stats.intercepted_tx_count.get(), stats.intercepted_rx_count.get()), (1, 1));
}

#[test]
fn answers_wait_for_room_and_come_in_order() {
    let mut guest = guest(Mirror { copies: 5, ..Mirror::default() }, RateLimiterConfig::default());
    guest.send(&request(3000, 1));
    assert_eq!(guest.received(), None);
    guest.arrive(&frame(100, 9));
    let mut got = 0;
    for _ in 0..40 {
        guest.give(&[700]);
        while let Some(came) = guest.received() {
            got += 1;
            assert!(came == request(3000, 1) || came == frame(100, 9));
        }
    }
    assert_eq!(got, 6);
}

#[test]
fn it_is_asked_when_its_time_has_come() {
    let mut guest = guest(Mirror { at: Some(5_000_000), ..Mirror::default() }, RateLimiterConfig::default());
    guest.give(&[1536]);
    assert_eq!(guest.received(), None);
    assert_eq!(guest.guest.worker.next_timer(), Some(5_000_000));
    guest.guest.worker.advance(5_000_000);
    assert_eq!(guest.received().unwrap(), frame(60, 99));
    assert_eq!(guest.guest.worker.next_timer(), None);
}

#[test]
fn limits_do_not_count_for_it() {
    let once = BucketConfig { size: 1, refill_time_ms: 1_000_000, one_time_burst: 0 };
    let limits = RateLimiterConfig { bandwidth: None, ops: Some(once) };
    let mut guest = guest(Mirror { copies: 1, ..Mirror::default() }, limits);
    for seed in 0..20 {
        guest.give(&[1536]);
        guest.send(&request(100, seed));
        assert_eq!(guest.received().unwrap(), request(100, seed));
    }
}

#[test]
fn a_new_driver_means_new_connections() {
    let resets = Arc::new(Mutex::new(0));
    let mut guest =
        guest(Mirror { resets: Arc::clone(&resets), ..Mirror::default() }, RateLimiterConfig::default());
    let before = *locked(&resets);
    guest.start(u64::MAX);
    assert_eq!(*locked(&resets), before + 1);
    guest.give(&[1536]);
    guest.arrive(&frame(60, 1));
    assert_eq!(guest.received().unwrap(), frame(60, 1));
}

#[test]
fn it_cannot_be_had_where_the_kernel_moves_the_frames() {
    // Without vhost-net there is nothing to try.
    let Ok(backend) = NetBackend::vhost(wires(1).0) else { return };
    let setup = NetSetup { backend, interceptor: Some(Box::new(Mirror::default())) };
    let none = RateLimiterConfig::default();
    assert!(matches!(Net::new(config(1), setup, none, none, 1), Err(NetError::Vhost { .. })));
}

#[test]
fn it_is_reached_over_a_link_that_stays_up_where_there_is_no_network() {
    for gone in [false, true] {
        let (tap, wires) = wires(1);
        let backend = if gone { NetBackend::tap(tap) } else { NetBackend::unplugged(1) };
        let mirror = Mirror { copies: 1, ..Mirror::default() };
        let setup = NetSetup { backend, interceptor: Some(Box::new(mirror)) };
        let none = RateLimiterConfig::default();
        let (net, control) = Net::new(config(1), setup, none, none, 1).unwrap();
        let mut guest = NetGuest::around(Kind::Mmio, net, control, wires, u64::MAX);
        guest.give(&[1536]);
        // The network's other end is closed.
        guest.wires.clear();
        guest.send(&frame(100, 2));
        assert_eq!(guest.status(), 1);
        guest.send(&request(100, 1));
        assert_eq!(guest.received().unwrap(), request(100, 1));
        assert_eq!(guest.control.stats().tap_write_fails.get(), 1);
    }
}
