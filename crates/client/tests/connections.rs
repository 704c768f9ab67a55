//! What the client does when connections end, stall or carry something unexpected. The server here
//! does exactly what each test says.

use std::io::{Read, Write};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::thread::{self, JoinHandle};
use std::time::Duration;

use tempfile::TempDir;
use vesta_client::{Client, Drive, Error, ProtocolError, Timeouts};

const OK: &str = "HTTP/1.1 204 \r\nConnection: keep-alive\r\n\r\n";
const LAST: &str = "HTTP/1.1 204 \r\nConnection: close\r\n\r\n";
const VERSION: &str = "HTTP/1.1 200 \r\nContent-Length: 32\r\n\r\n{\"firecracker_version\":\"1.17.0\"}";

/// A server with its socket.
struct Server {
    _dir: TempDir,
    path: PathBuf,
    thread: JoinHandle<Vec<String>>,
}

/// Serves one connection after another with these functions, which return what they read.
fn serve(connections: Vec<fn(&mut UnixStream) -> String>) -> Server {
    let dir = tempfile::tempdir().unwrap();
    let path = dir.path().join("api.sock");
    let listener = UnixListener::bind(&path).unwrap();
    let thread = thread::spawn(move || {
        connections.into_iter().map(|serve| serve(&mut listener.accept().unwrap().0)).collect()
    });
    Server { _dir: dir, path, thread }
}

impl Server {
    fn client(&self) -> Client {
        Client::new(&self.path)
    }

    /// The first lines of all requests, once all connections were served.
    fn requests(self) -> Vec<String> {
        self.thread.join().unwrap()
    }
}

/// Reads one request without a body; returns its first line.
fn request(stream: &mut UnixStream) -> String {
    let mut bytes = Vec::new();
    while !bytes.ends_with(b"\r\n\r\n") {
        let mut byte = [0];
        if stream.read(&mut byte).unwrap() == 0 {
            return "end".to_owned();
        }
        bytes.push(byte[0]);
    }
    String::from_utf8(bytes).unwrap().lines().next().unwrap().to_owned()
}

fn answer(stream: &mut UnixStream, response: &str) -> String {
    let line = request(stream);
    stream.write_all(response.as_bytes()).unwrap();
    line
}

fn short() -> Timeouts {
    Timeouts { answer: Duration::from_millis(30), ..Timeouts::default() }
}

#[test]
fn one_connection_carries_all_requests() {
    let server = serve(vec![|stream| {
        let first = answer(stream, VERSION);
        let second = answer(stream, VERSION);
        format!("{first}, {second}")
    }]);
    let mut client = server.client();
    assert_eq!(client.version().unwrap(), "1.17.0");
    assert_eq!(client.version().unwrap(), "1.17.0");
    assert_eq!(server.requests(), ["GET /version HTTP/1.1, GET /version HTTP/1.1"]);
}

#[test]
fn question_is_repeated_when_the_connection_ends() {
    // The second request is read and not answered.
    let server =
        serve(vec![|stream| answer(stream, VERSION) + &request(stream), |stream| answer(stream, VERSION)]);
    let mut client = server.client();
    client.version().unwrap();
    assert_eq!(client.version().unwrap(), "1.17.0");
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn action_that_may_have_arrived_is_not_repeated() {
    let server = serve(vec![|stream| answer(stream, OK) + &request(stream)]);
    let mut client = server.client();
    client.cancel_snapshot_job().unwrap();
    let error = client.cancel_snapshot_job().unwrap_err();
    assert!(matches!(error, Error::Closed { request_sent: true }), "{error}");
    assert_eq!(server.requests().len(), 1);
}

#[test]
fn action_that_was_not_sent_is_sent_on_a_new_connection() {
    let server =
        serve(vec![|stream| answer(stream, OK), |stream| answer(stream, OK), |stream| answer(stream, OK)]);
    let mut client = server.client();
    client.cancel_snapshot_job().unwrap();
    // An answer to another client: the server has closed the first connection.
    server.client().cancel_snapshot_job().unwrap();
    client.cancel_snapshot_job().unwrap();
    assert_eq!(server.requests().len(), 3);
}

#[test]
fn connection_is_not_used_after_connection_close() {
    let server = serve(vec![|stream| answer(stream, LAST), |stream| answer(stream, LAST)]);
    let mut client = server.client();
    client.cancel_snapshot_job().unwrap();
    client.cancel_snapshot_job().unwrap();
    assert_eq!(server.requests().len(), 2);
}

#[test]
fn answer_that_does_not_come_is_a_timeout() {
    let server = serve(vec![|stream| request(stream) + &request(stream), |stream| answer(stream, VERSION)]);
    let mut client = server.client().with_timeouts(short());
    let error = client.version().unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    let mut client = client.with_timeouts(Timeouts::default());
    assert_eq!(client.version().unwrap(), "1.17.0");
    assert_eq!(server.requests()[0], "GET /version HTTP/1.1end");
}

#[test]
fn answer_that_trickles_in_does_not_extend_the_limit() {
    let server = serve(vec![|stream| {
        let line = request(stream);
        stream.write_all(b"HTTP/1.1 204 \r\n").unwrap();
        // Ends when the client has hung up.
        while stream.write_all(b"a: b\r\n").is_ok() && stream.flush().is_ok() {
            thread::sleep(Duration::from_millis(5));
        }
        line
    }]);
    let error = server.client().with_timeouts(short()).version().unwrap_err();
    assert!(matches!(error, Error::Timeout { .. }), "{error}");
    server.requests();
}

#[test]
fn refusal_before_the_body_was_read_is_still_the_answer() {
    let server = serve(vec![|stream| {
        stream.read_exact(&mut [0; 100]).unwrap();
        let body = r#"{ "error": "too large" }"#;
        let len = body.len();
        let head = format!("HTTP/1.1 400 \r\nConnection: close\r\nContent-Length: {len}\r\n\r\n");
        stream.write_all((head + body).as_bytes()).unwrap();
        String::new()
    }]);
    // More than the socket's buffers take.
    let contents = serde_json::json!({ "a": "x".repeat(8 << 20) });
    let error = server.client().put_mmds(&contents).unwrap_err();
    assert_eq!((error.status(), error.fault_message()), (Some(400), Some("too large")), "{error}");
    server.requests();
}

#[test]
fn garbage_is_a_protocol_error_and_not_an_answer() {
    let server =
        serve(vec![|stream| answer(stream, "nonsense\r\n\r\n"), |stream| answer(stream, &VERSION.repeat(2))]);
    let mut client = server.client();
    assert!(matches!(client.version(), Err(Error::Protocol(ProtocolError::Head(_)))));
    assert!(matches!(client.version(), Err(Error::Protocol(ProtocolError::Excess(_)))));
    server.requests();
}

#[test]
fn unexpected_answer_names_the_request_and_the_field() {
    let server = serve(vec![|stream| answer(stream, "HTTP/1.1 200 \r\nContent-Length: 2\r\n\r\n{}")]);
    let error = server.client().version().unwrap_err().to_string();
    assert!(error.starts_with("GET /version: unexpected answer: missing field"), "{error}");
    server.requests();
}

#[test]
fn id_that_is_no_part_of_a_path_is_refused_unsent() {
    let mut client = Client::new("/nonexistent/api.sock");
    for id in ["", "a/../b", "a?b", "a b"] {
        let error = client.put_drive(&Drive::new(id, "/disk")).unwrap_err();
        assert!(matches!(error, Error::Id(_)), "{error}");
    }
    let error = client.put_drive(&Drive::new("rootfs", "/disk")).unwrap_err();
    assert!(error.is_absent() && error.to_string().contains("/nonexistent/api.sock"), "{error}");
}

#[test]
fn wait_until_ready_ends_with_the_last_reason() {
    let dir = tempfile::tempdir().unwrap();
    let mut client = Client::new(dir.path().join("api.sock"));
    assert!(client.wait_until_ready(Duration::from_millis(20)).unwrap_err().is_absent());
    // A socket that is too long for an address never appears.
    let mut client = Client::new(dir.path().join("x".repeat(120)));
    assert!(!client.wait_until_ready(Duration::from_hours(1)).unwrap_err().is_absent());
}

#[test]
fn structs_with_defaults_pass_their_own_checks() {
    use vesta_client::{
        BootSource, Child, DriveUpdate, Fork, InstanceId, NetworkInterface, SnapshotCreate, SnapshotLoad,
        Vsock,
    };
    BootSource::new("/vmlinux").check().unwrap();
    Drive::new("rootfs", "/disk").check().unwrap();
    NetworkInterface::new("eth0", "tap0").check().unwrap();
    Vsock::new(3, "/vsock").check().unwrap();
    Fork { children: vec![Child::new(InstanceId::default())], drives: vec![] }.check().unwrap();
    SnapshotCreate::new("/state", "/memory").check().unwrap();
    SnapshotLoad::from_files("/state".into(), "/memory".into()).check().unwrap();
    assert!(DriveUpdate::new("rootfs").is_empty());
}
