//! An overlay file as text and JSON.

use std::fmt;

use block::overlay::inspect::{OverlayInfo, SessionState};
use serde_json::{Value, json};

/// What an overlay file says of itself, for reading.
pub(super) struct Info<'a>(pub(super) &'a OverlayInfo);

/// What the state of the last session means.
pub(super) fn state_text(state: SessionState) -> &'static str {
    match state {
        SessionState::Closed => "closed: complete on any host",
        SessionState::Open => "open: in use, or its monitor was killed; complete on this host",
        SessionState::OpenUnsafe => {
            "open, cache_type Unsafe: in use, or its monitor was killed; complete unless this host has crashed since"
        }
        SessionState::Crashed => {
            "open in an earlier boot or on another host: it has what the guest had flushed"
        }
        SessionState::SyncFailed => "a sync failed: it has what the guest had flushed before",
        SessionState::Unknown => "a sync failed before anything was durable: its contents are unknown",
    }
}

/// The name of the state in JSON.
fn state_name(state: SessionState) -> &'static str {
    match state {
        SessionState::Closed => "Closed",
        SessionState::Open => "Open",
        SessionState::OpenUnsafe => "OpenUnsafe",
        SessionState::Crashed => "Crashed",
        SessionState::SyncFailed => "SyncFailed",
        SessionState::Unknown => "Unknown",
    }
}

impl Info<'_> {
    /// The information as JSON. Sizes are in bytes.
    pub(super) fn json(&self) -> Value {
        let info = self.0;
        let overlay =
            info.backing.overlay.map(|(uuid, sessions)| json!({"uuid": hex(&uuid), "sessions": sessions}));
        json!({
            "version": info.version,
            "uuid": hex(&info.uuid),
            "virtual_size": info.virtual_size,
            "allocated": info.allocated,
            "host_space": info.host_space,
            "sessions": info.sessions,
            "state": state_name(info.state),
            "locked_by": info.locked_by.as_ref().map(ToString::to_string),
            "backing": {
                "size": info.backing.size,
                "overlay": overlay,
                "fingerprint": format!("{:08x}", info.backing.fingerprint),
            },
        })
    }
}

impl fmt::Display for Info<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let info = self.0;
        let mut row = |name: &str, value: fmt::Arguments<'_>| writeln!(f, "{name:<12} {value}");
        row("file", format_args!("{}", info.path.display()))?;
        row("format", format_args!("version {}", info.version))?;
        row("uuid", format_args!("{}", hex(&info.uuid)))?;
        row("disk size", format_args!("{} bytes", info.virtual_size))?;
        row("allocated", format_args!("{} bytes of the disk", info.allocated))?;
        row("host space", format_args!("{} bytes", info.host_space))?;
        row("sessions", format_args!("{}", info.sessions))?;
        row("state", format_args!("{}", state_text(info.state)))?;
        if let Some(holder) = &info.locked_by {
            row("locked by", format_args!("{holder}"))?;
        }
        let backing = &info.backing;
        let fingerprint = backing.fingerprint;
        match backing.overlay {
            None => row(
                "made on",
                format_args!("a disk of {} bytes, fingerprint {fingerprint:08x}", backing.size),
            ),
            Some((uuid, sessions)) => row(
                "made on",
                format_args!(
                    "overlay {} after {sessions} sessions, a disk of {} bytes, fingerprint {fingerprint:08x}",
                    hex(&uuid),
                    backing.size
                ),
            ),
        }
    }
}

fn hex(bytes: &[u8; 16]) -> String {
    format!("{:032x}", u128::from_be_bytes(*bytes))
}
