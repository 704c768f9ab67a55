//! The events of a microVM: what happened to it, for clients that watch it (`GET /events`, an
//! extension).
//!
//! ```text
//! main thread -- publish --> EventLog (a ring) <-- read -- fc_api: one Subscription a stream
//!                                 '------- one eventfd wakes fc_api -------^
//! ```
//!
//! The main thread alone publishes, so that events are in the order of what happened. I/O workers
//! and vCPU threads report to it through the machine's [notices](machine::Notice). The API thread
//! reads for each client at the client's pace.
//!
//! - [`event`]: [`Event`], and its JSON.
//! - [`ring`]: the recent events.
//! - [`event_log`]: [`EventLog`], which both threads share, and [`Subscription`]. The text of a
//!   stream.
//!
//! # Invariants
//!
//! - Publishing waits for nothing but the lock, which is held for a copy of a few KiB at most.
//! - The log keeps the [`MAX_EVENTS`] last events, and at most [`MAX_BYTES`] of them (the newest
//!   whatever its length). A reader that is slower loses the oldest ones, and gets an event `lost`
//!   with their number.
//! - [`Event::Exit`] is the last event. A stream ends after it.
//! - Each process has its own log. A child of a fork never touches its parent's, whose lock another
//!   thread may have held.

mod event;
mod event_log;
mod ring;

pub use event::{Event, ExitReason, ResetCause, StartedBy};
pub use event_log::EventLog;
pub(crate) use event_log::{Read, Subscription};
pub use ring::{MAX_BYTES, MAX_EVENTS};
