//! A submit whose `expiration` passes while it is in flight: RabbitMQ drops its message on return.

use std::time::{Duration, Instant};

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Route};
use lapin::options::BasicGetOptions;
use lapin::types::AMQPValue;
use serde_json::json;

use crate::ledger::Place;
use crate::process::Process;
use crate::support::proxy::Proxy;
use crate::support::{World, submit_body, until, with_id};

use super::purged::{FINISHED_WITHIN, SETTINGS};

const SUBMIT: CommandKind = CommandKind::Submit;

const EXPIRATION: Duration = Duration::from_secs(3);

/// The request is still at ElevenLabs when the time is over, and a stop does not wait for it.
const PATIENT: [(&str, &str); 3] =
    [("RETRY_HORIZON", "2s"), ("ELEVENLABS_TIMEOUT", "20s"), ("SHUTDOWN_GRACE", "1s")];

/// Returns when the submit is at ElevenLabs and its time is over.
async fn expires_in_flight(world: &World) {
    let expiration = EXPIRATION.as_millis().to_string();
    let properties = with_id("m").with_correlation_id("for m".into());
    let published = Instant::now();
    let body = submit_body().to_string();
    let expiring = properties.with_expiration(expiration.into());
    world.publish(SUBMIT, body.as_bytes(), expiring).await;
    until("it is at ElevenLabs", async || world.requests(Route::Submit) == 1).await;
    until("its time is over", async || published.elapsed() > EXPIRATION).await;
}

/// The message has returned to its queue, and lies in the dead-letter queue instead.
async fn until_dead_lettered(world: &World) {
    let queue = world.topology.dead_letter();
    until("RabbitMQ drops its message", async || world.queue(&queue).await.0 == 1).await;
    let options = BasicGetOptions { no_ack: true };
    let dead = world.channel.basic_get(queue.into(), options).await.unwrap().unwrap();
    let headers = dead.properties.headers().as_ref().unwrap().inner();
    let reason = headers.get("x-first-death-reason").and_then(AMQPValue::as_long_string).unwrap();
    assert_eq!(reason.to_string(), "expired");
}

/// The worker without a message answers once, and a copy that comes later gets the same result.
async fn answers_once(mut world: World, worker: Process) {
    let result = world.result_within(FINISHED_WITHIN).await;
    assert_eq!((result.command_id().as_str(), result.code().as_str()), ("m", "200"));
    assert_eq!(result.properties.correlation_id().as_ref().unwrap().as_str(), "for m");
    worker.until_logged("answered without its message").await;
    let copy = with_id("m").with_correlation_id("for m".into());
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), copy).await;
    result.assert_repeats(&world.next_result().await);
    worker.stop().await;
    assert_eq!(world.remaining_results().await.len(), 0, "one result, and one of the copy");
    let batches = world.sandbox.batches();
    assert_eq!((batches.len(), world.requests(Route::Submit)), (1, 1));
    assert_eq!(result.json["data"]["id"], json!(batches[0].id));
    world.finish().await;
}

/// Its worker is killed, or stopped before the request is over.
async fn is_answered(store: &str, killed: bool) {
    let place = Place::of(store).await;
    let world = World::without_worker().await;
    let ledger = place.url(&world);
    world.sandbox.order(Fault::on(Route::Submit, Effect::Hang { processed: true }));
    let worker = Process::consuming(&world, &ledger, &PATIENT).await;
    expires_in_flight(&world).await;
    if killed {
        worker.kill().await;
    } else {
        worker.stop().await;
    }
    until_dead_lettered(&world).await;
    let next = Process::consuming(&world, &ledger, &SETTINGS).await;
    answers_once(world, next).await;
    place.clean_up().await;
}

#[tokio::test]
async fn a_submit_that_expired_with_its_killed_worker_is_answered_from_sqlite() {
    is_answered("sqlite", true).await;
}

#[tokio::test]
async fn a_submit_that_expired_with_its_killed_worker_is_answered_from_postgres() {
    is_answered("postgres", true).await;
}

#[tokio::test]
async fn a_submit_that_expired_with_its_stopped_worker_is_answered() {
    is_answered("sqlite", false).await;
}

#[tokio::test]
async fn a_submit_that_expired_while_its_connection_was_lost_is_answered() {
    let world = World::without_worker().await;
    let (proxy, url) = Proxy::to_broker().await;
    let through = [&PATIENT[..], &[("AMQP_URL", url.as_str())]].concat();
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(EXPIRATION * 3)));
    let worker = Process::consuming(&world, &world.ledger_url(), &through).await;
    expires_in_flight(&world).await;
    proxy.cut();
    until_dead_lettered(&world).await;
    assert_eq!(world.sandbox.batches().len(), 0, "its request is still under way");
    answers_once(world, worker).await;
}
