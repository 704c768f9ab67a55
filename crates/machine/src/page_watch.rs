//! Watching the page server of a guest whose memory comes from one ([`memory::page_server`]).
//!
//! A guest whose server is gone stands still at its next missing page, for ever, and so would whoever waits for its vCPUs. So a thread waits
//! for the server's end, and says so to the machine's owner. A server that only stalls is reported in the log: it may come
//! to itself.

use std::os::fd::{AsFd, OwnedFd};
use std::thread::JoinHandle;
use std::time::Duration;

use memory::page_server::{PageServer, ServerEvent};
use rustix::event::{EventfdFlags, eventfd};

use crate::events::{EventSink, MachineEvent};

/// How long a fault may stay unread before the log says so.
const STALL: Duration = Duration::from_secs(5);

/// The watch. Dropping it ends it and lets go of threads that wait for a page: the guest must not run again.
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
            Ok(ServerEvent::Gone) => {
                events.post(MachineEvent::MemoryLost("the page server has ended".to_owned()));
                break;
            }
            Err(error) => {
                events.post(MachineEvent::MemoryLost(error.to_string()));
                break;
            }
        }
    }
    // Whoever still waits for a page waits for nothing.
    server.release();
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
