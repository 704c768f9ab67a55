//! Memory from a page server: another process that answers the guest's page faults through
//! userfaultfd.
//!
//! # The handshake
//!
//! It is Firecracker's, so its page servers work unchanged. The server listens on a Unix socket.
//! The monitor maps anonymous memory, registers it for missing pages, connects, and sends one
//! message. The message is a JSON array with an object for each region, and the userfaultfd as
//! `SCM_RIGHTS`. An object has the fields `base_host_virt_addr`, `size`, `offset` (in the image),
//! `page_size` and `page_size_kib`. All are in bytes; `page_size_kib` is too, in Firecracker as
//! well.
//!
//! From then on the server reads faults from the userfaultfd and answers them with `UFFDIO_COPY`.
//! If the guest's balloon returns pages, the server reads `UFFD_EVENT_REMOVE` and must answer later
//! faults there with zeros. The server sends nothing on the socket.
//!
//! # When the server fails
//!
//! The monitor keeps the userfaultfd open as well. Otherwise the server's death would close the
//! last descriptor, and the kernel would let the guest continue *with zeros*. So a guest whose
//! server is gone waits for its page, and [`PageServer`] reports it:
//!
//! - [`PageServer::probe`] checks before the guest runs that the server answers faults.
//! - [`PageServer::wait_while_serving`] watches it while the vCPU state is restored, for which KVM
//!   may need pages.
//! - [`PageServer::wait`] watches it from then on, on a thread of the caller.
//!
//! The handshake does not say which process serves. The process that called `listen` may fork the
//! one that accepts, and exit. A server may close the connection and keep only the userfaultfd. So
//! each of these shows that the server lives:
//!
//! 1. A process holds the other end of the connection.
//! 2. The process that listened lives.
//! 3. A process reads page faults.
//!
//! Without the first two the server is an *orphan*, and the third decides. An orphan is gone when a
//! fault has been unread for the caller's limit and no page has arrived in that time. A fault that
//! was read before its reader exited would not show, so waiting threads are made to fault again.
//! A server that is no orphan can only stall, because it may recover.
//!
//! A thread that waits for a page can be killed but not interrupted. So a thread that has other
//! work never waits for a page itself: a thread of its own touches the pages, and the caller waits
//! for that thread as long as there is progress (`fetch`). A machine whose server is gone can only
//! end, at best with its process. [`PageServer::release`] lets its threads continue, with zeros, so
//! that they can be joined. It is only for a machine whose vCPUs and devices can no longer run.

mod error;
mod fetch;
mod handshake;
mod monitor;
mod stall;

pub use error::{FetchError, PageServerError};
pub(crate) use fetch::fetch;
pub use monitor::{PageServer, ServerEvent};
