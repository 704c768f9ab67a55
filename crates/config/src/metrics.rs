//! `/metrics`: the output of metrics.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::checks;
use crate::error::ConfigError;
#[cfg(feature = "schema")]
use crate::schema::PATH;
use crate::serde_helpers::null_is_default;

/// Where lines of metrics are written, and what each has besides the counters.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Metrics {
    /// A file (created if missing, and appended to) or a named pipe.
    #[cfg_attr(feature = "schema", schemars(regex(pattern = PATH)))]
    pub metrics_path: PathBuf,
    /// Whether each line has the microVM's id as `id`.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "std::ops::Not::not")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::null_is_default::<bool>", extend("default" = false))
    )]
    pub emit_id: bool,
    /// Texts that each line has as `properties`, unless there are none.
    #[serde(default, deserialize_with = "null_is_default", skip_serializing_if = "BTreeMap::is_empty")]
    #[cfg_attr(
        feature = "schema",
        schemars(schema_with = "crate::schema::null_is_default::<BTreeMap<String, String>>")
    )]
    pub properties: BTreeMap<String, String>,
}

impl Metrics {
    /// Checks that the kernel can take the path.
    pub fn check(&self) -> Result<(), ConfigError> {
        checks::path("metrics_path", &self.metrics_path)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(json: &str) -> Result<Metrics, String> {
        let metrics: Metrics = serde_json::from_str(json).map_err(|error| error.to_string())?;
        metrics.check().map(|()| metrics).map_err(|error| error.to_string())
    }

    #[test]
    fn path_is_the_only_required_field() {
        let metrics = Metrics { metrics_path: "m".into(), ..Metrics::default() };
        assert_eq!(parse(r#"{"metrics_path":"m"}"#), Ok(metrics.clone()));
        let nulls = r#"{"metrics_path":"m","emit_id":null,"properties":null}"#;
        assert_eq!(parse(nulls), Ok(metrics.clone()));
        assert_eq!(serde_json::to_string(&metrics).unwrap(), r#"{"metrics_path":"m"}"#);
    }

    #[test]
    fn invalid_fields_are_named() {
        for (json, named) in [
            (r"{}", "`metrics_path`"),
            (r#"{"metrics_path":""}"#, "metrics_path is empty"),
            (r#"{"metrics_path":"a\u0000b"}"#, "metrics_path is empty or has a NUL"),
            (r#"{"metrics_path":"m","emit_ids":true}"#, "`emit_ids`"),
            (r#"{"metrics_path":"m","properties":{"a":1}}"#, "expected a string"),
        ] {
            let error = parse(json).unwrap_err();
            assert!(error.contains(named), "{json}: {error}");
        }
    }
}
