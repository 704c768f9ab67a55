//! Interleaved rounds: every entry once, then every entry again.

use anyhow::{Context, Result};

use super::peers::not_measured;
use super::table::{Row, markdown};
use crate::process::say;

/// The values of one measurement: any number for each column.
pub(super) type Values = Vec<Vec<f64>>;

/// The values of all entries.
#[derive(Debug)]
pub(super) struct Measurements {
    rows: Vec<Row>,
    /// A line for each entry that is left out, with the reason.
    left_out: Vec<String>,
}

/// One row of the table to be.
pub(super) struct Entry<C> {
    pub(super) name: String,
    /// It may entry out that it cannot do what is asked: then it is left out, with all its entries.
    pub(super) may_fail: bool,
    pub(super) contestant: C,
}

/// Measures all entries in each of the rounds. With `warm_up`, a round before them is not counted:
/// it brings files into the page cache.
pub(super) fn interleaved<C>(
    mut entries: Vec<Entry<C>>,
    rounds: usize,
    warm_up: bool,
    mut measure: impl FnMut(&C) -> Result<Values>,
) -> Result<Measurements> {
    let mut rows: Vec<Row> =
        entries.iter().map(|entry| Row { name: entry.name.clone(), samples: Vec::new() }).collect();
    let mut left_out = Vec::new();
    for round in 0..rounds + usize::from(warm_up) {
        let mut at = 0;
        while let Some(entry) = entries.get(at) {
            match measure(&entry.contestant) {
                Ok(_) if warm_up && round == 0 => {}
                Ok(values) => rows[at].add(values),
                Err(error) if entry.may_fail => {
                    say!("{} is not measured: {error:#}", entry.name);
                    left_out.push(not_measured(&entry.name, &format!("{error:#}")));
                    entries.remove(at);
                    rows.remove(at);
                    continue;
                }
                Err(error) => return Err(error).with_context(|| entry.name.clone()),
            }
            at += 1;
        }
    }
    Ok(Measurements { rows, left_out })
}

impl Measurements {
    /// The table, and below it the entries that are left out.
    pub(super) fn markdown(&self, columns: &[&str]) -> String {
        markdown(columns, &self.rows) + &self.left_out.concat()
    }
}

#[cfg(test)]
mod tests {
    use anyhow::bail;

    use super::*;

    fn entry(name: &str, may_fail: bool, contestant: u32) -> Entry<u32> {
        Entry { name: name.to_owned(), may_fail, contestant }
    }

    #[test]
    fn turns_are_interleaved_and_the_first_round_does_not_count() {
        let mut order = Vec::new();
        let mut count = 0.0;
        let measured = interleaved(vec![entry("a", false, 1), entry("b", false, 2)], 2, true, |&who| {
            order.push(who);
            count += 1.0;
            Ok(vec![vec![f64::from(who) * 10.0 + count], vec![]])
        });
        assert_eq!(
            measured.unwrap().markdown(&["x", "y"]),
            "| | x | y |\n|---|---:|---:|\n| a | 13.0 (13.0..15.0) | - |\n| b | 24.0 (24.0..26.0) | - |\n"
        );
        assert_eq!(order, [1, 2, 1, 2, 1, 2]);
    }

    #[test]
    fn a_peer_that_fails_at_first_is_left_out_with_its_reason() {
        let measure = |&who: &u32| if who == 2 { bail!("no such device") } else { Ok(vec![vec![7.0]]) };
        let entries = || vec![entry("peer", true, 2), entry("ours", false, 1)];
        let text = interleaved(entries(), 1, false, measure).unwrap().markdown(&["x"]);
        assert!(
            text.ends_with("| ours | 7.0 (7.0..7.0) |\n\nNot measured: peer: no such device.\n"),
            "{text}"
        );
        let ours = vec![entry("ours", false, 2)];
        assert!(interleaved(ours, 1, false, measure).is_err());
    }

    #[test]
    fn a_peer_that_fails_later_is_left_out_with_all_its_values() {
        let mut calls = 0;
        let entries = vec![entry("peer", true, 1), entry("ours", false, 2)];
        let measured = interleaved(entries, 2, false, |who| {
            calls += 1;
            if calls > 2 && *who == 1 {
                bail!("it died")
            }
            Ok(vec![vec![1.0]])
        });
        let text = measured.unwrap().markdown(&["x"]);
        assert_eq!(text, "| | x |\n|---|---:|\n| ours | 1.0 (1.0..1.0) |\n\nNot measured: peer: it died.\n");
    }
}
