//! [`Instance`]: the answers to `GET /` and `GET /version`, which the API thread gives by itself.
//!
//! Clients poll `GET /` until a microVM runs, and it should cost no more than it has to: the main
//! thread is not asked.
//!
//! # Invariant
//!
//! The main thread sets the phase before it answers the command that changed it. So a client that
//! has an answer sees at least the state of that answer.

use std::sync::atomic::{AtomicU8, Ordering};

use config::{InstanceInfo, InstanceState, Version};
use serde::Serialize;

use crate::{Command, CommandError, Identity, Phase, Reply};

/// The identity of a microVM, and its phase as clients see it.
#[derive(Debug)]
pub struct Instance {
    identity: Identity,
    /// A [`Phase`].
    phase: AtomicU8,
}

impl Instance {
    /// A microVM that is not started.
    pub fn new(identity: Identity) -> Self {
        Instance { identity, phase: AtomicU8::new(Phase::Configured as u8) }
    }

    /// The names and versions.
    pub(crate) fn identity(&self) -> &Identity {
        &self.identity
    }

    /// Sets the phase.
    pub(crate) fn set_phase(&self, phase: Phase) {
        self.phase.store(phase as u8, Ordering::Release);
    }

    /// The answer to `command`, if it asks for what is here.
    pub(crate) fn answer(&self, command: &Command) -> Option<Result<Reply, CommandError>> {
        match command {
            Command::DescribeInstance => Some(to_json(&self.describe())),
            Command::GetVersion => {
                Some(to_json(&Version { firecracker_version: self.identity.api_version.to_owned() }))
            }
            _ => None,
        }
    }

    fn describe(&self) -> InstanceInfo {
        let phase = self.phase.load(Ordering::Acquire);
        InstanceInfo {
            app_name: self.identity.app_name.to_owned(),
            id: self.identity.id.clone(),
            state: match phase {
                phase if phase == Phase::Running as u8 => InstanceState::Running,
                phase if phase == Phase::Paused as u8 => InstanceState::Paused,
                _ => InstanceState::NotStarted,
            },
            vmm_version: self.identity.version.to_owned(),
        }
    }
}

/// A reply with this value as JSON.
pub(crate) fn to_json(value: &impl Serialize) -> Result<Reply, CommandError> {
    serde_json::to_value(value).map(Reply::Json).map_err(CommandError::Json)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn description_has_the_phase_that_was_set() {
        let identity = Identity { id: "vm-1".into(), app_name: "a", version: "1", api_version: "2" };
        let instance = Instance::new(identity);
        let state = || match instance.answer(&Command::DescribeInstance) {
            Some(Ok(Reply::Json(info))) => info["state"].clone(),
            other => panic!("{other:?}"),
        };
        assert_eq!(state(), "Not started");
        for phase in [Phase::Running, Phase::Paused] {
            instance.set_phase(phase);
            assert_eq!(state(), phase.name());
        }
        assert!(instance.answer(&Command::GetVmConfig).is_none());
    }
}
