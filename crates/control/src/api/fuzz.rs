//! The way from the bytes of a connection to commands, without a socket or threads: for tests, and
//! for the fuzz target `api`.

use std::time::Duration;

use super::limits::Limits;
use super::routes::{Route, RouteError, route};
use crate::http::{Decoded, Decoder, Refusal};

/// Small bounds, so that short inputs reach them.
const LIMITS: Limits = Limits {
    max_connections: 1,
    max_streams: 1,
    stream_comment_interval: Duration::from_secs(20),
    max_payload: 1024,
    max_head: 512,
};

/// The beginnings of requests.
const REQUESTS: [&str; 28] = [
    "GET /",
    "GET /vm/config",
    "PUT /machine-config",
    "PATCH /machine-config",
    "PUT /boot-source",
    "PUT /logger",
    "PUT /serial",
    "PUT /drives/a",
    "PATCH /drives/a",
    "DELETE /drives/a",
    "PUT /network-interfaces/a",
    "PATCH /network-interfaces/a",
    "PUT /entropy",
    "PUT /vsock",
    "PUT /mmds",
    "PATCH /mmds",
    "PUT /mmds/config",
    "PUT /actions",
    "PATCH /vm",
    "PUT /snapshot/create",
    "PUT /snapshot/load",
    "PUT /fork",
    "POST /actions",
    "PUT /balloon",
    "PUT /cpu-config",
    "PUT /metrics",
    "GET /metrics",
    "GET /events",
];

/// Parts of heads and bodies, which random bytes would hardly ever be.
const PARTS: [&str; 40] = [
    "\r\n",
    "\r\n\r\n",
    " HTTP/1.1\r\n",
    " HTTP/1.0\r\n",
    "Content-Length: ",
    "Content-Length: 2\r\n",
    "Transfer-Encoding: chunked\r\n",
    "Expect: 100-continue\r\n",
    "Connection: close\r\n",
    "0\r\n\r\n",
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    "\"a\":",
    "\"\\u0000\"",
    "null",
    "true",
    "-1",
    "1e400",
    "18446744073709551616",
    "\"vcpu_count\":1",
    "\"mem_size_mib\":128",
    "\"drive_id\":\"a\"",
    "\"is_root_device\":false",
    "\"path_on_host\":\"a\"",
    "\"rate_limiter\":",
    "\"ops\":",
    "\"size\":1,\"refill_time\":1",
    "\"iface_id\":\"a\"",
    "\"guest_mac\":",
    "\"network_interfaces\":[\"a\"]",
    "\"ipv4_address\":\"169.254.1.1\"",
    "\"action_type\":\"InstanceStart\"",
    "\"state\":\"Paused\"",
    "\"snapshot_path\":\"a\",\"mem_file_path\":\"b\"",
    "\"guest_cid\":3,\"uds_path\":\"a\"",
    "\"children\":[]",
];

/// Checks that what `data` stands for causes no panic, however it is cut, and always has the same
/// outcome.
///
/// # Panics
///
/// Panics if it is otherwise.
pub fn run(data: &[u8]) {
    let stream = stream(data);
    let whole = replay([stream.as_slice()], &LIMITS);
    let size = 1 + data.len() % 7;
    let cut = replay(stream.chunks(size), &LIMITS);
    assert_eq!(format!("{whole:?}"), format!("{cut:?}"), "in pieces of {size} bytes");
}

/// The requests that an input stands for. A zero separates them.
fn stream(data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    for request in data.split(|&byte| byte == 0) {
        match request {
            [kind, body @ ..] if usize::from(*kind) <= REQUESTS.len() => {
                let body = expanded(body);
                let head = format!(
                    "{} HTTP/1.1\r\nContent-Length: {}\r\n\r\n",
                    REQUESTS[usize::from(*kind) - 1],
                    body.len()
                );
                out.extend_from_slice(head.as_bytes());
                out.extend_from_slice(&body);
            }
            other => out.extend_from_slice(&expanded(other)),
        }
    }
    out
}

/// Each byte as a part, if there is one, or as it is.
fn expanded(bytes: &[u8]) -> Vec<u8> {
    let part = |byte: &u8| {
        PARTS.get(usize::from(*byte)).map_or_else(|| vec![*byte], |part| part.as_bytes().to_vec())
    };
    bytes.iter().flat_map(part).collect()
}

/// The outcome of one request.
#[derive(Debug)]
pub enum Replayed {
    /// What the request asks for.
    Route(Route),
    /// A request that the API does not know: a fault.
    Fault(RouteError),
    /// Bytes that are not HTTP: a protocol error.
    Refused(Refusal),
}

/// The outcomes of a connection on which `pieces` arrive one after the other.
pub fn replay<'a>(pieces: impl IntoIterator<Item = &'a [u8]>, limits: &Limits) -> Vec<Replayed> {
    let mut decoder = Decoder::new(limits.max_head, limits.max_payload);
    let mut out = Vec::new();
    for piece in pieces {
        decoder.push(piece);
        loop {
            out.push(match decoder.next() {
                Decoded::NeedMore | Decoded::Lost => break,
                Decoded::Continue => continue,
                Decoded::Request(request) => match route(&request) {
                    Ok(route) => Replayed::Route(route),
                    Err(error) => Replayed::Fault(error),
                },
                Decoded::Refused(refusal) => Replayed::Refused(refusal),
            });
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::Command;

    #[test]
    fn connection_becomes_commands_and_errors_in_order() {
        let bytes = b"GET /version HTTP/1.1\r\n\r\nGET /nowhere HTTP/1.1\r\n\r\nnonsense\r\n";
        let out = replay([&bytes[..]], &Limits::default());
        let [Replayed::Route(Route::Command(routed)), Replayed::Fault(_), Replayed::Refused(_)] =
            out.as_slice()
        else {
            panic!("{out:?}")
        };
        assert_eq!(routed.command, Command::GetVersion);
    }

    #[test]
    fn inputs_stand_for_whole_requests() {
        // `{`, the parts of vCPUs and memory with a comma between them, `}`.
        let out = replay([stream(&[3, 10, 23, 15, 24, 11, 0, 24]).as_slice()], &LIMITS);
        let [Replayed::Route(Route::Command(routed)), Replayed::Fault(_)] = out.as_slice() else {
            panic!("{out:?}")
        };
        assert!(matches!(routed.command, Command::PutMachineConfig(_)));
    }

    proptest! {
        #[test]
        fn no_bytes_cause_a_panic(bytes in prop::collection::vec(any::<u8>(), 0..1024)) {
            run(&bytes);
        }

        #[test]
        fn parts_of_requests_cause_no_panic(bytes in prop::collection::vec(0..48_u8, 0..200)) {
            run(&bytes);
        }
    }
}
