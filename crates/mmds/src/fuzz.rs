//! Entry point for fuzzing: any bytes as the acts of a hostile guest, run over the real code.
//!
//! The target under `fuzz/` calls it with what a coverage-guided fuzzer makes up; the test here calls it with seeded random bytes. What must
//! hold: no panic, no end that does not come, no more memory than the bounds say, frames for the guest that are whole, and a
//! guest that behaves is answered afterwards.

use std::time::Duration;

use config::MmdsVersion;
use serde_json::json;
use smoltcp::wire::TcpControl;

use crate::stack::testing::{ByHand, GUEST, Guest, said, service};
use crate::stack::{MAX_CONNECTIONS, Stack};

/// Acts in one run, so that a long input is not a slow one.
const MAX_ACTS: usize = 400;

/// Bytes as numbers. At the end there are zeros.
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

/// What the guest has learnt of its connections: port, its next sequence number, the service's.
struct Known {
    port: u16,
    seq: u32,
    ack: u32,
}

/// Lets a guest do what `data` says.
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
    let mut known: Vec<Known> = Vec::new();
    for _ in 0..MAX_ACTS {
        if input.0.is_empty() {
            break;
        }
        act(&mut input, &mut stack, &mut known, &mut now);
        stack.check_bounds();
    }
    // The time comes for everything that it left behind.
    let mut wakes = 0;
    loop {
        said(&mut stack, now);
        let Some(next) = stack.deadline(now) else { break };
        now = next.max(now + Duration::from_micros(1));
        wakes += 1;
        assert!(wakes < 100 * (MAX_CONNECTIONS + 1), "nothing keeps it busy for ever");
    }
    assert_eq!(stack.connection_count(), 0);
    let mut guest = Guest::new(&service, GUEST, 1500);
    guest.now = now.max(guest.now);
    guest.stack = stack;
    assert!(guest.ask("GET / HTTP/1.1\r\nConnection: close\r\n\r\n").starts_with("HTTP/1.1 "));
}

fn act(input: &mut Input<'_>, stack: &mut Stack, known: &mut Vec<Known>, now: &mut Duration) {
    match input.u8() {
        // Any frame.
        0..10 => {
            let len = usize::from(input.u8());
            let frame = input.take(len);
            let _ = stack.wants(&frame[..len.min(frame.len()).min(64)]);
            stack.push(frame, *now);
        }
        // A frame that was right before some bytes of it were changed.
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
        // A connection is opened by the book.
        110..160 => {
            let port = 1000 + u16::from(input.u8() % 48);
            let syn = ByHand {
                from: (GUEST, port),
                control: TcpControl::Syn,
                seq: input.u32(),
                ..ByHand::default()
            };
            stack.push(&syn.frame(), *now);
            hear(stack, known, *now);
            if let Some(known) = known.iter().find(|known| known.port == port) {
                let ack = Some(known.ack);
                let ack = ByHand { from: (GUEST, port), seq: known.seq, ack, ..ByHand::default() };
                stack.push(&ack.frame(), *now);
            }
        }
        // What stands in a connection by the book.
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
            let frame = ByHand {
                from: (GUEST, known.port),
                seq: known.seq,
                ack: Some(known.ack),
                payload: text,
                ..ByHand::default()
            };
            known.seq = known.seq.wrapping_add(text.len() as u32);
            stack.push(&frame.frame(), *now);
        }
        // It reads, or does not.
        210..240 => hear(stack, known, *now),
        240..250 => *now += Duration::from_millis(input.u16().into()),
        250..254 => {
            if let Some(deadline) = stack.deadline(*now) {
                *now = deadline.max(*now);
            }
        }
        _ => stack.reset(),
    }
}

/// Reads what the service says, and keeps what it says of each connection.
fn hear(stack: &mut Stack, known: &mut Vec<Known>, now: Duration) {
    for said in said(stack, now) {
        let flags = match said.control {
            TcpControl::Syn | TcpControl::Fin => 1,
            _ => 0,
        };
        let ack = said.seq.wrapping_add(said.payload.len() as u32 + flags);
        let port = said.to.2;
        known.retain(|known| said.control != TcpControl::Syn || known.port != port);
        match known.iter_mut().find(|known| known.port == port) {
            Some(known) => known.ack = ack,
            None => known.push(Known { port, seq: said.ack.unwrap_or(0), ack }),
        }
    }
}

/// A segment, mostly near one that makes sense.
fn segment(input: &mut Input<'_>, known: &[Known]) -> Vec<u8> {
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
    ByHand {
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

    /// Runs seeded random bytes, so that every test run tries the same.
    #[test]
    fn no_guest_breaks_it() {
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
