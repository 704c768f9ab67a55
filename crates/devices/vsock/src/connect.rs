//! Connections that the guest requests: connecting to a host server, and retrying if its backlog is
//! full.

use rustix::io::Errno;
use virtio::worker::{Context, Nanos};

use crate::connection::{Key, State};
use crate::muxer::{MS, Muxer};
use crate::packet::{Header, SocketKind};
use crate::table::Slot;

/// How long the backlog of a host server may stay full for a connection that the guest requests.
const CONNECT_TIMEOUT: Nanos = 5_000 * MS;
/// How often servers with a full backlog are retried.
const CONNECT_RETRY_INTERVAL: Nanos = 10 * MS;
/// Maximum number of connections to try at each retry.
const CONNECTS_PER_RETRY: usize = 64;

impl Muxer {
    /// Handles a connection request of the guest.
    pub(crate) fn handle_request(
        &mut self,
        cx: &mut Context<'_>,
        header: &Header,
        key: Key,
        kind: SocketKind,
    ) {
        if let Some(slot) = self.table.find(key) {
            // The guest has forgotten its former connection with these ports: both are reset.
            return self.kill(cx, slot);
        }
        let Some(slot) = self.table.add(kind, State::Connecting) else {
            self.shared.stats.conns_refused.add(1);
            return self.reply_reset(header);
        };
        self.shared.stats.conns_added.add(1);
        self.table.set_key(slot, key);
        if let Some(connection) = self.table.get(slot)
            && connection.credit.update_peer(header).is_err()
        {
            return self.kill(cx, slot);
        }
        // Connections that wait for this server already come first.
        if self.table.first_waiting((key.host_port, kind)).is_some() || !self.try_connect(cx, slot) {
            self.table.wait_for_server(slot);
            let now = cx.now();
            self.table.set_deadline(slot, Some(now.saturating_add(CONNECT_TIMEOUT)));
            let retry_at = now.saturating_add(CONNECT_RETRY_INTERVAL);
            self.connect_retry_at = self.connect_retry_at.or(Some(retry_at));
        }
    }

    /// Retries servers whose backlog was full. For each of them the waiting connections are tried
    /// in order, until the backlog is full again.
    pub(crate) fn retry_connects(&mut self, cx: &mut Context<'_>) {
        let mut left = CONNECTS_PER_RETRY;
        for _ in 0..self.table.servers() {
            // Round-robin, as one call may not get through all servers.
            let next = self.table.next_server_after(self.last_retried);
            let Some(server) = next.filter(|_| left > 0) else { break };
            self.last_retried = Some(server);
            while left > 0
                && let Some(slot) = self.table.first_waiting(server)
            {
                left -= 1;
                if !self.try_connect(cx, slot) {
                    break;
                }
            }
        }
        let retry_at = cx.now().saturating_add(CONNECT_RETRY_INTERVAL);
        self.connect_retry_at = (self.table.servers() > 0).then_some(retry_at);
    }

    /// Connects to the host server that the guest has requested, or refuses the connection. False
    /// if the server's backlog is full.
    fn try_connect(&mut self, cx: &mut Context<'_>, slot: Slot) -> bool {
        let Some(connection) = self.table.get(slot) else { return true };
        let Some((port, kind)) = connection.server() else { return true };
        match self.sockets.connect(port, kind) {
            Ok(socket) if self.is_below_fd_limit(&socket) => {
                if self.set_socket(cx, slot, socket) {
                    self.table.stop_waiting(slot);
                    self.table.set_deadline(slot, None);
                    if let Some(connection) = self.table.get(slot) {
                        connection.state = State::Established;
                        connection.pending.response = true;
                        connection.readable = true;
                    }
                    self.table.enqueue(slot);
                } else {
                    self.kill(cx, slot);
                }
            }
            Err(Errno::AGAIN) => return false,
            _ => self.refuse_connection(cx, slot),
        }
        true
    }
}
