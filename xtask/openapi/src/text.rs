//! Descriptions: from doc comments, which are Rust's, to the text that users read.

use anyhow::{Context, Result, bail};

/// A constant that doc comments name, and its value.
macro_rules! constants {
    ($($name:ident),* $(,)?) => {
        [$((stringify!($name), config::$name.to_string())),*]
    };
}

/// Joins the lines of a doc comment, and replaces links to constants by their values.
pub(crate) fn description(doc: &str) -> Result<String> {
    let constants = constants![
        DEFAULT_BOOT_ARGS,
        DEFAULT_DRIVE_QUEUE_SIZE,
        DEFAULT_MMDS_ADDRESS,
        DEFAULT_NET_QUEUE_SIZE,
        MAX_BOOT_ARGS_LEN,
        MAX_CHILDREN,
        MAX_DRIVE_ID_LEN,
        MAX_DRIVE_QUEUES,
        MAX_DRIVE_QUEUE_SIZE,
        MAX_IFACE_ID_LEN,
        MAX_MEM_SIZE_MIB,
        MAX_NET_QUEUE_SIZE,
        MAX_QUEUE_PAIRS,
        MAX_REFILL_TIME_MS,
        MAX_VCPU_COUNT,
        MIN_DRIVE_QUEUE_SIZE,
        MIN_MTU,
        MIN_NET_QUEUE_SIZE,
    ];
    let mut out = String::new();
    let mut rest = doc;
    while let Some((before, link)) = rest.split_once("[`") {
        let (name, after) = link.split_once("`]").with_context(|| format!("{doc:?}: a broken link"))?;
        let Some((_, value)) = constants.iter().find(|(known, _)| *known == name) else {
            bail!("{doc:?}: a user cannot follow the link to {name}");
        };
        out += before;
        // Texts need the marks of code; numbers do not.
        let is_number = value.bytes().all(|byte| byte.is_ascii_digit());
        let mark = if is_number { "" } else { "`" };
        out.extend([mark, value, mark]);
        rest = after;
    }
    out += rest;
    let paragraphs = out.split("\n\n").map(|text| text.split_whitespace().collect::<Vec<_>>().join(" "));
    Ok(paragraphs.collect::<Vec<_>>().join("\n\n"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn constants_become_their_values() {
        let doc = "At most [`MAX_VCPU_COUNT`]\nof them;\n\n [`DEFAULT_MMDS_ADDRESS`].";
        assert_eq!(description(doc).unwrap(), "At most 128 of them;\n\n`169.254.169.254`.");
    }

    #[test]
    fn other_links_are_refused_by_name() {
        let error = description("See [`Drive::lock`].").unwrap_err().to_string();
        assert!(error.contains("Drive::lock"), "{error}");
    }
}
