//! What all command lines need: [`ArgsError`], and flags that may be given once. And [`Parser`],
//! for the rules of Firecracker's command line.

use std::ffi::OsString;

/// Why a command line is invalid.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ArgsError {
    #[error(transparent)]
    Parse(#[from] lexopt::Error),
    #[error("--{0} is given twice")]
    Duplicate(&'static str),
    #[error("--{name} is \"{value}\": {reason}")]
    Value { name: &'static str, value: String, reason: String },
    #[error("--no-api needs --config-file or --restore: without them there is nothing to run")]
    NoApiWithoutConfig,
    #[error("--config-file cannot be combined with --restore")]
    TwoStarts,
    #[error("--{0} needs --restore")]
    OnlyWithRestore(&'static str),
    #[error("{0} is missing")]
    Missing(&'static str),
    #[error("--{0} cannot be combined with --{1}")]
    Conflict(&'static str, &'static str),
}

/// A parser of Firecracker's command line. As there, a word that begins with `--` is the value of
/// no flag (unless it follows a `=`), and what follows a `--` alone is ignored.
#[derive(Debug)]
pub(crate) struct Parser {
    inner: lexopt::Parser,
    /// The flag that was read last.
    flag: Option<String>,
}

impl Parser {
    /// A parser of this command line, the program's name first. Those of tools begin with a word,
    /// and keep their `--`.
    pub(crate) fn new(args: impl IntoIterator<Item = OsString>) -> Self {
        let mut args: Vec<OsString> = args.into_iter().collect();
        if args.get(1).is_some_and(|first| first.as_encoded_bytes().starts_with(b"-")) {
            let end = args.iter().position(|arg| arg == "--").unwrap_or(args.len());
            args.truncate(end);
        }
        Parser { inner: lexopt::Parser::from_iter(args), flag: None }
    }

    /// The name of the program.
    pub(crate) fn bin_name(&self) -> Option<&str> {
        self.inner.bin_name()
    }

    /// The parser for the rest of a tool's command line.
    pub(crate) fn into_tool(self) -> lexopt::Parser {
        self.inner
    }

    /// The next flag or word.
    pub(crate) fn next(&mut self) -> Result<Option<lexopt::Arg<'_>>, lexopt::Error> {
        let arg = self.inner.next()?;
        if let Some(lexopt::Arg::Long(name)) = &arg {
            self.flag = Some(format!("--{name}"));
        }
        Ok(arg)
    }

    /// The value of the flag that was read last.
    pub(crate) fn value(&mut self) -> Result<OsString, lexopt::Error> {
        if let Some(value) = self.inner.optional_value() {
            return Ok(value);
        }
        let next_is_flag = self
            .inner
            .try_raw_args()
            .is_some_and(|rest| rest.peek().is_some_and(|next| next.as_encoded_bytes().starts_with(b"--")));
        if next_is_flag {
            return Err(lexopt::Error::MissingValue { option: self.flag.clone() });
        }
        self.inner.value()
    }
}

/// Stores the value of the flag `name`, which may be given once.
pub(crate) fn once<T>(slot: &mut Option<T>, name: &'static str, value: T) -> Result<(), ArgsError> {
    match slot.replace(value) {
        None => Ok(()),
        Some(_) => Err(ArgsError::Duplicate(name)),
    }
}

/// The value of the flag `name` as UTF-8.
pub(crate) fn text(name: &'static str, value: OsString) -> Result<String, ArgsError> {
    value.into_string().map_err(|value| ArgsError::Value {
        name,
        value: value.to_string_lossy().into_owned(),
        reason: "it must be UTF-8".to_owned(),
    })
}
