//! Tests of the frame interceptor.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use super::guest::{config, fake_tap};
use super::*;
use crate::interceptor::FrameInterceptor;
use crate::{Net, NetBackend, NetError, NetSetup};
use sync::locked;
use virtio::rate_limiter::{BucketConfig, RateLimiterConfig};
use virtio::testing::Kind;
use virtio::worker::Nanos;

/// Takes frames for an address and sends each back `copies` times, and sends one more at `at`.
#[derive(Default)]
struct Mirror {
    copies: usize,
    replies: VecDeque<Vec<u8>>,
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
            self.replies.push_back(frame.to_vec());
        }
    }

    fn pop(&mut self, frame: &mut Vec<u8>, now: Nanos) -> bool {
        if self.at.take_if(|at| *at <= now).is_some() {
            self.replies.push_back(super::frame(60, 99));
        }
        match self.replies.pop_front() {
            Some(reply) => {
                frame.extend(reply);
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
    let (tap, peers) = fake_tap(1);
    let setup = NetSetup { backend: NetBackend::tap(tap), interceptor: Some(Box::new(mirror)) };
    let (net, control) = Net::new(config(1), setup, limits, limits, 1).unwrap();
    NetGuest::with_device(Kind::Mmio, net, control, peers, u64::MAX)
}

fn request(len: usize, seed: u8) -> Vec<u8> {
    let mut request = frame(len, seed);
    request[..6].copy_from_slice(&SERVICE);
    request
}

#[test]
fn intercepted_frames_skip_the_network_and_get_replies() {
    let mut guest = guest(Mirror { copies: 1, ..Mirror::default() }, RateLimiterConfig::default());
    guest.post_rx_buffer(&[1536]);
    guest.post_rx_buffer(&[1536]);
    guest.send(&request(1000, 1));
    guest.send(&frame(100, 2));
    assert_eq!(guest.sent().unwrap(), frame(100, 2));
    assert_eq!(guest.sent(), None);
    let rx = guest.received_on(0).unwrap();
    assert_eq!((rx.frame, rx.header), (request(1000, 1), [0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0].to_vec()));
    let stats = guest.control.stats();
    assert_eq!((stats.intercepted_tx_count.get(), stats.intercepted_rx_count.get()), (1, 1));
}

#[test]
fn replies_wait_for_receive_buffers() {
    let mut guest = guest(Mirror { copies: 5, ..Mirror::default() }, RateLimiterConfig::default());
    guest.send(&request(3000, 1));
    assert_eq!(guest.received(), None);
    guest.arrive(&frame(100, 9));
    let mut got = 0;
    for _ in 0..40 {
        guest.post_rx_buffer(&[700]);
        while let Some(rx) = guest.received() {
            got += 1;
            assert!(rx == request(3000, 1) || rx == frame(100, 9));
        }
    }
    assert_eq!(got, 6);
}

#[test]
fn interceptor_is_polled_at_its_deadline() {
    let mut guest = guest(Mirror { at: Some(5_000_000), ..Mirror::default() }, RateLimiterConfig::default());
    guest.post_rx_buffer(&[1536]);
    assert_eq!(guest.received(), None);
    assert_eq!(guest.guest.worker.next_timer(), Some(5_000_000));
    guest.guest.worker.advance(5_000_000);
    assert_eq!(guest.received().unwrap(), frame(60, 99));
    assert_eq!(guest.guest.worker.next_timer(), None);
}

#[test]
fn rate_limits_do_not_apply_to_the_interceptor() {
    let once = BucketConfig { size: 1, refill_time_ms: 1_000_000, one_time_burst: 0 };
    let limits = RateLimiterConfig { bandwidth: None, ops: Some(once) };
    let mut guest = guest(Mirror { copies: 1, ..Mirror::default() }, limits);
    for seed in 0..20 {
        guest.post_rx_buffer(&[1536]);
        guest.send(&request(100, seed));
        assert_eq!(guest.received().unwrap(), request(100, seed));
    }
}

#[test]
fn driver_reset_resets_the_interceptor() {
    let resets = Arc::new(Mutex::new(0));
    let mut guest =
        guest(Mirror { resets: Arc::clone(&resets), ..Mirror::default() }, RateLimiterConfig::default());
    let before = *locked(&resets);
    guest.start(u64::MAX);
    assert_eq!(*locked(&resets), before + 1);
    guest.post_rx_buffer(&[1536]);
    guest.arrive(&frame(60, 1));
    assert_eq!(guest.received().unwrap(), frame(60, 1));
}

#[test]
fn interceptor_with_vhost_is_an_error() {
    // Skipped without vhost-net.
    let Ok(backend) = NetBackend::vhost(fake_tap(1).0) else { return };
    let setup = NetSetup { backend, interceptor: Some(Box::new(Mirror::default())) };
    let none = RateLimiterConfig::default();
    assert!(matches!(Net::new(config(1), setup, none, none, 1), Err(NetError::Vhost { .. })));
}

#[test]
fn link_stays_up_for_the_interceptor_without_a_network() {
    for gone in [false, true] {
        let (tap, peers) = fake_tap(1);
        let backend = if gone { NetBackend::tap(tap) } else { NetBackend::unplugged(1) };
        let mirror = Mirror { copies: 1, ..Mirror::default() };
        let setup = NetSetup { backend, interceptor: Some(Box::new(mirror)) };
        let none = RateLimiterConfig::default();
        let (net, control) = Net::new(config(1), setup, none, none, 1).unwrap();
        let mut guest = NetGuest::with_device(Kind::Mmio, net, control, peers, u64::MAX);
        guest.post_rx_buffer(&[1536]);
        // Closes the network's end.
        guest.peers.clear();
        guest.send(&frame(100, 2));
        assert_eq!(guest.status(), 1);
        guest.send(&request(100, 1));
        assert_eq!(guest.received().unwrap(), request(100, 1));
        assert_eq!(guest.control.stats().tap_write_fails.get(), 1);
    }
}
