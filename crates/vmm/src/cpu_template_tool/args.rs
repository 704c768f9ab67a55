//! The command lines of the tools for CPU templates. Names and defaults are Firecracker's.

use std::ffi::OsString;
use std::path::PathBuf;

use lexopt::prelude::*;

use super::command::{Field, GuestFiles, Tool};
use crate::flags::{ArgsError, once, text};

/// What `--help` prints.
const HELP: &str = "\
vesta-vmm cpu-template dump [-c CONFIG] [-t TEMPLATE] [-o FILE]
        write what a guest's vCPU shows to FILE (cpu_config.json), as a CPU template
vesta-vmm cpu-template strip -p FILE FILE... [-s SUFFIX]
        write what the templates do not have in common, each to its name with SUFFIX (_stripped)
vesta-vmm cpu-template verify [-c CONFIG] [-t TEMPLATE]
        check that a guest's vCPU shows what its template says; exit status 0 or 1
vesta-vmm cpu-template fingerprint dump [-c CONFIG] [-t TEMPLATE] [-o FILE]
        write the same as dump to FILE (fingerprint.json), with the host's kernel, microcode and BIOS
vesta-vmm cpu-template fingerprint compare -p FILE -c FILE [-f FIELD...]
        print the FIELDs that differ between a previous and a current fingerprint; exit status 0 or 1

-c, --config CONFIG      the guest's configuration file; of it only vCPUs and CPU template count
-t, --template TEMPLATE  a CPU template, in place of the configuration file's
-o, --output FILE        -p, --paths FILE...   -s, --suffix SUFFIX
-p, --prev FILE          -c, --curr FILE       -f, --filters FIELD...

As cpu-template-helper, the first three are `template dump`, `template strip`, `template verify`.
";

/// The name of Firecracker's tool.
const PROGRAM: &str = "cpu-template-helper";

/// Whether a process with this name is Firecracker's tool.
pub(crate) fn is_program(name: Option<&str>) -> bool {
    name.is_some_and(|name| name.rsplit('/').next() == Some(PROGRAM))
}

/// Whether this process is. Its exit status for a wrong command line is another one.
pub(crate) fn is_this_program() -> bool {
    is_program(std::env::args_os().next().as_deref().and_then(std::ffi::OsStr::to_str))
}

/// Reads what follows `cpu-template-helper`.
pub(crate) fn parse_program(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    match word(&mut parser, "a command: template or fingerprint")? {
        Word::Is(word) if word == "template" => template(parser),
        Word::Is(word) if word == "fingerprint" => fingerprint(parser),
        Word::Is(word) => Err(Value(word).unexpected().into()),
        Word::Answer(tool) => Ok(tool),
    }
}

/// Reads what follows `vesta-vmm cpu-template`.
pub(crate) fn parse(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    match word(&mut parser, "a command: dump, strip, verify or fingerprint")? {
        Word::Is(word) if word == "fingerprint" => fingerprint(parser),
        Word::Is(word) => of_template(&word, parser),
        Word::Answer(tool) => Ok(tool),
    }
}

/// The next word of the command line, or a question that is answered at once.
enum Word {
    Is(OsString),
    Answer(Tool),
}

fn word(parser: &mut lexopt::Parser, what: &'static str) -> Result<Word, ArgsError> {
    match parser.next()? {
        Some(Value(word)) => Ok(Word::Is(word)),
        Some(Long("help") | Short('h')) => Ok(Word::Answer(Tool::Help(HELP))),
        Some(Long("version") | Short('V')) => Ok(Word::Answer(Tool::Version)),
        Some(other) => Err(other.unexpected().into()),
        None => Err(ArgsError::Missing(what)),
    }
}

fn template(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    match word(&mut parser, "a command: dump, strip or verify")? {
        Word::Is(word) => of_template(&word, parser),
        Word::Answer(tool) => Ok(tool),
    }
}

fn of_template(word: &OsString, parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    match word.to_str() {
        Some("dump") => guest(parser, Some("cpu_config.json"), |guest, output| Tool::Dump { guest, output }),
        Some("verify") => guest(parser, None, |guest, _| Tool::Verify { guest }),
        Some("strip") => strip(parser),
        _ => Err(Value(word.clone()).unexpected().into()),
    }
}

fn fingerprint(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    let word = match word(&mut parser, "a command: dump or compare")? {
        Word::Is(word) => word,
        Word::Answer(tool) => return Ok(tool),
    };
    match word.to_str() {
        Some("dump") => {
            guest(parser, Some("fingerprint.json"), |guest, output| Tool::FingerprintDump { guest, output })
        }
        Some("compare") => compare(parser),
        _ => Err(Value(word).unexpected().into()),
    }
}

/// Reads the flags of a command about one guest. It has an output if there is a default for that.
fn guest(
    mut parser: lexopt::Parser,
    output: Option<&str>,
    tool: fn(GuestFiles, PathBuf) -> Tool,
) -> Result<Tool, ArgsError> {
    let mut files = GuestFiles::default();
    let mut given = None;
    while let Some(arg) = parser.next()? {
        match arg {
            Short('c') | Long("config") => once(&mut files.config, "config", parser.value()?.into())?,
            Short('t') | Long("template") => once(&mut files.template, "template", parser.value()?.into())?,
            Short('o') | Long("output") if output.is_some() => {
                once(&mut given, "output", parser.value()?.into())?;
            }
            Short('h') | Long("help") => return Ok(Tool::Help(HELP)),
            other => return Err(other.unexpected().into()),
        }
    }
    Ok(tool(files, given.unwrap_or_else(|| output.unwrap_or_default().into())))
}

fn strip(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    let (mut paths, mut suffix) = (Vec::new(), None);
    while let Some(arg) = parser.next()? {
        match arg {
            Short('p') | Long("paths") => paths.extend(parser.values()?.map(PathBuf::from)),
            Short('s') | Long("suffix") => {
                once(&mut suffix, "suffix", text("suffix", parser.value()?)?)?;
            }
            Short('h') | Long("help") => return Ok(Tool::Help(HELP)),
            other => return Err(other.unexpected().into()),
        }
    }
    if paths.len() < 2 {
        return Err(ArgsError::Missing("--paths with two or more files"));
    }
    Ok(Tool::Strip { paths, suffix: suffix.unwrap_or_else(|| "_stripped".to_owned()) })
}

fn compare(mut parser: lexopt::Parser) -> Result<Tool, ArgsError> {
    let (mut previous, mut current) = (None, None);
    let mut fields = Vec::new();
    while let Some(arg) = parser.next()? {
        match arg {
            Short('p') | Long("prev") => once(&mut previous, "prev", parser.value()?.into())?,
            Short('c') | Long("curr") => once(&mut current, "curr", parser.value()?.into())?,
            Short('f') | Long("filters") => {
                for name in parser.values()? {
                    fields.push(field(name)?);
                }
            }
            Short('h') | Long("help") => return Ok(Tool::Help(HELP)),
            other => return Err(other.unexpected().into()),
        }
    }
    if fields.is_empty() {
        fields = Field::ALL.to_vec();
    }
    let previous = previous.ok_or(ArgsError::Missing("--prev"))?;
    let current = current.ok_or(ArgsError::Missing("--curr"))?;
    Ok(Tool::FingerprintCompare { previous, current, fields })
}

fn field(name: OsString) -> Result<Field, ArgsError> {
    let name = text("filters", name)?;
    let found = Field::ALL.into_iter().find(|field| field.name() == name);
    found.ok_or_else(|| ArgsError::Value {
        name: "filters",
        value: name,
        reason: format!("it must be one of {}", Field::ALL.map(Field::name).join(", ")),
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::args::{Invocation, parse};

    fn tool(line: &str) -> Result<Tool, String> {
        match parse(line.split_whitespace().map(OsString::from)).map_err(|e| e.to_string())? {
            Invocation::CpuTemplateTool(tool) => Ok(tool),
            other => panic!("{other:?}"),
        }
    }

    fn files(config: &str, template: &str) -> GuestFiles {
        let path = |text: &str| (!text.is_empty()).then(|| text.into());
        GuestFiles { config: path(config), template: path(template) }
    }

    #[test]
    fn each_command_is_read_under_both_names() {
        let compare = |fields: &[Field]| Tool::FingerprintCompare {
            previous: "a".into(),
            current: "b".into(),
            fields: fields.to_vec(),
        };
        let strip = |suffix: &str| Tool::Strip {
            paths: vec!["a".into(), "b".into(), "c".into()],
            suffix: suffix.to_owned(),
        };
        let dump = |guest, output: &str| Tool::Dump { guest, output: output.into() };
        for (line, expected) in [
            ("template dump", dump(files("", ""), "cpu_config.json")),
            ("template dump -c c --template=t -o o", dump(files("c", "t"), "o")),
            ("template verify --config c -t t", Tool::Verify { guest: files("c", "t") }),
            ("template strip -p a b c", strip("_stripped")),
            ("template strip -p a b -s x --paths c", strip("x")),
            ("template strip --paths a b c --suffix=", strip("")),
            (
                "fingerprint dump -t t",
                Tool::FingerprintDump { guest: files("", "t"), output: "fingerprint.json".into() },
            ),
            ("fingerprint compare -p a -c b", compare(&Field::ALL)),
            (
                "fingerprint compare --prev a --curr b -f bios_version kernel_version",
                compare(&[Field::BiosVersion, Field::KernelVersion]),
            ),
            ("template dump --help", Tool::Help(HELP)),
        ] {
            assert_eq!(tool(&format!("/opt/cpu-template-helper {line}")).as_ref(), Ok(&expected), "{line}");
            let line = line.strip_prefix("template ").unwrap_or(line);
            assert_eq!(tool(&format!("vesta-vmm cpu-template {line}")).as_ref(), Ok(&expected), "{line}");
        }
        assert_eq!(tool("cpu-template-helper --version"), Ok(Tool::Version));
        assert_eq!(tool("cpu-template-helper -V"), Ok(Tool::Version));
    }

    #[test]
    fn missing_and_wrong_arguments_are_named() {
        for (line, named) in [
            ("", "template or fingerprint"),
            ("template", "dump, strip or verify"),
            ("fingerprint", "dump or compare"),
            ("dump", "dump"),
            ("template compare", "compare"),
            ("template strip -p a", "two or more files"),
            ("template verify -o o", "-o"),
            ("template dump -c a -c b", "--config is given twice"),
            ("fingerprint compare -p a", "--curr"),
            ("fingerprint compare -p a -c b -f bios", "kernel_version, microcode_version"),
        ] {
            let error = tool(&format!("cpu-template-helper {line}")).unwrap_err();
            assert!(error.contains(named), "{line}: {error}");
        }
    }
}
