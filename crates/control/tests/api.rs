//! The API over a real socket. The test plays both the clients and the main thread.

use std::{
    fs,
    io::{Read, Write},
    net::Shutdown,
    os::unix::net::UnixStream,
    path::PathBuf,
    sync::Arc,
    thread,
    time::Duration,
};

use config::{Logger, VmState};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use vesta_control::{
    Command, CommandError, Identity, Instance, Reply,
    api::{ApiServer, Limits, Request, Requests, THREAD_NAME},
    events::EventLog,
};

/// Longer than anything here takes; a test that waits so long fails.
const TIMEOUT: Duration = Duration::from_secs(30);

const FAULT_HEAD: &str = "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
                          Content-Type: application/json\r\nContent-Length: ";

struct Api {
    requests: Requests,
    path: PathBuf,
    _dir: tempfile::TempDir,
}

impl Api {
    fn start() -> Api {
        Api::start_with(Limits::default())
    }

    fn start_with(limits: Limits) -> Api {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("api");
        let identity = Identity { id: "vm".into(), app_name: "test", version: "1", api_version: "2" };
        let instance = Arc::new(Instance::new(identity));
        let requests = ApiServer::bind(&path, limits).unwrap().spawn(instance, EventLog::new("vm")).unwrap();
        Api { requests, path, _dir: dir }
    }

    fn connect(&self) -> Client {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(TIMEOUT)).unwrap();
        stream.set_write_timeout(Some(TIMEOUT)).unwrap();
        Client { stream }
    }

    /// The next request, as the main thread gets it.
    fn next(&self) -> Request {
        wait_for(&self.requests);
        self.requests.try_recv().expect("its descriptor is readable")
    }

    /// Answers the next request, which must be `command`.
    fn expect(&self, command: &Command, result: Result<Reply, CommandError>) {
        let request = self.next();
        assert_eq!(&request.command, command);
        request.reply_to.send(result);
    }
}

fn wait_for(requests: &Requests) {
    let mut fds = [PollFd::new(requests, PollFlags::IN)];
    let timeout = Timespec::try_from(TIMEOUT).unwrap();
    assert_eq!(poll(&mut fds, Some(&timeout)).unwrap(), 1, "no request came");
}

struct Client {
    stream: UnixStream,
}

impl Client {
    fn send(&mut self, bytes: &str) {
        self.stream.write_all(bytes.as_bytes()).unwrap();
    }

    fn put(&mut self, path: &str, body: &str) {
        self.send(&format!("PUT {path} HTTP/1.1\r\nContent-Length: {}\r\n\r\n{body}", body.len()));
    }

    /// Everything up to the empty line after the headers, and the body.
    fn answer(&mut self) -> (String, String) {
        let mut head = Vec::new();
        while !head.ends_with(b"\r\n\r\n") {
            let mut byte = [0];
            self.stream.read_exact(&mut byte).expect("a whole head");
            head.push(byte[0]);
        }
        let head = String::from_utf8(head).unwrap();
        let len = head.lines().find_map(|line| line.strip_prefix("Content-Length: "));
        let mut body = vec![0; len.map_or(0, |len| len.parse().unwrap())];
        self.stream.read_exact(&mut body).expect("a whole body");
        (head, String::from_utf8(body).unwrap())
    }

    fn status(&mut self) -> String {
        let (head, _) = self.answer();
        head.split(' ').nth(1).unwrap().to_owned()
    }

    /// The rest of what the server sends before it closes.
    fn rest(&mut self) -> String {
        let mut rest = Vec::new();
        while let Ok(1..) = (&self.stream).take(1).read_to_end(&mut rest) {}
        String::from_utf8(rest).unwrap()
    }
}

const GET: &str = "GET /machine-config HTTP/1.1\r\n\r\n";

#[test]
fn instance_is_described_without_the_main_thread() {
    let api = Api::start();
    let mut client = api.connect();
    client.send("GET / HTTP/1.1\r\n\r\nGET /version HTTP/1.1\r\n\r\n");
    let (_, described) = client.answer();
    assert!(described.contains(r#""state":"Not started""#), "{described}");
    assert_eq!(client.answer().1, r#"{"firecracker_version":"2"}"#);
    assert!(api.requests.try_recv().is_none());
}

#[test]
fn answers_equal_firecrackers_byte_for_byte() {
    let api = Api::start();
    let mut client = api.connect();

    client.put("/actions", r#"{"action_type":"InstanceStart"}"#);
    api.expect(&Command::Start, Ok(Reply::Empty));
    let empty = "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
    assert_eq!(client.answer(), (empty.into(), String::new()));

    client.send(GET);
    api.expect(
        &Command::GetMachineConfig,
        Ok(Reply::Json(serde_json::json!({"firecracker_version": "1.17.0"}))),
    );
    let head = "HTTP/1.1 200 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\
                Content-Type: application/json\r\nContent-Length: 32\r\n\r\n";
    assert_eq!(client.answer(), (head.into(), r#"{"firecracker_version":"1.17.0"}"#.into()));

    client.send("PATCH /vm HTTP/1.1\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}");
    api.expect(&Command::SetVmState(VmState::Paused), Err(CommandError::NoMachine));
    let body = r#"{"fault_message":"there is no machine any more"}"#;
    assert_eq!(client.answer(), (format!("{FAULT_HEAD}{}\r\n\r\n", body.len()), body.into()));
}

#[test]
fn deprecated_field_sets_a_header() {
    let api = Api::start();
    let mut client = api.connect();
    client.put("/machine-config", r#"{"vcpu_count":1,"mem_size_mib":1,"cpu_template":"T2"}"#);
    api.next().reply_to.send(Ok(Reply::Empty));
    let expected =
        "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\nDeprecation: true\r\n\r\n";
    assert_eq!(client.answer(), (expected.into(), String::new()));
}

#[test]
fn unknown_requests_never_reach_the_main_thread() {
    let api = Api::start();
    let mut client = api.connect();
    client.send("GET /nowhere HTTP/1.1\r\n\r\n");
    let (head, body) = client.answer();
    assert!(head.starts_with(FAULT_HEAD), "{head}");
    assert!(body.starts_with(r#"{"fault_message":""#) && body.contains("GET /nowhere"), "{body}");
    assert!(api.requests.try_recv().is_none());
    client.send(GET);
    api.expect(&Command::GetMachineConfig, Ok(Reply::Empty));
    assert_eq!(client.status(), "204");
}

#[test]
fn eleventh_client_is_refused_until_another_leaves() {
    let api = Api::start();
    let mut clients: Vec<Client> = (0..10).map(|_| api.connect()).collect();
    let expected = "HTTP/1.1 503\r\nServer: Firecracker API\r\nConnection: close\r\nContent-Length: 40\r\n\r\n\
                    { \"error\": \"Too many open connections\" }";
    assert_eq!(api.connect().rest(), expected);

    for client in &mut clients {
        client.send("GET /nowhere HTTP/1.1\r\n\r\n");
        assert_eq!(client.status(), "400");
    }
    // The slot is free as soon as its client has hung up.
    for _ in 0..100 {
        drop(clients.pop());
        clients.push(api.connect());
        clients[9].send("GET /nowhere HTTP/1.1\r\n\r\n");
        assert_eq!(clients[9].status(), "400");
    }
}

#[test]
fn lingering_client_gives_its_slot_to_a_new_one() {
    let api = Api::start_with(Limits { max_connections: 1, ..Limits::default() });
    let mut lingering = api.connect();
    lingering.send("PUT /logger HTTP/1.1\r\nContent-Length: x\r\n\r\n");
    assert_eq!(lingering.status(), "400");
    assert_eq!(lingering.rest(), "");
    let mut next = api.connect();
    next.send("GET /nowhere HTTP/1.1\r\n\r\n");
    assert_eq!(next.status(), "400");
}

#[test]
fn pipelined_requests_are_answered_in_order() {
    let api = Api::start();
    let mut client = api.connect();
    client.send(
        "GET /vm/config HTTP/1.1\r\n\r\nGET /nowhere HTTP/1.1\r\n\r\nGET /machine-config HTTP/1.1\r\n\r\n",
    );
    let first = api.next();
    assert_eq!(first.command, Command::GetVmConfig);
    assert!(api.requests.try_recv().is_none(), "one at a time");
    first.reply_to.send(Ok(Reply::Json(1.into())));
    api.expect(&Command::GetMachineConfig, Ok(Reply::Json(3.into())));
    assert_eq!(client.answer().1, "1");
    assert!(client.answer().1.contains("/nowhere"));
    assert_eq!(client.answer().1, "3");
}

#[test]
fn request_may_arrive_byte_by_byte() {
    let api = Api::start();
    let mut client = api.connect();
    for byte in "PATCH /vm HTTP/1.1\r\nContent-Length: 19\r\n\r\n{\"state\":\"Resumed\"}".chars() {
        client.send(&byte.to_string());
    }
    api.expect(&Command::SetVmState(VmState::Resumed), Ok(Reply::Empty));
    assert_eq!(client.status(), "204");
}

#[test]
fn expect_100_continue_is_answered() {
    let api = Api::start();
    let mut client = api.connect();
    client.send("PATCH /vm HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 18\r\n\r\n");
    assert_eq!(client.status(), "100");
    client.send(r#"{"state":"Paused"}"#);
    api.expect(&Command::SetVmState(VmState::Paused), Ok(Reply::Empty));
    assert_eq!(client.status(), "204");
    // Also if the body comes with the head.
    client.send(
        "PATCH /vm HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 18\r\n\r\n{\"state\":\"Paused\"}",
    );
    api.expect(&Command::SetVmState(VmState::Paused), Ok(Reply::Empty));
    assert_eq!((client.status().as_str(), client.status().as_str()), ("100", "204"));
}

#[test]
fn body_over_the_limit_is_refused_and_connection_stays() {
    let api = Api::start_with(Limits { max_payload: 250, ..Limits::default() });
    let mut client = api.connect();
    client.put("/logger", &"x".repeat(260));
    client.send(GET);
    let body = "{ \"error\": \"Request payload with size 260 is larger than the limit of 250 allowed by server.\n\
                All previous unanswered requests will be dropped.\" }";
    assert_eq!(client.answer(), (format!("{FAULT_HEAD}{}\r\n\r\n", body.len()), body.into()));
    api.expect(&Command::GetMachineConfig, Ok(Reply::Empty));
    assert_eq!(client.status(), "204");
}

#[test]
fn body_at_the_limit_is_accepted() {
    let api = Api::start();
    let mut client = api.connect();
    let module = "m".repeat(Limits::default().max_payload - r#"{"module":""}"#.len());
    client.put("/logger", &format!(r#"{{"module":"{module}"}}"#));
    let expected = Logger { module: Some(module), ..Logger::default() };
    api.expect(&Command::PutLogger(expected), Ok(Reply::Empty));
    assert_eq!(client.status(), "204");
}

#[test]
fn connection_stays_open_after_malformed_input() {
    let api = Api::start();
    let long_header = format!("GET /vm/config HTTP/1.1\r\nA: {}\r\n\r\n", "a".repeat(9000));
    for noise in ["hello\r\n", "BREW /pot HTTP/1.1\r\n\r\n", "GET /\r\n\r\n", &long_header] {
        let mut client = api.connect();
        client.send(noise);
        let (head, body) = client.answer();
        assert!(head.starts_with(FAULT_HEAD) && body.starts_with("{ \"error\": \""), "{head}{body}");
        client.send(GET);
        api.expect(&Command::GetMachineConfig, Ok(Reply::Empty));
        assert_eq!(client.status(), "204", "{noise}");
    }
}

#[test]
fn post_with_a_body_is_read_whole_and_refused() {
    let api = Api::start();
    let mut client = api.connect();
    let body = "x".repeat(1 << 20);
    client.send(&format!("POST /logger HTTP/1.1\r\nContent-Length: {}\r\n\r\n", body.len()));
    // Refused at once. The client still sends its body, and gets no error.
    let (head, text) = client.answer();
    assert!(head.starts_with(FAULT_HEAD) && text.contains("POST /logger"), "{head}{text}");
    client.send(&body);
    client.send(GET);
    api.expect(&Command::GetMachineConfig, Ok(Reply::Empty));
    assert_eq!(client.status(), "204");
}

#[test]
fn closing_connection_lets_its_client_finish_writing() {
    let api = Api::start();
    for head in [
        "PUT /logger HTTP/1.1\r\nContent-Length: 1048576x\r\n\r\n",
        "PUT /logger HTTP/1.1\r\nTransfer-Encoding: gzip\r\n\r\n",
        "PUT /logger HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 1048576\r\n\r\n",
    ] {
        let mut client = api.connect();
        client.send(head);
        client.send(&"x".repeat(1 << 20));
        let answer = client.rest();
        let closing = "HTTP/1.1 400 \r\nServer: Firecracker API\r\nConnection: close\r\n";
        assert!(answer.starts_with(closing), "{head}{answer}");
    }
}

#[test]
fn dropped_reply_is_answered_with_an_error() {
    let api = Api::start();
    let mut client = api.connect();
    client.send(GET);
    drop(api.next());
    let (head, body) = client.answer();
    assert!(head.starts_with(FAULT_HEAD) && body.contains("no answer"), "{head}{body}");
}

#[test]
fn commands_of_several_clients_are_answered_in_any_order() {
    let api = Api::start();
    let mut clients: Vec<Client> = (0..10).map(|_| api.connect()).collect();
    let mut out = Vec::new();
    for client in &mut clients {
        client.send(GET);
        out.push(api.next());
    }
    for (number, request) in out.into_iter().enumerate().rev() {
        request.reply_to.send(Ok(Reply::Json(number.into())));
    }
    for (number, client) in clients.iter_mut().enumerate() {
        assert_eq!(client.answer().1, number.to_string());
    }
}

#[test]
fn client_that_does_not_read_delays_no_other() {
    let api = Api::start();
    let mut stuck = api.connect();
    stuck.send(&GET.repeat(1000));
    let long = "x".repeat(4 << 20);
    api.expect(&Command::GetMachineConfig, Ok(Reply::Json(long.clone().into())));

    let mut other = api.connect();
    for _ in 0..100 {
        other.send("GET /vm/config HTTP/1.1\r\n\r\n");
        api.expect(&Command::GetVmConfig, Ok(Reply::Empty));
        assert_eq!(other.status(), "204");
    }
    assert!(api.requests.try_recv().is_none(), "nothing of a client that has an answer to read");

    assert_eq!(stuck.answer().1, format!("\"{long}\""));
    for _ in 1..1000 {
        api.expect(&Command::GetMachineConfig, Ok(Reply::Empty));
        assert_eq!(stuck.status(), "204");
    }
}

#[test]
fn client_that_sends_half_a_request_delays_no_other() {
    let api = Api::start();
    let mut stuck = api.connect();
    stuck.send("PUT /logger HTTP/1.1\r\nContent-Length: 100\r\n\r\n{");
    let mut other = api.connect();
    other.send(GET);
    api.expect(&Command::GetMachineConfig, Ok(Reply::Empty));
    assert_eq!(other.status(), "204");
}

#[test]
fn hung_up_client_counts_until_its_command_is_answered() {
    let api = Api::start_with(Limits { max_connections: 1, ..Limits::default() });
    let mut gone = api.connect();
    gone.send(GET);
    let request = api.next();
    drop(gone);
    assert!(api.connect().rest().starts_with("HTTP/1.1 503"));
    request.reply_to.send(Ok(Reply::Empty));
    // Nothing reports when the slot is free: try until it is.
    loop {
        let mut next = api.connect();
        let _ = next.stream.write_all(b"GET /nowhere HTTP/1.1\r\n\r\n");
        let _ = next.stream.shutdown(Shutdown::Write);
        if next.rest().starts_with("HTTP/1.1 400 ") {
            break;
        }
    }
}

#[test]
fn client_that_shuts_down_sending_gets_all_answers() {
    let api = Api::start();
    let mut client = api.connect();
    client.send(&GET.repeat(2));
    client.stream.shutdown(Shutdown::Write).unwrap();
    api.expect(&Command::GetMachineConfig, Ok(Reply::Json(1.into())));
    api.expect(&Command::GetMachineConfig, Ok(Reply::Json(2.into())));
    assert_eq!((client.answer().1, client.answer().1), ("1".into(), "2".into()));
    assert_eq!(client.rest(), "");
}

#[test]
fn connection_stays_open_with_http_1_0_and_close() {
    let api = Api::start();
    let mut client = api.connect();
    for request in [
        "GET /machine-config HTTP/1.0\r\n\r\n",
        "GET /machine-config HTTP/1.1\r\nConnection: close\r\n\r\n",
        "GET /machine-config HTTP/1.0\r\nConnection: keep-alive\r\n\r\n",
    ] {
        client.send(request);
        api.expect(&Command::GetMachineConfig, Ok(Reply::Empty));
        let expected = "HTTP/1.1 204 \r\nServer: Firecracker API\r\nConnection: keep-alive\r\n\r\n";
        assert_eq!(client.answer(), (expected.into(), String::new()));
    }
}

#[test]
fn dropping_requests_removes_socket_and_answers_all_clients() {
    let Api { requests, path, _dir, .. } = Api::start();
    let connect = || Client { stream: UnixStream::connect(&path).unwrap() };
    let (mut answered, mut taken, mut waiting) = (connect(), connect(), connect());
    answered.send(GET);
    wait_for(&requests);
    let last = requests.try_recv().unwrap();
    taken.send(GET);
    wait_for(&requests);
    let never = requests.try_recv().unwrap();
    waiting.send(GET);
    wait_for(&requests);
    last.reply_to.send(Ok(Reply::Empty));
    drop(requests);
    assert!(!path.exists());
    assert!(answered.rest().starts_with("HTTP/1.1 204 "));
    for mut client in [taken, waiting] {
        assert!(client.rest().contains("no answer"));
    }
    // An answer too late goes nowhere.
    never.reply_to.send(Ok(Reply::Empty));
}

#[test]
fn api_thread_has_the_name_that_tools_look_for() {
    let api = Api::start();
    // It has its name once it does anything.
    let mut client = api.connect();
    client.send("GET /nowhere HTTP/1.1\r\n\r\n");
    client.answer();
    let names = fs::read_dir("/proc/self/task")
        .unwrap()
        .map(|task| fs::read_to_string(task.unwrap().path().join("comm")).unwrap_or_default());
    assert!(names.into_iter().any(|name| name.trim() == THREAD_NAME));
}

#[test]
fn concurrent_clients_get_their_own_answers() {
    const CLIENTS: usize = 10;
    const ROUNDS: usize = 200;
    let api = Api::start();
    let clients: Vec<_> = (0..CLIENTS)
        .map(|number| {
            let mut client = api.connect();
            thread::spawn(move || {
                for round in 0..ROUNDS {
                    let module = format!("{number}:{round}");
                    client.put("/logger", &format!(r#"{{"module":"{module}"}}"#));
                    assert_eq!(client.answer().1, format!("\"{module}\""));
                }
            })
        })
        .collect();
    for _ in 0..CLIENTS * ROUNDS {
        let request = api.next();
        let Command::PutLogger(Logger { module: Some(module), .. }) = request.command else { panic!() };
        request.reply_to.send(Ok(Reply::Json(module.into())));
    }
    for client in clients {
        client.join().unwrap();
    }
}
