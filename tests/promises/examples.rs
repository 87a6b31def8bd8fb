//! What a producer's developer is given does what it says: the programs in `examples/`, and the `AsyncAPI` document.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Stdio;

use call_manager::broker::Topology;
use call_manager::domain::command::CommandKind;
use call_manager::domain::result::ErrorCode;
use lapin::options::{
    BasicGetOptions, BasicNackOptions, ExchangeDeclareOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, ExchangeKind};
use serde_json::{Value, json};
use tempfile::TempDir;
use tokio::io::{AsyncBufReadExt as _, BufReader, Lines};
use tokio::process::{Child, ChildStdout, Command};
use tokio::time::timeout;

use crate::support::{LIMIT, Received, World, amqp_url, submit_body, until, with_id};

/// Nothing listens there.
const NO_BROKER: &str = "amqp://127.0.0.1:1/%2f";

/// The two programs that submit, and how they spell their time limit.
const SUBMITS: [(&str, &str, &str); 2] = [
    ("submit.mjs", "WAIT_MS = 120_000", "WAIT_MS = 1_500"),
    ("submit.py", "WAIT_SECONDS = 120", "WAIT_SECONDS = 1.5"),
];

fn project(path: &str) -> PathBuf {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join(path);
    assert!(path.exists(), "{} is missing: run script/test, which prepares it", path.display());
    path
}

/// A program of `examples/`, copied to where it finds its client library.
struct Example {
    folder: TempDir,
    name: &'static str,
    amqp_url: String,
    prefix: String,
}

struct Ended {
    code: Option<i32>,
    out: String,
    err: String,
}

impl Example {
    fn of(name: &'static str, world: &World) -> Self {
        let folder = TempDir::new().unwrap();
        fs::copy(project("examples").join(name), folder.path().join(name)).unwrap();
        let modules = project("tests/node/node_modules");
        std::os::unix::fs::symlink(modules, folder.path().join("node_modules")).unwrap();
        Self { folder, name, amqp_url: amqp_url(), prefix: world.settings().broker.amqp_prefix }
    }

    /// Changes one line of the copy.
    fn replace(self, from: &str, to: &str) -> Self {
        let path = self.folder.path().join(self.name);
        let source = fs::read_to_string(&path).unwrap();
        assert_eq!(source.matches(from).count(), 1, "{} has: {from}", self.name);
        fs::write(path, source.replace(from, to)).unwrap();
        self
    }

    fn command(&self, arguments: &[&str]) -> Command {
        let program = match self.name.rsplit_once('.') {
            Some((_, "py")) => project("target/python/bin/python"),
            _ => "node".into(),
        };
        let mut command = Command::new(program);
        command
            .arg(self.folder.path().join(self.name))
            .args(arguments)
            .env_clear()
            .env("PATH", std::env::var_os("PATH").unwrap_or_default())
            .env("AMQP_URL", &self.amqp_url)
            .env("AMQP_PREFIX", &self.prefix)
            .stdin(Stdio::null())
            .kill_on_drop(true);
        command
    }

    async fn run(&self, arguments: &[&str]) -> Ended {
        let output = timeout(LIMIT, self.command(arguments).output())
            .await
            .unwrap_or_else(|_| panic!("{} does not end", self.name))
            .expect("node is missing: run script/test, which prepares it");
        let ended = Ended {
            code: output.status.code(),
            out: String::from_utf8(output.stdout).unwrap().trim_end().to_owned(),
            err: String::from_utf8(output.stderr).unwrap(),
        };
        eprintln!("{} {:?}: {}\n{}", self.name, ended.code, ended.out, ended.err);
        ended
    }

    fn start(&self, arguments: &[&str]) -> (Child, Lines<BufReader<ChildStdout>>) {
        let mut child = self
            .command(arguments)
            .stdout(Stdio::piped())
            .spawn()
            .expect("node is missing: run script/test, which prepares it");
        let lines = BufReader::new(child.stdout.take().unwrap()).lines();
        (child, lines)
    }

    fn write(&self, body: &Value) -> String {
        let path = self.folder.path().join("body.json");
        fs::write(&path, body.to_string()).unwrap();
        path.to_str().unwrap().to_owned()
    }
}

fn batch_ids(world: &World) -> Vec<String> {
    let batches = world.sandbox.batches();
    batches.into_iter().map(|batch| batch.id).collect()
}

#[tokio::test]
async fn an_example_submit_creates_one_batch_and_prints_its_id() {
    for (name, ..) in SUBMITS {
        let mut world = World::start().await;
        let ended = Example::of(name, &world).run(&[]).await;
        assert_eq!(ended.code, Some(0));
        assert_eq!(batch_ids(&world), [ended.out]);
        let result = world.next_result().await;
        assert_eq!(result.routing_key, "batch-calling.submit.succeeded");
        world.finish().await;
    }
}

#[tokio::test]
async fn an_example_submit_that_is_asked_again_with_its_id_makes_no_second_batch() {
    for (name, limit, short) in SUBMITS {
        let mut world = World::without_worker().await;
        let example = Example::of(name, &world).replace(limit, short);
        let body = example.write(&submit_body());
        let first = example.run(&[&body]).await;
        assert_eq!((first.code, first.out.as_str()), (Some(2), ""));
        assert!(first.err.contains("no result yet"));
        let id = first.err.split_whitespace().next_back().unwrap();
        assert_waits_as_documented(&world, id).await;

        world.start_worker(|_| {}).await;
        let example = Example::of(name, &world);
        let body = example.write(&submit_body());
        for _ in 0..2 {
            let again = example.run(&[&body, id]).await;
            assert_eq!(again.code, Some(0));
            assert_eq!(batch_ids(&world), [again.out]);
        }
        world.finish().await;
    }
}

/// Looks at the one command that waits, and leaves it in its queue.
async fn assert_waits_as_documented(world: &World, id: &str) {
    let queue = world.topology.queue(CommandKind::Submit);
    let waiting = world.channel.basic_get(queue.into(), BasicGetOptions::default());
    let command = waiting.await.unwrap().expect("the command waits").delivery;
    let document = document();
    let message = &document["components"]["messages"]["submit"];
    let body = serde_json::from_slice(&command.data).unwrap();
    assert_valid(&document, &payload_schema(message), &body);
    let properties = properties(&command.properties);
    assert_valid(&document, &message["x-amqp-properties"], &properties);
    assert_eq!(properties["message_id"], id);
    assert_eq!(properties["delivery_mode"], 2);
    let requeue = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
    command.acker.nack(requeue).await.unwrap();
}

#[tokio::test]
async fn an_example_submit_that_is_refused_says_why_and_exits_with_1() {
    for (name, ..) in SUBMITS {
        let world = World::start().await;
        let example = Example::of(name, &world);
        let mut body = submit_body();
        body["recipients"][1]["phone_number"] = json!("0987654321");
        let ended = example.run(&[&example.write(&body)]).await;
        assert_eq!(ended.code, Some(1));
        assert!(ended.out.starts_with("invalid_command: The command is not valid"));
        assert!(ended.out.contains("recipients[1].phone_number"));
        assert_eq!(batch_ids(&world), Vec::<String>::new());
        world.finish().await;
    }
}

#[tokio::test]
async fn an_example_submit_that_cannot_ask_exits_with_2() {
    for (name, ..) in SUBMITS {
        let world = World::without_worker().await;
        let mut example = Example::of(name, &world);
        for queue in [world.topology.queue(CommandKind::Submit), world.topology.unknown()] {
            let delete = world.channel.queue_delete(queue.into(), QueueDeleteOptions::default());
            delete.await.unwrap();
        }
        let ended = example.run(&[]).await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(2), ""));
        let seen = ["no queue takes submits", "Unroutable"];
        assert!(seen.iter().any(|text| ended.err.contains(text)));

        "test-nobody-declared-this".clone_into(&mut example.prefix);
        let ended = example.run(&[]).await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(2), ""));
        assert!(ended.err.contains("NOT_FOUND"));

        NO_BROKER.clone_into(&mut example.amqp_url);
        let ended = example.run(&[]).await;
        assert_eq!((ended.code, ended.out.as_str()), (Some(2), ""));
        assert!(ended.err.contains("refused") || ended.err.contains("REFUSED"));
        world.clean_up().await;
    }
}

#[tokio::test]
async fn the_example_of_results_handles_each_once_and_misses_none() {
    let mut world = World::start().await;
    let example = Example::of("results.mjs", &world);
    let queue = format!("{}.example", example.prefix);
    // As the example declares it, so that its consumer can be waited for.
    let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let declare = world.channel.queue_declare(
        queue.as_str().into(),
        options,
        table(&json!({"x-queue-type": "quorum"})),
    );
    declare.await.unwrap();

    let (mut child, mut lines) = example.start(&[&queue]);
    until("the example consumes", async || world.queue(&queue).await.1 == 1).await;
    world.publish(CommandKind::Submit, submit_body().to_string().as_bytes(), with_id("m-1")).await;
    world.next_result().await;
    let batch = batch_ids(&world).remove(0);
    // The same result again, then two others.
    world.publish(CommandKind::Submit, submit_body().to_string().as_bytes(), with_id("m-1")).await;
    world.next_result().await;
    for id in ["m-2", "m-3"] {
        world.publish(CommandKind::Get, br#"{"batch_id":"btcal_nobody"}"#, with_id(id)).await;
        world.next_result().await;
    }
    let mut seen = Vec::new();
    for _ in 0..3 {
        seen.push(next_line(&mut lines).await);
    }
    assert_eq!(seen[0], format!("batch-calling.submit.succeeded m-1 {batch}"));
    assert!(seen[1].starts_with("batch-calling.get.failed m-2 not_found: "), "{seen:?}");
    assert!(seen[2].starts_with("batch-calling.get.failed m-3 not_found: "), "{seen:?}");

    child.kill().await.unwrap();
    until("the example is gone", async || world.queue(&queue).await.1 == 0).await;
    // The last acknowledgements may have died with it: the kernel resets a connection that its
    // process left with something unread.
    assert!(world.queue(&queue).await.0 <= 2, "what was handled is acknowledged");
    world.publish(CommandKind::Get, br#"{"batch_id":"btcal_nobody"}"#, with_id("m-4")).await;
    let (_child, mut lines) = example.start(&[&queue]);
    while !next_line(&mut lines).await.contains(" m-4 ") {}

    let delete = world.channel.queue_delete(queue.into(), QueueDeleteOptions::default());
    delete.await.unwrap();
    world.finish().await;
}

async fn next_line(lines: &mut Lines<BufReader<ChildStdout>>) -> String {
    let line = timeout(LIMIT, lines.next_line()).await.expect("the example prints a line in time");
    line.unwrap().expect("the example goes on")
}

fn document() -> Value {
    let text = fs::read_to_string(project("schemas/asyncapi.yaml")).unwrap();
    serde_saphyr::from_str(&text).unwrap()
}

/// Fails with every fault of `value`.
#[track_caller]
fn assert_conforms(schema: &Value, value: &Value) {
    let validator = jsonschema::validator_for(schema).unwrap();
    let faults = validator.iter_errors(value);
    let faults: Vec<_> =
        faults.map(|fault| format!("{}: {fault}", fault.instance_path())).collect();
    assert!(faults.is_empty(), "{value:#}\n{faults:#?}");
}

/// The same for a schema that may point into the document's own schemas.
#[track_caller]
fn assert_valid(document: &Value, schema: &Value, value: &Value) {
    let schema = json!({
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "allOf": [schema],
        "components": {"schemas": document["components"]["schemas"]},
    });
    assert_conforms(&schema, value);
}

/// Every `$ref` below `value`.
fn references(value: &Value) -> Vec<&str> {
    match value {
        Value::Object(map) => {
            let own = map.get("$ref").and_then(Value::as_str);
            let below = map.values().flat_map(references);
            own.into_iter().chain(below).collect()
        }
        Value::Array(items) => items.iter().flat_map(references).collect(),
        _ => Vec::new(),
    }
}

fn payload_schema(message: &Value) -> Value {
    let file = message["payload"]["$ref"].as_str().unwrap();
    serde_json::from_slice(&fs::read(project("schemas").join(file)).unwrap()).unwrap()
}

#[test]
fn the_asyncapi_document_is_valid_by_the_schema_of_asyncapi() {
    let document = document();
    let schema = project("tests/node/node_modules/@asyncapi/specs/schemas/3.0.0-without-$id.json");
    assert_conforms(&serde_json::from_slice(&fs::read(schema).unwrap()).unwrap(), &document);
    for reference in references(&document) {
        match reference.strip_prefix('#') {
            Some(pointer) => {
                assert!(document.pointer(pointer).is_some(), "{reference} leads nowhere");
            }
            None => drop(project("schemas").join(reference).canonicalize().expect(reference)),
        }
    }
}

#[test]
fn every_example_of_the_asyncapi_document_is_as_its_schemas_say() {
    let document = document();
    for (name, message) in document["components"]["messages"].as_object().unwrap() {
        let examples = message["examples"].as_array().expect(name);
        assert!(!examples.is_empty(), "{name} has an example");
        for example in examples {
            assert_valid(&document, &payload_schema(message), &example["payload"]);
            if let Some(headers) = example.get("headers") {
                assert_valid(&document, &message["headers"], headers);
            }
        }
        let properties = &message["x-amqp-properties"];
        for example in properties["examples"].as_array().expect(name) {
            assert_valid(&document, properties, example);
        }
    }
}

#[test]
fn the_asyncapi_document_has_every_error_code_and_an_example_of_each() {
    let document = document();
    let codes = ErrorCode::ALL.map(ErrorCode::name);
    let listed = &document["components"]["schemas"]["failedHeaders"]["properties"]["error_code"];
    assert_eq!(listed["enum"], json!(codes));
    let examples = document["components"]["messages"]["resultFailed"]["examples"].as_array();
    let pair = |headers: &Value| (headers["error_code"].clone(), headers["status_code"].clone());
    let shown: Vec<_> = examples.unwrap().iter().map(|example| pair(&example["headers"])).collect();
    let expected = ErrorCode::ALL.map(|code| (json!(code.name()), json!(code.status_code())));
    assert_eq!(shown, expected);
}

#[tokio::test]
async fn the_asyncapi_document_names_what_the_worker_declares() {
    let world = World::without_worker().await;
    let document = document();
    let default = Topology::new("call-manager");
    let prefix = world.settings().broker.amqp_prefix;
    let own = |text: &str| text.replace("call-manager", &prefix);
    let mut exchanges = BTreeSet::new();
    let mut queues = BTreeSet::new();
    for channel in document["channels"].as_object().unwrap().values() {
        let binding = &channel["bindings"]["amqp"];
        // The broker refuses a declaration that differs from what is there.
        let arguments = own(&channel["x-arguments"].to_string());
        let arguments = table(&serde_json::from_str(&arguments).unwrap());
        if let Some(name) = binding["exchange"]["name"].as_str() {
            exchanges.insert(name.to_owned());
            assert_eq!(binding["exchange"]["type"], "topic");
            let options = ExchangeDeclareOptions {
                durable: binding["exchange"]["durable"] == true,
                auto_delete: binding["exchange"]["autoDelete"] == true,
                ..ExchangeDeclareOptions::default()
            };
            let (name_here, topic) = (own(name).into(), ExchangeKind::Topic);
            let declare = world.channel.exchange_declare(name_here, topic, options, arguments);
            declare.await.expect(name);
        } else if let Some(name) = binding["queue"]["name"].as_str() {
            queues.insert(name.to_owned());
            assert_eq!(channel["address"], name);
            let options = QueueDeclareOptions {
                durable: binding["queue"]["durable"] == true,
                exclusive: binding["queue"]["exclusive"] == true,
                auto_delete: binding["queue"]["autoDelete"] == true,
                ..QueueDeclareOptions::default()
            };
            let declare = world.channel.queue_declare(own(name).into(), options, arguments);
            declare.await.expect(name);
        }
    }
    assert_eq!(exchanges, [default.commands_exchange(), default.results_exchange()].into());
    let mut declared: BTreeSet<_> = CommandKind::ALL.map(|kind| default.queue(kind)).into();
    declared.extend([default.unknown(), default.unrouted(), default.dead_letter()]);
    assert_eq!(queues, declared);
    for kind in CommandKind::ALL {
        let channel = &document["channels"][format!("{kind}s")];
        assert_eq!(channel["address"], kind.routing_key());
        assert_eq!(channel["bindings"]["amqp"]["exchange"]["name"], default.commands_exchange());
    }
    world.clean_up().await;
}

#[tokio::test]
async fn results_are_as_the_asyncapi_document_says() {
    let mut world = World::start().await;
    let document = document();
    let mut wrong_provider = submit_body();
    wrong_provider["phone_provider"] = json!("exotel");
    let results = [
        ("resultSucceeded", world.ask(CommandKind::Submit, &submit_body()).await),
        ("resultSucceeded", world.ask(CommandKind::Submit, &wrong_provider).await),
        ("resultFailed", world.ask(CommandKind::Submit, &json!({})).await),
        ("resultFailed", world.ask(CommandKind::Get, &json!({"batch_id": "btcal_nobody"})).await),
    ];
    let channel = &document["channels"]["results"];
    assert_eq!(channel["address"], "batch-calling.{command}.{outcome}");
    let has = |parameter: &str, value: &str| {
        let values = channel["parameters"][parameter]["enum"].as_array().unwrap();
        values.contains(&json!(value))
    };
    assert!(CommandKind::ALL.iter().all(|kind| has("command", kind.name())));
    assert!(results[1].1.header("warning").is_some());
    for (name, result) in results {
        let words: Vec<_> = result.routing_key.split('.').collect();
        assert!(words.len() == 3 && has("command", words[1]) && has("outcome", words[2]));
        let message = &document["components"]["messages"][name];
        assert_valid(&document, &payload_schema(message), &result.json);
        assert_valid(&document, &message["headers"], &headers(&result));
        assert_valid(&document, &message["x-amqp-properties"], &properties(&result.properties));
    }
    world.finish().await;
}

fn headers(result: &Received) -> Value {
    let headers = result.properties.headers().as_ref().unwrap();
    let headers = headers.inner().iter().map(|(name, value)| {
        let value = match value {
            AMQPValue::LongString(text) => json!(text.to_string()),
            AMQPValue::LongInt(number) => json!(number),
            AMQPValue::LongLongInt(number) => json!(number),
            other => panic!("{name} is a {:?}", other.get_type()),
        };
        (name.to_string(), value)
    });
    headers.collect()
}

fn properties(given: &BasicProperties) -> Value {
    let mut properties = json!({
        "message_id": given.message_id(),
        "correlation_id": given.correlation_id(),
        "reply_to": given.reply_to(),
        "type": given.kind(),
        "app_id": given.app_id(),
        "content_type": given.content_type(),
        "content_encoding": given.content_encoding(),
        "delivery_mode": given.delivery_mode(),
        "expiration": given.expiration(),
        "timestamp": given.timestamp(),
    });
    let given = properties.as_object_mut().unwrap();
    given.retain(|_, value| !value.is_null());
    properties
}

/// The arguments of a queue or exchange; `null` has none.
fn table(arguments: &Value) -> FieldTable {
    let mut table = FieldTable::default();
    for (name, value) in arguments.as_object().into_iter().flatten() {
        let value = match value {
            Value::String(text) => AMQPValue::LongString(text.as_str().into()),
            other => AMQPValue::LongLongInt(other.as_i64().expect("a text or a whole number")),
        };
        table.insert(name.as_str().into(), value);
    }
    table
}
