//! The serial port as the guest sees it: a 16550 (the `vm-superio` crate's) on the port bus.

use std::io;
use std::sync::{Arc, Mutex, MutexGuard};

use serde::{Deserialize, Serialize};
use sync::EventFd;
use vm_superio::serial::{Serial, SerialEvents};
use vm_superio::{SerialState, Trigger};

use super::console::{Console, ConsoleWriter};
use crate::bus::BusDevice;

/// Bytes that a 16550 receives before the guest reads them.
const FIFO_SIZE: usize = 64;

type Registers = Serial<Interrupt, Arc<Console>, ConsoleWriter>;

/// The port's registers, whose output goes to a [`Console`].
pub(crate) struct SerialPort {
    registers: Mutex<Registers>,
}

/// What it saves: its registers, by their names in the 16550's data sheet, and what the guest has not read yet.
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

    /// The port as it was saved. More received bytes than it holds are an impossible state, and cut off.
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

    /// Its state.
    pub(crate) fn save(&self) -> SerialPortState {
        let state = self.lock().state();
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

    /// How many bytes the guest's receive buffer has room for.
    pub(crate) fn input_room(&self) -> usize {
        self.lock().fifo_capacity()
    }

    /// Gives bytes to the guest. At most [`Self::input_room`] are taken, and their number returned.
    pub(crate) fn input(&self, bytes: &[u8]) -> usize {
        // In loopback mode nothing is received, and a full buffer takes nothing: both are the guest's affair.
        self.lock().enqueue_raw_bytes(bytes).unwrap_or(0)
    }

    fn lock(&self) -> MutexGuard<'_, Registers> {
        self.registers.lock().expect("no holder of this lock panics")
    }
}

impl BusDevice for SerialPort {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut registers = self.lock();
        // The registers are a byte each: a wider access, or a string instruction, is several of the same one.
        data.fill_with(|| registers.read(offset as u8));
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut registers = self.lock();
        for byte in data {
            // The console takes every byte, or counts it as dropped; the interrupt's counter can only be full when raised.
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
    fn buffer_read(&self) {}
    fn out_byte(&self) {}
    fn tx_lost_byte(&self) {}

    fn in_buffer_empty(&self) {
        self.guest_wants_input();
    }
}
