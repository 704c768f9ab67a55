//! A guest's network stack, and raw segments, against the service's stack.

use std::net::Ipv4Addr;
use std::time::Duration;

use config::MmdsVersion;
use proptest::prelude::*;
use serde_json::json;
use smoltcp::socket::tcp::State;
use smoltcp::wire::{EthernetAddress, TcpControl};

use super::connection::STALL_TIMEOUT;
use super::device::MAX_FRAMES;
use super::testing::{
    Fate, GUEST, GUEST_MAC, Guest, MAX_STORE, RawSegment, SentSegment, sent_segments, service,
};
use super::{EVICTION_AGE, MAX_CONNECTIONS, Stack};

const GET: &str = "GET /latest/meta-data HTTP/1.1\r\nConnection: close\r\n\r\n";
const T0: Duration = Duration::from_secs(5);

fn contents() -> serde_json::Value {
    json!({"latest":{"meta-data":{"ami-id":"ami-1","instance-id":"i-1"}}})
}

fn guest() -> Guest {
    Guest::new(&service(MmdsVersion::V1, contents()), GUEST, 1500)
}

fn stack() -> Stack {
    Stack::new(service(MmdsVersion::V1, contents()), 1500, 1, T0)
}

fn body(response: &str) -> &str {
    response.split_once("\r\n\r\n").map_or(response, |(_, body)| body)
}

/// Opens a connection from `port` with raw segments. Returns the next sequence number of the
/// service.
fn open(stack: &mut Stack, port: u16, now: Duration) -> u32 {
    let syn = RawSegment { from: (GUEST, port), control: TcpControl::Syn, seq: 99, ..RawSegment::default() };
    stack.push(&syn.frame(), now);
    let sent = sent_segments(stack, now);
    let [SentSegment { control: TcpControl::Syn, ack: Some(100), seq, .. }] = sent[..] else {
        panic!("no SYN|ACK: {sent:?}")
    };
    let ack =
        RawSegment { from: (GUEST, port), seq: 100, ack: Some(seq.wrapping_add(1)), ..RawSegment::default() };
    stack.push(&ack.frame(), now);
    assert_eq!(sent_segments(stack, now), []);
    seq.wrapping_add(1)
}

#[test]
fn request_gets_a_response() {
    let response = guest().request(GET);
    assert!(response.starts_with("HTTP/1.1 200 OK\r\n"), "{response}");
    assert_eq!(body(&response), "ami-id\ninstance-id");
}

#[test]
fn guest_may_have_any_ip_address() {
    for address in [[10, 0, 0, 2], [192, 168, 1, 1], [8, 8, 8, 8]] {
        let mut guest = Guest::new(&service(MmdsVersion::V1, contents()), Ipv4Addr::from(address), 1500);
        assert_eq!(body(&guest.request(GET)), "ami-id\ninstance-id");
    }
}

#[test]
fn responses_of_any_size_arrive_with_any_mtu() {
    let text: String = (0..).map(|n| format!("{n} ")).take_while(|_| true).take(9000).collect();
    assert!(text.len() > 40_000 && text.len() < MAX_STORE - 100);
    let service = service(MmdsVersion::V1, json!({ "text": text }));
    for mtu in [576, 1500, 9000] {
        let response =
            Guest::new(&service, GUEST, mtu).request("GET /text HTTP/1.1\r\nConnection: close\r\n\r\n");
        assert!(body(&response) == text, "MTU {mtu}");
    }
}

#[test]
fn connection_serves_pipelined_requests() {
    let request = "GET /latest/meta-data/ami-id HTTP/1.1\r\n\r\n";
    let response = guest().request(&format!("{}{GET}", request.repeat(200)));
    assert_eq!(response.matches("\r\n\r\nami-1").count(), 200);
    assert!(response.ends_with("ami-id\ninstance-id"));
}

#[test]
fn half_closed_connection_still_gets_its_response() {
    let mut guest = guest();
    let handle = guest.connect();
    guest.until(T0, |g| g.socket(handle).may_send());
    guest.socket(handle).send_slice(b"GET /latest/meta-data/ami-id HTTP/1.1\r\n\r\n").unwrap();
    guest.socket(handle).close();
    let mut response: Vec<u8> = Vec::new();
    guest.until(T0, |g| {
        let _ = g.socket(handle).recv(|bytes| (bytes.len(), response.extend_from_slice(bytes)));
        !g.socket(handle).may_recv()
    });
    assert!(String::from_utf8(response).unwrap().ends_with("ami-1"));
    guest.until(T0, |g| g.stack.connections.is_empty());
}

#[test]
fn token_is_valid_on_all_interfaces() {
    let service = service(MmdsVersion::V2, contents());
    let mut first = Guest::new(&service, GUEST, 1500);
    let token = first.request(
        "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\nConnection: close\r\n\r\n",
    );
    let mut second = Guest::new(&service, GUEST, 1500);
    assert!(second.request(GET).starts_with("HTTP/1.1 401 "));
    let with_token = format!(
        "GET /latest/meta-data/ami-id HTTP/1.1\r\nConnection: close\r\nX-metadata-token: {}\r\n\r\n",
        body(&token)
    );
    assert_eq!(body(&second.request(&with_token)), "ami-1");
}

#[test]
fn guest_reads_changed_contents() {
    let store = crate::SharedStore::new(100);
    store.put(json!({"a":"1"})).unwrap();
    let config = service(MmdsVersion::V1, contents()).config().clone();
    let service = crate::Service::new(config, store.clone(), "vm", &[1; 32]);
    let mut guest = Guest::new(&service, GUEST, 1500);
    let ask = "GET /a HTTP/1.1\r\nConnection: close\r\n\r\n";
    assert_eq!(body(&guest.request(ask)), "1");
    store.patch(json!({"a":"2"})).unwrap();
    assert_eq!(body(&guest.request(ask)), "2");
}

#[test]
fn response_goes_to_the_mac_of_the_request() {
    let mut stack = stack();
    let mut frame = RawSegment { control: TcpControl::Syn, ..RawSegment::default() }.frame();
    let other = EthernetAddress([2, 9, 9, 9, 9, 9]);
    frame[6..12].copy_from_slice(other.as_bytes());
    // Routed, so the destination MAC is not the service's.
    frame[..6].copy_from_slice(&[2, 1, 1, 1, 1, 1]);
    stack.push(&frame, T0);
    assert_eq!(sent_segments(&mut stack, T0)[0].to, (other, GUEST, 50000));
}

#[test]
fn only_configured_interfaces_have_a_stack() {
    let service = service(MmdsVersion::V1, contents());
    assert!(Stack::for_interface(&service, "eth0", None, T0).is_some());
    assert!(Stack::for_interface(&service, "eth1", None, T0).is_none());
}

#[test]
fn segment_to_another_port_gets_a_reset() {
    let mut stack = stack();
    let syn = RawSegment { to_port: 81, control: TcpControl::Syn, seq: 5, ..RawSegment::default() };
    stack.push(&syn.frame(), T0);
    let sent = sent_segments(&mut stack, T0);
    assert!(
        matches!(sent[..], [SentSegment { control: TcpControl::Rst, ack: Some(6), from_port: 81, .. }]),
        "{sent:?}"
    );
    assert_eq!(stack.connections.len(), 0);
}

#[test]
fn duplicate_syn_opens_one_connection() {
    let mut stack = stack();
    let syn = RawSegment { control: TcpControl::Syn, seq: 99, ..RawSegment::default() }.frame();
    for _ in 0..3 {
        stack.push(&syn, T0);
        sent_segments(&mut stack, T0);
    }
    assert_eq!(stack.connections.len(), 1);
}

#[test]
fn reordered_overlapping_and_duplicate_segments_are_merged() {
    let mut stack = stack();
    let ack = Some(open(&mut stack, 50000, T0));
    let request = b"GET /latest/meta-data/ami-id HTTP/1.1\r\nAccept: text/plain\r\n\r\n";
    let end = request.len();
    let mut response: Vec<u8> = Vec::new();
    for range in [20..40, 30..end, 20..30, 10..25, 0..5, 0..15] {
        let part = RawSegment {
            seq: 100 + range.start as u32,
            ack,
            payload: &request[range],
            ..RawSegment::default()
        };
        assert!(response.is_empty());
        stack.push(&part.frame(), T0);
        response = sent_segments(&mut stack, T0).into_iter().flat_map(|sent| sent.payload).collect();
    }
    assert!(String::from_utf8(response).unwrap().ends_with("ami-1"));
}

#[test]
fn oversized_segment_is_accepted_up_to_the_window() {
    let mut stack = stack();
    let ack = Some(open(&mut stack, 50000, T0));
    // More than 60 KB: a segment that the guest offloads to its device (TSO).
    let requests = "GET /latest/meta-data/ami-id HTTP/1.1\r\nX: y\r\n\r\n".repeat(1300);
    let all = RawSegment { seq: 100, ack, payload: requests.as_bytes(), ..RawSegment::default() };
    assert!(all.frame().len() > 60_000);
    stack.push(&all.frame(), T0);
    let sent = sent_segments(&mut stack, T0);
    let acked = sent.iter().filter_map(|sent| sent.ack).max().unwrap();
    assert!((4000..5000).contains(&(acked - 100)), "{acked}");
    assert!(sent.iter().map(|sent| sent.payload.len()).sum::<usize>() > 4000);
}

#[test]
fn connections_of_an_interface_are_bounded() {
    let mut guest = guest();
    let handles: Vec<_> = (0..MAX_CONNECTIONS).map(|_| guest.connect()).collect();
    guest.until(T0, |g| {
        handles.iter().all(|h| g.sockets.get::<smoltcp::socket::tcp::Socket<'_>>(*h).may_send())
    });
    let refused = guest.connect();
    guest.until(T0, |g| g.state(refused) == State::Closed);
    assert_eq!(guest.stack.connections.len(), MAX_CONNECTIONS);
    // All but the first make progress, so the first is dropped for the new one.
    let later = guest.now + EVICTION_AGE;
    guest.until(2 * EVICTION_AGE, |g| g.now > later);
    for handle in &handles[1..] {
        guest.socket(*handle).send_slice(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    }
    guest.until(T0, |g| {
        handles[1..].iter().all(|h| g.sockets.get::<smoltcp::socket::tcp::Socket<'_>>(*h).can_recv())
    });
    assert_eq!(body(&guest.request(GET)), "ami-id\ninstance-id");
    assert_eq!(guest.state(handles[0]), State::Closed);
    assert!(handles[1..].iter().all(|h| guest.state(*h) == State::Established));
    assert_eq!(guest.stack.connections.len(), MAX_CONNECTIONS);
}

#[test]
fn connections_in_time_wait_are_replaced_at_once() {
    let mut guest = guest();
    for _ in 0..3 * MAX_CONNECTIONS {
        assert_eq!(body(&guest.request(GET)), "ami-id\ninstance-id");
        assert!(guest.stack.connections.len() <= MAX_CONNECTIONS);
    }
    let stats = guest.stack.service.stats();
    assert_eq!(stats.connections_created.get(), 3 * MAX_CONNECTIONS as u64);
}

#[test]
fn incomplete_request_ends_at_the_stall_timeout() {
    let mut guest = guest();
    let handle = guest.connect();
    let start = guest.now;
    guest.until(2 * STALL_TIMEOUT, |g| {
        if g.socket(handle).can_send() && g.now.as_millis().is_multiple_of(500) {
            g.socket(handle).send_slice(b"x").unwrap();
        }
        g.state(handle) == State::Closed
    });
    let lifetime = guest.now.saturating_sub(start);
    assert!((STALL_TIMEOUT..STALL_TIMEOUT + Duration::from_secs(1)).contains(&lifetime), "{lifetime:?}");
    assert!(guest.stack.connections.is_empty());
}

#[test]
fn guest_that_never_reads_is_disconnected() {
    let mut guest = guest();
    let handle = guest.connect();
    guest.until(T0, |g| g.socket(handle).may_send());
    guest.until(2 * STALL_TIMEOUT, |g| {
        while g.socket(handle).can_send() {
            g.socket(handle).send_slice(b"GET /latest HTTP/1.1\r\n\r\n").unwrap();
        }
        g.state(handle) == State::Closed
    });
}

#[test]
fn idle_connection_is_closed_with_a_fin() {
    let mut guest = guest();
    let handle = guest.connect();
    guest.until(T0, |g| g.socket(handle).may_send());
    let start = guest.now;
    guest.until(2 * STALL_TIMEOUT, |g| g.state(handle) == State::CloseWait);
    assert!(guest.now + Duration::from_secs(1) >= start + STALL_TIMEOUT);
    guest.socket(handle).close();
    guest.until(T0, |g| g.state(handle) == State::Closed);
}

#[test]
fn deadline_covers_every_timer() {
    let mut stack = stack();
    assert_eq!(stack.deadline(T0), None, "no timer without a connection");
    open(&mut stack, 50000, T0);
    let deadline = stack.deadline(T0).unwrap();
    assert_eq!(deadline, T0 + STALL_TIMEOUT);
    // The guest sends nothing more: first a FIN, then a reset, then no timer is left.
    let (mut now, mut wakes) = (deadline, 0);
    loop {
        sent_segments(&mut stack, now);
        let Some(next) = stack.deadline(now) else { break };
        assert!(next > now, "a past deadline is handled");
        (now, wakes) = (next, wakes + 1);
    }
    assert_eq!(stack.connections.len(), 0);
    assert!(wakes < 20, "{wakes}");
    assert!(now <= T0 + 2 * STALL_TIMEOUT + Duration::from_secs(1), "{now:?}");
}

#[test]
fn memory_is_bounded_without_receive_buffers() {
    let mut stack = stack();
    for n in 0..2000_u16 {
        let syn = RawSegment { from: (GUEST, 10_000 + n), control: TcpControl::Syn, ..RawSegment::default() };
        stack.push(&syn.frame(), T0);
        assert!(stack.device.frames.len() <= MAX_FRAMES);
    }
    assert_eq!(stack.deadline(T0), None, "only the guest can continue");
    assert!(stack.connections.len() <= MAX_CONNECTIONS);
    assert!(stack.service.stats().rx_accepted_err.get() > 1000);
}

#[test]
fn reset_after_syn_leaves_no_connection() {
    let mut stack = stack();
    let syn = |port, seq| {
        RawSegment { from: (GUEST, port), control: TcpControl::Syn, seq, ..RawSegment::default() }.frame()
    };
    for port in 0..2 * MAX_CONNECTIONS as u16 {
        stack.push(&syn(10_000 + port, 99), T0);
        assert_eq!(sent_segments(&mut stack, T0).len(), 1);
        let rst = RawSegment {
            from: (GUEST, 10_000 + port),
            control: TcpControl::Rst,
            seq: 100,
            ..RawSegment::default()
        };
        stack.push(&rst.frame(), T0);
        assert_eq!(sent_segments(&mut stack, T0), []);
        assert_eq!(stack.connections.len(), 0);
        assert_eq!(stack.deadline(T0), None);
    }
    let stats = stack.service.stats();
    assert_eq!(stats.connections_created.get(), stats.connections_destroyed.get());
}

#[test]
fn device_reset_drops_all_connections() {
    let mut stack = stack();
    let ack = Some(open(&mut stack, 50000, T0));
    stack.reset();
    assert_eq!(stack.deadline(T0), None);
    let request = RawSegment { seq: 100, ack, payload: GET.as_bytes(), ..RawSegment::default() };
    stack.push(&request.frame(), T0);
    let sent = sent_segments(&mut stack, T0);
    assert!(matches!(sent[..], [SentSegment { control: TcpControl::Rst, .. }]), "{sent:?}");
    open(&mut stack, 50000, T0);
}

#[test]
fn invalid_frames_are_counted_and_dropped() {
    let mut stack = stack();
    let whole = RawSegment { control: TcpControl::Syn, ..RawSegment::default() }.frame();
    let mut fragment = whole.clone();
    fragment[20] = 0x20;
    let mut multicast = whole.clone();
    multicast[6] = 1;
    let own =
        RawSegment { from: (super::testing::SERVICE, 5), control: TcpControl::Syn, ..RawSegment::default() };
    let port0 = RawSegment { from: (GUEST, 0), control: TcpControl::Syn, ..RawSegment::default() };
    for frame in [
        &[][..],
        &whole[..13],
        &whole[..20],
        &whole[..40],
        &fragment,
        &multicast,
        &own.frame(),
        &port0.frame(),
    ] {
        stack.push(frame, T0);
        assert_eq!(sent_segments(&mut stack, T0), []);
    }
    let stats = stack.service.stats();
    assert_eq!((stats.rx_count.get(), stats.rx_bad_eth.get()), (8, 2));
    assert_eq!((stats.rx_accepted_err.get(), stats.rx_accepted_unusual.get()), (5, 1));
    assert!(stack.connections.is_empty());
}

#[test]
fn arp_request_is_answered() {
    let mut guest = guest();
    let handle = guest.connect();
    guest.step(|| Fate::Delivered);
    guest.step(|| Fate::Delivered);
    guest.until(T0, |g| g.state(handle) == State::Established);
    assert_eq!(guest.stack.device.neighbors.find(GUEST), Some(GUEST_MAC));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// TCP recovers from lost, duplicated and reordered frames.
    #[test]
    fn lossy_cable_delays_and_loses_nothing(seed in any::<u64>(), bad in 0..12_u64) {
        let text = "0123456789".repeat(1200) + "last";
        let service = service(MmdsVersion::V1, json!({ "text": text }));
        let mut random = seed | 1;
        let mut next = move || {
            random ^= random << 13;
            random ^= random >> 7;
            random ^= random << 17;
            random
        };
        let fate = || match next() % 100 {
            n if n >= bad => Fate::Delivered,
            n if n % 3 == 0 => Fate::Lost,
            n if n % 3 == 1 => Fate::Duplicated,
            _ => Fate::Delayed,
        };
        let response = Guest::new(&service, GUEST, 1500)
            .request_over("GET /text HTTP/1.1\r\n\r\n", fate, |response| response.ends_with(b"last"));
        prop_assert!(body(&response) == text);
    }
}
