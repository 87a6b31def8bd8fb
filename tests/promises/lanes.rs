//! What breaks the lane of one kind of command stops only that one.

use std::time::{Duration, Instant};

use call_manager::domain::command::CommandKind;
use lapin::options::{QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::{Value, json};

use crate::process::Process;
use crate::support::node::Node;
use crate::support::{World, submit_body, until, with_header, with_id};

/// So long at most does anybody wait for somebody else's fault.
const NEIGHBOUR_LIMIT: Duration = Duration::from_secs(30);

const SUBMIT: CommandKind = CommandKind::Submit;

/// Every kind but one answers in time.
pub async fn others_are_answered(world: &mut World, broken: CommandKind, batch_id: &str) {
    for kind in CommandKind::ALL.into_iter().filter(|kind| *kind != broken) {
        let since = Instant::now();
        let result = match kind {
            SUBMIT => {
                world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("other")).await;
                world.next_result().await
            }
            CommandKind::Cancel | CommandKind::Get => {
                world.ask(kind, &json!({"batch_id": batch_id})).await
            }
        };
        assert_eq!(result.code(), "200", "{}", result.body);
        assert!(since.elapsed() < NEIGHBOUR_LIMIT, "{kind}: {:?}", since.elapsed());
    }
}

async fn broker_part(worker: &Process) -> String {
    let (_, body) = worker.readiness().await.expect("it answers in time");
    let body: Value = body.parse().unwrap();
    body["parts"]["broker"].as_str().unwrap_or_default().to_owned()
}

/// Deletes a queue and declares it as somebody else would.
async fn redeclare(world: &World, queue: &str) {
    let channel = world.connection.create_channel().await.unwrap();
    channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    let durable = QueueDeclareOptions { durable: true, ..QueueDeclareOptions::default() };
    let mut other = FieldTable::default();
    other.insert("x-queue-type".into(), AMQPValue::LongString("classic".into()));
    // The worker may be faster: it declares what is not there.
    let declared = channel.queue_declare(queue.into(), durable, other.clone()).await;
    if declared.is_err() {
        let channel = world.connection.create_channel().await.unwrap();
        channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
        channel.queue_declare(queue.into(), durable, other).await.unwrap();
    }
}

#[tokio::test]
async fn a_queue_that_somebody_else_declares_in_another_way_stops_only_its_own_commands() {
    for broken in CommandKind::ALL {
        let mut world = World::without_worker().await;
        let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
        let batch_id = world.submitted().await;
        let queue = world.topology.queue(broken);
        redeclare(&world, &queue).await;
        until("readiness names the queue", async || {
            let told = broker_part(&worker).await;
            told.ends_with(&format!("(concerns {broken} alone)"))
                && told.contains(&format!("'{queue}'"))
        })
        .await;
        worker.until_logged("exists with other arguments than call-manager declares").await;
        others_are_answered(&mut world, broken, &batch_id).await;

        // A person mends it, and nobody has to start the worker again.
        world.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
        world.until_declared(broken).await;
        world.until_consuming().await;
        until("the worker is ready", async || broker_part(&worker).await == "ok").await;
        worker.stop().await;
        world.finish().await;
    }
}

#[tokio::test]
async fn a_shared_queue_that_somebody_else_declares_in_another_way_is_told_and_done_without() {
    let mut world = World::without_worker().await;
    let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
    let batch_id = world.submitted().await;
    let unrouted = world.topology.unrouted();
    redeclare(&world, &unrouted).await;
    // The lane that is built again finds it.
    let queue = world.topology.queue(SUBMIT);
    world.channel.queue_delete(queue.into(), QueueDeleteOptions::default()).await.unwrap();
    until("readiness names the queue", async || {
        broker_part(&worker).await.contains(&format!("'{unrouted}'"))
    })
    .await;
    world.until_declared(SUBMIT).await;
    world.until_consuming().await;
    others_are_answered(&mut world, CommandKind::Cancel, &batch_id).await;
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn headers_that_no_frame_has_room_for_are_refused_with_a_result() {
    // The producer may send larger frames than the worker takes: as RabbitMQ's own form for publishing does.
    let node = Node::with("frame_max = 1000000").await;
    let mut world = World::at(node.amqp_url()).await;
    let url = format!("{}?frame_max=131072", node.amqp_url());
    let worker = Process::consuming(&world, &world.ledger_url(), &[("AMQP_URL", &url)]).await;
    let batch_id = world.submitted().await;
    for kind in CommandKind::ALL {
        for bytes in [125_000, 131_000, 200 * 1024, 900 * 1024] {
            let large = AMQPValue::LongString("x".repeat(bytes).into());
            let id = format!("{kind}-{bytes}");
            world.publish(kind, b"{}", with_header(&id, "large", large)).await;
            let result = world.next_result().await;
            assert_eq!(result.command_id(), id);
            assert_eq!(result.code(), "400 invalid_command", "{}", result.body);
            let told = "bytes, and at most 124000 are read";
            assert!(result.error().contains(told), "{}", result.error());
        }
        others_are_answered(&mut world, kind, &batch_id).await;
    }
    let room = AMQPValue::LongString("x".repeat(122_000).into());
    let properties = with_header("room", "large", room);
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
    assert_eq!(world.next_result().await.code(), "200");
    assert!(!worker.log().contains("the lane is lost"), "{}", worker.log());
    worker.stop().await;
}
