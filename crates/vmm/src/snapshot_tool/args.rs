//! The command lines of the snapshot tools.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::prelude::*;

use super::Tool;
use super::program::Program;
use crate::flags::{ArgsError, once};

/// What `vesta-vmm snapshot --help` prints.
const HELP: &str = "\
vesta-vmm snapshot info STATE [MEMORY] [--json]
        show the contents of a snapshot
vesta-vmm snapshot verify STATE [MEMORY]
        check the state file's checksums and contents, and the memory file's size; exit status 0 or 1
vesta-vmm snapshot merge --base FILE --diff FILE [--out FILE]
        merge the memory file of a Diff into its base, in place or into a new file
";

/// What `snapshot-editor --help` prints.
const EDITOR_HELP: &str = "\
snapshot-editor edit-memory rebase --memory-path FILE --diff-path FILE
        merge the memory file of a Diff into its base, in place
snapshot-editor info-vmstate version --vmstate-path FILE
        print the version of a state file's format
snapshot-editor info-vmstate vcpu-states --vmstate-path FILE
        print the vCPUs
snapshot-editor info-vmstate vm-state --vmstate-path FILE
        print the rest of the machine
";

/// What `rebase-snap --help` prints.
const REBASE_HELP: &str = "\
rebase-snap --base-file FILE --diff-file FILE
        merge the memory file of a Diff into its base, in place
";

/// Reads the command line of `program`.
pub(crate) fn parse_as(program: Program, mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    let asks_version = |rest: lexopt::RawArgs<'_>| rest.peek().is_some_and(|w| w == "--version" || w == "-V");
    if parser.try_raw_args().is_some_and(asks_version) {
        return Ok(Tool::ProgramVersion(program));
    }
    match program {
        Program::Editor => editor(parser),
        Program::Rebase => rebase(parser, REBASE_HELP, [("base-file", None), ("diff-file", None)]),
    }
}

/// Reads what follows `vesta-vmm snapshot`.
pub(crate) fn parse(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    match word(&mut parser, HELP, "what to do with a snapshot: info, verify or merge")? {
        Word::Is(word) => match word.to_str() {
            Some("info") => files(parser, true),
            Some("verify") => files(parser, false),
            Some("merge") => merge(parser),
            _ => Err(Value(word).unexpected().into()),
        },
        Word::Help(tool) => Ok(tool),
    }
}

/// The next word of the command line, or a request for help.
enum Word {
    Is(OsString),
    Help(Tool),
}

fn word(parser: &mut lexopt::Parser, help: &'static str, what: &'static str) -> Result<Word, ArgsError> {
    match parser.next()? {
        Some(Value(word)) => Ok(Word::Is(word)),
        Some(Long("help") | Short('h')) => Ok(Word::Help(Tool::Help(help))),
        Some(other) => Err(other.unexpected().into()),
        None => Err(ArgsError::Missing(what)),
    }
}

/// Parses `STATE [MEMORY]`, and `--json` for `info`.
fn files(mut parser: lexopt::Parser, info: bool) -> Result<Tool, ArgsError> {
    let (mut state, mut memory, mut json) = (None, None, None);
    while let Some(arg) = parser.next()? {
        match arg {
            Value(path) if state.is_none() => state = Some(PathBuf::from(path)),
            Value(path) if memory.is_none() => memory = Some(PathBuf::from(path)),
            Long("json") if info => once(&mut json, "json", ())?,
            Long("help") | Short('h') => return Ok(Tool::Help(HELP)),
            other => return Err(other.unexpected().into()),
        }
    }
    let state = state.ok_or(ArgsError::Missing("the state file"))?;
    Ok(if info { Tool::Info { state, memory, json: json.is_some() } } else { Tool::Verify { state, memory } })
}

fn merge(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    let (mut base, mut diff, mut output) = (None, None, None);
    while let Some(arg) = parser.next()? {
        match arg {
            Long("base") => once(&mut base, "base", parser.value()?.into())?,
            Long("diff") => once(&mut diff, "diff", parser.value()?.into())?,
            Long("out") => once(&mut output, "out", parser.value()?.into())?,
            Long("help") | Short('h') => return Ok(Tool::Help(HELP)),
            other => return Err(other.unexpected().into()),
        }
    }
    let base = base.ok_or(ArgsError::Missing("--base"))?;
    let diff = diff.ok_or(ArgsError::Missing("--diff"))?;
    Ok(Tool::Merge { base, diff, output })
}

/// A flag with a value: its long name, and its short one.
type Flag = (&'static str, Option<char>);

/// Whether `arg` is this flag.
fn is(arg: &lexopt::Arg<'_>, (long, short): Flag) -> bool {
    match arg {
        Long(name) => *name == long,
        Short(name) => Some(*name) == short,
        Value(_) => false,
    }
}

/// Parses a merge in place, with these flags for the two files.
fn rebase(
    mut parser: lexopt::Parser,
    help: &'static str,
    [base_flag, diff_flag]: [Flag; 2],
) -> Result<Tool, ArgsError> {
    let (mut base, mut diff) = (None, None);
    while let Some(arg) = parser.next()? {
        match arg {
            arg if is(&arg, base_flag) => once(&mut base, base_flag.0, parser.value()?.into())?,
            arg if is(&arg, diff_flag) => once(&mut diff, diff_flag.0, parser.value()?.into())?,
            Long("help") | Short('h') => return Ok(Tool::Help(help)),
            other => return Err(other.unexpected().into()),
        }
    }
    let base = base.ok_or(ArgsError::Missing(base_flag.0))?;
    let diff = diff.ok_or(ArgsError::Missing(diff_flag.0))?;
    Ok(Tool::Merge { base, diff, output: None })
}

fn editor(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    let group = match word(&mut parser, EDITOR_HELP, "a command: edit-memory or info-vmstate")? {
        Word::Is(group) => group,
        Word::Help(tool) => return Ok(tool),
    };
    let what = match group.to_str() {
        Some("edit-memory") => "a command: rebase",
        Some("info-vmstate") => "a command: version, vcpu-states or vm-state",
        _ => return Err(Value(group).unexpected().into()),
    };
    let command = match word(&mut parser, EDITOR_HELP, what)? {
        Word::Is(command) => command,
        Word::Help(tool) => return Ok(tool),
    };
    match (group.to_str(), command.to_str()) {
        (Some("edit-memory"), Some("rebase")) => {
            rebase(parser, EDITOR_HELP, [("memory-path", Some('m')), ("diff-path", Some('d'))])
        }
        (Some("info-vmstate"), Some("version")) => vmstate(parser, |state| Tool::Version { state }),
        (Some("info-vmstate"), Some("vcpu-states")) => vmstate(parser, |state| Tool::Vcpus { state }),
        (Some("info-vmstate"), Some("vm-state")) => vmstate(parser, |state| Tool::Machine { state }),
        _ => Err(Value(command).unexpected().into()),
    }
}

fn vmstate(mut parser: lexopt::Parser, tool: fn(PathBuf) -> Tool) -> Result<Tool, ArgsError> {
    let mut state = None;
    while let Some(arg) = parser.next()? {
        match arg {
            Long("vmstate-path") | Short('v') => once(&mut state, "vmstate-path", parser.value()?.into())?,
            Long("help") | Short('h') => return Ok(Tool::Help(EDITOR_HELP)),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(tool(state.ok_or(ArgsError::Missing("--vmstate-path"))?))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Invocation, parse};

    fn tool(line: &str) -> Result<Tool, String> {
        match parse(line.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())? {
            Invocation::SnapshotTool(tool) => Ok(tool),
            other => panic!("{other:?}"),
        }
    }

    #[test]
    fn each_tool_answers_under_its_names() {
        let merge = |output| Tool::Merge { base: "b".into(), diff: "d".into(), output };
        let info = |json| Tool::Info { state: "s".into(), memory: None, json };
        for (line, wanted) in [
            ("vesta-vmm snapshot info s", info(false)),
            ("firecracker snapshot info --json s", info(true)),
            ("vesta-vmm snapshot verify s m", Tool::Verify { state: "s".into(), memory: Some("m".into()) }),
            ("vesta-vmm snapshot merge --base b --diff=d", merge(None)),
            ("vesta-vmm snapshot merge --base b --diff d --out o", merge(Some("o".into()))),
            ("/usr/bin/snapshot-editor edit-memory rebase --memory-path b --diff-path d", merge(None)),
            ("rebase-snap --base-file b --diff-file d", merge(None)),
            ("snapshot-editor info-vmstate version --vmstate-path s", Tool::Version { state: "s".into() }),
            ("snapshot-editor info-vmstate vcpu-states --vmstate-path s", Tool::Vcpus { state: "s".into() }),
            ("snapshot-editor info-vmstate vm-state --vmstate-path s", Tool::Machine { state: "s".into() }),
            ("vesta-vmm snapshot --help", Tool::Help(HELP)),
            ("snapshot-editor edit-memory rebase -m b -d d", merge(None)),
            ("snapshot-editor info-vmstate version -v s", Tool::Version { state: "s".into() }),
            ("snapshot-editor --version", Tool::ProgramVersion(Program::Editor)),
            ("rebase-snap --version", Tool::ProgramVersion(Program::Rebase)),
            ("rebase-snap -h", Tool::Help(REBASE_HELP)),
            ("snapshot-editor info-vmstate --help", Tool::Help(EDITOR_HELP)),
        ] {
            assert_eq!(tool(line), Ok(wanted), "{line}");
        }
    }

    #[test]
    fn missing_and_unexpected_arguments_are_named() {
        for (line, named) in [
            ("vesta-vmm snapshot", "info, verify or merge"),
            ("vesta-vmm snapshot eat s", "eat"),
            ("vesta-vmm snapshot info", "the state file"),
            ("vesta-vmm snapshot info s m more", "more"),
            ("vesta-vmm snapshot verify s --json", "--json"),
            ("vesta-vmm snapshot merge --base b", "--diff"),
            ("vesta-vmm snapshot merge --base b --base c", "--base is given twice"),
            ("snapshot-editor", "edit-memory or info-vmstate"),
            ("snapshot-editor edit-vmstate remove-regs", "edit-vmstate"),
            ("snapshot-editor info-vmstate rebase", "rebase"),
            ("rebase-snap --base-file b", "diff-file"),
        ] {
            let error = tool(line).unwrap_err();
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
