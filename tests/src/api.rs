//! Requests to the API as JSON and as bytes, on top of `vesta-client`: tests also send what no
//! typed client can.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, bail};
use serde_json::Value;
use vesta_client::{Client, Timeouts};

/// The time limit of one response.
const ANSWER_TIMEOUT: Duration = Duration::from_mins(1);

/// A response.
#[derive(Debug, Clone)]
pub struct Response {
    /// The status code.
    pub status: u16,
    /// The header fields, in order.
    pub headers: Vec<(String, String)>,
    /// The body; empty if there is none.
    pub body: String,
}

impl From<vesta_client::Response> for Response {
    fn from(response: vesta_client::Response) -> Response {
        let vesta_client::Response { status, headers, body } = response;
        Response { status, headers, body }
    }
}

impl Response {
    /// The body as JSON.
    pub fn json(&self) -> Result<Value> {
        serde_json::from_str(&self.body).with_context(|| format!("response is not JSON: {}", self.body))
    }

    /// The text of an error response (`fault_message`); empty for others.
    pub fn fault(&self) -> String {
        let body = self.json().unwrap_or_default();
        body.get("fault_message").and_then(Value::as_str).unwrap_or_default().to_owned()
    }

    /// A header's value. The case of the name does not matter.
    pub fn header(&self, name: &str) -> Option<&str> {
        self.headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.as_str())
    }

    /// The response if its status is a success (2xx), else an error that contains the body.
    pub fn ok(self) -> Result<Response> {
        if !(200..300).contains(&self.status) {
            bail!("the API answered {}: {}", self.status, self.body);
        }
        Ok(self)
    }
}

/// A client of the API, which connects at its first request.
#[derive(Debug)]
pub struct ApiClient(Client);

impl ApiClient {
    /// A client of the API at this socket.
    pub fn new(socket: &Path) -> ApiClient {
        let timeouts = Timeouts { connect: ANSWER_TIMEOUT, answer: ANSWER_TIMEOUT, long: ANSWER_TIMEOUT };
        ApiClient(Client::new(socket).with_timeouts(timeouts))
    }

    /// The client below, whose requests and answers have types.
    pub fn typed(&mut self) -> &mut Client {
        &mut self.0
    }

    /// Waits until the API answers `GET /`.
    pub fn wait_ready(&mut self, timeout: Duration) -> Result<()> {
        self.0
            .wait_until_ready(timeout)
            .with_context(|| format!("no response of the API within {timeout:?}"))?;
        Ok(())
    }

    /// `GET path`.
    pub fn get(&mut self, path: &str) -> Result<Response> {
        self.request("GET", path, None)
    }

    /// `PUT path`.
    pub fn put(&mut self, path: &str, body: &Value) -> Result<Response> {
        self.request("PUT", path, Some(&body.to_string()))
    }

    /// `PATCH path`.
    pub fn patch(&mut self, path: &str, body: &Value) -> Result<Response> {
        self.request("PATCH", path, Some(&body.to_string()))
    }

    /// `DELETE path`.
    pub fn delete(&mut self, path: &str) -> Result<Response> {
        self.request("DELETE", path, None)
    }

    /// Sends any request, with an unchecked body.
    pub fn request(&mut self, method: &str, path: &str, body: Option<&str>) -> Result<Response> {
        let response = self.0.send(method, path, body.map(str::to_owned), ANSWER_TIMEOUT);
        Ok(response.with_context(|| format!("{method} {path}"))?.into())
    }

    /// Sends any bytes, and reads one response.
    pub fn send_raw(&mut self, message: &[u8]) -> Result<Response> {
        Ok(self.0.send_raw(message, ANSWER_TIMEOUT)?.into())
    }

    /// Sends `PUT path` on another connection, without waiting for the response: see
    /// [`read_response`].
    pub fn begin_put(&self, path: &str, body: &Value) -> Result<UnixStream> {
        let (body, mut connection) = (body.to_string(), self.connect()?);
        let length = body.len();
        write!(connection, "PUT {path} HTTP/1.1\r\nContent-Length: {length}\r\n\r\n{body}")
            .context("cannot send")?;
        Ok(connection)
    }

    /// Opens another connection.
    pub fn connect(&self) -> Result<UnixStream> {
        let connection = self.0.connect()?.into_stream();
        connection.set_read_timeout(Some(ANSWER_TIMEOUT))?;
        connection.set_write_timeout(Some(ANSWER_TIMEOUT))?;
        Ok(connection)
    }
}

/// Reads one response from a connection. Further bytes are an error.
pub fn read_response(connection: &mut impl Read) -> Result<Response> {
    Ok(vesta_client::Response::read(connection)?.into())
}
