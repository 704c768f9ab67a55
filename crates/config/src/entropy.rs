//! `/entropy`: the entropy device.

use serde::{Deserialize, Serialize};

use crate::error::ConfigError;
use crate::token_bucket::RateLimiter;

/// An entropy device.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Entropy {
    /// Limits on the random bytes and requests of the guest; none if absent.
    #[serde(default)]
    pub rate_limiter: Option<RateLimiter>,
}

impl Entropy {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.rate_limiter.as_ref().map_or(Ok(()), RateLimiter::check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_means_absent_and_unknown_field_is_named() {
        assert_eq!(serde_json::from_str::<Entropy>(r#"{"rate_limiter":null}"#).unwrap(), Entropy::default());
        let error = serde_json::from_str::<Entropy>(r#"{"limit":1}"#).unwrap_err().to_string();
        assert!(error.contains("`limit`"), "{error}");
    }
}
