//! A stop loses no command: each has its result, or is back in its queue.

use std::collections::HashSet;
use std::time::{Duration, Instant};

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Route};
use serde_json::json;

use crate::support::proxy::Proxy;
use crate::support::{World, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

async fn publish_fifty(world: &World) {
    let body = submit_body().to_string();
    for n in 0..50 {
        world.publish(SUBMIT, body.as_bytes(), with_id(&format!("m-{n}"))).await;
    }
}

/// After the stop, with `answered` of the fifty answered already: a new worker does the rest, and
/// in the end there is one batch and one result for each.
async fn nothing_is_lost(mut world: World, mut answered: HashSet<String>) {
    world.sandbox.clear_faults();
    world.start_worker(|_| {}).await;
    while answered.len() < 50 {
        assert!(answered.insert(world.next_result().await.command_id()), "answered once");
    }
    // A command that was answered and came back all the same would be answered before this one.
    world.ask(SUBMIT, &submit_body()).await;
    assert_eq!(world.sandbox.batches().len(), 51, "each was executed once");
    world.finish().await;
}

async fn answered(world: &mut World, count: usize) -> HashSet<String> {
    let mut answered = HashSet::new();
    for _ in 0..count {
        assert!(answered.insert(world.next_result().await.command_id()), "answered once");
    }
    answered
}

#[tokio::test]
async fn a_stop_with_fifty_commands_in_hand_settles_them_all() {
    let mut world = World::start().await;
    let slow = Effect::Latency(Duration::from_secs(2));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    publish_fifty(&world).await;
    until("all fifty are at the vendor", async || world.asked() == 50).await;
    world.stop_worker().await;
    let answered = answered(&mut world, 50).await;
    nothing_is_lost(world, answered).await;
}

#[tokio::test]
async fn a_stop_gives_back_what_was_received_and_not_begun() {
    let mut world = World::with(|settings| settings.broker.prefetch = 10).await;
    let slow = Effect::Latency(Duration::from_secs(1));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    publish_fifty(&world).await;
    until("some are at the vendor", async || world.asked() >= 10).await;
    world.stop_worker().await;
    // Ten were in hand; the answer of one lets another begin, until the stop.
    assert!(world.asked() <= 20, "a stop begins nothing: {}", world.asked());
    nothing_is_lost(world, HashSet::new()).await;
}

#[tokio::test]
async fn a_stop_does_not_wait_for_commands_that_wait_to_be_tried_again() {
    let mut world = World::start().await;
    let limited = Effect::vendor_error(429, "system_busy", "Busy");
    world.sandbox.order(Fault::on(Route::Submit, limited).until_cleared());
    publish_fifty(&world).await;
    until("some were turned away", async || world.asked() >= 5).await;
    let started = Instant::now();
    world.stop_worker().await;
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    let queue = world.topology.queue(SUBMIT);
    until("all are back", async || world.queue(&queue).await.0 == 50).await;
    nothing_is_lost(world, HashSet::new()).await;
}

#[tokio::test]
async fn a_stop_ends_when_the_grace_period_does() {
    let mut world = World::with(|settings| {
        settings.elevenlabs_timeout = Duration::from_secs(20);
        settings.shutdown_grace = Duration::from_millis(500);
    })
    .await;
    world.sandbox.order(Fault::on(Route::Get, Effect::Hang { processed: false }));
    let body = br#"{"batch_id":"btcal_1"}"#;
    world.publish(CommandKind::Get, body, with_id("m")).await;
    until("the get is at the vendor", async || world.asked() == 1).await;
    let started = Instant::now();
    world.stop_worker().await;
    assert!(started.elapsed() < Duration::from_secs(10), "{:?}", started.elapsed());
    let queue = world.topology.queue(CommandKind::Get);
    until("the command is back in its queue", async || world.queue(&queue).await.0 == 1).await;
    world.start_worker(|_| {}).await;
    assert_eq!(world.next_result().await.command_id(), "m");
    world.finish().await;
}

#[tokio::test]
async fn a_submit_that_outlasts_the_grace_period_is_adopted_by_the_next_worker() {
    let mut world = World::with(|settings| {
        settings.shutdown_grace = Duration::from_millis(500);
        settings.elevenlabs_timeout = Duration::from_secs(5);
    })
    .await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_secs(3))));
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    until("the submit is at the vendor", async || world.asked() == 1).await;
    world.stop_worker().await;
    let queue = world.topology.queue(SUBMIT);
    until("the command is back in its queue", async || world.queue(&queue).await.0 == 1).await;
    assert!(world.sandbox.batches().is_empty(), "the vendor is still busy with it");
    world.start_worker(|_| {}).await;
    let result = world.next_result().await;
    assert_eq!((result.code().as_str(), result.command_id().as_str()), ("200", "m"));
    assert_eq!(result.json["data"]["id"], json!(world.sandbox.batches()[0].id));
    assert_eq!(world.requests(Route::Submit), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_stop_while_the_broker_is_away_still_waits_for_the_request_under_way() {
    let mut world = World::without_worker().await;
    let (proxy, url) = Proxy::to_broker().await;
    world.start_worker(|settings| settings.broker.amqp_url = url.to_string().into()).await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_secs(2))));
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    until("the submit is at the vendor", async || world.asked() == 1).await;
    proxy.refuse(true);
    proxy.cut();
    until("the worker tries to connect", async || proxy.refused() > 0).await;
    let started = Instant::now();
    world.stop_worker().await;
    assert!(started.elapsed() > Duration::from_secs(1), "{:?}", started.elapsed());
    // Its answer was waited for, and recorded: nobody has to search.
    let looked = world.requests(Route::List);
    world.start_worker(|_| {}).await;
    assert_eq!(world.next_result().await.code(), "200");
    assert_eq!(world.requests(Route::List), looked, "but for what a start asks");
    assert_eq!(world.requests(Route::Submit), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_stop_while_lanes_are_being_built_leaves_no_consumer() {
    for kind in CommandKind::ALL.into_iter().cycle().take(12) {
        let mut world = World::without_worker().await;
        world.run_worker(world.settings());
        let queue = world.topology.queue(kind);
        until("one lane consumes", async || world.queue(&queue).await.1 > 0).await;
        world.stop_worker().await;
        // It looks for consumers.
        world.finish().await;
    }
}
