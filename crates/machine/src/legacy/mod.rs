//! The few devices that are not virtio: what a kernel needs before it finds anything else.

mod boot_timer;
mod cmos;
pub(crate) mod console;
mod i8042;
mod output;
mod power;
mod serial;

pub use boot_timer::StartTimes;
pub use cmos::CmosState;
pub use console::{SerialInput, SerialSetup};
pub use i8042::{KeyboardFull, KeyboardState};
pub use output::Output;
pub use serial::SerialPortState;

pub(crate) use boot_timer::BootTimer;
pub(crate) use cmos::Cmos;
pub(crate) use i8042::I8042;
pub(crate) use power::Power;
pub(crate) use serial::SerialPort;
