//! Watching the page server of a guest whose memory comes from one ([`memory::page_server`]).
//!
//! A guest whose server is gone waits at its next missing page for ever. So a thread waits for the
//! server's end ([`memory::page_server`] says what counts as one), and reports it to the machine's
//! owner, who ends the process. Until then nothing is let go: a vCPU or a disk would go on with zeros.
//! An owner that does not hear, because it waits for a page itself, is ended with the process after
//! [`UNHEARD`]. A server that only stalls is reported in the log: it may come to itself.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use memory::page_server::{PageServer, ServerEvent};
use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};

use crate::events::{EventSink, MachineEvent};

/// How long a fault may stay unread before the log says so.
const STALL: Duration = Duration::from_secs(5);

/// How long the owner of a machine whose memory is lost may take to end it.
const UNHEARD: Duration = Duration::from_secs(5);

/// The watch. Dropping it ends it and lets go of threads that wait for a page: vCPUs must have been told to stop.
#[derive(Debug)]
pub(crate) struct PageWatch {
    stop: OwnedFd,
    thread: Option<JoinHandle<()>>,
}

impl PageWatch {
    /// Begins to watch `server`.
    pub(crate) fn start(server: PageServer, events: EventSink) -> std::io::Result<Self> {
        let stop = eventfd(0, EventfdFlags::CLOEXEC | EventfdFlags::NONBLOCK)?;
        let stopped = stop.try_clone()?;
        let thread = std::thread::Builder::new()
            .name("page_watch".to_owned())
            .spawn(move || watch(server, &stopped, &events))?;
        Ok(PageWatch { stop, thread: Some(thread) })
    }
}

fn watch(mut server: PageServer, stop: &OwnedFd, events: &EventSink) {
    loop {
        match server.wait(stop.as_fd(), STALL) {
            Ok(ServerEvent::Stopped) => break,
            Ok(ServerEvent::Closed) => log::warn!("the page server has closed its connection"),
            Ok(ServerEvent::Stalled) => {
                log::warn!("the page server has not looked at a page fault for {} s", STALL.as_secs());
            }
            Ok(ServerEvent::Gone) => break lost("the page server has ended".to_owned(), stop, events),
            Err(error) => break lost(error.to_string(), stop, events),
        }
    }
    // The machine is being taken down, and its threads are to end.
    server.release();
}

/// Says that no page will come any more, and returns when the machine is taken down.
fn lost(why: String, stop: &OwnedFd, events: &EventSink) {
    events.post(MachineEvent::MemoryLost(why));
    let limit = Timespec { tv_sec: UNHEARD.as_secs().cast_signed(), tv_nsec: 0 };
    let mut stopped = [PollFd::new(stop, PollFlags::IN)];
    // A signal is for other threads; this one only waits shorter.
    if poll(&mut stopped, Some(&limit)).unwrap_or(0) == 0 {
        log::error!("the guest's memory is lost, and nobody has ended it within {} s", UNHEARD.as_secs());
        events.end_process();
        // Nobody may go on with zeros, whatever became of the process.
        let _ = poll(&mut stopped, None);
    }
}

impl Drop for PageWatch {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1u64.to_ne_bytes());
        if let Some(thread) = self.thread.take() {
            let joined = thread.join();
            debug_assert!(joined.is_ok(), "the watch does not panic");
        }
    }
}
