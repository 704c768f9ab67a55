//! `/logger`: the log of the monitor.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize, de};

use crate::checks;
use crate::error::ConfigError;

/// Settings of the monitor's log.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file (created if missing) or a named pipe; unchanged if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(regex(pattern = crate::schema::PATH)))]
    pub log_path: Option<PathBuf>,
    /// Least severe level that is logged. If absent, `Info`, whatever it was before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    #[cfg_attr(feature = "schema", schemars(extend("default" = LogLevel::default())))]
    pub level: Option<LogLevel>,
    /// Whether each line shows its level; unchanged if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether each line shows its source file and line; unchanged if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Prefix of the module paths whose lines are logged; all if absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

impl Logger {
    /// Checks that the kernel can take the path.
    pub fn check(&self) -> Result<(), ConfigError> {
        self.log_path.iter().try_for_each(|path| checks::path("log_path", path))
    }

    /// The settings after this change of `before`: absent fields stay, but for the level.
    #[must_use]
    pub fn after(self, before: Logger) -> Logger {
        Logger {
            log_path: self.log_path.or(before.log_path),
            level: self.level,
            show_level: self.show_level.or(before.show_level),
            show_log_origin: self.show_log_origin.or(before.show_log_origin),
            module: self.module.or(before.module),
        }
    }
}

/// Severity of a log line. Read in any mix of upper and lower case. `Warn` and `Warning` are the
/// same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
#[cfg_attr(feature = "schema", derive(schemars::JsonSchema))]
pub enum LogLevel {
    /// Logs nothing.
    Off,
    /// Logs everything.
    Trace,
    /// Details for developers of the monitor.
    Debug,
    /// Normal events.
    #[default]
    Info,
    /// Events that a user should look at.
    Warning,
    /// Failures.
    Error,
}

/// An unknown name of a log level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown log level `{0}`; it must be one of Off, Trace, Debug, Info, Warn, Warning, Error")]
pub struct UnknownLogLevel(pub String);

impl FromStr for LogLevel {
    type Err = UnknownLogLevel;

    fn from_str(name: &str) -> Result<LogLevel, UnknownLogLevel> {
        const NAMES: [(&str, LogLevel); 7] = [
            ("Off", LogLevel::Off),
            ("Trace", LogLevel::Trace),
            ("Debug", LogLevel::Debug),
            ("Info", LogLevel::Info),
            ("Warn", LogLevel::Warning),
            ("Warning", LogLevel::Warning),
            ("Error", LogLevel::Error),
        ];
        let found = NAMES.iter().find(|(known, _)| known.eq_ignore_ascii_case(name));
        found.map(|&(_, level)| level).ok_or_else(|| UnknownLogLevel(name.to_owned()))
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<LogLevel, D::Error> {
        struct LevelVisitor;
        impl de::Visitor<'_> for LevelVisitor {
            type Value = LogLevel;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a log level")
            }

            fn visit_str<E: de::Error>(self, name: &str) -> Result<LogLevel, E> {
                name.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(LevelVisitor)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn empty_object_only_resets_the_level() {
        assert_eq!(serde_json::from_str::<Logger>("{}").unwrap(), Logger::default());
        assert_eq!(Logger::default().level.unwrap_or_default(), LogLevel::Info);
    }

    #[test]
    fn null_means_absent() {
        let json = r#"{"log_path":null,"level":null,"show_level":null,"show_log_origin":null,"module":null}"#;
        assert_eq!(serde_json::from_str::<Logger>(json).unwrap(), Logger::default());
    }

    #[test]
    fn unknown_level_is_named_with_the_known_ones() {
        let error = serde_json::from_str::<Logger>(r#"{"level":"Loud"}"#).unwrap_err().to_string();
        assert!(error.contains("`Loud`") && error.contains("Warning"), "{error}");
    }

    #[test]
    fn unknown_field_is_named() {
        let error = serde_json::from_str::<Logger>(r#"{"path":"x"}"#).unwrap_err().to_string();
        assert!(error.contains("`path`"), "{error}");
    }

    proptest! {
        #[test]
        fn level_is_read_in_any_case(
            (word, level) in prop::sample::select(vec![
                ("Off", LogLevel::Off), ("Trace", LogLevel::Trace), ("Debug", LogLevel::Debug),
                ("Info", LogLevel::Info), ("Warn", LogLevel::Warning), ("Warning", LogLevel::Warning),
                ("Error", LogLevel::Error),
            ]),
            upper in prop::collection::vec(any::<bool>(), 7),
        ) {
            let word: String = word.chars().zip(upper)
                .map(|(c, up)| if up { c.to_ascii_uppercase() } else { c.to_ascii_lowercase() }).collect();
            prop_assert_eq!(word.parse(), Ok(level));
            let json = serde_json::to_string(&word).unwrap();
            prop_assert_eq!(serde_json::from_str::<LogLevel>(&json).unwrap(), level);
        }
    }
}
