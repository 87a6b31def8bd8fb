//! What no queue is bound for: commands under a wrong routing key, and results that nobody takes.

use std::collections::HashSet;

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::Route;
use futures_util::StreamExt as _;
use lapin::options::{
    BasicGetOptions, BasicNackOptions, ExchangeDeclareOptions, ExchangeDeleteOptions,
    QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions,
};
use lapin::types::FieldTable;
use lapin::{Consumer, ExchangeKind};
use serde_json::{Value, json};
use tokio::time::timeout;

use crate::process::Process;
use crate::support::node::Node;
use crate::support::{
    LIMIT, Received, World, connect, consume, exclusive_queue, submit_body, until, with_id,
};

const SUBMIT: CommandKind = CommandKind::Submit;
const GET: CommandKind = CommandKind::Get;

const CHECKS: [(&str, &str); 1] = [("TOPOLOGY", "check")];

async fn publish_under(world: &World, key: &str, id: &str) {
    let (exchange, body) = (world.topology.commands_exchange(), submit_body().to_string());
    world.publish_to(&exchange, key, body.as_bytes(), with_id(id)).await;
}

async fn bind(world: &World, queue: &str, exchange: &str, key: &str) {
    let (options, none) = (QueueBindOptions::default(), FieldTable::default());
    let bound = world.channel.queue_bind(queue.into(), exchange.into(), key.into(), options, none);
    bound.await.unwrap();
}

async fn delete(world: &World, queue: &str) {
    let deleted = world.channel.queue_delete(queue.into(), QueueDeleteOptions::default());
    deleted.await.unwrap();
}

/// Of a queue, if it is there.
async fn consumers(world: &World, queue: &str) -> Option<u32> {
    let channel = world.connection.create_channel().await.unwrap();
    let passive = QueueDeclareOptions { passive: true, ..QueueDeclareOptions::default() };
    let declared = channel.queue_declare(queue.into(), passive, FieldTable::default()).await;
    declared.ok().map(|queue| queue.consumer_count())
}

fn is_refused(result: &Received, key: &str) {
    assert_eq!(result.code(), "400 invalid_command", "{}", result.body);
    // A reply has its queue's name for its routing key.
    let event = result.properties.kind().as_ref().unwrap();
    assert_eq!(event.as_str(), "batch-calling.unknown.failed");
    let said = format!("the routing key \"{key}\" names no command; use batch-calling.submit, ");
    assert!(result.error().contains(&said), "{}", result.error());
}

#[tokio::test]
async fn a_routing_key_that_names_no_command_is_answered() {
    let mut world = World::start().await;
    let queue = exclusive_queue(&world.channel).await;
    let mut answers = consume(&world.channel, queue.as_str()).await;
    for key in ["batch-calling.submitt", "batch-calling.Submit", "submit", "", "#", "a.b.c"] {
        let (exchange, body) = (world.topology.commands_exchange(), submit_body().to_string());
        let properties = with_id("m").with_reply_to(queue.clone());
        world.publish_to(&exchange, key, body.as_bytes(), properties).await;
        let result = world.next_result().await;
        is_refused(&result, key);
        assert_eq!(result.command_id(), "m");
        let reply = timeout(LIMIT, answers.next()).await.expect("a reply comes in time");
        is_refused(&Received::checked(&reply.unwrap().unwrap()), key);
    }
    // The id is still free.
    publish_under(&world, &SUBMIT.routing_key(), "m").await;
    assert_eq!(world.next_result().await.code(), "200");
    assert_eq!(world.requests(Route::Submit), 1);
    world.finish().await;
}

/// It is never executed, so it is no poison; and a copy of it would be a get's.
#[tokio::test]
async fn an_unknown_command_that_came_back_often_is_refused_all_the_same() {
    let mut world = World::without_worker().await;
    publish_under(&world, "batch-calling.cancle", "m").await;
    let queue = world.topology.unknown();
    for _ in 0..25 {
        let got = world.channel.basic_get(queue.as_str().into(), BasicGetOptions::default());
        let got = got.await.unwrap().expect("it is there");
        let requeue = BasicNackOptions { requeue: true, ..BasicNackOptions::default() };
        assert!(got.delivery.acker.nack(requeue).await.unwrap());
        until("it is back", async || world.queue(&queue).await.0 == 1).await;
    }
    world.start_worker(|_| {}).await;
    is_refused(&world.next_result().await, "batch-calling.cancle");
    world.finish().await;
}

/// The queue of unknown commands is deleted, and declared again with its consumer.
#[tokio::test]
async fn the_queue_of_unknown_commands_is_declared_again_and_taken_from() {
    let mut world = World::start().await;
    let unknown = world.topology.unknown();
    delete(&world, &unknown).await;
    until("it is taken from again", async || consumers(&world, &unknown).await == Some(1)).await;
    publish_under(&world, "typo", "m").await;
    is_refused(&world.next_result().await, "typo");
    world.finish().await;
}

#[tokio::test]
async fn a_command_whose_queue_is_missing_is_executed_once_all_the_same() {
    for kind in CommandKind::ALL {
        let mut world = World::start().await;
        let batch = world.submitted().await;
        world.stop_worker().await;
        delete(&world, &world.topology.queue(kind)).await;
        let body = match kind {
            SUBMIT => submit_body(),
            CommandKind::Cancel | GET => json!({"batch_id": batch}),
        };
        world.publish(kind, body.to_string().as_bytes(), with_id("m")).await;
        assert_eq!(world.queue(&world.topology.unknown()).await.0, 1);
        world.run_worker(world.settings());
        let result = world.next_result().await;
        assert_eq!((result.code().as_str(), result.command_id().as_str()), ("200", "m"));
        assert_eq!(result.routing_key, format!("{}.succeeded", kind.routing_key()));
        assert_eq!(world.sandbox.batches().len(), 1 + usize::from(kind == SUBMIT));
        world.finish().await;
    }
}

/// The commands exchange of a former version, which has no alternate exchange, with what was bound to it.
async fn make_former(world: &World) {
    let commands = world.topology.commands_exchange();
    let options = ExchangeDeleteOptions::default();
    world.channel.exchange_delete(commands.as_str().into(), options).await.unwrap();
    let options = ExchangeDeclareOptions { durable: true, ..ExchangeDeclareOptions::default() };
    let (topic, none) = (ExchangeKind::Topic, FieldTable::default());
    let declared = world.channel.exchange_declare(commands.as_str().into(), topic, options, none);
    declared.await.unwrap();
    for kind in CommandKind::ALL {
        bind(world, &world.topology.queue(kind), &commands, &kind.routing_key()).await;
    }
}

/// The words of the command that the log tells of.
fn advised(worker: &Process) -> Vec<String> {
    let log = worker.log();
    let told: Vec<_> = log.split("rabbitmqctl ").skip(1).collect();
    assert_eq!(told.len(), 1, "{log}");
    let line = told[0].lines().next().unwrap().replace("VIRTUAL_HOST", "/");
    line.split_whitespace().map(|word| word.trim_matches('\'').to_owned()).collect()
}

#[tokio::test]
async fn a_commands_exchange_of_a_former_version_goes_on_and_a_policy_mends_it() {
    let node = Node::start().await;
    for settings in [&[][..], &CHECKS] {
        let mut world = World::at(node.amqp_url()).await;
        make_former(&world).await;
        let audit = exclusive_queue(&world.channel).await;
        bind(&world, audit.as_str(), &world.topology.commands_exchange(), "#").await;
        let worker = Process::consuming(&world, &world.ledger_url(), settings).await;
        world.submitted().await;
        let words = advised(&worker);
        node.control(&words.iter().map(String::as_str).collect::<Vec<_>>()).await;
        // What somebody else has bound is still bound, and takes what it took.
        assert_eq!(world.queue(audit.as_str()).await.0, 1);
        world.channel.queue_delete(audit, QueueDeleteOptions::default()).await.unwrap();
        publish_under(&world, "typo", "m").await;
        is_refused(&world.next_result().await, "typo");
        worker.stop().await;
        world.finish().await;
    }
}

#[tokio::test]
async fn a_checking_worker_does_without_the_queue_of_unknown_commands() {
    let mut world = World::without_worker().await;
    delete(&world, &world.topology.unknown()).await;
    let worker = Process::consuming(&world, &world.ledger_url(), &CHECKS).await;
    let told = "what has a routing key that names no command is dropped, and nobody told";
    assert!(worker.log().contains(told), "{}", worker.log());
    world.submitted().await;
    assert_eq!(worker.ready().await.0, 200);
    worker.stop().await;
    world.topology.declare(&world.connection).await.unwrap();
    world.finish().await;
}

/// From now on, somebody listens to the results of gets alone.
async fn listen_to_gets(world: &mut World) -> Consumer {
    let channel = connect().await.create_channel().await.unwrap();
    channel.confirm_select(lapin::options::ConfirmSelectOptions::default()).await.unwrap();
    let own = std::mem::replace(&mut world.channel, channel);
    own.close(200, "nobody listens".into()).await.unwrap();
    let queue = exclusive_queue(&world.channel).await;
    let results = world.topology.results_exchange();
    bind(world, queue.as_str(), &results, "batch-calling.get.#").await;
    consume(&world.channel, queue.as_str()).await
}

/// The ids of the commands whose results lie there.
async fn unheard(world: &World, count: usize) -> HashSet<String> {
    let mut ids = HashSet::new();
    let queue = world.topology.unrouted();
    until("all results lie there", async || world.queue(&queue).await.0 as usize >= count).await;
    let options = BasicGetOptions { no_ack: true };
    while let Some(got) = world.channel.basic_get(queue.as_str().into(), options).await.unwrap() {
        ids.insert(Received::checked(&got.delivery).command_id());
    }
    ids
}

async fn publisher_part(worker: &Process) -> String {
    let (_, body) = worker.readiness().await.expect("it answers in time");
    let body: Value = body.parse().unwrap();
    body["parts"]["publisher"].as_str().unwrap_or_default().to_owned()
}

#[tokio::test]
async fn no_result_vanishes_while_the_queue_of_those_that_nobody_takes_is_gone() {
    const EACH: usize = 60;
    let mut world = World::without_worker().await;
    let mut gets = listen_to_gets(&mut world).await;
    let worker = Process::consuming(&world, &world.ledger_url(), &CHECKS).await;
    delete(&world, &world.topology.unrouted()).await;
    // In the get queue, one after the other: the results of both are in flight on one channel.
    let (submit, get) = (submit_body().to_string(), json!({"batch_id": "btcal_no"}).to_string());
    for n in 0..EACH {
        let exchange = world.topology.commands_exchange();
        world.publish_to(&exchange, "typo", submit.as_bytes(), with_id(&format!("t{n}"))).await;
        world.publish(GET, get.as_bytes(), with_id(&format!("g{n}"))).await;
    }
    for _ in 0..EACH {
        let got = timeout(LIMIT, gets.next()).await.expect("a result comes in time");
        assert_eq!(Received::checked(&got.unwrap().unwrap()).code(), "404 not_found");
    }
    until("readiness tells", async || publisher_part(&worker).await.contains("is gone")).await;
    world.topology.declare(&world.connection).await.unwrap();
    assert_eq!(unheard(&world, EACH).await.len(), EACH, "none has vanished");
    worker.until_logged("the routing key names no command").await;
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn a_worker_that_declares_makes_the_queue_of_unheard_results_again() {
    let mut world = World::start().await;
    let _gets = listen_to_gets(&mut world).await;
    delete(&world, &world.topology.unrouted()).await;
    publish_under(&world, &SUBMIT.routing_key(), "m").await;
    let unrouted = world.topology.unrouted();
    until("it is declared again", async || consumers(&world, &unrouted).await.is_some()).await;
    assert_eq!(unheard(&world, 1).await, HashSet::from(["m".to_owned()]));
    assert_eq!(world.requests(Route::Submit), 1);
    world.finish().await;
}
