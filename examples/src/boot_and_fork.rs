//! Boots a microVM over the API, forks it while it runs, and ends both.
//!
//! ```console
//! $ boot-and-fork target/x86_64-unknown-linux-gnu/release/vesta-vmm vmlinux initramfs.cpio
//! ```
//!
//! It needs only a Unix socket, JSON and the head of an HTTP response. Copy it to start from here.

#![forbid(unsafe_code)]

use std::error::Error;
use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};
use std::time::{Duration, Instant};

use serde_json::{Value, json};

type Result<T> = std::result::Result<T, Box<dyn Error>>;

/// How long the monitor may take until it serves its API.
const START_TIMEOUT: Duration = Duration::from_secs(10);

fn main() -> Result<()> {
    let args: Vec<PathBuf> = std::env::args_os().skip(1).map(PathBuf::from).collect();
    let [vmm, kernel, initrd] = args.as_slice() else {
        return Err("usage: boot-and-fork VMM KERNEL INITRD".into());
    };
    let dir = std::env::temp_dir().join(format!("vesta-example-{}", std::process::id()));
    std::fs::create_dir(&dir)?;
    let result = boot_and_fork(vmm, kernel, initrd, &dir);
    std::fs::remove_dir_all(&dir)?;
    result
}

fn boot_and_fork(vmm: &Path, kernel: &Path, initrd: &Path, dir: &Path) -> Result<()> {
    let socket = dir.join("parent.sock");
    let mut parent = Command::new(vmm).arg("--api-sock").arg(&socket).spawn()?;
    let result = drive(&socket, kernel, initrd, dir);
    end(&mut parent)?;
    result
}

fn drive(socket: &Path, kernel: &Path, initrd: &Path, dir: &Path) -> Result<()> {
    let mut api = Api::connect(socket)?;
    api.put("/machine-config", &json!({ "vcpu_count": 1, "mem_size_mib": 128 }))?;
    api.put(
        "/boot-source",
        &json!({
            "kernel_image_path": kernel,
            "initrd_path": initrd,
            "boot_args": "console=ttyS0 reboot=k panic=1",
        }),
    )?;
    api.put("/actions", &json!({ "action_type": "InstanceStart" }))?;
    println!("parent: {}", api.get("/")?);

    let child_socket = dir.join("child.sock");
    let fork = json!({ "children": [{ "id": "child", "api_socket": child_socket }] });
    let forked = api.put("/fork", &fork)?;
    println!("forked: {forked}");
    let mut child = Api::connect(&child_socket)?;
    println!("child: {}", child.get("/")?);

    let pid = forked["children"][0]["pid"].as_u64().ok_or("the child has no process id")?;
    // A child is a process of its own, which outlives its parent: SIGTERM ends it in order.
    Command::new("kill").arg(pid.to_string()).status()?;
    Ok(())
}

/// Ends the monitor as a supervisor would: by SIGTERM, after which it closes its files in order.
fn end(vmm: &mut Child) -> Result<()> {
    Command::new("kill").arg(vmm.id().to_string()).status()?;
    vmm.wait()?;
    Ok(())
}

/// A connection to the API of one microVM.
struct Api(UnixStream);

impl Api {
    /// Connects as soon as the monitor listens.
    fn connect(socket: &Path) -> Result<Self> {
        let begin = Instant::now();
        loop {
            match UnixStream::connect(socket) {
                Ok(stream) => return Ok(Api(stream)),
                Err(error) if begin.elapsed() > START_TIMEOUT => return Err(error.into()),
                Err(_) => std::thread::sleep(Duration::from_millis(1)),
            }
        }
    }

    fn get(&mut self, path: &str) -> Result<Value> {
        self.request(&format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n"))
    }

    fn put(&mut self, path: &str, body: &Value) -> Result<Value> {
        let body = body.to_string();
        let length = body.len();
        self.request(&format!(
            "PUT {path} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}"
        ))
    }

    /// Sends a request and returns the response's body; an error status becomes an error.
    fn request(&mut self, request: &str) -> Result<Value> {
        self.0.write_all(request.as_bytes())?;
        let mut bytes = Vec::new();
        loop {
            let mut buffer = [0; 4096];
            let count = self.0.read(&mut buffer)?;
            if count == 0 {
                return Err("the monitor closed the connection".into());
            }
            bytes.extend_from_slice(&buffer[..count]);
            let mut headers = [httparse::EMPTY_HEADER; 16];
            let mut response = httparse::Response::new(&mut headers);
            let httparse::Status::Complete(head) = response.parse(&bytes)? else { continue };
            let length = content_length(response.headers)?;
            let Some(body) = bytes.get(head..head + length) else { continue };
            let body = if body.is_empty() { Value::Null } else { serde_json::from_slice(body)? };
            return match response.code {
                Some(200..300) => Ok(body),
                status => Err(format!("status {status:?}: {body}").into()),
            };
        }
    }
}

/// The body's length; 204 has no body and no such header.
fn content_length(headers: &[httparse::Header<'_>]) -> Result<usize> {
    let field = headers.iter().find(|header| header.name.eq_ignore_ascii_case("content-length"));
    field.map_or(Ok(0), |field| Ok(std::str::from_utf8(field.value)?.parse()?))
}
