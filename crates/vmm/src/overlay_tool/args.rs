//! The command line of the tools for overlay files.

use std::path::PathBuf;

use lexopt::prelude::*;

use super::command::{BackingFiles, Tool};
use super::export::Format;
use crate::flags::{ArgsError, once};

/// What `vesta-vmm overlay --help` prints.
pub(super) const HELP: &str = "\
vesta-vmm overlay info FILE [--json]
        show what is in an overlay file; it may be in use
vesta-vmm overlay check FILE [--base DISK [--layer FILE]...]
        check the file's checksums and, with --base, that it fits the disk below it; exit status 0 or 1
vesta-vmm overlay export FILE --base DISK [--layer FILE]... --out IMAGE [--format raw|qcow2]
        write the disk to a new image (raw); it must not be in use
An overlay names no other file: --base is the disk at the bottom, and each --layer an overlay
between it and FILE, from the bottom up.
";

/// Reads what follows `vesta-vmm overlay`.
pub(crate) fn parse(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    let command = match parser.next()? {
        Some(Value(word)) => word,
        Some(Long("help") | Short('h')) => return Ok(Tool::Help),
        Some(other) => return Err(other.unexpected().into()),
        None => return Err(ArgsError::Missing("what to do with an overlay: info, check or export")),
    };
    let command = match command.to_str() {
        Some("info") => "info",
        Some("check") => "check",
        Some("export") => "export",
        _ => return Err(Value(command).unexpected().into()),
    };
    let (mut file, mut json, mut base, mut output, mut format) = (None, None, None, None, None);
    let mut layers = Vec::new();
    while let Some(arg) = parser.next()? {
        match arg {
            Value(path) if file.is_none() => file = Some(PathBuf::from(path)),
            Long("json") if command == "info" => once(&mut json, "json", ())?,
            Long("base") if command != "info" => once(&mut base, "base", PathBuf::from(parser.value()?))?,
            Long("layer") if command != "info" => layers.push(PathBuf::from(parser.value()?)),
            Long("out") if command == "export" => once(&mut output, "out", PathBuf::from(parser.value()?))?,
            Long("format") if command == "export" => {
                let value = parser.value()?.to_string_lossy().into_owned();
                once(&mut format, "format", value.parse::<Format>().map_err(|()| invalid_format(value))?)?;
            }
            Long("help") | Short('h') => return Ok(Tool::Help),
            other => return Err(other.unexpected().into()),
        }
    }
    let file = file.ok_or(ArgsError::Missing("the overlay file"))?;
    if base.is_none() && !layers.is_empty() {
        return Err(ArgsError::Missing("--base"));
    }
    let backing = base.map(|base| BackingFiles { base, layers });
    Ok(match command {
        "info" => Tool::Info { file, json: json.is_some() },
        "check" => Tool::Check { file, backing },
        _ => Tool::Export {
            file,
            backing: backing.ok_or(ArgsError::Missing("--base"))?,
            output: output.ok_or(ArgsError::Missing("--out"))?,
            format: format.unwrap_or(Format::Raw),
        },
    })
}

fn invalid_format(value: String) -> ArgsError {
    ArgsError::Value { name: "format", value, reason: "it must be raw or qcow2".to_owned() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parsed(line: &str) -> Result<Tool, String> {
        let words = std::iter::once("vesta-vmm").chain(line.split_whitespace());
        let mut parser = lexopt::Parser::from_iter(words);
        assert!(matches!(parser.next(), Ok(Some(Value(word))) if word == "overlay"));
        parse(parser).map_err(|error| error.to_string())
    }

    #[test]
    fn commands_are_parsed() {
        let info = Tool::Info { file: "a".into(), json: true };
        assert_eq!(parsed("overlay info --json a").unwrap(), info);
        let check = Tool::Check { file: "a".into(), backing: None };
        assert_eq!(parsed("overlay check a").unwrap(), check);
        let backing = BackingFiles { base: "d".into(), layers: vec!["l".into(), "m".into()] };
        let (output, format) = ("o".into(), Format::Qcow2);
        let export = Tool::Export { file: "a".into(), backing, output, format };
        let line = "overlay export a --base d --layer l --layer m --format=qcow2 --out o";
        assert_eq!(parsed(line).unwrap(), export);
        assert_eq!(parsed("overlay export --help").unwrap(), Tool::Help);
    }

    #[test]
    fn incomplete_and_wrong_commands_are_refused_by_name() {
        for (line, text) in [
            ("overlay", "info, check or export"),
            ("overlay frob a", "frob"),
            ("overlay info", "the overlay file"),
            ("overlay info a b", "b"),
            ("overlay info a --base d", "--base"),
            ("overlay check a --layer l", "--base"),
            ("overlay export a --base d", "--out"),
            ("overlay export a --out o", "--base"),
            ("overlay export a --base d --out o --format vmdk", "raw or qcow2"),
        ] {
            let error = parsed(line).unwrap_err();
            assert!(error.contains(text), "{line}: {error}");
        }
    }
}
