//! What the operator sees: one line for what is wrong at start, health, an orderly exit.

use std::process::Stdio;
use std::time::Duration;

use call_manager::broker::Topology;
use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Route};
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::FieldTable;
use serde_json::Value;
use tokio::io::{AsyncBufReadExt as _, AsyncReadExt as _, BufReader};
use tokio::net::TcpListener;
use tokio::process::{Child, Command};
use tokio::time::timeout;

use crate::support::{LIMIT, World, amqp_url, connect, submit_body, until, with_id};

const PROGRAM: &str = env!("CARGO_BIN_EXE_call-manager");

/// The program with nothing in its environment but what is given, in a directory without a .env.
pub fn program(environment: &[(&str, &str)]) -> Command {
    let mut command = Command::new(PROGRAM);
    command
        .env_clear()
        // Most of these end before there is anything to remember.
        .env("LEDGER_URL", "memory:")
        .envs(environment.iter().copied())
        .current_dir(std::env::temp_dir())
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .kill_on_drop(true);
    command
}

/// Runs to the end: exit code, standard output, standard error.
pub async fn finished(mut command: Command) -> (i32, String, String) {
    let output = timeout(LIMIT, command.output()).await.expect("the program ends in time").unwrap();
    let text = |bytes: Vec<u8>| String::from_utf8(bytes).unwrap();
    (output.status.code().expect("it exits by itself"), text(output.stdout), text(output.stderr))
}

/// The lines a person reads when the worker does not start.
async fn complaint(environment: &[(&str, &str)]) -> String {
    let (code, out, err) = finished(program(environment)).await;
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    let said: Vec<_> = err.lines().filter(|line| line.starts_with("call-manager: ")).collect();
    assert_eq!(said.len(), 1, "one line says it: {err}");
    said[0].to_owned()
}

/// A worker in a process of its own, whose health can be asked for.
pub struct Process {
    child: Child,
    address: String,
    log: BufReader<tokio::process::ChildStderr>,
}

impl Process {
    pub async fn start(world: &World, more: &[(&str, &str)]) -> Self {
        let settings = world.settings();
        let (url, vendor) = (amqp_url(), world.sandbox.base_url());
        let ledger = settings.ledger.place.to_string();
        let mut environment = vec![
            ("LEDGER_URL", ledger.as_str()),
            ("AMQP_URL", url.as_str()),
            ("AMQP_PREFIX", settings.broker.amqp_prefix.as_str()),
            ("ELEVENLABS_BASE_URL", vendor.as_str()),
            ("ELEVENLABS_API_KEY", "sandbox-key"),
            ("HOST", "127.0.0.1"),
            ("PORT", "0"),
            ("LOG_FORMAT", "json"),
        ];
        environment.extend(more);
        let mut child = program(&environment).spawn().unwrap();
        let mut log = BufReader::new(child.stderr.take().unwrap());
        let mut address = String::new();
        while address.is_empty() {
            let mut line = String::new();
            let read = timeout(LIMIT, log.read_line(&mut line)).await.unwrap().unwrap();
            assert_ne!(read, 0, "the worker ended");
            let line: Value = serde_json::from_str(&line).expect("a log line is JSON");
            line["address"].as_str().unwrap_or_default().clone_into(&mut address);
        }
        Self { child, address, log }
    }

    pub fn signal(&self, name: &str) {
        let pid = self.child.id().unwrap().to_string();
        let sent = std::process::Command::new("kill").args(["-s", name, &pid]).status().unwrap();
        assert!(sent.success());
    }

    async fn until_logged(&mut self, text: &str) {
        let mut line = String::new();
        while !line.contains(text) {
            line.clear();
            let read =
                timeout(LIMIT, self.log.read_line(&mut line)).await.expect("it logs in time");
            assert_ne!(read.unwrap(), 0, "the worker ended without logging {text:?}");
        }
    }

    /// The exit code, and the rest of the log.
    pub async fn ended(mut self) -> (Option<i32>, String) {
        let mut log = String::new();
        let waiting = async {
            self.log.read_to_string(&mut log).await.unwrap();
            self.child.wait().await.unwrap()
        };
        let status = timeout(LIMIT, waiting).await.expect("the worker ends in time");
        (status.code(), log)
    }

    pub async fn get(&self, path: &str) -> (u16, Value) {
        let response = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
        let response = response.get(format!("http://{}{path}", self.address)).send().await.unwrap();
        (response.status().as_u16(), response.json().await.unwrap())
    }
}

#[tokio::test]
async fn no_api_key_is_one_line_that_says_what_to_do() {
    let said = complaint(&[]).await;
    assert!(said.contains("ELEVENLABS_API_KEY is missing"), "{said}");
}

#[tokio::test]
async fn every_fault_of_the_settings_is_told_at_once() {
    let faulty = [("PORT", "70000"), ("PREFETCH", "none"), ("AMQP_URL", "localhost")];
    let (code, _, err) = finished(program(&faulty)).await;
    assert_eq!(code, 1);
    for name in ["PORT is", "PREFETCH is", "AMQP_URL is not a URL", "ELEVENLABS_API_KEY is missing"]
    {
        assert!(
            err.contains(&format!("call-manager: {name}")) || err.contains(name),
            "{name}: {err}"
        );
    }
    assert_eq!(err.lines().count(), 4, "{err}");
}

#[tokio::test]
async fn a_bad_url_is_named() {
    let key = ("ELEVENLABS_API_KEY", "k");
    let said = complaint(&[key, ("AMQP_URL", "http://localhost")]).await;
    assert!(said.contains("AMQP_URL does not begin with amqp://"), "{said}");
    let said = complaint(&[key, ("ELEVENLABS_BASE_URL", "api.elevenlabs.io")]).await;
    assert!(said.contains("ELEVENLABS_BASE_URL is \"api.elevenlabs.io\""), "{said}");
}

#[tokio::test]
async fn a_taken_port_is_named() {
    let taken = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let port = taken.local_addr().unwrap().port().to_string();
    let url = amqp_url();
    let said = complaint(&[
        ("ELEVENLABS_API_KEY", "k"),
        ("HOST", "127.0.0.1"),
        ("PORT", &port),
        ("AMQP_URL", &url),
    ])
    .await;
    assert!(
        said.contains(&format!("cannot listen on 127.0.0.1:{port}; stop what uses the port")),
        "{said}"
    );
}

#[tokio::test]
async fn a_wrong_password_is_told_without_showing_it() {
    let mut url: url::Url = amqp_url().parse().unwrap();
    url.set_password(Some("wrong-secret")).unwrap();
    let environment = [
        ("ELEVENLABS_API_KEY", "k"),
        ("HOST", "127.0.0.1"),
        ("PORT", "0"),
        ("AMQP_URL", url.as_str()),
    ];
    let said = complaint(&environment).await;
    assert!(said.contains("refused the user name or password; check them in AMQP_URL"), "{said}");
    let (_, _, err) = finished(program(&environment)).await;
    assert!(!err.contains("wrong-secret"), "{err}");
}

#[tokio::test]
async fn a_virtual_host_that_is_not_there_is_named() {
    let mut url: url::Url = amqp_url().parse().unwrap();
    url.set_path("/no-such-vhost");
    let said = complaint(&[
        ("ELEVENLABS_API_KEY", "k"),
        ("HOST", "127.0.0.1"),
        ("PORT", "0"),
        ("AMQP_URL", url.as_str()),
    ])
    .await;
    assert!(said.contains("refused the virtual host; check the path of AMQP_URL"), "{said}");
}

#[tokio::test]
async fn a_queue_that_exists_with_other_arguments_is_named_with_the_argument() {
    let prefix = format!("test-{}", uuid::Uuid::now_v7());
    let connection = connect().await;
    let channel = connection.create_channel().await.unwrap();
    // All but one are there: RabbitMQ 3.10 can lose its quorum queues where some are deleted that are only
    // just being declared.
    let topology = Topology::new(&prefix);
    topology.declare(&connection).await.unwrap();
    let queue = topology.queue(CommandKind::Submit);
    channel.queue_delete(queue.as_str().into(), QueueDeleteOptions::default()).await.unwrap();
    // What counts is that it is no quorum queue.
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.as_str().into(), options, FieldTable::default()).await.unwrap();
    let url = amqp_url();
    let said = complaint(&[
        ("ELEVENLABS_API_KEY", "k"),
        ("HOST", "127.0.0.1"),
        ("PORT", "0"),
        ("AMQP_URL", &url),
        ("AMQP_PREFIX", &prefix),
    ])
    .await;
    assert!(said.contains("exists with other arguments than call-manager declares"), "{said}");
    assert!(said.contains(&queue) && said.contains("inequivalent arg 'x-"), "{said}");
    let world = World::cleaner(&prefix, connection).await;
    world.clean_up().await;
}

#[tokio::test]
async fn health_is_green_while_the_process_runs_and_ready_only_while_it_consumes() {
    let world = World::without_worker().await;
    // Nothing listens on port 1.
    let process =
        Process::start(&world, &[("AMQP_URL", "amqp://guest:guest@127.0.0.1:1/%2f")]).await;
    let (status, body) = process.get("/health").await;
    assert_eq!(
        (status, &body["status"], &body["service"]),
        (200, &"ok".into(), &"call-manager".into())
    );
    let timestamp = body["timestamp"].as_str().unwrap();
    assert_eq!(timestamp.len(), "2025-10-04T12:00:00.000Z".len(), "{timestamp}");
    let (status, body) = process.get("/health/ready").await;
    assert_eq!((status, &body["status"]), (503, &"not_ready".into()));
    assert!(body["missing"][0].as_str().unwrap().starts_with("broker: "), "{body}");
    process.signal("TERM");
    assert_eq!(process.ended().await.0, Some(0), "it can be stopped while it waits for the broker");

    let process = Process::start(&world, &[]).await;
    until("it is ready", async || process.get("/health/ready").await.0 == 200).await;
    let port = process.address.rsplit(':').next().unwrap();
    let (code, _, err) = {
        let mut check = program(&[("PORT", port)]);
        check.arg("healthcheck");
        finished(check).await
    };
    assert_eq!((code, err.as_str()), (0, ""));
    process.signal("INT");
    assert_eq!(process.ended().await.0, Some(0));
    world.finish().await;
}

#[tokio::test]
async fn sigterm_settles_what_is_in_hand_and_exits_0_and_no_log_line_tells_on_anybody() {
    let mut world = World::without_worker().await;
    let process = Process::start(&world, &[("LOG_LEVEL", "trace,lapin=trace")]).await;
    world.until_consuming().await;
    let slow = Effect::Latency(Duration::from_secs(1));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    let body = submit_body().to_string();
    for n in 0..50 {
        world.publish(CommandKind::Submit, body.as_bytes(), with_id(&format!("m-{n}"))).await;
    }
    until("all are at the vendor", async || world.asked() == 50).await;
    process.signal("TERM");
    until("it is not ready while it drains", async || {
        let (status, body) = process.get("/health/ready").await;
        status == 503 && body["missing"][0] == "worker: stopping"
    })
    .await;
    let (code, log) = process.ended().await;
    assert_eq!(code, Some(0), "{log}");
    for _ in 0..50 {
        assert_eq!(world.next_result().await.code(), "200");
    }
    assert!(log.contains("\"command_id\":\"m-49\""), "what was done is logged");
    for private in ["14155550100", "Ana", "sandbox-key", "guest:guest", "password", "Recordatorio"]
    {
        assert!(!log.contains(private), "{private} is in the log");
    }
    world.finish().await;
}

#[tokio::test]
async fn a_second_signal_leaves_at_once() {
    let world = World::without_worker().await;
    let mut process = Process::start(&world, &[]).await;
    world.until_consuming().await;
    world.sandbox.order(Fault::on(Route::Get, Effect::Hang { processed: false }));
    world.publish(CommandKind::Get, br#"{"batch_id":"btcal_1"}"#, with_id("m")).await;
    until("the get is at the vendor", async || world.asked() == 1).await;
    process.signal("TERM");
    process.until_logged("signal received").await;
    process.signal("TERM");
    let (code, log) = process.ended().await;
    assert_eq!(code, Some(1));
    assert!(log.contains("second signal"), "{log}");
    let queue = world.topology.queue(CommandKind::Get);
    until("the command is back", async || world.queue(&queue).await.0 == 1).await;
    world.clean_up().await;
}
