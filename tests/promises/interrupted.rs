//! What a worker leaves behind in the midst of a cancel, of a pause, of a commit: the next one goes on.

use std::time::{Duration, Instant};

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{BatchStatus, Effect, Fault, Reply, Route};
use serde_json::json;

use crate::process::{LONGEST_REQUEST, Process};
use crate::strikes::Remote;
use crate::support::postgres::Database;
use crate::support::{World, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;
const CANCEL: CommandKind = CommandKind::Cancel;
const GET: CommandKind = CommandKind::Get;

async fn submit(world: &World) {
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
}

/// About the submit, by its id.
async fn ask(world: &World, kind: CommandKind, id: &str) {
    let body = json!({"command_id": "m"}).to_string();
    world.publish(kind, body.as_bytes(), with_id(id)).await;
}

#[tokio::test]
async fn a_strike_holds_though_its_worker_is_killed_before_it_has_answered() {
    let mut world = World::without_worker().await;
    ask(&world, CANCEL, "cancel").await;
    // Recorded, and not published.
    Process::start(&world, &world.ledger_url(), &[("CRASH_AT", "6")]).killed().await;
    submit(&world).await;
    let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
    for _ in 0..2 {
        let result = world.next_result().await;
        let expected = match result.command_id().as_str() {
            "m" => "400 cancelled_before_submit",
            _ => "404 not_found",
        };
        assert_eq!(result.code(), expected, "{}", result.body);
    }
    assert_eq!(world.requests(Route::Submit), 0);
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_by_command_id_whose_worker_is_killed_at_elevenlabs_is_done() {
    for processed in [false, true] {
        let mut world = World::without_worker().await;
        let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
        submit(&world).await;
        assert_eq!(world.next_result().await.code(), "200");
        world.sandbox.order(Fault::on(Route::Cancel, Effect::Hang { processed }));
        ask(&world, CANCEL, "cancel").await;
        let log = async || world.sandbox.requests();
        until("it is at ElevenLabs", async || {
            log().await.iter().any(|one| one.route == Route::Cancel && one.processed == processed)
        })
        .await;
        worker.kill().await;
        let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
        let result = world.next_result().await;
        assert_eq!((result.code().as_str(), result.command_id().as_str()), ("200", "cancel"));
        assert_eq!(result.json["data"]["status"], "cancelled");
        assert_eq!(world.sandbox.batches()[0].status, BatchStatus::Cancelled);
        worker.stop().await;
        world.finish().await;
    }
}

#[tokio::test]
async fn a_worker_that_is_frozen_while_elevenlabs_asks_for_time_sends_nothing_when_it_thaws() {
    let database = Database::create().await;
    let mut world = World::without_worker().await;
    // It gets the first copy and no other.
    let first = Process::consuming(&world, &database.url(), &[("PREFETCH", "1")]).await;
    let limited = Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after("4");
    world.sandbox.order(Fault::on(Route::Submit, Effect::Status(limited)));
    let before_the_claim = Instant::now();
    submit(&world).await;
    until("it is turned away", async || {
        world.sandbox.requests().iter().any(|request| request.status == Some(429))
    })
    .await;
    first.freeze().await;
    let second = Process::consuming(&world, &database.url(), &[]).await;
    submit(&world).await;
    assert_eq!(world.next_result().await.code(), "200");
    assert!(before_the_claim.elapsed() > LONGEST_REQUEST * 2, "not before the lease has run out");
    first.thaw();
    assert_eq!(world.next_result().await.code(), "200");
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (2, 1));
    first.stop().await;
    second.stop().await;
    assert_eq!(world.remaining_results().await.len(), 0);
    world.finish().await;
    database.drop().await;
}

/// The answer of PostgreSQL to the COMMIT of such rows is lost.
async fn commit_without_an_answer(rows: &str) {
    let mut world = World::without_worker().await;
    let remote = Remote::start().await;
    let settings = [("ELEVENLABS_TIMEOUT", "10s")];
    let worker = Process::consuming(&world, &remote.url, &settings).await;
    remote.hold(rows).await;
    submit(&world).await;
    remote.until_lost(rows).await;
    remote.heal();
    let result = world.next_result().await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
    worker.stop().await;
    assert_eq!(world.remaining_results().await.len(), 0);
    world.finish().await;
    remote.clean_up().await;
}

#[tokio::test]
async fn a_claim_whose_answer_postgres_loses_is_sent_once() {
    commit_without_an_answer("NEW.command_id = 'm' AND NEW.token IS NOT NULL").await;
}

#[tokio::test]
async fn a_result_whose_answer_postgres_loses_is_published_once() {
    commit_without_an_answer("NEW.command_id = 'm' AND NEW.settled_at IS NOT NULL").await;
}

#[tokio::test]
async fn who_asks_about_a_submit_that_hangs_past_the_horizon_is_answered_and_the_batch_cancelled() {
    let hangs = Duration::from_secs(7);
    let mut world = World::with(|settings| {
        settings.retry_horizon = Duration::from_secs(3);
        settings.elevenlabs_timeout = hangs * 2;
    })
    .await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(hangs)));
    submit(&world).await;
    until("it is at ElevenLabs", async || world.requests(Route::Submit) == 1).await;
    let asked = Instant::now();
    ask(&world, GET, "get").await;
    ask(&world, CANCEL, "cancel").await;
    let mut left =
        vec![("get", "500 upstream_unavailable"), ("cancel", "500 outcome_unknown"), ("m", "200")];
    while !left.is_empty() {
        let result = world.next_result().await;
        let id = result.command_id();
        let at = left.iter().position(|(command, _)| *command == id).expect("one result each");
        assert_eq!(result.code(), left.remove(at).1, "{id}: {}", result.body);
        assert!(id == "m" || asked.elapsed() < hangs, "{id}: {:?}", asked.elapsed());
    }
    let batches = async || world.sandbox.batches();
    until("nobody is called", async || batches().await[0].status == BatchStatus::Cancelled).await;
    world.finish().await;
}
