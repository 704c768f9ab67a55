//! `net-tool`: uses a guest's network, as a part of the network tests.
//!
//! | command | does | prints |
//! |---|---|---|
//! | `upload ADDRESS SEED BYTES` | sends bytes over TCP, which the other side checks | `UPLOADED ADDRESS SEED`, `FAILED ...` |
//! | `download ADDRESS SEED BYTES` | receives bytes over TCP, and checks them | `DOWNLOADED ADDRESS SEED`, `FAILED ...` |
//! | `flood ADDRESS` | sends UDP datagrams until none has been accepted for a while | `STUFFED ADDRESS` |
//! | `until FILE ADDRESS` | sends bytes over TCP, which are echoed, until FILE exists in the guest | see [`exchange::until`] |
//! | `serve PORT` | serves uploads and downloads without end | `SERVING PORT` |
//! | `load` | serves the benchmark's clients without end | `SERVING PORT` |

use std::io::ErrorKind;
use std::net::{Ipv4Addr, TcpListener, TcpStream, UdpSocket};
use std::path::Path;
use std::process::ExitCode;
use std::time::Duration;

use vesta_tests::exchange;
use vesta_tests::line::print_line;
use vesta_tests::traffic::{download, serve, upload};

/// Bytes of a datagram, which fits into one frame.
const DATAGRAM: usize = 1400;
/// How long no datagram must be accepted before the flood ends.
const STUCK: Duration = Duration::from_secs(1);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    let done = match args[..] {
        ["upload", address, seed, bytes] => {
            upload(address, number(seed), number(bytes)).map(|_| format!("UPLOADED {address} {seed}"))
        }
        ["download", address, seed, bytes] => {
            download(address, number(seed), number(bytes)).map(|_| format!("DOWNLOADED {address} {seed}"))
        }
        ["serve", port] => TcpListener::bind((Ipv4Addr::UNSPECIFIED, number(port) as u16)).map(|listener| {
            print_line(&format!("SERVING {port}"));
            serve(&listener);
            String::new()
        }),
        ["until", file, address] => {
            exchange::until("net", Path::new(file), || TcpStream::connect(address)).map(|()| String::new())
        }
        ["flood", address] => flood(address).map(|()| format!("STUFFED {address}")),
        ["load"] => vesta_tests::net_load::serve().map(|()| String::new()),
        _ => {
            eprintln!("net-tool: what is {args:?}?");
            return ExitCode::FAILURE;
        }
    };
    match done {
        Ok(line) => {
            print_line(&line);
            ExitCode::SUCCESS
        }
        Err(error) => {
            print_line(&format!("FAILED {}: {error}", args.join(" ")));
            ExitCode::FAILURE
        }
    }
}

/// Sends datagrams until none has been accepted for [`STUCK`].
fn flood(address: &str) -> std::io::Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_write_timeout(Some(STUCK))?;
    loop {
        match socket.send_to(&[7; DATAGRAM], address) {
            Err(error) if error.kind() == ErrorKind::WouldBlock => return Ok(()),
            // Whether anything receives them does not matter.
            Ok(_) | Err(_) => {}
        }
    }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or_else(|error| panic!("{text:?} is no number: {error}"))
}
