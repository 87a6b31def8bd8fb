//! The rights that the README gives each user are enough for it, and no more than it needs.

use call_manager::broker::{Delay, Topology};
use call_manager::domain::command::CommandKind;
use futures_util::StreamExt as _;
use lapin::options::{
    BasicConsumeOptions, BasicGetOptions, BasicPublishOptions, ConfirmSelectOptions,
    QueueBindOptions, QueueDeclareOptions,
};
use lapin::types::{AMQPValue, FieldTable};
use lapin::{BasicProperties, Channel, Confirmation, Connection};
use serde_json::Value;
use tokio::time::timeout;

use crate::process::Process;
use crate::start::{finished, program};
use crate::support::node::Node;
use crate::support::{LIMIT, Received, World, submit_body, until};
use crate::topology::{connect, refusal, virtual_host};

/// A node with the virtual host and the users of the README.
struct Place {
    node: Node,
    /// Of somebody who may do everything.
    url: String,
    admin: Connection,
    topology: Topology,
}

/// The user, and what it may configure, write and read.
fn rights() -> Vec<[String; 4]> {
    let readme = include_str!("../../README.md");
    let lines = readme.lines().filter_map(|line| {
        let (user, patterns) =
            line.strip_prefix("rabbitmqctl set_permissions -p calls ")?.split_once(' ')?;
        let patterns: Vec<_> =
            patterns.split('\'').filter(|part| !part.trim().is_empty()).collect();
        let [configure, write, read] = patterns[..] else { panic!("three patterns: {line}") };
        Some([user, configure, write, read].map(str::to_owned))
    });
    lines.collect()
}

impl Place {
    /// These users get their rights; the others may do nothing yet.
    async fn with(allowed: &[&str]) -> Self {
        let rights = rights();
        assert_eq!(rights.len(), 4);
        let node = Node::start().await;
        let users: Vec<_> = rights.iter().map(|rights| rights[0].as_str()).collect();
        let url = virtual_host(&node, "calls", &users).await;
        let admin = connect(&url).await;
        let place = Self { node, url, admin, topology: Topology::new("call-manager") };
        for user in allowed {
            let [configure, write, read] = rights_of(user);
            place.allow(user, &configure, &write, &read).await;
        }
        place
    }

    async fn allow(&self, user: &str, configure: &str, write: &str, read: &str) {
        self.node.control(&["set_permissions", "-p", "calls", user, configure, write, read]).await;
    }

    fn url_of(&self, user: &str) -> String {
        let mut url: url::Url = self.url.parse().unwrap();
        url.set_username(user).unwrap();
        url.set_password(Some("secret")).unwrap();
        url.into()
    }

    async fn world(&self) -> World {
        World::cleaner("call-manager", connect(&self.url).await).await
    }

    async fn declare(&self) {
        self.topology.declare(&self.admin).await.unwrap();
    }

    /// What `call-manager request` answers the producer.
    async fn request(&self, arguments: &[&str]) -> Value {
        let mut command = program(&[("AMQP_URL", &self.url_of("producer"))]);
        command.arg("request").args(arguments);
        let (code, out, err) = finished(command).await;
        assert_eq!((code, err.as_str()), (0, ""), "{out}");
        serde_json::from_str(&out).unwrap()
    }

    /// Submits, reads and cancels a batch, each with a reply.
    async fn campaign(&self) {
        let file = tempfile::NamedTempFile::new().unwrap();
        tokio::fs::write(file.path(), submit_body().to_string()).await.unwrap();
        let answer = self.request(&["submit", file.path().to_str().unwrap()]).await;
        let id = answer["data"]["id"].as_str().unwrap();
        assert_eq!(self.request(&["get", "--batch-id", id]).await["data"]["id"], id);
        let answer = self.request(&["cancel", "--batch-id", id]).await;
        assert_eq!(answer["data"]["status"], "cancelled");
    }
}

/// Publishes on a channel of its own, and waits until the broker has taken it or has refused.
async fn publish(by: &Connection, exchange: &str, key: &str) -> lapin::Result<()> {
    let channel = by.create_channel().await?;
    channel.confirm_select(ConfirmSelectOptions::default()).await?;
    let options = BasicPublishOptions::default();
    let properties = BasicProperties::default();
    let sent = channel
        .basic_publish(exchange.into(), key.into(), options, b"published", properties)
        .await?;
    let confirmed = timeout(LIMIT, sent).await.expect("the broker confirms or refuses in time")?;
    assert_eq!(confirmed, Confirmation::Ack(None));
    Ok(())
}

async fn consume(by: &Connection, queue: &str) -> lapin::Result<Channel> {
    let channel = by.create_channel().await?;
    let options = BasicConsumeOptions::default();
    channel.basic_consume(queue.into(), "".into(), options, FieldTable::default()).await?;
    Ok(channel)
}

#[track_caller]
fn assert_refused<T>(result: lapin::Result<T>, resource: &str) {
    let error = result.err().unwrap_or_else(|| panic!("{resource} is not refused")).to_string();
    assert!(error.contains(&format!("access to {resource} ")), "{error}");
}

#[tokio::test]
async fn a_worker_with_the_readmes_rights_does_all_its_work_declaring_or_checking() {
    let place = Place::with(&["worker", "declaring-worker", "producer"]).await;
    let world = place.world().await;
    let ledger = world.ledger_url();

    // There is nothing yet: it makes everything itself.
    let url = place.url_of("declaring-worker");
    let worker = Process::consuming(&world, &ledger, &[("AMQP_URL", &url)]).await;
    place.campaign().await;
    worker.stop().await;

    let url = place.url_of("worker");
    let checks = [("AMQP_URL", url.as_str()), ("TOPOLOGY", "check")];
    let worker = Process::consuming(&world, &ledger, &checks).await;
    worker.until_logged("their arguments cannot be compared").await;
    place.campaign().await;
    let log = worker.log();
    worker.stop().await;
    assert!(!log.contains("WARN"), "{log}");

    for user in ["worker", "declaring-worker"] {
        let worker = connect(&place.url_of(user)).await;
        let names = &place.topology;
        let key = CommandKind::Get.routing_key();
        for delay in Delay::ALL {
            publish(&worker, &names.delay(delay), &key).await.unwrap();
        }
        publish(&worker, &names.dead_letter(), &key).await.unwrap();
        publish(&worker, &names.results_exchange(), "nobody.listens").await.unwrap();
        publish(&worker, "", "a name that no queue has").await.unwrap();
        assert_refused(
            publish(&worker, &names.commands_exchange(), &key).await,
            "exchange 'call-manager.commands'",
        );
        for kind in CommandKind::ALL {
            for queue in [names.queue(kind), names.retry_queue(kind)] {
                let channel = consume(&worker, &queue).await.unwrap();
                channel.close(200, "seen".into()).await.unwrap();
            }
        }
        worker.close(200, "done".into()).await.unwrap();
    }
    // What was deferred comes back, and what was given up lies where it can be found.
    let dead = place.topology.dead_letter();
    until("both dead letters are there", async || world.queue(&dead).await.0 == 2).await;
    let queue = place.topology.retry_queue(CommandKind::Get);
    until("the shortest delay is over", async || world.queue(&queue).await.0 >= 2).await;

    let worker = connect(&place.url_of("worker")).await;
    assert_refused(consume(&worker, &dead).await, "queue 'call-manager.dead-letter'");
    let channel = worker.create_channel().await.unwrap();
    let declared = channel
        .queue_declare(
            "call-manager.other".into(),
            QueueDeclareOptions::default(),
            FieldTable::default(),
        )
        .await;
    assert_refused(declared, "queue 'call-manager.other'");
}

#[tokio::test]
async fn a_right_that_the_worker_lacks_is_named() {
    let place = Place::with(&["producer"]).await;
    let world = place.world().await;
    let url = place.url_of("declaring-worker");
    let [configure, write, read] = rights_of("declaring-worker");
    for (lacks, resource) in [
        // Whichever of them the broker comes to first.
        (["^$", &write, &read], "exchange 'call-manager."),
        // Before it is there: whoever makes a queue with dead letters has to read it.
        ([&configure, &write, &but(&read, "submit.retry")], "queue 'call-manager.submit.retry'"),
        ([&configure, &but(&write, "delay.10s"), &read], "queue 'call-manager.delay.10s'"),
        ([&configure, &write, &but(&read, "commands")], "exchange 'call-manager.commands'"),
    ] {
        place.allow("declaring-worker", lacks[0], lacks[1], lacks[2]).await;
        let said = refusal(&[("AMQP_URL", &url)]).await;
        assert!(said.contains("the broker's user lacks a permission"), "{said}");
        assert!(said.contains(&format!("access to {resource}")), "{said}");
    }

    place.declare().await;
    let url = place.url_of("worker");
    let checks = [("AMQP_URL", url.as_str()), ("TOPOLOGY", "check")];
    let [configure, write, read] = rights_of("worker");
    place.allow("worker", &configure, &write, &but(&read, "get")).await;
    // A worker whose ElevenLabs is unavailable takes nothing from that queue, and misses no right to it.
    let vendor = world.sandbox.base_url();
    let works = [("ELEVENLABS_BASE_URL", &*vendor), ("ELEVENLABS_API_KEY", "sandbox-key")];
    let said = refusal(&[&checks[..], &works].concat()).await;
    assert!(said.contains("access to queue 'call-manager.get' "), "{said}");

    // What may be written shows only when it is, as long as the exchange may be seen: RabbitMQ 4.3 shows
    // it only to a user with some permission on it.
    let sees = format!("{read}|^call-manager\\.results$");
    place.allow("worker", &configure, &but(&write, "results"), &sees).await;
    let worker = Process::consuming(&world, &world.ledger_url(), &checks).await;
    let producer = connect(&place.url_of("producer")).await;
    let key = CommandKind::Get.routing_key();
    publish(&producer, &place.topology.commands_exchange(), &key).await.unwrap();
    worker.until_logged("access to exchange 'call-manager.results' ").await;
    worker.kill().await;
}

fn rights_of(user: &str) -> [String; 3] {
    let [_, configure, write, read] =
        rights().into_iter().find(|rights| rights[0] == user).expect("it is in the README");
    [configure, write, read]
}

/// The same but for one name.
fn but(pattern: &str, name: &str) -> String {
    format!("^(?!call-manager\\.{name}$){}", pattern.trim_start_matches('^'))
}

#[tokio::test]
async fn producers_and_listeners_with_the_readmes_rights_get_along_and_see_no_commands() {
    let place = Place::with(&["worker", "producer", "listener"]).await;
    place.declare().await;
    let world = place.world().await;
    let listener = connect(&place.url_of("listener")).await;
    let channel = listener.create_channel().await.unwrap();
    let mut quorum = FieldTable::default();
    quorum.insert("x-queue-type".into(), AMQPValue::LongString("quorum".into()));
    let queue = "campaigns.call-results";
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    channel.queue_declare(queue.into(), durable, quorum).await.unwrap();
    let exchange = place.topology.results_exchange();
    let (options, table) = (QueueBindOptions::default(), FieldTable::default());
    let bound =
        channel.queue_bind(queue.into(), exchange.as_str().into(), "#".into(), options, table);
    bound.await.unwrap();
    let options = BasicConsumeOptions { no_ack: true, ..BasicConsumeOptions::default() };
    let consumer = channel.basic_consume(queue.into(), "".into(), options, FieldTable::default());
    let mut results = consumer.await.unwrap();

    let url = place.url_of("worker");
    let checks = [("AMQP_URL", url.as_str()), ("TOPOLOGY", "check")];
    let worker = Process::consuming(&world, &world.ledger_url(), &checks).await;
    place.campaign().await;
    worker.stop().await;
    for _ in 0..3 {
        let result = timeout(LIMIT, results.next()).await.expect("a result comes in time");
        assert_eq!(Received::checked(&result.unwrap().unwrap()).code(), "200");
    }

    let producer = connect(&place.url_of("producer")).await;
    let key = CommandKind::Submit.routing_key();
    let commands = place.topology.commands_exchange();
    publish(&producer, &commands, &key).await.unwrap();
    assert_refused(publish(&listener, &commands, &key).await, "exchange 'call-manager.commands'");
    for by in [&producer, &listener] {
        for kind in CommandKind::ALL {
            for queue in [place.topology.queue(kind), place.topology.retry_queue(kind)] {
                assert_refused(consume(by, &queue).await, &format!("queue '{queue}'"));
            }
        }
        let dead = place.topology.dead_letter();
        let channel = by.create_channel().await.unwrap();
        let got = channel.basic_get(dead.as_str().into(), BasicGetOptions::default()).await;
        assert_refused(got, &format!("queue '{dead}'"));
        assert_refused(
            publish(by, &place.topology.results_exchange(), "batch-calling.submit.succeeded").await,
            "exchange 'call-manager.results'",
        );
    }
}
