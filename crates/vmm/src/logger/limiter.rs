//! [`Limiter`]: how often one place in the source may log, so that a guest that causes warnings at
//! will fills no disk.
//!
//! At most [`MOST`] lines in any [`WINDOW`] come from one place. The first line over it is replaced
//! by a notice; the others are counted, and a summary with their count follows once the place may
//! log again. Nothing waits for that moment: the summary is written before the next line of the
//! log, from any place, and at the latest when the process ends.
//!
//! A place takes memory while it logs. There are as many places as log statements in this program,
//! so the memory is bounded.

use std::time::{Duration, Instant};

use log::{Level, Record};

/// Most lines from one place in [`WINDOW`].
pub(super) const MOST: usize = 10;
/// The time for which lines count.
pub(super) const WINDOW: Duration = Duration::from_secs(5);

/// A log statement.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) file: &'static str,
    pub(super) line: u32,
    pub(super) level: Level,
}

impl Place {
    pub(super) fn of(record: &Record<'_>) -> Self {
        Place {
            file: record.file_static().unwrap_or("-"),
            line: record.line().unwrap_or(0),
            level: record.level(),
        }
    }
}

/// What becomes of a line.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It is written.
    Write,
    /// It is the first that is suppressed: a notice is written in its place.
    Notice,
    /// It is suppressed.
    Drop,
}

/// The places that logged lately.
#[derive(Debug, Default)]
pub(super) struct Limiter {
    sites: Vec<Site>,
    /// How many of them have suppressed lines that are not reported.
    unreported: usize,
}

#[derive(Debug)]
struct Site {
    place: Place,
    /// When the last lines were written: a ring, whose oldest is at `next`.
    written: [Option<Instant>; MOST],
    next: usize,
    suppressed: u64,
}

impl Limiter {
    /// Decides on a line from `place`.
    pub(super) fn admit(&mut self, place: Place, now: Instant) -> Verdict {
        let site = self.site(place, now);
        if site.may_log(now) {
            site.written[site.next] = Some(now);
            site.next = (site.next + 1) % MOST;
            return Verdict::Write;
        }
        site.suppressed += 1;
        if site.suppressed > 1 {
            return Verdict::Drop;
        }
        self.unreported += 1;
        Verdict::Notice
    }

    /// Takes the count of one place whose lines were suppressed and that may log again by now.
    pub(super) fn take_due(&mut self, now: Instant) -> Option<(Place, u64)> {
        self.take(|site| site.may_log(now))
    }

    /// Takes the count of one place whose lines were suppressed.
    pub(super) fn take_any(&mut self) -> Option<(Place, u64)> {
        self.take(|_| true)
    }

    fn take(&mut self, due: impl Fn(&Site) -> bool) -> Option<(Place, u64)> {
        if self.unreported == 0 {
            return None;
        }
        let site = self.sites.iter_mut().find(|site| site.suppressed > 0 && due(site))?;
        self.unreported -= 1;
        Some((site.place, std::mem::take(&mut site.suppressed)))
    }

    fn site(&mut self, place: Place, now: Instant) -> &mut Site {
        let known = self.sites.iter().position(|site| site.place == place);
        let at = known.unwrap_or_else(|| {
            self.sites.retain(|site| site.suppressed > 0 || site.is_recent(now));
            self.sites.push(Site { place, written: [None; MOST], next: 0, suppressed: 0 });
            self.sites.len() - 1
        });
        &mut self.sites[at]
    }
}

impl Site {
    fn may_log(&self, now: Instant) -> bool {
        !counts(self.written[self.next], now)
    }

    fn is_recent(&self, now: Instant) -> bool {
        counts(self.written[(self.next + MOST - 1) % MOST], now)
    }
}

/// Whether a line that was written at `time` still counts.
fn counts(time: Option<Instant>, now: Instant) -> bool {
    time.is_some_and(|time| now.saturating_duration_since(time) < WINDOW)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn place(line: u32) -> Place {
        Place { file: "a.rs", line, level: Level::Warn }
    }

    /// The verdicts on `count` lines at `now`: written, notices, dropped.
    fn verdicts(limiter: &mut Limiter, line: u32, now: Instant, count: usize) -> (usize, usize, usize) {
        let all: Vec<_> = (0..count).map(|_| limiter.admit(place(line), now)).collect();
        let number = |wanted| all.iter().filter(|verdict| **verdict == wanted).count();
        (number(Verdict::Write), number(Verdict::Notice), number(Verdict::Drop))
    }

    #[test]
    fn ten_lines_pass_and_the_rest_is_counted() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        assert_eq!(verdicts(&mut limiter, 1, start, 1000), (10, 1, 989));
        assert_eq!(limiter.take_due(start + WINDOW.mul_f64(0.99)), None);
        assert_eq!(limiter.take_due(start + WINDOW), Some((place(1), 990)));
        assert_eq!(limiter.take_due(start + WINDOW), None);
        assert_eq!(verdicts(&mut limiter, 1, start + WINDOW, 11), (10, 1, 0));
        assert_eq!(limiter.take_any(), Some((place(1), 1)));
    }

    #[test]
    fn places_do_not_share_their_allowance() {
        let (mut limiter, now) = (Limiter::default(), Instant::now());
        assert_eq!(verdicts(&mut limiter, 1, now, 20), (10, 1, 9));
        assert_eq!(verdicts(&mut limiter, 2, now, 5), (5, 0, 0));
        assert_eq!(limiter.take_any(), Some((place(1), 10)));
        assert_eq!(limiter.take_any(), None);
    }

    #[test]
    fn no_window_of_five_seconds_has_more_than_ten_lines() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        let mut written: Vec<Instant> = Vec::new();
        for step in 0..3000 {
            let now = start + Duration::from_millis(step * 7);
            if limiter.admit(place(1), now) == Verdict::Write {
                written.push(now);
            }
        }
        assert!(written.len() >= 40, "{}", written.len());
        assert!(written.windows(MOST + 1).all(|eleven| eleven[MOST] - eleven[0] >= WINDOW));
    }

    #[test]
    fn idle_places_are_forgotten() {
        let (mut limiter, start) = (Limiter::default(), Instant::now());
        for line in 0..1000 {
            limiter.admit(place(line), start + WINDOW * line);
        }
        assert_eq!(limiter.sites.len(), 1);
    }
}
