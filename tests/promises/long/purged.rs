//! A submit whose message is gone, with real workers: its worker is killed, and its queue purged.

use std::time::{Duration, Instant};

use call_manager::domain::command::CommandKind;
use call_manager::handler::Unpublished;
use call_manager::retry::Policy;
use elevenlabs_sandbox::{BatchStatus, Effect, Fault, Route};
use lapin::options::QueuePurgeOptions;
use serde_json::json;
use tokio::time::timeout;

use crate::finish::{Trial, code};
use crate::ledger::Place;
use crate::process::Process;
use crate::support::{Received, World, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

/// The horizon, the longest delay, and a while.
pub const FINISHED_WITHIN: Duration = Duration::from_secs(120);

pub const SETTINGS: [(&str, &str); 1] = [("RETRY_HORIZON", "2s")];

/// The submit is still at ElevenLabs, and its cancel still waits for it, when the worker is killed.
const PATIENT: [(&str, &str); 2] = [("RETRY_HORIZON", "10s"), ("ELEVENLABS_TIMEOUT", "20s")];

/// A cancel that is taken has reached the ledger by then; nothing tells of it.
const STRIKES_WITHIN: Duration = Duration::from_secs(2);

/// Longer than a submit waits in hand, with pauses that are too long for that.
const RETRY: Policy = Policy {
    initial: Duration::from_millis(200),
    max: Duration::from_secs(60),
    horizon: Some(Duration::from_secs(15)),
};

/// Killed while its request is at ElevenLabs; then nothing of its message is left.
pub async fn killed_and_purged(world: &World, ledger: &str, processed: bool) {
    let hangs = Fault::on(Route::Submit, Effect::Hang { processed });
    world.sandbox.order(hangs);
    let worker = Process::consuming(world, ledger, &SETTINGS).await;
    let body = submit_body().to_string();
    let properties = with_id("m").with_correlation_id("for m".into());
    world.publish(SUBMIT, body.as_bytes(), properties).await;
    until("it is at ElevenLabs", async || world.requests(Route::Submit) == 1).await;
    worker.kill().await;
    let queue = world.topology.queue(SUBMIT);
    until("its message is back", async || world.queue(&queue).await.0 == 1).await;
    let purged = world.channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await;
    assert_eq!(purged.unwrap(), 1);
}

async fn result_of(world: &mut World) -> Received {
    world.result_within(FINISHED_WITHIN).await
}

async fn is_answered(store: &str) {
    let place = Place::of(store).await;
    for processed in [true, false] {
        let mut world = World::without_worker().await;
        let ledger = place.url(&world);
        killed_and_purged(&world, &ledger, processed).await;
        let worker = Process::consuming(&world, &ledger, &SETTINGS).await;
        let result = result_of(&mut world).await;
        assert_eq!(result.command_id(), "m");
        assert_eq!(result.properties.correlation_id().as_ref().unwrap().as_str(), "for m");
        if processed {
            assert_eq!(result.code(), "200", "{}", result.body);
            assert_eq!(result.json["data"]["id"], json!(world.sandbox.batches()[0].id));
        } else {
            assert_eq!(result.code(), "500 upstream_unavailable", "{}", result.body);
            assert!(result.error().contains("its message is gone"), "{}", result.error());
        }
        assert_eq!(world.requests(Route::Submit), 1);
        worker.stop().await;
        world.finish().await;
        if matches!(place, Place::Postgres(_)) {
            break;
        }
    }
    place.clean_up().await;
}

#[tokio::test]
async fn a_submit_whose_queue_was_purged_is_answered_from_sqlite() {
    is_answered("sqlite").await;
}

#[tokio::test]
async fn a_submit_whose_queue_was_purged_is_answered_from_postgres() {
    is_answered("postgres").await;
}

/// Not even a hand that holds it as long as it may is patient enough.
#[tokio::test]
async fn a_submit_whose_message_is_gone_is_answered_though_the_list_can_never_be_read() {
    let trial = Trial::retrying(RETRY).await;
    trial.dies_at_elevenlabs(Effect::Hang { processed: false }).await;
    trial.vendor.sandbox.distort(|route, page| {
        if route == Route::List {
            page["batch_calls"] = json!([{"name": "it has no id"}]);
        }
    });
    let finished = timeout(FINISHED_WITHIN, async {
        loop {
            if let Some(Unpublished { event, .. }) = trial.finish().await {
                return event;
            }
            // It was deferred: its next turn comes when its lease is over.
        }
    });
    let event = finished.await.expect("it is answered in the end");
    assert_eq!(code(&event), "outcome_unknown");
    assert_eq!(trial.vendor.requests(Route::Submit), 1);
}

#[tokio::test]
async fn a_cancel_whose_message_is_gone_too_cancels_the_batch() {
    let mut world = World::without_worker().await;
    let ledger = world.ledger_url();
    let hangs = Fault::on(Route::Submit, Effect::Hang { processed: true });
    world.sandbox.order(hangs);
    let worker = Process::consuming(&world, &ledger, &PATIENT).await;
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    until("it is at ElevenLabs", async || world.requests(Route::Submit) == 1).await;
    let cancel = json!({"command_id": "m"}).to_string();
    world.publish(CommandKind::Cancel, cancel.as_bytes(), with_id("cancel")).await;
    let cancels = world.topology.queue(CommandKind::Cancel);
    until("it is taken", async || world.queue(&cancels).await.0 == 0).await;
    let taken = Instant::now();
    until("it has reached the ledger", async || taken.elapsed() > STRIKES_WITHIN).await;
    worker.kill().await;
    for queue in [world.topology.queue(SUBMIT), cancels] {
        until("its message is back", async || world.queue(&queue).await.0 == 1).await;
        world.channel.queue_purge(queue.into(), QueuePurgeOptions::default()).await.unwrap();
    }
    let worker = Process::consuming(&world, &ledger, &PATIENT).await;
    assert_eq!(result_of(&mut world).await.code(), "200");
    until("nobody is called", async || world.sandbox.batches()[0].status == BatchStatus::Cancelled)
        .await;
    worker.stop().await;
    world.finish().await;
}
