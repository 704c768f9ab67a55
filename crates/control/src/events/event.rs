//! [`Event`]: what can happen to a microVM, and its JSON.

use std::path::PathBuf;
use std::time::SystemTime;

use machine::Notice;
use serde_json::{Map, Value, json};

use crate::Phase;

/// Longest text of an error, in characters.
const MAX_TEXT: usize = 512;

/// Most children of a fork that an event describes. It counts all.
const MAX_CHILDREN: usize = 64;

/// Something that happened to a microVM.
#[derive(Debug, Clone, PartialEq)]
pub enum Event {
    /// The guest was started.
    Started {
        /// How.
        by: StartedBy,
        /// Whether it runs, or is paused.
        phase: Phase,
    },
    /// A client paused the guest.
    Paused,
    /// A client resumed the guest.
    Resumed,
    /// A snapshot has begun, is further, or has ended: what `GET /snapshot/job` tells of it.
    Snapshot(Value),
    /// The microVM was forked: the answer of `PUT /fork`.
    Forked(Value),
    /// Something happened to the guest, which continues.
    Notice(Notice),
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset(ResetCause),
    /// The process ends. Always the last event.
    Exit {
        /// Why.
        reason: ExitReason,
        /// The exit status of the process as a shell reports it: 128 plus the number of a signal
        /// that ends it.
        code: i32,
    },
}

/// How a guest was started.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum StartedBy {
    /// A kernel was booted.
    Boot,
    /// It was restored from this state file.
    Restore(PathBuf),
    /// It is a child of a fork.
    Fork,
}

/// How a guest reset itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ResetCause {
    /// It asked a reset register or the keyboard controller.
    Request,
    /// By a triple fault: a crash, or a kernel that reboots by one.
    TripleFault,
}

/// Why a process ends.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ExitReason {
    /// The guest powered off.
    PowerOff,
    /// The guest reset itself.
    Reset(ResetCause),
    /// A debugger killed the guest.
    Debugger,
    /// The guest cannot be run any further, for this reason.
    Fault(String),
    /// This signal asked the process to end.
    Signal(i32),
    /// The microVM could not be started or served, for this reason.
    Error(String),
}

impl Event {
    /// The event's name on the wire.
    pub(super) fn name(&self) -> &'static str {
        match self {
            Event::Started { .. } => "started",
            Event::Paused => "paused",
            Event::Resumed => "resumed",
            Event::Snapshot(_) => "snapshot",
            Event::Forked(_) => "forked",
            Event::Notice(Notice::GuestPanic { .. }) => "guest_panic",
            Event::Notice(Notice::DeviceError { .. }) => "device_error",
            Event::PowerOff => "poweroff",
            Event::Reset(_) => "reset",
            Event::Exit { .. } => "exit",
        }
    }

    /// The event as a JSON object on one line. `id` is the microVM's.
    pub(super) fn data(&self, id: &str, time: SystemTime) -> String {
        let mut fields = match self.fields() {
            Value::Object(fields) => fields,
            _ => Map::new(),
        };
        fields.insert("event".into(), self.name().into());
        fields.insert("id".into(), id.into());
        fields.insert("time".into(), humantime::format_rfc3339_nanos(time).to_string().into());
        Value::Object(fields).to_string()
    }

    /// What the event has beside its name, the microVM and the time.
    fn fields(&self) -> Value {
        match self {
            Event::Started { by, phase } => {
                let (by, snapshot) = match by {
                    StartedBy::Boot => ("boot", None),
                    StartedBy::Restore(path) => ("restore", Some(path)),
                    StartedBy::Fork => ("fork", None),
                };
                let mut fields = json!({ "by": by, "state": phase.name() });
                if let Some(path) = snapshot {
                    fields["snapshot_path"] = path.to_string_lossy().into();
                }
                fields
            }
            Event::Paused | Event::Resumed | Event::PowerOff => Value::Null,
            Event::Snapshot(job) => {
                let mut fields = job.clone();
                if let Some(Value::String(error)) = fields.get_mut("error") {
                    *error = shortened(error);
                }
                fields
            }
            Event::Forked(answer) => forked(answer),
            Event::Notice(Notice::GuestPanic { crash_kernel, times }) => {
                json!({ "crash_kernel": crash_kernel, "times": times })
            }
            Event::Notice(Notice::DeviceError { device, error, needs_reset, times }) => json!({
                "device": device,
                "error": shortened(error),
                "needs_reset": needs_reset,
                "times": times,
            }),
            Event::Reset(cause) => json!({ "cause": cause.name() }),
            Event::Exit { reason, code } => {
                let (name, more) = match reason {
                    ExitReason::PowerOff => ("poweroff", None),
                    ExitReason::Reset(ResetCause::Request) => ("reset", None),
                    ExitReason::Reset(ResetCause::TripleFault) => ("triple_fault", None),
                    ExitReason::Debugger => ("debugger", None),
                    ExitReason::Fault(error) => ("fault", Some(("error", shortened(error).into()))),
                    ExitReason::Signal(signal) => ("signal", Some(("signal", Value::from(*signal)))),
                    ExitReason::Error(error) => ("error", Some(("error", shortened(error).into()))),
                };
                let mut fields = json!({ "reason": name, "code": code });
                if let Some((key, value)) = more {
                    fields[key] = value;
                }
                fields
            }
        }
    }
}

impl ResetCause {
    fn name(self) -> &'static str {
        match self {
            ResetCause::Request => "request",
            ResetCause::TripleFault => "triple_fault",
        }
    }
}

/// The fields of a fork's answer, with few children but all counted.
fn forked(answer: &Value) -> Value {
    let children = answer["children"].as_array().map_or(&[][..], Vec::as_slice);
    let failed = children.iter().filter(|child| child.get("error").is_some()).count();
    json!({
        "children": children[..children.len().min(MAX_CHILDREN)],
        "failed": failed,
        "pause_us": answer["pause_us"],
        "started": children.len() - failed,
    })
}

fn shortened(text: &str) -> String {
    text.chars().take(MAX_TEXT).collect()
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;

    fn data(event: &Event) -> Value {
        let time = SystemTime::UNIX_EPOCH + Duration::new(1_767_225_600, 5);
        let text = event.data("vm-1", time);
        assert!(!text.contains('\n'), "{text}");
        let mut data: Value = serde_json::from_str(&text).unwrap();
        let fields = data.as_object_mut().unwrap();
        assert_eq!(fields.remove("time"), Some("2026-01-01T00:00:00.000000005Z".into()));
        assert_eq!(fields.remove("id"), Some("vm-1".into()));
        assert_eq!(fields.remove("event"), Some(event.name().into()));
        data
    }

    #[test]
    fn events_have_their_fields() {
        let exit = |reason| data(&Event::Exit { reason, code: 3 });
        for (got, expected) in [
            (
                data(&Event::Started { by: StartedBy::Boot, phase: Phase::Running }),
                json!({"by": "boot", "state": "Running"}),
            ),
            (
                data(&Event::Started { by: StartedBy::Restore("/s\n".into()), phase: Phase::Paused }),
                json!({"by": "restore", "snapshot_path": "/s\n", "state": "Paused"}),
            ),
            (data(&Event::Paused), json!({})),
            (data(&Event::Reset(ResetCause::TripleFault)), json!({"cause": "triple_fault"})),
            (
                data(&Event::Notice(Notice::GuestPanic { crash_kernel: true, times: 2 })),
                json!({"crash_kernel": true, "times": 2}),
            ),
            (exit(ExitReason::PowerOff), json!({"reason": "poweroff", "code": 3})),
            (exit(ExitReason::Signal(15)), json!({"reason": "signal", "signal": 15, "code": 3})),
            (exit(ExitReason::Fault("x".into())), json!({"reason": "fault", "error": "x", "code": 3})),
        ] {
            assert_eq!(got, expected);
        }
    }

    #[test]
    fn texts_and_lists_are_bounded() {
        let (device, error) = ("drive a".to_owned(), "\u{10ffff}".repeat(10_000));
        let notice = Notice::DeviceError { device, error, needs_reset: true, times: 1 };
        let shown = data(&Event::Notice(notice));
        assert_eq!(shown["error"].as_str().unwrap().chars().count(), MAX_TEXT);

        let child = |n: usize| match n {
            0..10 => json!({"id": n.to_string(), "error": "e"}),
            _ => json!({"id": n.to_string(), "pid": n}),
        };
        let answer = json!({"pause_us": 7, "children": (0..1000).map(child).collect::<Vec<_>>()});
        let shown = data(&Event::Forked(answer));
        assert_eq!(
            (&shown["started"], &shown["failed"], &shown["pause_us"]),
            (&990.into(), &10.into(), &7.into())
        );
        assert_eq!(shown["children"].as_array().unwrap().len(), MAX_CHILDREN);
    }
}
