//! The program says where it listens, logs without secrets, and stops when it is told to.
#![allow(
    clippy::unwrap_used,
    clippy::expect_used,
    clippy::panic,
    reason = "clippy lets only the test functions themselves panic, not what they share"
)]

mod support;

use std::process::{Output, Stdio};

use support::{KEY, LIMIT, submit_to};
use tokio::io::{AsyncBufReadExt, BufReader};
use tokio::process::{Child, Command};
use tokio::time::timeout;

fn program() -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_elevenlabs-sandbox"));
    command.stdout(Stdio::piped()).stderr(Stdio::piped()).kill_on_drop(true);
    for name in
        ["SANDBOX_LISTEN", "SANDBOX_API_KEY", "SANDBOX_SPEED", "SANDBOX_LIST_LAG", "RUST_LOG"]
    {
        command.env_remove(name);
    }
    command
}

async fn listening(command: &mut Command) -> (Child, String) {
    let mut child = command.spawn().unwrap();
    let mut out = BufReader::new(child.stdout.take().unwrap());
    let mut line = String::new();
    timeout(LIMIT, out.read_line(&mut line)).await.expect("it says nothing").unwrap();
    let url = line.trim_end().strip_prefix("listening on ").expect(&line).to_owned();
    (child, url)
}

async fn stopped_by(signal: &str, child: Child) -> Output {
    let id = child.id().unwrap();
    let killed = Command::new("sh")
        // The shell's own `kill`: a small image has no program of that name.
        .args(["-c", &format!("kill -s {signal} {id}")])
        .status()
        .await
        .unwrap();
    assert!(killed.success());
    timeout(LIMIT, child.wait_with_output()).await.expect("it does not stop").unwrap()
}

#[tokio::test]
async fn it_logs_a_line_for_each_request_without_bodies_numbers_or_keys_and_stops_on_sigterm() {
    let (child, url) = listening(program().args(["--listen", "127.0.0.1:0"])).await;
    let http = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
    let submit = http.post(format!("{url}/v1/convai/batch-calling/submit?token=hidden"));
    let submit = submit.header("xi-api-key", KEY).json(&submit_to(&["+14155550100"]));
    assert_eq!(submit.send().await.unwrap().status(), 200);
    let get = http.get(format!("{url}/v1/convai/batch-calling/btcal_none"));
    assert_eq!(get.header("xi-api-key", "other-key").send().await.unwrap().status(), 401);
    let output = stopped_by("TERM", child).await;
    assert_eq!(output.status.code(), Some(0));
    let log = String::from_utf8(output.stderr).unwrap();
    let lines: Vec<&str> = log.lines().collect();
    assert_eq!(lines.len(), 2, "{log}");
    for (line, method, path, status) in [
        (lines[0], "POST", "/v1/convai/batch-calling/submit", "200"),
        (lines[1], "GET", "/v1/convai/batch-calling/btcal_none", "401"),
    ] {
        assert!(line.contains(&format!("method=\"{method}\"")), "{line}");
        assert!(line.contains(&format!("path=\"{path}\"")), "{line}");
        assert!(line.contains(&format!("status={status}")), "{line}");
    }
    for secret in ["+1415", "Recall", "hidden", KEY, "other-key"] {
        assert!(!log.contains(secret), "{secret} in {log}");
    }
}

#[tokio::test]
async fn it_takes_its_settings_from_the_environment_and_stops_on_ctrl_c() {
    let mut command = program();
    command.env("SANDBOX_LISTEN", "127.0.0.1:0").env("SANDBOX_API_KEY", "mine");
    command.env("SANDBOX_SPEED", "0").env("SANDBOX_LIST_LAG", "600");
    let (child, url) = listening(&mut command).await;
    let http = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
    let base = format!("{url}/v1/convai/batch-calling");
    let submit = http.post(format!("{base}/submit")).header("xi-api-key", "mine");
    let sent = submit.json(&submit_to(&["+14155550100"])).send().await.unwrap();
    assert_eq!(sent.status(), 200);
    let list = http.get(format!("{base}/workspace")).header("xi-api-key", "mine");
    let list: serde_json::Value = list.send().await.unwrap().json().await.unwrap();
    assert_eq!(list["batch_calls"], serde_json::json!([]), "the lag was not taken");
    assert_eq!(stopped_by("INT", child).await.status.code(), Some(0));
}

#[tokio::test]
async fn a_taken_port_is_one_line_that_says_what_to_change() {
    let taken = std::net::TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = taken.local_addr().unwrap().to_string();
    let output = timeout(LIMIT, program().args(["--listen", &addr]).output()).await;
    let output = output.expect("it runs all the same").unwrap();
    assert_eq!(output.status.code(), Some(1));
    assert!(output.stdout.is_empty());
    let said = String::from_utf8(output.stderr).unwrap();
    assert_eq!(said.lines().count(), 1, "{said}");
    for part in [addr.as_str(), "--listen", "SANDBOX_LISTEN"] {
        assert!(said.contains(part), "{part} is not in {said}");
    }
}

#[tokio::test]
async fn the_help_names_every_setting_and_every_fault() {
    let output = program().arg("--help").output().await.unwrap();
    assert_eq!(output.status.code(), Some(0));
    let help = String::from_utf8(output.stdout).unwrap();
    for part in [
        "--listen",
        "--api-key",
        "--speed",
        "--list-lag",
        "SANDBOX_LISTEN",
        "SANDBOX_API_KEY",
        "SANDBOX_SPEED",
        "SANDBOX_LIST_LAG",
        "127.0.0.1:8400",
        "/sandbox/faults",
        "latency_ms",
        "reset_before",
        "reset_after",
        "close_before",
        "close_after",
        "hang",
        "garbage",
        "truncated",
    ] {
        assert!(help.contains(part), "{part} is not in {help}");
    }
    let output = program().args(["--speed", "-1"]).output().await.unwrap();
    assert_eq!(output.status.code(), Some(2));
}
