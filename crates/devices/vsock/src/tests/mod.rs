//! Tests of the device on both transports, with a test driver on one side and real Unix sockets on
//! the other.

mod ends;
mod guest;
mod hostile;
mod message_model;
mod messages;
mod model;
mod resets;
mod streams;
