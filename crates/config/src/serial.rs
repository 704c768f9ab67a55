//! `/serial`: the guest's serial console.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks;
use crate::error::ConfigError;
use crate::token_bucket::TokenBucket;

/// Output of the guest's serial console.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Serial {
    /// A file (created if missing) or a named pipe; standard output if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::PATH)))]
    pub serial_out_path: Option<PathBuf>,
    /// Limit on the bytes that the guest writes; none if absent. Bytes above it are dropped and
    /// counted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rate_limiter: Option<TokenBucket>,
}

impl Serial {
    /// Checks bounds.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.serial_out_path.iter().try_for_each(|path| checks::path("serial_out_path", path))?;
        self.rate_limiter.as_ref().map_or(Ok(()), TokenBucket::check)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn null_means_absent() {
        let json = r#"{"serial_out_path":null,"rate_limiter":null}"#;
        assert_eq!(serde_json::from_str::<Serial>(json).unwrap(), Serial::default());
    }

    #[test]
    fn token_bucket_out_of_bounds_is_refused() {
        let json = format!(r#"{{"rate_limiter":{{"size":1,"refill_time":{}}}}}"#, u64::MAX);
        let serial: Serial = serde_json::from_str(&json).unwrap();
        assert!(matches!(serial.check(), Err(ConfigError::OutOfRange { field: "refill_time", .. })));
    }

    #[test]
    fn unknown_field_is_named() {
        let error = serde_json::from_str::<Serial>(r#"{"output":"x"}"#).unwrap_err().to_string();
        assert!(error.contains("`output`"), "{error}");
    }
}
