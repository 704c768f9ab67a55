//! The guest side of the serial port: the registers of a 16550 (from `vm-superio`) on the port bus.

use std::io;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use sync::{EventFd, locked};
use vm_superio::serial::{Serial, SerialEvents};
use vm_superio::{SerialState, Trigger};

use super::console::{Console, ConsoleWriter};
use crate::bus::BusDevice;

/// Received bytes that a 16550 holds until the guest reads them.
const FIFO_SIZE: usize = 64;

type Registers = Serial<Interrupt, Arc<Console>, ConsoleWriter>;

/// The serial port's registers. Output goes to a [`Console`].
pub(crate) struct SerialPort {
    registers: Mutex<Registers>,
}

/// What the serial port saves: its registers, by their names in the 16550's data sheet, and the
/// input that the guest has not read yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SerialPortState {
    /// Divisor latch, low and high byte.
    divisor: [u8; 2],
    interrupt_enable: u8,
    interrupt_identification: u8,
    line_control: u8,
    line_status: u8,
    modem_control: u8,
    modem_status: u8,
    scratch: u8,
    #[serde(with = "serde_bytes")]
    received: Vec<u8>,
}

impl SerialPort {
    pub(crate) fn new(interrupt: EventFd, console: Arc<Console>) -> Self {
        let registers = Serial::with_events(Interrupt(interrupt), console.clone(), ConsoleWriter(console));
        SerialPort { registers: Mutex::new(registers) }
    }

    /// A port with saved registers. Received bytes beyond [`FIFO_SIZE`] are cut off.
    pub(crate) fn restore(
        state: &SerialPortState,
        interrupt: EventFd,
        console: Arc<Console>,
    ) -> io::Result<Self> {
        let saved = SerialState {
            baud_divisor_low: state.divisor[0],
            baud_divisor_high: state.divisor[1],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            in_buffer: state.received.iter().copied().take(FIFO_SIZE).collect(),
        };
        let registers =
            Serial::from_state(&saved, Interrupt(interrupt), console.clone(), ConsoleWriter(console))
                .map_err(|error| io::Error::other(format!("the serial port's saved state: {error:?}")))?;
        Ok(SerialPort { registers: Mutex::new(registers) })
    }

    /// The port's state.
    pub(crate) fn save(&self) -> SerialPortState {
        let state = locked(&self.registers).state();
        SerialPortState {
            divisor: [state.baud_divisor_low, state.baud_divisor_high],
            interrupt_enable: state.interrupt_enable,
            interrupt_identification: state.interrupt_identification,
            line_control: state.line_control,
            line_status: state.line_status,
            modem_control: state.modem_control,
            modem_status: state.modem_status,
            scratch: state.scratch,
            received: state.in_buffer,
        }
    }

    /// How many more bytes of input the port can take.
    pub(crate) fn input_space(&self) -> usize {
        locked(&self.registers).fifo_capacity()
    }

    /// Adds input for the guest. Takes at most [`Self::input_space`] bytes; returns how many.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        // Nothing is taken in loopback mode or if the buffer is full. The guest causes both.
        locked(&self.registers).enqueue_raw_bytes(bytes).unwrap_or(0)
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = locked(&self.registers);
        // Registers have one byte: a wider access or a string instruction is several accesses to
        // one.
        data.fill_with(|| registers.read(offset as u8));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = locked(&self.registers);
        for byte in data {
            // It does not fail: the console takes every byte or counts it as dropped, and
            // signalling the eventfd always succeeds.
            let _ = registers.write(offset as u8, *byte);
        }
    }
}

impl std::fmt::Debug for SerialPort {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("SerialPort").finish_non_exhaustive()
    }
}

struct Interrupt(EventFd);

impl Trigger for Interrupt {
    type E = io::Error;

    fn trigger(&self) -> io::Result<()> {
        self.0.signal();
        Ok(())
    }
}

impl SerialEvents for Console {
    fn buffer_read(&self) {
        self.count_read();
    }

    fn out_byte(&self) {
        self.count_written();
    }

    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.guest_wants_input();
    }
}
