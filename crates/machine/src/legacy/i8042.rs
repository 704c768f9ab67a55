//! An i8042 keyboard controller: as much as a kernel needs to find a keyboard, to receive
//! Ctrl+Alt+Del, and to reset the machine by command 0xFE.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex};

use serde::{Deserialize, Serialize};
use sync::{EventFd, locked};

use crate::bus::BusDevice;
use crate::events::{EventSink, MachineEvent};
use crate::stats::KeyboardStats;

/// Offsets from port 0x60.
const DATA: u64 = 0;
const STATUS_OR_COMMAND: u64 = 4;

const STATUS_OUTPUT_FULL: u8 = 0x01;
const STATUS_SYSTEM: u8 = 0x04;
const STATUS_KEYBOARD_UNLOCKED: u8 = 0x10;

const COMMAND_READ_CONTROL: u8 = 0x20;
const COMMAND_WRITE_CONTROL: u8 = 0x60;
const COMMAND_SELF_TEST: u8 = 0xaa;
const COMMAND_TEST_KEYBOARD_PORT: u8 = 0xab;
const COMMAND_READ_OUTPUT_PORT: u8 = 0xd0;
const COMMAND_WRITE_OUTPUT_PORT: u8 = 0xd1;
const COMMAND_RESET: u8 = 0xfe;

const CONTROL_KEYBOARD_INTERRUPT: u8 = 0x01;
const SELF_TEST_PASSED: u8 = 0x55;
const PORT_TEST_PASSED: u8 = 0x00;

const KEYBOARD_RESET: u8 = 0xff;
const KEYBOARD_IDENTIFY: u8 = 0xf2;
const KEYBOARD_ACK: u8 = 0xfa;
const KEYBOARD_SELF_TEST_PASSED: u8 = 0xaa;
const KEYBOARD_ID: [u8; 2] = [0xab, 0x83];

/// Scan codes (set 2) for pressing left Ctrl, left Alt and Delete.
const CTRL_ALT_DEL: [u8; 4] = [0x14, 0x11, 0xe0, 0x71];

/// Bytes that the controller holds for the guest. As on hardware, bytes that arrive while it is
/// full are lost.
const BUFFER: usize = 16;

/// Ctrl+Alt+Del cannot be pressed: the guest does not read its keyboard.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
#[error("keyboard: it holds {0} bytes that the guest has not read; Ctrl+Alt+Del does not fit")]
pub struct KeyboardFull(usize);

/// The controller and its keyboard.
#[derive(Debug)]
pub(crate) struct I8042 {
    state: Mutex<KeyboardState>,
    interrupt: EventFd,
    events: EventSink,
    stats: Arc<KeyboardStats>,
}

/// The registers of the controller.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KeyboardState {
    control: u8,
    output_port: u8,
    /// A command that takes its argument from the next byte written to the data port.
    waiting: Option<u8>,
    /// The bytes that the guest has not read yet.
    buffer: VecDeque<u8>,
}

impl I8042 {
    pub(crate) fn new(interrupt: EventFd, events: EventSink) -> Self {
        let state = KeyboardState {
            control: CONTROL_KEYBOARD_INTERRUPT,
            output_port: 0,
            waiting: None,
            buffer: VecDeque::with_capacity(BUFFER),
        };
        I8042 { state: Mutex::new(state), interrupt, events, stats: Arc::default() }
    }

    /// The counters of the controller.
    pub(crate) fn stats(&self) -> Arc<KeyboardStats> {
        Arc::clone(&self.stats)
    }

    /// The registers.
    pub(crate) fn save(&self) -> KeyboardState {
        locked(&self.state).clone()
    }

    /// Restores the registers of a new controller.
    pub(crate) fn restore(&self, state: &KeyboardState) {
        let mut restored = state.clone();
        restored.buffer.truncate(BUFFER);
        self.interrupt_if_full(&restored);
        *locked(&self.state) = restored;
    }

    /// Presses Ctrl+Alt+Del.
    pub(crate) fn press_ctrl_alt_del(&self) -> Result<(), KeyboardFull> {
        let mut state = locked(&self.state);
        if state.buffer.len() + CTRL_ALT_DEL.len() > BUFFER {
            self.stats.refused_keys.add(1);
            return Err(KeyboardFull(state.buffer.len()));
        }
        self.send_to_guest(&mut state, &CTRL_ALT_DEL);
        Ok(())
    }

    /// Adds bytes for the guest to read. Those that do not fit are lost.
    fn send_to_guest(&self, state: &mut KeyboardState, bytes: &[u8]) {
        let free = BUFFER - state.buffer.len();
        state.buffer.extend(bytes.iter().take(free));
        self.interrupt_if_full(state);
    }

    /// Raises the interrupt if there is something to read and the guest has enabled it.
    fn interrupt_if_full(&self, state: &KeyboardState) {
        if !state.buffer.is_empty() && state.control & CONTROL_KEYBOARD_INTERRUPT != 0 {
            self.interrupt.signal();
        }
    }

    fn command(&self, state: &mut KeyboardState, command: u8) {
        state.waiting = None;
        match command {
            COMMAND_RESET => {
                self.stats.resets.add(1);
                self.events.post(MachineEvent::Reset);
            }
            COMMAND_READ_CONTROL => self.send_to_guest(state, &[state.control]),
            COMMAND_READ_OUTPUT_PORT => self.send_to_guest(state, &[state.output_port]),
            COMMAND_SELF_TEST => self.send_to_guest(state, &[SELF_TEST_PASSED]),
            COMMAND_TEST_KEYBOARD_PORT => self.send_to_guest(state, &[PORT_TEST_PASSED]),
            COMMAND_WRITE_CONTROL | COMMAND_WRITE_OUTPUT_PORT => state.waiting = Some(command),
            _ => {}
        }
    }

    fn data(&self, state: &mut KeyboardState, value: u8) {
        match state.waiting.take() {
            Some(COMMAND_WRITE_CONTROL) => state.control = value,
            Some(_) => state.output_port = value,
            None => match value {
                KEYBOARD_RESET => self.send_to_guest(state, &[KEYBOARD_ACK, KEYBOARD_SELF_TEST_PASSED]),
                KEYBOARD_IDENTIFY => {
                    self.send_to_guest(state, &[KEYBOARD_ACK, KEYBOARD_ID[0], KEYBOARD_ID[1]]);
                }
                _ => self.send_to_guest(state, &[KEYBOARD_ACK]),
            },
        }
    }
}

impl BusDevice for I8042 {
    fn read(&self, offset: u64, data: &mut [u8]) {
        let mut state = locked(&self.state);
        // Registers have one byte: a string instruction is several accesses to the same register.
        let count = if matches!(offset, DATA | STATUS_OR_COMMAND) {
            &self.stats.reads
        } else {
            &self.stats.missed_reads
        };
        count.add(data.len() as u64);
        for byte in data {
            *byte = match offset {
                DATA => {
                    let value = state.buffer.pop_front().unwrap_or(0);
                    self.interrupt_if_full(&state);
                    value
                }
                STATUS_OR_COMMAND => {
                    let full = if state.buffer.is_empty() { 0 } else { STATUS_OUTPUT_FULL };
                    STATUS_SYSTEM | STATUS_KEYBOARD_UNLOCKED | full
                }
                _ => 0,
            };
        }
    }

    fn write(&self, offset: u64, data: &[u8]) {
        let mut state = locked(&self.state);
        let count = if matches!(offset, DATA | STATUS_OR_COMMAND) {
            &self.stats.writes
        } else {
            &self.stats.missed_writes
        };
        count.add(data.len() as u64);
        for &value in data {
            match offset {
                DATA => self.data(&mut state, value),
                STATUS_OR_COMMAND => self.command(&mut state, value),
                _ => {}
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::events::{EventSource, event_channel};
    use proptest::prelude::*;

    fn controller() -> (I8042, EventSource) {
        let (sink, source) = event_channel().unwrap();
        (I8042::new(EventFd::new().unwrap(), sink), source)
    }

    fn read(device: &I8042, offset: u64) -> u8 {
        let mut data = [0];
        device.read(offset, &mut data);
        data[0]
    }

    #[test]
    fn command_fe_resets() {
        let (device, events) = controller();
        device.write(STATUS_OR_COMMAND, &[COMMAND_RESET]);
        assert_eq!(events.take(), Some(MachineEvent::Reset));
    }

    #[test]
    fn control_byte_reads_back_what_was_written() {
        let (device, _events) = controller();
        device.write(STATUS_OR_COMMAND, &[COMMAND_WRITE_CONTROL]);
        device.write(DATA, &[0x44]);
        device.write(STATUS_OR_COMMAND, &[COMMAND_READ_CONTROL]);
        assert_eq!(read(&device, STATUS_OR_COMMAND) & STATUS_OUTPUT_FULL, STATUS_OUTPUT_FULL);
        assert_eq!(read(&device, DATA), 0x44);
        assert_eq!(read(&device, STATUS_OR_COMMAND) & STATUS_OUTPUT_FULL, 0);
    }

    #[test]
    fn ctrl_alt_del_arrives_byte_by_byte_with_an_interrupt_each() {
        let (device, _events) = controller();
        device.press_ctrl_alt_del().unwrap();
        for code in CTRL_ALT_DEL {
            assert_eq!(device.interrupt.take(), 1);
            assert_eq!(read(&device, DATA), code);
        }
        assert_eq!(device.interrupt.take(), 0, "nothing more to read, no interrupt");
    }

    #[test]
    fn a_string_instruction_is_several_accesses_to_one_register() {
        let (device, _events) = controller();
        device.write(DATA, &[KEYBOARD_IDENTIFY, KEYBOARD_RESET]);
        let mut data = [0xee; 6];
        device.read(DATA, &mut data);
        let [low, high] = KEYBOARD_ID;
        assert_eq!(data, [KEYBOARD_ACK, low, high, KEYBOARD_ACK, KEYBOARD_SELF_TEST_PASSED, 0]);
    }

    #[test]
    fn ctrl_alt_del_is_refused_while_the_buffer_is_full() {
        let (device, _events) = controller();
        for _ in 0..4 {
            device.press_ctrl_alt_del().unwrap();
        }
        assert_eq!(device.press_ctrl_alt_del(), Err(KeyboardFull(16)));
    }

    proptest! {
        #[test]
        fn any_accesses_keep_the_buffer_bounded(ops in prop::collection::vec((any::<bool>(), 0u64..6, prop::collection::vec(any::<u8>(), 1..9)), 0..200)) {
            let (device, _events) = controller();
            for (write, offset, mut data) in ops {
                if write { device.write(offset, &data) } else { device.read(offset, &mut data) }
                prop_assert!(locked(&device.state).buffer.len() <= BUFFER);
            }
        }
    }
}
