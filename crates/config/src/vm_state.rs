//! `/vm`: pause and resume of a started microVM.

use serde::{Deserialize, Serialize};

/// The body of `PATCH /vm`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Vm {
    /// The new state. The current one is accepted too.
    pub state: VmState,
}

/// State of a started microVM.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum VmState {
    /// The vCPUs are paused.
    Paused,
    /// The vCPUs run.
    Resumed,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn states_are_read_by_name() {
        for (name, state) in [("Paused", VmState::Paused), ("Resumed", VmState::Resumed)] {
            let json = format!(r#"{{"state":"{name}"}}"#);
            assert_eq!(serde_json::from_str::<Vm>(&json).unwrap(), Vm { state });
        }
    }

    #[test]
    fn unknown_state_is_named() {
        let error = serde_json::from_str::<Vm>(r#"{"state":"Stopped"}"#).unwrap_err();
        assert!(error.to_string().contains("`Stopped`"), "{error}");
    }
}
