//! `/logger`: where the monitor's own log goes, and what is in it.

use std::{fmt, path::PathBuf, str::FromStr};

use serde::{Deserialize, Serialize, de};

/// How the monitor logs.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Logger {
    /// A file (created if missing) or a named pipe; where absent, the log stays where it goes now.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub log_path: Option<PathBuf>,
    /// What is logged: this level and the graver ones. Where absent, [`LogLevel::Info`], whatever it was before.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub level: Option<LogLevel>,
    /// Whether each line names its level; unchanged where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_level: Option<bool>,
    /// Whether each line names the source file and line that wrote it; unchanged where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub show_log_origin: Option<bool>,
    /// Only lines of modules whose path begins so are logged; all where absent.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub module: Option<String>,
}

/// How grave a line must be to be logged. Read in any mix of upper and lower case; `Warn` and `Warning` are the same.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub enum LogLevel {
    /// Nothing at all.
    Off,
    /// Everything.
    Trace,
    /// What helps a developer of the monitor.
    Debug,
    /// What happens, step by step.
    #[default]
    Info,
    /// What a user should look at.
    Warning,
    /// What failed.
    Error,
}

/// A word that is no log level.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("unknown log level `{0}`: it must be one of Off, Trace, Debug, Info, Warn, Warning, Error")]
pub struct UnknownLogLevel(pub String);

impl FromStr for LogLevel {
    type Err = UnknownLogLevel;

    fn from_str(word: &str) -> Result<LogLevel, UnknownLogLevel> {
        const WORDS: [(&str, LogLevel); 7] = [
            ("Off", LogLevel::Off),
            ("Trace", LogLevel::Trace),
            ("Debug", LogLevel::Debug),
            ("Info", LogLevel::Info),
            ("Warn", LogLevel::Warning),
            ("Warning", LogLevel::Warning),
            ("Error", LogLevel::Error),
        ];
        let found = WORDS.iter().find(|(known, _)| known.eq_ignore_ascii_case(word));
        found.map(|&(_, level)| level).ok_or_else(|| UnknownLogLevel(word.to_owned()))
    }
}

impl<'de> Deserialize<'de> for LogLevel {
    fn deserialize<D: de::Deserializer<'de>>(deserializer: D) -> Result<LogLevel, D::Error> {
        struct Word;
        impl de::Visitor<'_> for Word {
            type Value = LogLevel;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a log level")
            }

            fn visit_str<E: de::Error>(self, word: &str) -> Result<LogLevel, E> {
                word.parse().map_err(E::custom)
            }
        }
        deserializer.deserialize_str(Word)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn an_empty_object_changes_nothing_but_the_level() {
        assert_eq!(serde_json::from_str::<Logger>("{}").unwrap(), Logger::default());
        assert_eq!(Logger::default().level.unwrap_or_default(), LogLevel::Info);
    }

    #[test]
    fn null_means_absent() {
        let json = r#"{"log_path":null,"level":null,"show_level":null,"show_log_origin":null,"module":null}"#;
        assert_eq!(serde_json::from_str::<Logger>(json).unwrap(), Logger::default());
    }

    #[test]
    fn an_unknown_level_is_named_with_the_known_ones() {
        let error = serde_json::from_str::<Logger>(r#"{"level":"Loud"}"#).unwrap_err().to_string();
        assert!(error.contains("`Loud`") && error.contains("Warning"), "{error}");
    }

    #[test]
    fn an_unknown_field_is_named() {
        let error = serde_json::from_str::<Logger>(r#"{"path":"x"}"#).unwrap_err().to_string();
        assert!(error.contains("`path`"), "{error}");
    }

    proptest! {
        #[test]
        fn a_level_is_read_in_any_case(
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
