//! The kernel command line: the user's, and what the machine adds to it.
//!
//! Linux passes everything behind a parameter `--` to init without reading it, so additions go
//! before it. To find it, the line is split as Linux does (`next_arg`): at white space that is not
//! between double quotes. A parameter that begins with a quote loses that quote and a closing one.

use memory::GuestRam;

use super::error::BootError;
use super::io::write_boot_data;
use crate::layout;

/// The parameter that ends the kernel's parameters.
const END_OF_PARAMETERS: &[u8] = b"--";
const QUOTE: u8 = b'"';

/// Writes the command line and returns its length without the closing NUL.
///
/// The parameters in `added` go behind those of the kernel in `user` and before the arguments of
/// init.
pub(super) fn write(ram: &GuestRam, user: &str, added: &str) -> Result<usize, BootError> {
    let mut line = join(user, added);
    line.push(0);
    if line.len() > config::MAX_BOOT_ARGS_LEN {
        return Err(BootError::CmdlineTooLong { len: line.len() });
    }
    write_boot_data(ram, layout::CMDLINE, &line);
    Ok(line.len() - 1)
}

/// The whole line.
fn join(user: &str, added: &str) -> Vec<u8> {
    let user = user.as_bytes();
    let (kernel, rest) = user.split_at(insertion_point(user));
    let parts = [kernel, added.as_bytes(), rest].map(<[u8]>::trim_ascii);
    parts.into_iter().filter(|part| !part.is_empty()).collect::<Vec<_>>().join(&b' ')
}

/// The offset at which additions go: that of the parameter `--`, or of a last parameter whose quote
/// is not closed (it would include what follows), or the end.
fn insertion_point(line: &[u8]) -> usize {
    let mut at = 0;
    loop {
        at += line[at..].iter().take_while(|byte| is_space(**byte)).count();
        if at == line.len() {
            return at;
        }
        let word = word(&line[at..]);
        if word.unclosed || word.text == END_OF_PARAMETERS {
            return at;
        }
        at += word.len;
    }
}

/// A parameter with its value, as Linux splits the line.
struct Word<'a> {
    /// Length in bytes, up to the white space behind it or to the end.
    len: usize,
    /// The parameter without the quotes around it.
    text: &'a [u8],
    /// Whether it has a quote that is not closed.
    unclosed: bool,
}

/// The first parameter of `line`, which does not begin with white space.
fn word(line: &[u8]) -> Word<'_> {
    let mut quoted = false;
    let end = line.iter().position(|byte| {
        quoted ^= *byte == QUOTE;
        is_space(*byte) && !quoted
    });
    let len = end.unwrap_or(line.len());
    let ([QUOTE, text @ .., QUOTE] | [QUOTE, text @ ..] | text) = &line[..len];
    Word { len, text, unclosed: quoted }
}

/// Linux's `isspace`, which reads Latin-1: 0xa0 is the no-break space.
fn is_space(byte: u8) -> bool {
    matches!(byte, b' ' | b'\t'..=b'\r' | 0xa0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use config::HugePages;
    use proptest::prelude::*;
    use vm_memory::{Bytes, GuestAddress};

    #[test]
    fn additions_go_before_the_arguments_of_init() {
        for (user, whole) in [
            ("", "A"),
            ("  ", "A"),
            ("quiet", "quiet A"),
            ("quiet -- --login", "quiet A -- --login"),
            ("init=/init --", "init=/init A --"),
            ("init=/init\t--\tx  y", "init=/init A --\tx  y"),
            ("init=/init\n--\r\nx", "init=/init A --\r\nx"),
            ("-- x", "A -- x"),
            ("--", "A --"),
            ("quiet -- a -- b", "quiet A -- a -- b"),
            ("a=-- --b -- c", "a=-- --b A -- c"),
            ("a=\"x -- y\" -- z", "a=\"x -- y\" A -- z"),
            ("a=\"x -- y\" z", "a=\"x -- y\" z A"),
            ("a \"--\" b", "a A \"--\" b"),
            ("a \"-- \" b", "a \"-- \" b A"),
            ("a --=b c", "a --=b c A"),
            ("a b=\"c d", "a A b=\"c d"),
            ("a \"--", "a A \"--"),
            ("a=\u{e0}-- b \u{2800}\"c", "a=\u{e0} A -- b \u{2800}\"c"),
        ] {
            assert_eq!(String::from_utf8_lossy(&join(user, "A")), whole, "{user:?}");
        }
        assert_eq!(join(" quiet -- x", ""), b"quiet -- x");
    }

    #[test]
    fn line_ends_with_a_nul_that_its_length_excludes() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        let len = write(&ram, "quiet -- --login", "pci=off").unwrap();
        let mut bytes = vec![0xff; len + 1];
        ram.memory().read_slice(&mut bytes, GuestAddress(layout::CMDLINE)).unwrap();
        assert_eq!(bytes, b"quiet pci=off -- --login\0");
        assert_eq!(write(&ram, "", "").unwrap(), 0);
    }

    #[test]
    fn line_with_additions_that_is_too_long_is_refused() {
        let ram = GuestRam::map(16, HugePages::None, false).unwrap();
        let user = "x".repeat(config::MAX_BOOT_ARGS_LEN - 1);
        assert!(write(&ram, &user, "").is_ok());
        let len = config::MAX_BOOT_ARGS_LEN + 2;
        assert!(matches!(write(&ram, &user, "y"), Err(BootError::CmdlineTooLong { len: l }) if l == len));
    }

    /// The kernel's own parameters, split the way that Linux documents: a state machine over single
    /// bytes.
    fn kernel_parameters(line: &str) -> Vec<String> {
        let mut parameters = vec![String::new()];
        let mut quoted = false;
        for c in line.chars() {
            quoted ^= c == '"';
            if c.is_ascii_whitespace() && !quoted {
                parameters.push(String::new());
            } else {
                parameters.last_mut().unwrap().push(c);
            }
        }
        parameters.retain(|parameter| !parameter.is_empty());
        let bare = |parameter: &String| {
            let inner = parameter.strip_prefix('"').map(|rest| rest.strip_suffix('"').unwrap_or(rest));
            inner.unwrap_or(parameter) != "--"
        };
        parameters.into_iter().take_while(bare).collect()
    }

    proptest! {
        #[test]
        fn kernel_reads_additions_and_all_its_own_parameters(
            user in "([ \t\n]|[\"]|-|=|a|( -- )|( \"--\" )){0,24}",
        ) {
            let joined = String::from_utf8(join(&user, "A=1 B")).unwrap();
            let mut parameters = kernel_parameters(&joined);
            for added in ["A=1", "B"] {
                let at = parameters.iter().position(|parameter| parameter == added);
                prop_assert!(at.is_some(), "{user:?} became {joined:?}");
                parameters.remove(at.unwrap());
            }
            let trimmed = |parameters: Vec<String>| parameters.concat().split_whitespace().collect::<String>();
            prop_assert_eq!(trimmed(parameters), trimmed(kernel_parameters(&user)));
        }
    }
}
