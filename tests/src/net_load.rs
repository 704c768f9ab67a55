//! Network load for the benchmarks: a server in the guest (or on the host) and clients on the host.
//!
//! A client connects and sends one letter for what the server does with the connection. The data is
//! not checked: [`crate::traffic`] does that.
#![expect(clippy::cast_precision_loss, reason = "rates are not known to the last byte")]

use std::io::{ErrorKind, Read, Result, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};
use std::thread;
use std::time::{Duration, Instant};

/// The port of the server.
pub const PORT: u16 = 7100;
/// Bytes of a small datagram.
pub const SMALL: usize = 64;

const SINK: u8 = b'<';
const SOURCE: u8 = b'>';
const ECHO: u8 = b'=';
const COUNT: u8 = b'#';
const FLOOD: u8 = b'!';
const PLAIN: u8 = b'-';
const PIECE: usize = 128 << 10;
const TIMEOUT: Duration = Duration::from_secs(30);

/// Serves clients, without end.
pub fn serve() -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))?;
    println!("SERVING {PORT}");
    for stream in listener.incoming().flatten() {
        thread::spawn(move || {
            // A client closes when it has measured enough.
            let _ = answer(stream);
        });
    }
    Ok(())
}

fn answer(mut stream: TcpStream) -> Result<()> {
    stream.set_nodelay(true)?;
    let mut what = [0];
    stream.read_exact(&mut what)?;
    let mut piece = vec![0; PIECE];
    match what[0] {
        SINK => while stream.read(&mut piece)? > 0 {},
        SOURCE => loop {
            stream.write_all(&piece)?;
        },
        ECHO => loop {
            stream.read_exact(&mut piece[..1])?;
            stream.write_all(&piece[..1])?;
        },
        COUNT => {
            // Counts datagrams until the client asks for their number.
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            stream.write_all(&socket.local_addr()?.port().to_le_bytes())?;
            socket.set_read_timeout(Some(Duration::from_millis(20)))?;
            stream.set_nonblocking(true)?;
            let mut count = 0u64;
            loop {
                for _ in 0..64 {
                    if socket.recv(&mut piece).is_err() {
                        break;
                    }
                    count += 1;
                }
                match stream.read(&mut piece[..1]) {
                    Ok(1) => break,
                    Err(error) if error.kind() == ErrorKind::WouldBlock => {}
                    _ => return Ok(()),
                }
            }
            stream.set_nonblocking(false)?;
            stream.write_all(&count.to_le_bytes())?;
        }
        FLOOD => {
            let mut to = [0; 10];
            stream.read_exact(&mut to)?;
            let port = u16::from_le_bytes([to[0], to[1]]);
            let millis = u64::from_le_bytes(to[2..].try_into().expect("eight bytes are eight bytes"));
            flood(SocketAddr::new(stream.peer_addr()?.ip(), port), Duration::from_millis(millis))?;
            stream.write_all(&[0])?;
        }
        PLAIN => {
            let off = ["-K", "eth0", "tx", "off", "rx", "off", "tso", "off", "gso", "off", "gro", "off"];
            let done = Command::new("ethtool").args(off).status()?;
            stream.write_all(&[u8::from(!done.success())])?;
        }
        _ => {}
    }
    Ok(())
}

/// Sends small datagrams for some time.
fn flood(to: SocketAddr, time: Duration) -> Result<()> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.connect(to)?;
    let until = Instant::now() + time;
    while Instant::now() < until {
        for _ in 0..64 {
            // A full queue drops datagrams; only those that arrive count.
            let _ = socket.send(&[0; SMALL]);
        }
    }
    Ok(())
}

/// The clients of the server at this address.
#[derive(Debug, Clone, Copy)]
pub struct Server(pub IpAddr);

impl Server {
    fn ask(self, what: u8) -> Result<TcpStream> {
        let mut stream = TcpStream::connect_timeout(&(self.0, PORT).into(), TIMEOUT)?;
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(TIMEOUT))?;
        stream.set_write_timeout(Some(TIMEOUT))?;
        stream.write_all(&[what])?;
        Ok(stream)
    }

    /// Switches off the server's offloads.
    pub fn without_offloads(self) -> Result<()> {
        let mut failed = [1];
        self.ask(PLAIN)?.read_exact(&mut failed)?;
        if failed[0] == 0 { Ok(()) } else { Err(std::io::Error::other("ethtool failed in the guest")) }
    }

    /// Bytes per second over so many connections, to or from the server. Returns also the number of
    /// bytes.
    pub fn throughput(self, to_server: bool, streams: usize, time: Duration) -> Result<(f64, u64)> {
        let total = AtomicU64::new(0);
        let connections: Vec<TcpStream> =
            (0..streams).map(|_| self.ask(if to_server { SINK } else { SOURCE })).collect::<Result<_>>()?;
        let begun = Instant::now();
        thread::scope(|scope| {
            for mut stream in connections {
                let total = &total;
                scope.spawn(move || {
                    let mut piece = vec![0; PIECE];
                    while begun.elapsed() < time {
                        let moved = if to_server { stream.write(&piece) } else { stream.read(&mut piece) };
                        match moved {
                            Ok(count @ 1..) => total.fetch_add(count as u64, Ordering::Relaxed),
                            _ => break,
                        };
                    }
                });
            }
        });
        let bytes = total.into_inner();
        Ok((bytes as f64 / begun.elapsed().as_secs_f64(), bytes))
    }

    /// The median round trip of a byte, in microseconds.
    pub fn round_trip(self, time: Duration) -> Result<f64> {
        let mut stream = self.ask(ECHO)?;
        let mut times = Vec::new();
        let begun = Instant::now();
        while begun.elapsed() < time {
            let sent = Instant::now();
            stream.write_all(&[0])?;
            stream.read_exact(&mut [0])?;
            times.push(sent.elapsed());
        }
        times.sort_unstable();
        Ok(times[times.len() / 2].as_secs_f64() * 1e6)
    }

    /// Small datagrams per second that arrive at the server.
    pub fn packets_to(self, time: Duration) -> Result<f64> {
        let mut stream = self.ask(COUNT)?;
        let mut port = [0; 2];
        stream.read_exact(&mut port)?;
        flood((self.0, u16::from_le_bytes(port)).into(), time)?;
        stream.write_all(&[0])?;
        let mut count = [0; 8];
        stream.read_exact(&mut count)?;
        Ok(u64::from_le_bytes(count) as f64 / time.as_secs_f64())
    }

    /// Small datagrams per second that arrive from the server.
    pub fn packets_from(self, time: Duration) -> Result<f64> {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(Duration::from_millis(200)))?;
        let mut stream = self.ask(FLOOD)?;
        let millis = u64::try_from(time.as_millis()).unwrap_or(u64::MAX);
        stream.write_all(&socket.local_addr()?.port().to_le_bytes())?;
        stream.write_all(&millis.to_le_bytes())?;
        let counting = thread::spawn(move || {
            let mut count = 0u64;
            let mut bytes = [0; 2 * SMALL];
            // The last datagram is followed by silence.
            while socket.recv(&mut bytes).is_ok() || count == 0 {
                count += 1;
            }
            count
        });
        stream.read_exact(&mut [0])?;
        let count = counting.join().expect("counting does not panic");
        Ok(count as f64 / time.as_secs_f64())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_kind_of_load_is_answered() {
        thread::spawn(serve);
        let server = Server(Ipv4Addr::LOCALHOST.into());
        let time = Duration::from_millis(20);
        while server.ask(ECHO).is_err() {
            thread::yield_now();
        }
        for to_server in [false, true] {
            assert!(server.throughput(to_server, 2, time).unwrap().1 > 0);
        }
        assert!(server.round_trip(time).unwrap() > 0.0);
        assert!(server.packets_to(time).unwrap() > 0.0);
        assert!(server.packets_from(time).unwrap() > 0.0);
    }
}
