//! Entry point for fuzzing: runs the actions of a hostile guest, decoded from any bytes.
//!
//! The target under `fuzz/` calls it with the input of a coverage-guided fuzzer, the test here with
//! seeded random bytes. It checks that nothing panics, that every loop ends, that memory stays
//! within its bounds, that frames to the guest are valid, and that a well-behaved guest gets a
//! response afterwards.

use std::time::Duration;

use config::MmdsVersion;
use serde_json::json;
use smoltcp::wire::TcpControl;

use crate::stack::testing::{GUEST, Guest, RawSegment, sent_segments, service};
use crate::stack::{MAX_CONNECTIONS, Stack};

/// Most actions in one run, so that a long input is not slow.
const MAX_ACTIONS: usize = 400;

/// Reads numbers from bytes; zeros after the end.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn bytes<const N: usize>(&mut self) -> [u8; N] {
        let mut bytes = [0; N];
        let taken = self.take(N);
        bytes[..taken.len()].copy_from_slice(taken);
        bytes
    }

    fn take(&mut self, len: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(len.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn u8(&mut self) -> u8 {
        u8::from_le_bytes(self.bytes())
    }

    fn u16(&mut self) -> u16 {
        u16::from_le_bytes(self.bytes())
    }

    fn u32(&mut self) -> u32 {
        u32::from_le_bytes(self.bytes())
    }
}

/// A connection as the guest knows it: its port, its next sequence number, the service's.
struct KnownConnection {
    port: u16,
    seq: u32,
    ack: u32,
}

/// Runs the actions that `data` encodes.
pub fn run(data: &[u8]) {
    let mut input = Input(data);
    let version = if input.u8().is_multiple_of(2) { MmdsVersion::V1 } else { MmdsVersion::V2 };
    let contents = json!({"latest":{"meta-data":{"long":"x".repeat(20_000),"a":"b"}}});
    let service = service(version, contents);
    let mtu = match input.u8() {
        0..200 => 1500,
        small => u16::from(small) * 4,
    };
    let mut now = Duration::from_secs(1);
    let mut stack = Stack::new(service.clone(), mtu, u64::from(input.u32()), now);
    let mut known: Vec<KnownConnection> = Vec::new();
    for _ in 0..MAX_ACTIONS {
        if input.0.is_empty() {
            break;
        }
        step(&mut input, &mut stack, &mut known, &mut now);
        stack.check_bounds();
    }
    // Run all remaining timers.
    let mut wakes = 0;
    loop {
        sent_segments(&mut stack, now);
        let Some(next) = stack.deadline(now) else { break };
        now = next.max(now + Duration::from_micros(1));
        wakes += 1;
        assert!(wakes < 100 * (MAX_CONNECTIONS + 1), "timers end");
    }
    assert_eq!(stack.connection_count(), 0);
    let mut guest = Guest::new(&service, GUEST, 1500);
    guest.now = now.max(guest.now);
    guest.stack = stack;
    assert!(guest.request("GET / HTTP/1.1\r\nConnection: close\r\n\r\n").starts_with("HTTP/1.1 "));
}

/// Decodes and runs one action.
fn step(input: &mut Input<'_>, stack: &mut Stack, known: &mut Vec<KnownConnection>, now: &mut Duration) {
    match input.u8() {
        // Any frame.
        0..10 => {
            let len = usize::from(input.u8());
            let frame = input.take(len);
            let _ = stack.wants(&frame[..len.min(frame.len()).min(64)]);
            stack.push(frame, *now);
        }
        // A valid frame with some bytes changed.
        10..40 => {
            let mut frame = segment(input, known);
            for _ in 0..input.u8() % 4 {
                let at = usize::from(input.u16()) % frame.len();
                frame[at] = input.u8();
            }
            frame.truncate(frame.len() - usize::from(input.u8() % 8));
            stack.push(&frame, *now);
        }
        40..110 => stack.push(&segment(input, known), *now),
        // A correct handshake.
        110..160 => {
            let port = 1000 + u16::from(input.u8() % 48);
            let syn = RawSegment {
                from: (GUEST, port),
                control: TcpControl::Syn,
                seq: input.u32(),
                ..RawSegment::default()
            };
            stack.push(&syn.frame(), *now);
            receive(stack, known, *now);
            if let Some(known) = known.iter().find(|known| known.port == port) {
                let ack = Some(known.ack);
                let ack = RawSegment { from: (GUEST, port), seq: known.seq, ack, ..RawSegment::default() };
                stack.push(&ack.frame(), *now);
            }
        }
        // A correct segment with part of a request.
        160..210 => {
            let texts: [&[u8]; 6] = [
                b"GET /latest/meta-data/long HTTP/1.1\r\n\r\n",
                b"PUT /latest/api/token HTTP/1.1\r\nX-metadata-token-ttl-seconds: 9\r\n\r\n",
                b"GET / HTTP/1.0\r\nAccept: application/json\r\n",
                b"\r\n\r\n",
                b"POST / HTTP/1.1\r\nContent-Length: 9\r\n\r\n123",
                &[b'x'; 1400],
            ];
            let text = texts[usize::from(input.u8()) % texts.len()];
            let at = usize::from(input.u8());
            if known.is_empty() {
                return;
            }
            let len = known.len();
            let known = &mut known[at % len];
            let frame = RawSegment {
                from: (GUEST, known.port),
                seq: known.seq,
                ack: Some(known.ack),
                payload: text,
                ..RawSegment::default()
            };
            known.seq = known.seq.wrapping_add(text.len() as u32);
            stack.push(&frame.frame(), *now);
        }
        // The guest receives frames.
        210..240 => receive(stack, known, *now),
        240..250 => *now += Duration::from_millis(input.u16().into()),
        250..254 => {
            if let Some(deadline) = stack.deadline(*now) {
                *now = deadline.max(*now);
            }
        }
        _ => stack.reset(),
    }
}

/// Receives all frames and updates the known connections.
fn receive(stack: &mut Stack, known: &mut Vec<KnownConnection>, now: Duration) {
    for sent in sent_segments(stack, now) {
        let flags = match sent.control {
            TcpControl::Syn | TcpControl::Fin => 1,
            _ => 0,
        };
        let ack = sent.seq.wrapping_add(sent.payload.len() as u32 + flags);
        let port = sent.to.2;
        known.retain(|known| sent.control != TcpControl::Syn || known.port != port);
        match known.iter_mut().find(|known| known.port == port) {
            Some(known) => known.ack = ack,
            None => known.push(KnownConnection { port, seq: sent.ack.unwrap_or(0), ack }),
        }
    }
}

/// A segment whose fields are mostly close to valid ones.
fn segment(input: &mut Input<'_>, known: &[KnownConnection]) -> Vec<u8> {
    let shape = input.u8();
    let port = match known.get(usize::from(input.u8() % 64)) {
        Some(known) => known.port,
        None => 1000 + u16::from(input.u8() % 64),
    };
    let near = known.iter().find(|known| known.port == port);
    let offset = |input: &mut Input<'_>| match input.u8() {
        0..150 => 0,
        150..200 => u32::from(input.u8()),
        200..240 => 0_u32.wrapping_sub(input.u8().into()),
        _ => input.u32(),
    };
    let seq = near.map_or(0, |known| known.seq).wrapping_add(offset(input));
    let ack = near.map_or(0, |known| known.ack).wrapping_add(offset(input));
    let control = match shape % 8 {
        0 | 1 => TcpControl::Syn,
        2 => TcpControl::Fin,
        3 => TcpControl::Rst,
        4 => TcpControl::Psh,
        _ => TcpControl::None,
    };
    let has_options = control == TcpControl::Syn && shape & 16 != 0;
    let len = usize::from(input.u8() % 64);
    RawSegment {
        from: (GUEST, port),
        to_port: if shape & 0xc0 == 0xc0 { input.u16() } else { 80 },
        control,
        seq,
        ack: (control != TcpControl::Syn || shape & 32 != 0).then_some(ack),
        window: if shape & 8 == 0 { 60000 } else { input.u16() % 2000 },
        mss: has_options.then(|| input.u16()),
        window_scale: has_options.then(|| input.u8()),
        timestamp: (shape & 32 != 0).then(|| (input.u32(), input.u32())),
        payload: input.take(len),
    }
    .frame()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The seed is fixed, so every test run is the same.
    #[test]
    fn random_actions_pass_all_checks() {
        let mut random = 0x9e37_79b9_7f4a_7c15_u64;
        for _ in 0..1000 {
            let mut data = vec![0; 6000];
            for byte in &mut data {
                random ^= random << 13;
                random ^= random >> 7;
                random ^= random << 17;
                *byte = (random >> 32) as u8;
            }
            run(&data);
        }
    }
}
