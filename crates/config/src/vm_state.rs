//! `/vm`: whether a started microVM runs or stands still.

use serde::{Deserialize, Serialize};

/// The body of `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The state to bring it to; the one it is in already is no error.
    pub state: VmState,
}

/// The states that a user can ask for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum VmState {
    /// No vCPU runs.
    Paused,
    /// The vCPUs run.
    Resumed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn both_states_are_known_by_their_names() {
        for (name, state) in [("Paused", VmState::Paused), ("Resumed", VmState::Resumed)] {
            let json = format!(r#"{{"state":"{name}"}}"#);
            assert_eq!(serde_json::from_str::<Vm>(&json).unwrap(), Vm { state });
        }
    }

    #[test]
    fn an_unknown_state_is_named() {
        let error = serde_json::from_str::<Vm>(r#"{"state":"Stopped"}"#).unwrap_err();
        assert!(error.to_string().contains("`Stopped`"), "{error}");
    }
}
