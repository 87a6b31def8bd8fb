//! Exchanges and queues that an operator made: printed, imported, checked, and never made by the worker.

use std::io::Write as _;

use call_manager::broker::{Delay, Topology};
use call_manager::domain::command::CommandKind;
use futures_util::StreamExt as _;
use lapin::options::{
    ConfirmSelectOptions, ExchangeDeclareOptions, ExchangeDeleteOptions, QueueDeclareOptions,
    QueueDeleteOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Connection, ConnectionProperties, ExchangeKind};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::process::Process;
use crate::start::{finished, program};
use crate::support::node::Node;
use crate::support::{LIMIT, Received, World, listen, submit_body, with_id};

/// A virtual host of its own, which `guest` may do everything in, and users who may do nothing yet;
/// its URL.
pub async fn virtual_host(node: &Node, name: &str, users: &[&str]) -> String {
    let users = users.iter().map(|user| json!({"name": user, "password": "secret", "tags": ""}));
    let all = json!({
        "vhosts": [{"name": name}],
        "users": users.collect::<Vec<_>>(),
        "permissions":
            [{"user": "guest", "vhost": name, "configure": ".*", "write": ".*", "read": ".*"}],
    });
    import(node, &all.to_string()).await;
    let mut url: url::Url = node.amqp_url().parse().unwrap();
    url.set_path(name);
    url.into()
}

pub async fn connect(url: &str) -> Connection {
    let connecting = Connection::connect(url, ConnectionProperties::default());
    timeout(LIMIT, connecting).await.expect("the broker answers in time").unwrap()
}

/// The one line that the worker ends with, before it has begun.
pub async fn refusal(environment: &[(&str, &str)]) -> String {
    let mut all = vec![("ELEVENLABS_API_KEY", "k"), ("HOST", "127.0.0.1"), ("PORT", "0")];
    all.extend(environment);
    let (code, out, err) = finished(program(&all)).await;
    assert_eq!((code, out.as_str()), (1, ""), "{err}");
    let said: Vec<_> = err.lines().filter(|line| line.starts_with("call-manager: ")).collect();
    assert_eq!(said.len(), 1, "one line says it: {err}");
    said[0].to_owned()
}

async fn printed(url: &str, more: &[(&str, &str)]) -> String {
    let mut command = program(&[("AMQP_URL", url)]);
    command.envs(more.iter().copied()).arg("topology");
    let (code, out, err) = finished(command).await;
    assert_eq!((code, err.as_str()), (0, ""));
    out
}

async fn import(node: &Node, definitions: &str) {
    let mut file = tempfile::NamedTempFile::new().unwrap();
    file.write_all(definitions.as_bytes()).unwrap();
    node.control(&["import_definitions", file.path().to_str().unwrap()]).await;
}

#[tokio::test]
async fn what_the_worker_prints_and_an_operator_imports_is_all_it_needs() {
    let node = Node::start().await;
    let url = virtual_host(&node, "imported", &[]).await;
    let checks = [("AMQP_URL", url.as_str()), ("TOPOLOGY", "check")];

    let said = refusal(&checks).await;
    assert!(said.contains("the exchange call-manager.dead-letter is not there"), "{said}");
    assert!(said.contains("`call-manager topology`"), "it says what to do: {said}");
    let queues = ["-q", "list_queues", "-p", "imported", "name", "--no-table-headers"];
    assert_eq!(node.control(&queues).await, "", "nothing was created");

    let definitions = printed(&url, &[]).await;
    import(&node, &definitions).await;
    let connection = connect(&url).await;
    let world = World::cleaner("call-manager", connection).await;
    let mut results = listen(&world.channel, &world.topology.results_exchange()).await;
    world.channel.confirm_select(ConfirmSelectOptions::default()).await.unwrap();
    let worker = Process::consuming(&world, &world.ledger_url(), &checks).await;
    let body = submit_body().to_string();
    world.publish(CommandKind::Submit, body.as_bytes(), with_id("m")).await;
    let result = timeout(LIMIT, results.next()).await.expect("a result comes in time");
    assert_eq!(Received::checked(&result.unwrap().unwrap()).code(), "200");
    worker.stop().await;

    // What one makes is, argument by argument, what the other makes: each takes the other's.
    let declares = Process::consuming(&world, &world.ledger_url(), &[("AMQP_URL", &url)]).await;
    declares.stop().await;
    import(&node, &definitions).await;
}

#[tokio::test]
async fn what_is_missing_or_different_is_named_and_left_as_it_is() {
    let node = Node::start().await;
    let url = virtual_host(&node, "edited", &[]).await;
    let connection = connect(&url).await;
    let topology = Topology::new("call-manager");
    topology.declare(&connection).await.unwrap();
    let checks = [("AMQP_URL", url.as_str()), ("TOPOLOGY", "check")];

    for queue in [topology.retry_queue(CommandKind::Get), topology.delay(Delay::Medium)] {
        let channel = connection.create_channel().await.unwrap();
        delete_queue(&channel, &queue).await;
        let said = refusal(&checks).await;
        assert!(said.contains(&format!("the queue {queue} is not there")), "{said}");

        let mut other = FieldTable::default();
        other.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
        other.insert("x-message-ttl".into(), AMQPValue::LongInt(7));
        let options = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
        channel.queue_declare(queue.as_str().into(), options, other).await.unwrap();
        let said = refusal(&checks).await;
        assert!(said.contains("exists with other arguments than call-manager declares"), "{said}");
        assert!(said.contains("inequivalent arg 'x-"), "{said}");
        assert!(said.contains(&format!("for queue '{queue}'")), "{said}");
        delete_queue(&channel, &queue).await;
        topology.declare(&connection).await.unwrap();
    }

    let channel = connection.create_channel().await.unwrap();
    let exchange = topology.retry_exchange();
    let options = ExchangeDeleteOptions::default();
    channel.exchange_delete(exchange.as_str().into(), options).await.unwrap();
    let said = refusal(&checks).await;
    assert!(said.contains(&format!("the exchange {exchange} is not there")), "{said}");
    topology.declare(&connection).await.unwrap();

    let exchange = topology.results_exchange();
    let (options, table) = (ExchangeDeleteOptions::default(), FieldTable::default());
    channel.exchange_delete(exchange.as_str().into(), options).await.unwrap();
    let durable = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let plain =
        channel.exchange_declare(exchange.as_str().into(), ExchangeKind::Topic, durable, table);
    plain.await.unwrap();
    let said = refusal(&checks).await;
    assert!(said.contains("inequivalent arg 'alternate-exchange'"), "{said}");
    assert!(said.contains(&format!("for exchange '{exchange}'")), "{said}");
    channel.exchange_delete(exchange.as_str().into(), options).await.unwrap();
    topology.declare(&connection).await.unwrap();

    let world = World::cleaner("call-manager", connection).await;
    Process::consuming(&world, "memory:", &checks).await.stop().await;
}

async fn delete_queue(channel: &Channel, queue: &str) {
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
}

#[tokio::test]
async fn the_definitions_are_of_the_virtual_host_and_the_prefix_that_were_asked_for() {
    let text = printed("amqp://u:secret@nowhere/%2fcalls", &[("AMQP_PREFIX", "staging")]).await;
    assert!(!text.contains("secret"));
    let json: Value = serde_json::from_str(&text).unwrap();
    let topology = Topology::new("staging");
    let names = |what: &str| -> Vec<String> {
        let list = json[what].as_array().unwrap();
        list.iter().map(|one| one["name"].as_str().unwrap().to_owned()).collect()
    };
    assert_eq!(names("queues"), topology.queue_names());
    assert_eq!(names("exchanges"), topology.exchange_names());
    for what in ["exchanges", "queues", "bindings"] {
        for one in json[what].as_array().unwrap() {
            assert_eq!(one["vhost"], "/calls", "{one}");
        }
    }
    // One to each queue, and those between the exchanges behind the delay queues.
    assert_eq!(json["bindings"].as_array().unwrap().len(), topology.queue_names().len() + 4);
}

#[tokio::test]
async fn what_is_deferred_comes_back_to_the_retry_queue_of_its_command_after_the_delay() {
    let world = World::without_worker().await;
    let key = CommandKind::Cancel.routing_key();
    let began = std::time::Instant::now();
    let delay = world.topology.delay(Delay::Short);
    world.publish_to(&delay, &key, b"deferred", BasicProperties::default()).await;
    let queue = world.topology.retry_queue(CommandKind::Cancel);
    let mut consumer = crate::support::consume(&world.channel, &queue).await;
    let back = timeout(LIMIT, consumer.next()).await.expect("it comes back in time");
    let back = back.unwrap().unwrap();
    assert_eq!((back.data.as_slice(), back.routing_key.as_str()), (&b"deferred"[..], key.as_str()));
    assert!(began.elapsed() >= Delay::Short.duration(), "{:?}", began.elapsed());
    world.clean_up().await;
}
