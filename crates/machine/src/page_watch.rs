//! Watches the page server of a guest whose memory comes from one ([`memory::page_server`]).
//!
//! A guest whose server has ended would wait for ever at its next missing page. So a thread waits
//! for the server's end ([`memory::page_server`] says what counts as one) and reports it to the
//! machine's owner, which ends the process. Until then no waiting thread is released: a vCPU or a
//! disk would continue with zeros. If the owner does not react within [`OWNER_TIMEOUT`], because it
//! waits for a page itself, this thread ends the process. A server that only stalls is reported in
//! the log: it may recover.

use std::os::fd::AsFd;
use std::sync::Arc;
use std::thread::JoinHandle;
use std::time::Duration;

use memory::page_server::{PageServer, ServerEvent};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use sync::EventFd;

use crate::events::{EventSink, MachineEvent};

/// How long the server may leave a fault unread before the log says so.
const STALL_TIMEOUT: Duration = Duration::from_secs(5);

/// How long the owner may take to end the process after memory was lost.
const OWNER_TIMEOUT: Duration = Duration::from_secs(5);

/// The watch of a page server. Dropping it ends it and releases threads that wait for a page: vCPUs
/// must have been asked to stop before.
#[derive(Debug)]
pub(crate) struct PageWatch {
    stop: Arc<EventFd>,
    thread: Option<JoinHandle<()>>,
}

impl PageWatch {
    /// Starts to watch `server`.
    pub(crate) fn start(server: PageServer, events: EventSink) -> std::io::Result<Self> {
        let stop = Arc::new(EventFd::new()?);
        let stopped = Arc::clone(&stop);
        let thread = sync::thread::spawn("page_watch", None, move || watch(server, &stopped, &events))?;
        Ok(PageWatch { stop, thread: Some(thread) })
    }
}

fn watch(mut server: PageServer, stop: &EventFd, events: &EventSink) {
    loop {
        match server.wait(stop.as_fd(), STALL_TIMEOUT) {
            Ok(ServerEvent::Stopped) => break,
            Ok(ServerEvent::Closed) => log::warn!("the page server has closed its connection"),
            Ok(ServerEvent::Stalled) => {
                log::warn!("the page server has not read a page fault for {} s", STALL_TIMEOUT.as_secs());
            }
            Ok(ServerEvent::Gone) => break lost("the page server has ended".to_owned(), stop, events),
            Err(error) => break lost(error.to_string(), stop, events),
        }
    }
    // The machine is being dropped, and its threads are to end.
    server.release();
}

/// Reports that no page will arrive any more. Returns when the machine is dropped.
fn lost(why: String, stop: &EventFd, events: &EventSink) {
    events.post(MachineEvent::MemoryLost(why));
    let limit = Timespec { tv_sec: OWNER_TIMEOUT.as_secs().cast_signed(), tv_nsec: 0 };
    let mut stopped = [PollFd::new(stop, PollFlags::IN)];
    // A signal only shortens the wait.
    if poll(&mut stopped, Some(&limit)).unwrap_or(0) == 0 {
        log::error!("guest memory is lost: the process has not ended within {} s", OWNER_TIMEOUT.as_secs());
        events.end_process();
        // Waiting threads must not get zeros, even if the process does not end.
        let _ = poll(&mut stopped, None);
    }
}

impl Drop for PageWatch {
    fn drop(&mut self) {
        self.stop.signal();
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "the watch does not panic");
        }
    }
}
