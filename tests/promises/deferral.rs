//! A command that has to wait long leaves the worker's hands for a delay queue, and comes back whole.

use std::time::{Duration, Instant};

use call_manager::broker::Delay;
use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use futures_util::StreamExt as _;
use lapin::BasicProperties;
use lapin::types::{AMQPValue, FieldTable};
use serde_json::json;
use tokio::time::timeout;

use crate::process::Process;
use crate::support::{
    LIMIT, Received, World, consume, exclusive_queue, submit_body, until, with_id,
};

const SUBMIT: CommandKind = CommandKind::Submit;

/// Past what a command waits in hand.
fn limited() -> Fault {
    Fault::on(
        Route::Submit,
        Effect::Status(
            Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after("11"),
        ),
    )
}

async fn until_deferred(world: &World) {
    let delay = world.topology.delay(Delay::Medium);
    until("it is in a delay queue", async || world.queue(&delay).await.0 == 1).await;
}

#[tokio::test]
async fn a_deferred_command_is_in_nobodys_hands_and_comes_back_with_all_it_had() {
    let mut world = World::start().await;
    let replies = exclusive_queue(&world.channel).await;
    let mut listener = consume(&world.channel, replies.as_str()).await;
    world.sandbox.order(limited());
    let mut headers = FieldTable::default();
    let trace = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01";
    headers.insert("traceparent".into(), AMQPValue::LongString(trace.into()));
    // What must not be copied: it would send the command to a second queue.
    let copies =
        AMQPValue::FieldArray(vec![AMQPValue::LongString("batch-calling.get".into())].into());
    headers.insert("CC".into(), copies);
    let properties = with_id("m")
        .with_correlation_id("for m".into())
        .with_reply_to(replies)
        .with_expiration("60000".into())
        .with_headers(headers);
    let since = Instant::now();
    // Straight to the queue, where CC has no meaning yet.
    let queue = world.topology.queue(SUBMIT);
    world.publish_to("", &queue, submit_body().to_string().as_bytes(), properties).await;
    until_deferred(&world).await;
    // Nothing of it is left with the worker: a stop gives nothing back.
    world.stop_worker().await;
    assert_eq!(world.queue(&queue).await.0, 0);
    world.start_worker(|_| {}).await;

    let result = world.next_result().await;
    assert!(since.elapsed() >= Duration::from_secs(10), "{:?}", since.elapsed());
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(result.command_id(), "m");
    assert_eq!(result.properties.correlation_id().as_ref().unwrap().as_str(), "for m");
    assert_eq!(result.header("traceparent").as_deref(), Some(trace));
    assert_eq!(result.header("attempts").as_deref(), Some("2"), "all times in hand count");
    let reply = timeout(LIMIT, listener.next()).await.unwrap().unwrap().unwrap();
    assert_eq!(Received::checked(&reply).body, result.body);
    assert_eq!(world.sandbox.batches().len(), 1);
    assert_eq!(world.requests(Route::Get), 0, "no copy of it went to another queue");
    world.finish().await;
}

#[tokio::test]
async fn what_was_deferred_comes_back_while_fresh_commands_wait_and_is_answered_at_its_horizon() {
    let mut world = World::with(|settings| settings.retry_horizon = Duration::from_secs(12)).await;
    let down = Effect::vendor_error(503, "a_code", "Down.");
    world.sandbox.order(Fault::on(Route::Any, down).until_cleared());
    let since = Instant::now();
    let body = json!({"batch_id": "btcal_1"}).to_string();
    world.publish(CommandKind::Get, body.as_bytes(), with_id("seen")).await;
    let queue = world.topology.queue(CommandKind::Get);
    until("it is in hand, and the outage is seen", async || world.queue(&queue).await == (0, 0))
        .await;
    world.publish(CommandKind::Get, body.as_bytes(), with_id("unseen")).await;
    let result = world.next_result().await;
    assert_eq!(
        (result.command_id().as_str(), result.code().as_str()),
        ("seen", "500 upstream_unavailable")
    );
    assert!(since.elapsed() >= Duration::from_secs(11), "{:?}", since.elapsed());
    assert!(result.error().contains("503"), "{}", result.error());
    assert_eq!(world.queue(&queue).await.0, 1, "what nobody has begun waits");
    world.sandbox.clear_faults();
    assert_eq!(world.next_result().await.code(), "404 not_found");
    world.finish().await;
}

#[tokio::test]
async fn a_deferral_that_is_lost_between_two_workers_is_found_again() {
    // Deferred in doubt, by one worker; found by the next one.
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter));
    let away = Effect::Status(Reply::new(503).retry_after("11"));
    world.sandbox.order(Fault::on(Route::List, away));
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    until_deferred(&world).await;
    world.stop_worker().await;
    world.start_worker(|_| {}).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
    world.finish().await;
}

#[tokio::test]
async fn a_delay_exchange_without_its_queue_loses_nothing() {
    let mut world = World::start().await;
    let delay = world.topology.delay(Delay::Medium);
    let options = lapin::options::QueueDeleteOptions::default();
    world.channel.queue_delete(delay.into(), options).await.unwrap();
    world.sandbox.order(limited());
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    // The connection is built again, and with it the queue.
    let result = world.next_result().await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(world.sandbox.batches().len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_command_with_headers_of_almost_a_frame_is_deferred_too() {
    let mut world = World::start().await;
    world.sandbox.order(limited());
    let mut headers = FieldTable::default();
    headers.insert("large".into(), AMQPValue::LongString("x".repeat(100 * 1024).into()));
    let properties = with_id("m").with_headers(headers);
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(result.header("attempts").as_deref(), Some("2"));
    world.finish().await;
}

#[tokio::test]
async fn headers_of_a_deferral_that_a_producer_makes_up_do_no_harm() {
    let mut world = World::start().await;
    for value in [i64::MIN, -1, 0, i64::MAX] {
        let mut headers = FieldTable::default();
        for name in ["first-seen", "attempts", "in-doubt", "deliveries"] {
            let name = format!("x-call-manager-{name}");
            headers.insert(name.into(), AMQPValue::LongLongInt(value));
        }
        let id = format!("m{value}");
        let properties: BasicProperties = with_id(&id).with_headers(headers);
        world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
        assert_eq!(world.next_result().await.code(), "200", "{value}");
    }
    world.finish().await;
}

#[tokio::test]
async fn a_worker_that_dies_between_deferral_and_ack_makes_no_second_batch() {
    let mut world = World::without_worker().await;
    world.sandbox.order(limited());
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    let ledger = world.ledger_url();
    Process::start(&world, &ledger, &[("CRASH_AT", "9")]).killed().await;
    // In its queue and in a delay queue: both are executed, and one of them creates the batch.
    let next = Process::consuming(&world, &ledger, &[]).await;
    let first = world.next_result().await;
    assert_eq!(first.code(), "200", "{}", first.body);
    assert_eq!(world.next_result().await.body, first.body, "the other copy's result is the same");
    assert_eq!(world.sandbox.batches().len(), 1);
    next.stop().await;
    world.finish().await;
}
