//! The device behind both transports, with a driver's hands on one side and real Unix sockets on the other.

mod ends;
mod guest;
mod hostile;
mod message_model;
mod messages;
mod model;
mod resets;
mod streams;
