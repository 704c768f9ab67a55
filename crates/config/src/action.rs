//! `/actions`: what a microVM is told to do, once and at once.

use serde::{Deserialize, Serialize};

/// The body of `PUT /actions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// What to do.
    pub action_type: ActionType,
}

/// What a microVM can be told to do.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum ActionType {
    /// Boot the guest.
    InstanceStart,
    /// Write the metrics out now.
    FlushMetrics,
    /// Press Ctrl+Alt+Del on the guest's keyboard: an orderly reboot for most guests.
    SendCtrlAltDel,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_action_is_known_by_its_name() {
        for (name, action_type) in [
            ("InstanceStart", ActionType::InstanceStart),
            ("FlushMetrics", ActionType::FlushMetrics),
            ("SendCtrlAltDel", ActionType::SendCtrlAltDel),
        ] {
            let json = format!(r#"{{"action_type":"{name}"}}"#);
            assert_eq!(serde_json::from_str::<Action>(&json).unwrap(), Action { action_type });
        }
    }

    #[test]
    fn an_unknown_action_is_named() {
        let error = serde_json::from_str::<Action>(r#"{"action_type":"InstanceHalt"}"#).unwrap_err();
        assert!(error.to_string().contains("`InstanceHalt`"), "{error}");
    }

    #[test]
    fn an_unknown_field_is_named() {
        let error =
            serde_json::from_str::<Action>(r#"{"action_type":"InstanceStart","payload":1}"#).unwrap_err();
        assert!(error.to_string().contains("`payload`"), "{error}");
    }
}
