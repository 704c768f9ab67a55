//! Waiting for pages that a page server is to send.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc::{RecvTimeoutError, sync_channel};
use std::time::{Duration, Instant};

use super::error::FetchError;
use super::stall::StallDetector;
use crate::observer::Observer;
use crate::pages::{PAGE, PageSet};
use crate::ram::GuestRam;
use crate::server_link::ServerLink;
use crate::sys::span_io;

/// The longest time between two checks of the server while pages are waited for.
const POLL_INTERVAL: Duration = Duration::from_millis(20);

/// Makes the server send those of `pages` that are missing, and waits for them. Gives up once no
/// page has arrived for `timeout`; then the thread that touches the pages is left behind, which
/// does nothing else.
pub(crate) fn fetch(
    link: &ServerLink,
    ram: &GuestRam,
    pages: &PageSet,
    timeout: Duration,
    observer: &dyn Observer,
) -> Result<(), FetchError> {
    let touched = Arc::new(AtomicU64::new(0));
    let given_up = Arc::new(AtomicBool::new(false));
    let (done, is_done) = sync_channel(1);
    let touch_pages = {
        let (ram, pages) = (ram.clone(), pages.clone());
        let (touched, given_up) = (Arc::clone(&touched), Arc::clone(&given_up));
        move || {
            for (index, span) in ram.spans().iter().enumerate() {
                for page in pages.runs(index).flatten() {
                    if given_up.load(Ordering::Relaxed) {
                        return;
                    }
                    span_io::touch(span.subspan(page * PAGE..(page + 1) * PAGE));
                    touched.fetch_add(1, Ordering::Relaxed);
                }
            }
            // The waiter may have given up; ignore the send error.
            let _ = done.send(());
        }
    };
    let thread = sync::thread::spawn("page_fetch", None, touch_pages);
    thread.map_err(|source| FetchError::Thread { path: link.path.clone(), source })?;
    let waited = wait_while_serving(
        link,
        ram,
        timeout,
        || touched.load(Ordering::Relaxed),
        |interval| {
            if observer.cancelled() {
                return Err(FetchError::Cancelled { path: link.path.clone() });
            }
            match is_done.recv_timeout(interval) {
                Ok(()) => Ok(true),
                Err(RecvTimeoutError::Timeout) => Ok(false),
                // The thread ends without a message only if it panics.
                Err(RecvTimeoutError::Disconnected) => Err(FetchError::Gone { path: link.path.clone() }),
            }
        },
    );
    given_up.store(waited.is_err(), Ordering::Relaxed);
    waited
}

/// Calls `is_done` until it returns true, as long as the server lives and `progress` changes at
/// least once within `timeout`.
pub(super) fn wait_while_serving<E: From<FetchError>>(
    link: &ServerLink,
    ram: &GuestRam,
    timeout: Duration,
    progress: impl Fn() -> u64,
    mut is_done: impl FnMut(Duration) -> Result<bool, E>,
) -> Result<(), E> {
    // Asking for progress may be expensive. The server is checked more often.
    let progress_interval = timeout / 10;
    let interval = POLL_INTERVAL.min(progress_interval);
    let (mut progressed, mut asked) = (Instant::now(), Instant::now());
    let mut last = None;
    let mut stall = StallDetector::new(timeout / 2);
    while !is_done(interval)? {
        // If the poll fails, only the timeout counts.
        if link.is_orphaned() && stall.poll(link, ram, true).unwrap_or(false) {
            return Err(FetchError::Gone { path: link.path.clone() }.into());
        }
        if asked.elapsed() >= progress_interval {
            let now = Some(progress());
            if last.is_some() && last != now {
                progressed = Instant::now();
            }
            (last, asked) = (now, Instant::now());
        }
        if progressed.elapsed() >= timeout {
            return Err(FetchError::Unanswered { path: link.path.clone(), waited: timeout }.into());
        }
    }
    Ok(())
}
