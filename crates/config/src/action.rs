//! `/actions`: one-time actions of a microVM.

use serde::{Deserialize, Serialize};

/// The body of `PUT /actions`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Action {
    /// The action.
    pub action_type: ActionType,
}

/// An action of a microVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum ActionType {
    /// Boot the guest.
    InstanceStart,
    /// Write the metrics now.
    FlushMetrics,
    /// Press Ctrl+Alt+Del on the guest's keyboard. Most guests then reboot in order.
    SendCtrlAltDel,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn actions_are_read_by_name() {
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
    fn unknown_action_is_named() {
        let error = serde_json::from_str::<Action>(r#"{"action_type":"InstanceHalt"}"#).unwrap_err();
        assert!(error.to_string().contains("`InstanceHalt`"), "{error}");
    }

    #[test]
    fn unknown_field_is_named() {
        let error =
            serde_json::from_str::<Action>(r#"{"action_type":"InstanceStart","payload":1}"#).unwrap_err();
        assert!(error.to_string().contains("`payload`"), "{error}");
    }
}
