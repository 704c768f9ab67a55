//! The legacy devices: the few that are not virtio, which a kernel needs before it finds anything
//! else.
//!
//! | module | device |
//! |---|---|
//! | `serial` | the registers of COM1, a 16550 |
//! | `console`, `console_thread`, `output` | the host side of COM1 |
//! | `i8042` | keyboard controller: Ctrl+Alt+Del, and reset by command 0xFE |
//! | `cmos` | CMOS clock |
//! | `power` | ACPI sleep and reset registers |
//! | `boot_timer` | Firecracker's boot timer |
//! | `pvpanic` | reports a panic of the guest's kernel |

mod boot_timer;
mod cmos;
mod console;
mod console_thread;
mod i8042;
mod output;
mod power;
mod pvpanic;
mod serial;

pub use boot_timer::StartTimes;
pub use cmos::CmosState;
pub use console_thread::{SerialInput, SerialSetup};
pub use i8042::{KeyboardFull, KeyboardState};
pub use output::Output;
pub use serial::SerialPortState;

pub(crate) use boot_timer::BootTimer;
pub(crate) use cmos::Cmos;
pub(crate) use console_thread::ConsoleThread;
pub(crate) use i8042::I8042;
pub(crate) use power::Power;
pub(crate) use pvpanic::PvPanic;
pub(crate) use serial::SerialPort;
