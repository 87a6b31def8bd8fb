//! What the tests share: a sandbox with a client, and a raw TCP client that sees how a connection ends.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy lets only the test functions themselves panic, not what they share"
)]
#![allow(dead_code, reason = "each test file uses its own part of it")]

use std::io;
use std::time::Duration;

use elevenlabs_sandbox::{Options, Sandbox};
use reqwest::{Method, StatusCode};
use serde_json::{Value, json};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::time::timeout;

pub const KEY: &str = "sandbox-key";
pub const LIMIT: Duration = Duration::from_secs(20);

pub struct Vendor {
    pub sandbox: Sandbox,
    pub http: reqwest::Client,
}

/// A sandbox whose batches stand still until `advance`.
pub async fn vendor() -> Vendor {
    vendor_with(Options { speed: 0.0, ..Options::default() }).await
}

pub async fn vendor_with(options: Options) -> Vendor {
    let http = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
    Vendor { sandbox: Sandbox::start(options).await.unwrap(), http }
}

/// A submit to these numbers, each with its place as a dynamic variable.
pub fn submit_to(numbers: &[&str]) -> Value {
    let recipients: Vec<Value> = numbers
        .iter()
        .enumerate()
        .map(|(place, number)| {
            json!({
                "phone_number": number,
                "conversation_initiation_client_data": {"dynamic_variables": {"place": place}},
            })
        })
        .collect();
    json!({
        "call_name": "Recall",
        "agent_id": "agent_1",
        "agent_phone_number_id": "phnum_1",
        "recipients": recipients,
    })
}

impl Vendor {
    pub fn url(&self, path: &str) -> String {
        format!("{}/v1/convai/batch-calling/{path}", self.sandbox.base_url())
    }

    pub fn request(&self, method: Method, path: &str) -> reqwest::RequestBuilder {
        self.http.request(method, self.url(path)).header("xi-api-key", KEY)
    }

    pub async fn call(&self, method: Method, path: &str) -> (StatusCode, Value) {
        answer(self.request(method, path)).await
    }

    pub async fn get(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::GET, path).await
    }

    pub async fn post(&self, path: &str) -> (StatusCode, Value) {
        self.call(Method::POST, path).await
    }

    pub async fn submit(&self, body: &Value) -> (StatusCode, Value) {
        answer(self.request(Method::POST, "submit").json(body)).await
    }

    /// Submits to these numbers and gives the new batch's id.
    pub async fn batch(&self, numbers: &[&str]) -> String {
        let (status, batch) = self.submit(&submit_to(numbers)).await;
        assert_eq!(status, 200, "{batch}");
        text(&batch["id"])
    }

    pub fn advance(&self, seconds: u64) {
        self.sandbox.advance(Duration::from_secs(seconds));
    }

    pub async fn control(&self, method: Method, path: &str, body: &str) -> (StatusCode, Value) {
        let url = format!("{}/sandbox/{path}", self.sandbox.base_url());
        answer(self.http.request(method, url).body(body.to_owned())).await
    }

    /// Sends a submit over a connection of its own, and reads until it ends.
    pub async fn raw_submit(&self) -> Raw {
        let body = submit_to(&["+14155550100"]).to_string();
        self.raw(&format!(
            "POST /v1/convai/batch-calling/submit HTTP/1.1\r\nhost: sandbox\r\nxi-api-key: {KEY}\r\n\
             content-type: application/json\r\ncontent-length: {}\r\n\r\n{body}",
            body.len()
        ))
        .await
    }

    pub async fn raw(&self, request: &str) -> Raw {
        let addr = self.sandbox.base_url().replace("http://", "");
        let mut stream = TcpStream::connect(addr).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut seen = Vec::new();
        let ended = timeout(LIMIT, stream.read_to_end(&mut seen)).await.expect("it never ended");
        Raw { seen: String::from_utf8(seen).unwrap(), ended: ended.map(drop) }
    }
}

/// What a raw client saw, and how the connection ended.
pub struct Raw {
    pub seen: String,
    pub ended: io::Result<()>,
}

async fn answer(request: reqwest::RequestBuilder) -> (StatusCode, Value) {
    let answer = request.send().await.unwrap();
    let status = answer.status();
    let text = answer.text().await.unwrap();
    (status, serde_json::from_str(&text).unwrap_or(Value::String(text)))
}

pub fn text(value: &Value) -> String {
    value.as_str().unwrap_or_else(|| panic!("no text: {value}")).to_owned()
}

/// Waits for a condition, for a limited time.
pub async fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let waited = timeout(LIMIT, async {
        while !holds() {
            tokio::time::sleep(Duration::from_millis(5)).await;
        }
    });
    assert!(waited.await.is_ok(), "it never came true: {what}");
}
