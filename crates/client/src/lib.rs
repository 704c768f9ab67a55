//! A blocking client of the API of `vesta-vmm`, over its Unix socket.
//!
//! Requests and answers are typed: the structs of the `config` crate, which the monitor itself
//! reads and writes. The client starts no process and no thread. It only needs the path of the API
//! socket.
//!
//! ```no_run
//! use std::process::Command;
//! use std::time::Duration;
//!
//! use vesta_client::{BootSource, Child, Client, Fork, InstanceId, MachineConfig};
//!
//! fn main() -> Result<(), Box<dyn std::error::Error>> {
//!     let mut vmm = Command::new("vesta-vmm").args(["--api-sock", "/run/vm.sock"]).spawn()?;
//!
//!     let mut client = Client::new("/run/vm.sock");
//!     client.wait_until_ready(Duration::from_secs(10))?;
//!     client.put_machine_config(&MachineConfig { mem_size_mib: 256, ..MachineConfig::default() })?;
//!     client.put_boot_source(&BootSource::new("/images/vmlinux"))?;
//!     client.start()?;
//!
//!     let child = Child { api_socket: Some("/run/child.sock".into()), ..Child::new(InstanceId::default()) };
//!     let outcome = client.fork(&Fork { children: vec![child], drives: vec![] })?;
//!     println!("paused for {} us", outcome.pause_us);
//!
//!     vmm.kill()?;
//!     vmm.wait()?;
//!     Ok(())
//! }
//! ```
//!
//! # Connections
//!
//! [`Client`] keeps one connection and uses it for all requests: the monitor answers 503 to the
//! eleventh. Where the monitor has closed it, the client connects again and repeats the request,
//! but only if no byte of it was sent, or if repeating it changes nothing: each `GET`, and each
//! `PUT` of a configuration. Every other request is carried out once at most.
//!
//! # Errors
//!
//! [`Error`]. A refusal of the monitor ([`Error::Refused`]) has its text, which names the field,
//! the value and the bound. Each request has a time limit ([`Timeouts`]). Values are checked by the
//! monitor; `check` methods of the structs find most errors without it.
//!
//! # Other monitors
//!
//! The API is Firecracker's, so most methods work with Firecracker too. It refuses fields that it
//! does not have, and has no [`Client::fork`] and no live snapshots.

#![forbid(unsafe_code)]

mod client;
mod connection;
mod endpoints;
mod error;
mod response;

pub use config::*;

pub use client::{Client, Timeouts};
pub use connection::Connection;
pub use error::{Error, ProtocolError};
pub use response::{ReadError, Response};
