//! Who gets a result, and what travels with it.

use std::time::Duration;

use call_manager::config::Settings;
use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use futures_util::StreamExt as _;
use lapin::BasicProperties;
use lapin::options::{BasicGetOptions, QueueBindOptions, QueueDeclareOptions, QueueDeleteOptions};
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;
use tokio::time::timeout;

use crate::process::Process;
use crate::support::{
    LIMIT, Received, World, consume, exclusive_queue, submit_body, until, with_id,
};

const GET: CommandKind = CommandKind::Get;

fn nobody() -> Vec<u8> {
    json!({"batch_id": "btcal_nobody"}).to_string().into_bytes()
}

#[tokio::test]
async fn the_correlation_id_is_the_commands_own_else_its_message_id() {
    let mut world = World::start().await;
    world.publish(GET, &nobody(), with_id("m-1").with_correlation_id("c-1".into())).await;
    world.publish(GET, &nobody(), with_id("m-2")).await;
    world
        .publish(GET, &nobody(), BasicProperties::default().with_correlation_id("c-3".into()))
        .await;
    let mut seen = Vec::new();
    for _ in 0..3 {
        let result = world.next_result().await;
        let correlation = result.properties.correlation_id().as_ref().unwrap().to_string();
        seen.push((result.command_id(), correlation));
    }
    seen.sort();
    let pair = |a: &str, b: &str| (a.to_owned(), b.to_owned());
    assert_eq!(seen, [pair("c-3", "c-3"), pair("m-1", "c-1"), pair("m-2", "m-2")]);
    world.finish().await;
}

#[tokio::test]
async fn a_get_without_any_id_is_answered_under_an_id_of_the_workers() {
    let mut world = World::start().await;
    world.publish(GET, &nobody(), BasicProperties::default()).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "404 not_found");
    let correlation = result.properties.correlation_id().as_ref().unwrap().to_string();
    assert_eq!(result.command_id(), correlation);
    world.finish().await;
}

#[tokio::test]
async fn the_trace_context_is_copied_to_the_result() {
    let mut world = World::start().await;
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    let mut headers = FieldTable::default();
    headers.insert("traceparent".into(), AMQPValue::LongString(trace.into()));
    headers.insert("tracestate".into(), AMQPValue::LongString("vendor=1".into()));
    world.publish(GET, &nobody(), with_id("m").with_headers(headers)).await;
    let result = world.next_result().await;
    assert_eq!(result.header("traceparent").as_deref(), Some(trace));
    assert_eq!(result.header("tracestate").as_deref(), Some("vendor=1"));
    world.finish().await;
}

#[tokio::test]
async fn the_result_id_is_the_same_for_a_command_that_is_published_again() {
    let mut world = World::start().await;
    let mut ids = Vec::new();
    for id in ["m-1", "m-1", "m-2"] {
        world.publish(GET, &nobody(), with_id(id)).await;
        ids.push(world.next_result().await.message_id().to_owned());
    }
    assert_eq!(ids[0], ids[1]);
    assert_ne!(ids[0], ids[2]);
    world.finish().await;
}

/// Who drops repeats by `message_id` drops nothing else.
#[tokio::test]
async fn a_cancel_that_failed_first_has_another_result_id_when_it_succeeds() {
    let limited = Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.");
    for (fault, code) in
        [(limited, "500 upstream_unavailable"), (Reply::new(503), "500 outcome_unknown")]
    {
        let brief = |settings: &mut Settings| settings.retry_horizon = Duration::from_secs(1);
        let mut world = World::with(brief).await;
        let cancel = json!({"batch_id": world.submitted().await}).to_string();
        let fault = Fault::on(Route::Cancel, Effect::Status(fault));
        world.sandbox.order(fault.until_cleared());
        world.publish(CommandKind::Cancel, cancel.as_bytes(), with_id("m")).await;
        let mut results = vec![world.next_result().await];
        assert_eq!(results[0].code(), code, "{}", results[0].body);
        world.sandbox.clear_faults();
        for _ in 0..3 {
            world.publish(CommandKind::Cancel, cancel.as_bytes(), with_id("m")).await;
            results.push(world.next_result().await);
        }
        assert!(results[1..].iter().all(|result| result.code() == "200"));
        for one in &results {
            for other in &results {
                let (ids, bodies) =
                    (one.message_id() == other.message_id(), one.body == other.body);
                assert_eq!(ids, bodies, "{}\n{}", one.body, other.body);
            }
        }
        assert_ne!(results[0].message_id(), results[1].message_id());
        results[2].assert_repeats(&results[3]);
        world.finish().await;
    }
}

#[tokio::test]
async fn a_repeated_submit_gets_its_result_under_the_correlation_id_it_was_repeated_with() {
    let mut world = World::start().await;
    let mut seen = Vec::new();
    for correlation in ["first", "second"] {
        let properties = with_id("m").with_correlation_id(correlation.into());
        let body = submit_body().to_string();
        world.publish(CommandKind::Submit, body.as_bytes(), properties).await;
        let result = world.next_result().await;
        assert_eq!(result.properties.correlation_id().as_ref().unwrap().as_str(), correlation);
        seen.push((result.message_id().to_owned(), result.body));
    }
    assert_eq!(seen[0], seen[1]);
    world.finish().await;
}

#[tokio::test]
async fn reply_to_gets_the_same_message_as_the_exchange() {
    let mut world = World::start().await;
    let queue = exclusive_queue(&world.channel).await;
    let mut replies = consume(&world.channel, queue.as_str()).await;
    // More than there are reply channels, so that some wait for their turn.
    for n in 0..40 {
        let properties = with_id(&format!("m-{n}")).with_reply_to(queue.clone());
        world.publish(CommandKind::Submit, submit_body().to_string().as_bytes(), properties).await;
    }
    let mut results = Vec::new();
    let mut copies = Vec::new();
    for _ in 0..40 {
        let result = world.next_result().await;
        results.push((result.message_id().to_owned(), result.body));
        let reply = timeout(LIMIT, replies.next()).await.unwrap().unwrap().unwrap();
        assert_eq!(reply.exchange.as_str(), "");
        let reply = Received::checked(&reply);
        copies.push((reply.message_id().to_owned(), reply.body));
    }
    results.sort();
    copies.sort();
    assert_eq!(results, copies);
    world.finish().await;
}

#[tokio::test]
async fn direct_reply_to_works() {
    let mut world = World::start().await;
    let mut replies = consume(&world.channel, "amq.rabbitmq.reply-to").await;
    let properties = with_id("m").with_reply_to("amq.rabbitmq.reply-to".into());
    world.publish(GET, &nobody(), properties).await;
    let reply = timeout(LIMIT, replies.next()).await.expect("a reply comes in time");
    assert_eq!(Received::checked(&reply.unwrap().unwrap()).code(), "404 not_found");
    assert_eq!(world.next_result().await.code(), "404 not_found");
    world.finish().await;
}

#[tokio::test]
async fn a_full_queue_is_waited_for_and_readiness_says_so() {
    let mut world = World::without_worker().await;
    let mut small = FieldTable::default();
    small.insert("x-max-length".into(), AMQPValue::LongInt(1));
    small.insert("x-overflow".into(), AMQPValue::LongString("reject-publish".into()));
    let options = QueueDeclareOptions { exclusive: true, ..QueueDeclareOptions::default() };
    let full = world.channel.queue_declare("".into(), options, small).await.unwrap();
    let full = full.name().clone();
    let results = world.topology.results_exchange();
    let (all, none) = (QueueBindOptions::default(), FieldTable::default());
    world.channel.queue_bind(full.clone(), results.into(), "#".into(), all, none).await.unwrap();

    let worker = Process::consuming(&world, "memory:", &[]).await;
    for id in ["first", "second"] {
        world.publish(GET, &nobody(), with_id(id)).await;
        assert_eq!(world.next_result().await.command_id(), id);
    }
    until("it says what is wrong", async || {
        let (status, body) = worker.ready().await;
        status == 503 && body.contains("\"publisher: the broker refused the message")
    })
    .await;
    world.channel.queue_delete(full, QueueDeleteOptions::default()).await.unwrap();
    until("it is ready again", async || worker.ready().await.0 == 200).await;
    worker.stop().await;
    // Whoever has room got it each time.
    let repeated = world.remaining_results().await;
    assert!(repeated.iter().all(|result| result.command_id() == "second"));
    world.finish().await;
}

#[tokio::test]
async fn a_result_that_no_queue_is_bound_for_is_kept() {
    let mut world = World::without_worker().await;
    // The test's own results queue goes with its channel.
    let own = std::mem::replace(
        &mut world.channel,
        crate::support::connect().await.create_channel().await.unwrap(),
    );
    own.close(200, "nobody listens".into()).await.unwrap();
    world.start_worker(|_| {}).await;
    let key = GET.routing_key();
    let body = nobody();
    let exchange = world.topology.commands_exchange();
    let publish = world.channel.basic_publish(
        exchange.as_str().into(),
        key.as_str().into(),
        lapin::options::BasicPublishOptions::default(),
        &body,
        with_id("m"),
    );
    publish.await.unwrap();
    let unrouted = world.topology.unrouted();
    until("the result lies in the unrouted queue", async || world.queue(&unrouted).await.0 == 1)
        .await;
    let kept = world.channel.basic_get(unrouted.as_str().into(), BasicGetOptions { no_ack: true });
    let kept = Received::checked(&kept.await.unwrap().unwrap().delivery);
    assert_eq!(kept.routing_key, "batch-calling.get.failed");
    world.finish().await;
}
