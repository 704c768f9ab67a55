//! The state of a machine as text, down to the registers.

use std::fmt::Write as _;

use machine::MachineState;

/// The longest line of numbers, in characters.
const WIDTH: usize = 120;

/// The state of the vCPUs.
pub(super) fn vcpus(machine: &MachineState) -> String {
    let mut text = String::new();
    for (number, vcpu) in machine.vcpus.iter().enumerate() {
        let _ = writeln!(text, "vcpu {number}:\n{}", folded(&format!("{vcpu:#?}")));
    }
    text
}

/// The state of everything but the vCPUs.
pub(super) fn without_vcpus(machine: &MachineState) -> String {
    let MachineState { vcpus: _, chipset, devices, serial, keyboard, cmos } = machine;
    let parts = [
        format!("{chipset:#?}"),
        format!("{devices:#?}"),
        format!("{serial:#?}"),
        format!("{keyboard:#?}"),
        format!("{cmos:#?}"),
    ];
    parts.iter().map(|part| folded(part) + "\n").collect()
}

/// Joins lines that have one number each, so that thousands of bytes can be read.
fn folded(text: &str) -> String {
    let mut lines: Vec<String> = Vec::new();
    let mut numbers = false;
    for line in text.lines() {
        let item = line.trim_start();
        let number = item.strip_suffix(',').is_some_and(|n| n.parse::<i128>().is_ok());
        match lines.last_mut() {
            Some(last) if number && numbers && last.len() + item.len() < WIDTH => {
                last.push(' ');
                last.push_str(item);
            }
            _ => lines.push(line.to_owned()),
        }
        numbers = number;
    }
    lines.join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_share_lines_and_nothing_else_changes() {
        let bytes: Vec<u32> = (0..100).collect();
        let text = folded(&format!("{:#?}", (&bytes, "a", Some(-1))));
        assert!(text.lines().all(|line| line.len() <= WIDTH), "{text}");
        assert!(text.lines().count() < 15, "{text}");
        let words = |text: &str| text.split_whitespace().map(str::to_owned).collect::<Vec<_>>();
        assert_eq!(words(&text), words(&format!("{:#?}", (&bytes, "a", Some(-1)))));
    }
}
