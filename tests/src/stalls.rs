//! Stalls of the host, to subtract from times that are measured on a busy or emulated machine.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long the watching thread sleeps at a time.
const NAP: Duration = Duration::from_millis(5);
/// A sleep that is longer than requested by more than this was a stall.
const LATE: Duration = Duration::from_millis(10);

/// Watches for stalls until it is dropped.
#[derive(Debug)]
pub struct Stalls {
    /// The end and the length of each stall.
    seen: Arc<Mutex<Vec<(Instant, Duration)>>>,
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Stalls {
    /// Starts watching, on the processors of the calling thread.
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

    /// How long the host was stalled between `from` and `to`.
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
            // The thread cannot fail.
            let _ = thread.join();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_stalls_within_the_interval_count() {
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
