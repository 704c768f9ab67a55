//! Debuggers for guests: Debian's `gdb`, and a client of its remote protocol.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::process::die_with_parent;

/// A line that ends the output of one command.
const DONE: &str = "<<done>>";

/// A running `gdb`. It ends with this value.
#[derive(Debug)]
pub struct Gdb {
    process: Child,
    input: ChildStdin,
    lines: Receiver<String>,
    timeout: Duration,
}

impl Gdb {
    /// Starts one with this file for symbols. Each command may take `timeout`.
    pub fn start(symbols: Option<&Path>, timeout: Duration) -> Result<Gdb> {
        let mut command = Command::new("gdb");
        command.args(["-nx", "-q"]).args(symbols).stdin(Stdio::piped()).stdout(Stdio::piped());
        command.stderr(Stdio::inherit());
        let mut process = die_with_parent(&mut command).spawn().context("cannot run gdb")?;
        let input = process.stdin.take().context("gdb has an input")?;
        let mut output = BufReader::new(process.stdout.take().context("gdb has an output")?);
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            let mut line = Vec::new();
            while output.read_until(b'\n', &mut line).is_ok_and(|count| count > 0) {
                // The prompts are in the same stream.
                let text = String::from_utf8_lossy(&line).replace("(gdb) ", "").trim_end().to_owned();
                line.clear();
                if sender.send(text).is_err() {
                    return;
                }
            }
        });
        let mut gdb = Gdb { process, input, lines, timeout };
        for setting in ["confirm off", "pagination off", "width 0"] {
            gdb.run(&format!("set {setting}"))?;
        }
        Ok(gdb)
    }

    /// Runs one command, and returns what it printed. One that runs the guest ends when the guest
    /// stops.
    pub fn run(&mut self, command: &str) -> Result<String> {
        self.begin(command)?;
        self.finish().with_context(|| format!("gdb: {command}"))
    }

    /// Sends a command; [`Self::finish`] waits for its end.
    pub fn begin(&mut self, command: &str) -> Result<()> {
        writeln!(self.input, "{command}\necho \\n{DONE}\\n").context("gdb ended")
    }

    /// Waits for the end of a command, and returns what it printed.
    pub fn finish(&mut self) -> Result<String> {
        self.read_until(|line| line == DONE)
    }

    /// Interrupts a guest that a [`Self::begin`] lets run, as Ctrl-C does.
    pub fn interrupt(&mut self) -> Result<String> {
        self.read_until(|line| line == "Continuing.")?;
        // gdb prints this line before it sends the packet, and remembers the signal until it has.
        self.signal(Signal::INT)?;
        self.finish()
    }

    /// Sends gdb a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.process), signal).context("cannot send gdb a signal")
    }

    fn read_until(&mut self, is_last: impl Fn(&str) -> bool) -> Result<String> {
        let deadline = Instant::now() + self.timeout;
        let mut printed = String::new();
        loop {
            let left = deadline.saturating_duration_since(Instant::now());
            match self.lines.recv_timeout(left) {
                Ok(line) if is_last(&line) => return Ok(printed),
                Ok(line) => printed += &(line + "\n"),
                Err(error) => bail!("{error} after {printed:?}"),
            }
        }
    }
}

impl Drop for Gdb {
    fn drop(&mut self) {
        // It may have ended.
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}

/// A client that sends packets of the remote protocol itself.
#[derive(Debug)]
pub struct RemoteClient(UnixStream);

impl RemoteClient {
    /// Connects. Nothing is sent yet.
    pub fn connect(socket: &Path, timeout: Duration) -> Result<RemoteClient> {
        let stream = UnixStream::connect(socket).with_context(|| socket.display().to_string())?;
        stream.set_read_timeout(Some(timeout))?;
        stream.set_write_timeout(Some(timeout))?;
        Ok(RemoteClient(stream))
    }

    /// Sends a packet.
    pub fn send(&mut self, packet: &str) -> Result<()> {
        let sum = packet.bytes().fold(0_u8, u8::wrapping_add);
        self.send_raw(format!("${packet}#{sum:02x}").as_bytes())
    }

    /// Sends bytes as they are.
    pub fn send_raw(&mut self, bytes: &[u8]) -> Result<()> {
        Ok(self.0.write_all(bytes)?)
    }

    /// Sends a packet, and returns the answer.
    pub fn ask(&mut self, packet: &str) -> Result<String> {
        self.send(packet)?;
        self.receive()
    }

    /// The next packet from the other side.
    pub fn receive(&mut self) -> Result<String> {
        let mut packet = Vec::new();
        let mut byte = [0];
        loop {
            self.0.read_exact(&mut byte).context("the monitor closed the connection")?;
            match byte[0] {
                b'$' => packet.clear(),
                b'#' => break,
                other => packet.push(other),
            }
        }
        self.0.read_exact(&mut [0; 2])?;
        // After the last packet the connection may be closed.
        let _ = self.send_raw(b"+");
        expanded(&packet).context("a packet that is text")
    }

    /// Sets the instruction pointer of the thread whose registers are read.
    pub fn set_pc(&mut self, pc: u64) -> Result<()> {
        // After 16 registers of 8 bytes.
        const RIP: usize = 16 * 16;
        let mut registers = self.ask("g")?;
        ensure!(registers.len() > RIP + 16, "registers: {registers}");
        registers.replace_range(RIP..RIP + 16, &format!("{:016x}", pc.swap_bytes()));
        let set = self.ask(&format!("G{registers}"))?;
        ensure!(set == "OK", "the registers are not set: {set}");
        Ok(())
    }

    /// Ends its side of the connection, and waits until the other side closes it.
    pub fn close(mut self) -> Result<()> {
        // It may be closed already.
        let _ = self.0.shutdown(std::net::Shutdown::Write);
        self.wait_closed()
    }

    /// Waits until the other side closes the connection.
    pub fn wait_closed(&mut self) -> Result<()> {
        let mut left = Vec::new();
        match self.0.read_to_end(&mut left) {
            Ok(_) => Ok(()),
            Err(e) => {
                ensure!(e.kind() == std::io::ErrorKind::ConnectionReset, "the connection is open: {e}");
                Ok(())
            }
        }
    }
}

/// A packet without its run-length encoding: `0*n` is a character and a number of repetitions,
/// from 29 on.
fn expanded(packet: &[u8]) -> Option<String> {
    let mut text = String::new();
    let mut bytes = packet.iter();
    while let Some(&byte) = bytes.next() {
        if byte == b'*' {
            let last = text.chars().next_back()?;
            let times = usize::from(bytes.next()?.checked_sub(29)?);
            text.extend(std::iter::repeat_n(last, times));
        } else {
            text.push(char::from(byte));
        }
    }
    Some(text)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_packet_are_expanded() {
        assert_eq!(expanded(b"10* f").as_deref(), Some("10000f"));
        assert_eq!((expanded(b"*!"), expanded(b"0*")), (None, None));
    }
}
