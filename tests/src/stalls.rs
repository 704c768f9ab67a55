//! How long a host stood still: what to take off where time is measured on a machine that others use, or that is emulated.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the watch sleeps at a time.
const NAP: Duration = Duration::from_millis(5);
/// A nap that is longer than it should be by more than this was a stall.
const LATE: Duration = Duration::from_millis(10);

/// Watches for stalls until it is dropped.
#[derive(Debug)]
pub struct Stalls {
    /// When each was over, and how long it was.
    seen: Arc<Mutex<Vec<(Instant, Duration)>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stalls {
    /// Begins to watch, on the processors of the thread that calls.
    pub fn watch() -> Stalls {
        let (seen, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (to, until) = (Arc::clone(&seen), Arc::clone(&stop));
        let thread = std::thread::spawn(move || {
            let mut before = Instant::now();
            while !until.load(Ordering::Relaxed) {
                std::thread::sleep(NAP);
                let now = Instant::now();
                let late = (now - before).saturating_sub(NAP);
                if late > LATE {
                    to.lock().expect("no thread panics with it").push((now, late));
                }
                before = now;
            }
        });
        Stalls { seen, stop, thread: Some(thread) }
    }

    /// How much of the time from `from` to `to` it stood still.
    pub fn between(&self, from: Instant, to: Instant) -> Duration {
        let overlap = |&(end, len): &(Instant, Duration)| {
            end.min(to).saturating_duration_since(end.checked_sub(len).map_or(from, |start| start.max(from)))
        };
        self.seen.lock().expect("no thread panics with it").iter().map(overlap).sum()
    }
}

impl Drop for Stalls {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            // It does nothing that could fail.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_part_of_a_stall_that_lies_in_the_span_counts() {
        let stalls = Stalls::watch();
        let start = Instant::now();
        let at = |ms| start + Duration::from_millis(ms);
        *stalls.seen.lock().unwrap() =
            vec![(at(100), Duration::from_millis(40)), (at(300), Duration::from_millis(100))];
        assert_eq!(stalls.between(at(0), at(400)), Duration::from_millis(140));
        assert_eq!(stalls.between(at(80), at(250)), Duration::from_millis(70));
        assert_eq!(stalls.between(at(110), at(190)), Duration::ZERO);
    }
}
