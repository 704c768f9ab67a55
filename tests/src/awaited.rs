//! Behaviour of Firecracker that this build does not have yet. The tests of its clients have the
//! steps that need it, and skip them while the constant here is false.

/// `PUT /metrics`, `--metrics-path` and the section `metrics` of the configuration file: lines of
/// JSON in a file or FIFO.
pub const METRICS: bool = false;

/// HTTP/1.0 connections stay open after a response, as a Rust SDK expects.
pub const HTTP_1_0_KEEP_ALIVE: bool = false;
