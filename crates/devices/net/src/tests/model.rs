//! Property test: with any traffic and any buffers, frames arrive in order, and missing ones are
//! counted.

use std::collections::VecDeque;

use proptest::prelude::*;

use super::guest::config;
use super::*;
use crate::config_space::feature;
use virtio::rate_limiter::RateLimiterConfig;
use virtio::testing::Kind;

#[derive(Debug, Clone)]
enum Act {
    /// The guest sends a frame in buffers of these lengths.
    Send(usize, Vec<usize>),
    /// The network has a frame.
    Arrive(usize),
    /// The guest adds a receive buffer.
    AddBuffer(Vec<u32>),
    /// Time passes: frames that wait for receive buffers are dropped.
    Wait,
    /// The machine pauses and resumes.
    Pause,
}

fn len() -> impl Strategy<Value = usize> {
    prop_oneof![14usize..100, 100usize..3000, 60_000usize..65_000]
}

fn act() -> impl Strategy<Value = Act> {
    prop_oneof![
        4 => (len(), prop::collection::vec(1usize..5000, 0..4)).prop_map(|(len, cuts)| Act::Send(len, cuts)),
        4 => len().prop_map(Act::Arrive),
        8 => prop::collection::vec(1u32..4000, 1..4).prop_map(Act::AddBuffer),
        1 => Just(Act::Wait),
        1 => Just(Act::Pause),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn frames_arrive_in_order_or_are_counted_as_dropped(
        acts in prop::collection::vec(act(), 1..60),
        mergeable: bool, event_idx: bool, pci: bool,
    ) {
        let mut accepts = u64::MAX;
        if !mergeable {
            accepts &= !feature::MRG_RXBUF;
        }
        if !event_idx {
            accepts &= !virtio::device::feature::RING_EVENT_IDX;
        }
        let none = RateLimiterConfig::default();
        let kind = if pci { Kind::Pci } else { Kind::Mmio };
        let mut guest = NetGuest::with(kind, config(1), none, none, accepts);
        let mut to_network: VecDeque<Vec<u8>> = VecDeque::new();
        let mut to_guest: VecDeque<Vec<u8>> = VecDeque::new();
        let mut seed = 0u8;
        let mut skipped = 0;
        for act in acts {
            seed = seed.wrapping_add(1);
            match act {
                Act::Send(len, cuts) => {
                    while guest.queues[1].take_used().is_some() {}
                    if guest.send_on(0, [0; 12], &frame(len, seed), &cuts) {
                        to_network.push_back(frame(len, seed));
                    }
                    guest.publish(1);
                }
                Act::Arrive(len) => {
                    if guest.arrive_on(0, [0; 12], &frame(len, seed)) {
                        to_guest.push_back(frame(len, seed));
                    }
                }
                Act::AddBuffer(parts) => {
                    guest.add_rx_buffer(0, &parts);
                    guest.publish(0);
                }
                Act::Wait => guest.guest.worker.advance(crate::pair::BUFFER_TIMEOUT),
                Act::Pause => {
                    let paused = guest.guest.worker.pause();
                    prop_assert!(paused.try_recv().is_ok());
                    guest.guest.worker.resume();
                }
            }
            while let Some(sent) = guest.sent() {
                prop_assert!(Some(sent) == to_network.pop_front());
                guest.guest.worker.run();
            }
            while let Some(rx) = guest.received() {
                // Frames before it may have been dropped.
                while to_guest.front().is_some_and(|next| *next != rx) {
                    to_guest.pop_front();
                    skipped += 1;
                }
                prop_assert!(to_guest.pop_front() == Some(rx));
            }
        }
        prop_assert!(to_network.is_empty(), "{} frames were not sent", to_network.len());
        prop_assert!(guest.control.stats().rx_fails.get() >= skipped);
        prop_assert_eq!(guest.guest.broken_count(), 0);
    }
}
