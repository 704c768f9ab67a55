//! A guest's network stack, and segments by hand, against the service's.

use std::net::Ipv4Addr;
use std::time::Duration;

use config::MmdsVersion;
use proptest::prelude::*;
use serde_json::json;
use smoltcp::socket::tcp::State;
use smoltcp::wire::{EthernetAddress, TcpControl};

use super::connection::PATIENCE;
use super::testing::{ByHand, Fate, GUEST, GUEST_MAC, Guest, MAX_STORE, Said, said, service};
use super::wire::MAX_FRAMES;
use super::{GRACE, MAX_CONNECTIONS, Stack};

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

fn body(answer: &str) -> &str {
    answer.split_once("\r\n\r\n").map_or(answer, |(_, body)| body)
}

/// A connection by hand from `port`: what the service's sequence number is.
fn open(stack: &mut Stack, port: u16, now: Duration) -> u32 {
    let syn = ByHand { from: (GUEST, port), control: TcpControl::Syn, seq: 99, ..ByHand::default() };
    stack.push(&syn.frame(), now);
    let said = said(stack, now);
    let [Said { control: TcpControl::Syn, ack: Some(100), seq, .. }] = said[..] else {
        panic!("no SYN|ACK: {said:?}")
    };
    let ack = ByHand { from: (GUEST, port), seq: 100, ack: Some(seq.wrapping_add(1)), ..ByHand::default() };
    stack.push(&ack.frame(), now);
    assert_eq!(self::said(stack, now), []);
    seq.wrapping_add(1)
}

#[test]
fn a_guest_asks_and_is_answered() {
    let answer = guest().ask(GET);
    assert!(answer.starts_with("HTTP/1.1 200 OK\r\n"), "{answer}");
    assert_eq!(body(&answer), "ami-id\ninstance-id");
}

#[test]
fn a_guest_may_have_any_address() {
    for address in [[10, 0, 0, 2], [192, 168, 1, 1], [8, 8, 8, 8]] {
        let mut guest = Guest::new(&service(MmdsVersion::V1, contents()), Ipv4Addr::from(address), 1500);
        assert_eq!(body(&guest.ask(GET)), "ami-id\ninstance-id");
    }
}

#[test]
fn an_answer_of_any_size_arrives_whole_whatever_the_mtu() {
    let text: String = (0..).map(|n| format!("{n} ")).take_while(|_| true).take(9000).collect();
    assert!(text.len() > 40_000 && text.len() < MAX_STORE - 100);
    let service = service(MmdsVersion::V1, json!({ "text": text }));
    for mtu in [576, 1500, 9000] {
        let answer = Guest::new(&service, GUEST, mtu).ask("GET /text HTTP/1.1\r\nConnection: close\r\n\r\n");
        assert!(body(&answer) == text, "MTU {mtu}");
    }
}

#[test]
fn a_connection_serves_many_requests_and_several_at_once() {
    let request = "GET /latest/meta-data/ami-id HTTP/1.1\r\n\r\n";
    let answer = guest().ask(&format!("{}{GET}", request.repeat(200)));
    assert_eq!(answer.matches("\r\n\r\nami-1").count(), 200);
    assert!(answer.ends_with("ami-id\ninstance-id"));
}

#[test]
fn a_guest_that_has_said_everything_is_still_answered() {
    let mut guest = guest();
    let handle = guest.connect();
    guest.until(T0, |g| g.socket(handle).may_send());
    guest.socket(handle).send_slice(b"GET /latest/meta-data/ami-id HTTP/1.1\r\n\r\n").unwrap();
    guest.socket(handle).close();
    let mut answer: Vec<u8> = Vec::new();
    guest.until(T0, |g| {
        let _ = g.socket(handle).recv(|bytes| (bytes.len(), answer.extend_from_slice(bytes)));
        !g.socket(handle).may_recv()
    });
    assert!(String::from_utf8(answer).unwrap().ends_with("ami-1"));
    guest.until(T0, |g| g.stack.connections.is_empty());
}

#[test]
fn a_token_of_one_interface_is_good_on_another() {
    let service = service(MmdsVersion::V2, contents());
    let mut first = Guest::new(&service, GUEST, 1500);
    let token = first.ask(
        "PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 60\r\nConnection: close\r\n\r\n",
    );
    let mut second = Guest::new(&service, GUEST, 1500);
    assert!(second.ask(GET).starts_with("HTTP/1.1 401 "));
    let with_token = format!(
        "GET /latest/meta-data/ami-id HTTP/1.1\r\nConnection: close\r\nX-metadata-token: {}\r\n\r\n",
        body(&token)
    );
    assert_eq!(body(&second.ask(&with_token)), "ami-1");
}

#[test]
fn what_the_user_changes_the_guest_reads_next() {
    let store = crate::SharedStore::new(100);
    store.put(json!({"a":"1"})).unwrap();
    let config = service(MmdsVersion::V1, contents()).config().clone();
    let service = crate::Service::new(config, store.clone(), "vm", &[1; 32]);
    let mut guest = Guest::new(&service, GUEST, 1500);
    let ask = "GET /a HTTP/1.1\r\nConnection: close\r\n\r\n";
    assert_eq!(body(&guest.ask(ask)), "1");
    store.patch(json!({"a":"2"})).unwrap();
    assert_eq!(body(&guest.ask(ask)), "2");
}

#[test]
fn an_answer_goes_to_the_hardware_address_that_asked() {
    let mut stack = stack();
    let mut frame = ByHand { control: TcpControl::Syn, ..ByHand::default() }.frame();
    let other = EthernetAddress([2, 9, 9, 9, 9, 9]);
    frame[6..12].copy_from_slice(other.as_bytes());
    // By way of a router, so to a hardware address that is not the service's.
    frame[..6].copy_from_slice(&[2, 1, 1, 1, 1, 1]);
    stack.push(&frame, T0);
    assert_eq!(said(&mut stack, T0)[0].to, (other, GUEST, 50000));
}

#[test]
fn another_port_refuses() {
    let mut stack = stack();
    let syn = ByHand { to_port: 81, control: TcpControl::Syn, seq: 5, ..ByHand::default() };
    stack.push(&syn.frame(), T0);
    let said = said(&mut stack, T0);
    assert!(
        matches!(said[..], [Said { control: TcpControl::Rst, ack: Some(6), from_port: 81, .. }]),
        "{said:?}"
    );
    assert_eq!(stack.connections.len(), 0);
}

#[test]
fn a_first_segment_that_comes_twice_is_one_connection() {
    let mut stack = stack();
    let syn = ByHand { control: TcpControl::Syn, seq: 99, ..ByHand::default() }.frame();
    for _ in 0..3 {
        stack.push(&syn, T0);
        said(&mut stack, T0);
    }
    assert_eq!(stack.connections.len(), 1);
}

#[test]
fn segments_out_of_order_overlapping_and_twice_make_one_request() {
    let mut stack = stack();
    let ack = Some(open(&mut stack, 50000, T0));
    let request = b"GET /latest/meta-data/ami-id HTTP/1.1\r\nAccept: text/plain\r\n\r\n";
    let end = request.len();
    let mut answer: Vec<u8> = Vec::new();
    for range in [20..40, 30..end, 20..30, 10..25, 0..5, 0..15] {
        let part =
            ByHand { seq: 100 + range.start as u32, ack, payload: &request[range], ..ByHand::default() };
        assert!(answer.is_empty());
        stack.push(&part.frame(), T0);
        answer = said(&mut stack, T0).into_iter().flat_map(|said| said.payload).collect();
    }
    assert!(String::from_utf8(answer).unwrap().ends_with("ami-1"));
}

#[test]
fn a_segment_larger_than_any_packet_is_taken_as_far_as_the_window_goes() {
    let mut stack = stack();
    let ack = Some(open(&mut stack, 50000, T0));
    // Nine requests and then some: a segment that the guest left to its device to cut up.
    let requests = "GET /latest/meta-data/ami-id HTTP/1.1\r\nX: y\r\n\r\n".repeat(1300);
    let all = ByHand { seq: 100, ack, payload: requests.as_bytes(), ..ByHand::default() };
    assert!(all.frame().len() > 60_000);
    stack.push(&all.frame(), T0);
    let said = said(&mut stack, T0);
    let acked = said.iter().filter_map(|said| said.ack).max().unwrap();
    assert!((4000..5000).contains(&(acked - 100)), "{acked}");
    assert!(said.iter().map(|said| said.payload.len()).sum::<usize>() > 4000);
}

#[test]
fn an_interface_has_no_more_connections_than_its_bound() {
    let mut guest = guest();
    let handles: Vec<_> = (0..MAX_CONNECTIONS).map(|_| guest.connect()).collect();
    guest.until(T0, |g| {
        handles.iter().all(|h| g.sockets.get::<smoltcp::socket::tcp::Socket<'_>>(*h).may_send())
    });
    let refused = guest.connect();
    guest.until(T0, |g| g.state(refused) == State::Closed);
    assert_eq!(guest.stack.connections.len(), MAX_CONNECTIONS);
    // All but the first speak, so that is the one that makes room.
    let later = guest.now + GRACE;
    guest.until(2 * GRACE, |g| g.now > later);
    for handle in &handles[1..] {
        guest.socket(*handle).send_slice(b"GET / HTTP/1.1\r\n\r\n").unwrap();
    }
    guest.until(T0, |g| {
        handles[1..].iter().all(|h| g.sockets.get::<smoltcp::socket::tcp::Socket<'_>>(*h).can_recv())
    });
    assert_eq!(body(&guest.ask(GET)), "ami-id\ninstance-id");
    assert_eq!(guest.state(handles[0]), State::Closed);
    assert!(handles[1..].iter().all(|h| guest.state(*h) == State::Established));
    assert_eq!(guest.stack.connections.len(), MAX_CONNECTIONS);
}

#[test]
fn connections_that_are_over_make_room_at_once() {
    let mut guest = guest();
    for _ in 0..3 * MAX_CONNECTIONS {
        assert_eq!(body(&guest.ask(GET)), "ami-id\ninstance-id");
        assert!(guest.stack.connections.len() <= MAX_CONNECTIONS);
    }
    let stats = guest.stack.service.stats();
    assert_eq!(stats.connections_created.get(), 3 * MAX_CONNECTIONS as u64);
}

#[test]
fn a_request_that_drips_in_ends_with_patience() {
    let mut guest = guest();
    let handle = guest.connect();
    let start = guest.now;
    guest.until(2 * PATIENCE, |g| {
        if g.socket(handle).can_send() && g.now.as_millis().is_multiple_of(500) {
            g.socket(handle).send_slice(b"x").unwrap();
        }
        g.state(handle) == State::Closed
    });
    let lived = guest.now.saturating_sub(start);
    assert!((PATIENCE..PATIENCE + Duration::from_secs(1)).contains(&lived), "{lived:?}");
    assert!(guest.stack.connections.is_empty());
}

#[test]
fn a_guest_that_never_reads_its_answer_is_let_go() {
    let mut guest = guest();
    let handle = guest.connect();
    guest.until(T0, |g| g.socket(handle).may_send());
    guest.until(2 * PATIENCE, |g| {
        while g.socket(handle).can_send() {
            g.socket(handle).send_slice(b"GET /latest HTTP/1.1\r\n\r\n").unwrap();
        }
        g.state(handle) == State::Closed
    });
}

#[test]
fn an_idle_connection_is_closed_in_order() {
    let mut guest = guest();
    let handle = guest.connect();
    guest.until(T0, |g| g.socket(handle).may_send());
    let start = guest.now;
    guest.until(2 * PATIENCE, |g| g.state(handle) == State::CloseWait);
    assert!(guest.now + Duration::from_secs(1) >= start + PATIENCE);
    guest.socket(handle).close();
    guest.until(T0, |g| g.state(handle) == State::Closed);
}

#[test]
fn the_deadline_says_when_there_is_something_to_do() {
    let mut stack = stack();
    assert_eq!(stack.deadline(T0), None, "nothing happens where nobody asks");
    open(&mut stack, 50000, T0);
    let deadline = stack.deadline(T0).unwrap();
    assert_eq!(deadline, T0 + PATIENCE);
    // The guest is gone: the connection ends in order, then at once, and then there is nothing left.
    let (mut now, mut wakes) = (deadline, 0);
    loop {
        said(&mut stack, now);
        let Some(next) = stack.deadline(now) else { break };
        assert!(next > now, "a deadline that has come is dealt with");
        (now, wakes) = (next, wakes + 1);
    }
    assert_eq!(stack.connections.len(), 0);
    assert!(wakes < 20, "{wakes}");
    assert!(now <= T0 + 2 * PATIENCE + Duration::from_secs(1), "{now:?}");
}

#[test]
fn a_guest_that_fetches_nothing_fills_nothing() {
    let mut stack = stack();
    for n in 0..2000_u16 {
        let syn = ByHand { from: (GUEST, 10_000 + n), control: TcpControl::Syn, ..ByHand::default() };
        stack.push(&syn.frame(), T0);
        assert!(stack.wire.frames.len() <= MAX_FRAMES);
    }
    assert_eq!(stack.deadline(T0), None, "only the guest can go on");
    assert!(stack.connections.len() <= MAX_CONNECTIONS);
    assert!(stack.service.stats().rx_accepted_err.get() > 1000);
}

#[test]
fn a_guest_that_takes_its_first_segment_back_leaves_no_connection() {
    let mut stack = stack();
    let syn = |port, seq| {
        ByHand { from: (GUEST, port), control: TcpControl::Syn, seq, ..ByHand::default() }.frame()
    };
    for port in 0..2 * MAX_CONNECTIONS as u16 {
        stack.push(&syn(10_000 + port, 99), T0);
        assert_eq!(said(&mut stack, T0).len(), 1);
        let rst =
            ByHand { from: (GUEST, 10_000 + port), control: TcpControl::Rst, seq: 100, ..ByHand::default() };
        stack.push(&rst.frame(), T0);
        assert_eq!(said(&mut stack, T0), []);
        assert_eq!(stack.connections.len(), 0);
        assert_eq!(stack.deadline(T0), None);
    }
    let stats = stack.service.stats();
    assert_eq!(stats.connections_created.get(), stats.connections_destroyed.get());
}

#[test]
fn a_driver_that_begins_anew_has_no_connections() {
    let mut stack = stack();
    let ack = Some(open(&mut stack, 50000, T0));
    stack.reset();
    assert_eq!(stack.deadline(T0), None);
    let request = ByHand { seq: 100, ack, payload: GET.as_bytes(), ..ByHand::default() };
    stack.push(&request.frame(), T0);
    let said = said(&mut stack, T0);
    assert!(matches!(said[..], [Said { control: TcpControl::Rst, .. }]), "{said:?}");
    open(&mut stack, 50000, T0);
}

#[test]
fn what_cannot_be_meant_is_counted_and_dropped() {
    let mut stack = stack();
    let whole = ByHand { control: TcpControl::Syn, ..ByHand::default() }.frame();
    let mut fragment = whole.clone();
    fragment[20] = 0x20;
    let mut multicast = whole.clone();
    multicast[6] = 1;
    let own = ByHand { from: (super::testing::SERVICE, 5), control: TcpControl::Syn, ..ByHand::default() };
    let port0 = ByHand { from: (GUEST, 0), control: TcpControl::Syn, ..ByHand::default() };
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
        assert_eq!(said(&mut stack, T0), []);
    }
    let stats = stack.service.stats();
    assert_eq!((stats.rx_count.get(), stats.rx_bad_eth.get()), (8, 2));
    assert_eq!((stats.rx_accepted_err.get(), stats.rx_accepted_unusual.get()), (5, 1));
    assert!(stack.connections.is_empty());
}

#[test]
fn arp_is_answered_to_who_asks() {
    let mut guest = guest();
    let handle = guest.connect();
    guest.step(|| Fate::Arrives);
    guest.step(|| Fate::Arrives);
    guest.until(T0, |g| g.state(handle) == State::Established);
    assert_eq!(guest.stack.wire.peers.find(GUEST), Some(GUEST_MAC));
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(64))]

    /// Whatever the cable loses, doubles and swaps, TCP makes it good.
    #[test]
    fn a_bad_cable_only_takes_longer(seed in any::<u64>(), bad in 0..12_u64) {
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
            n if n >= bad => Fate::Arrives,
            n if n % 3 == 0 => Fate::Lost,
            n if n % 3 == 1 => Fate::Twice,
            _ => Fate::Late,
        };
        let answer = Guest::new(&service, GUEST, 1500)
            .ask_with("GET /text HTTP/1.1\r\n\r\n", fate, |answer| answer.ends_with(b"last"));
        prop_assert!(body(&answer) == text);
    }
}
