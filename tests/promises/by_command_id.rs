//! Cancel and get by a submit's own id: before it, while it is executed, and after it.

use std::collections::HashMap;
use std::time::Duration;

use call_manager::config::{LedgerPlace, Settings};
use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{BatchStatus, Effect, Fault, Reply, Route};
use lapin::BasicProperties;
use serde_json::{Value, json};

use crate::process::Process;
use crate::support::postgres::Database;
use crate::support::{Received, World, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;
const CANCEL: CommandKind = CommandKind::Cancel;
const GET: CommandKind = CommandKind::Get;

fn of(command_id: &str) -> Value {
    json!({"command_id": command_id})
}

async fn submit(world: &World, id: &str) {
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(id)).await;
}

/// Publishes a cancel or a get of a submit, with the id `<kind>-<submit>`.
async fn publish(world: &World, kind: CommandKind, submit: &str) {
    let properties = BasicProperties::default().with_message_id(format!("{kind}-{submit}").into());
    world.publish(kind, of(submit).to_string().as_bytes(), properties).await;
}

/// The next results, by the id of their command.
async fn results(world: &mut World, count: usize) -> HashMap<String, Received> {
    let mut results = HashMap::new();
    for _ in 0..count {
        let result = world.next_result().await;
        results.insert(result.command_id(), result);
    }
    assert_eq!(results.len(), count, "one result each");
    results
}

fn status(world: &World) -> BatchStatus {
    let batches = world.sandbox.batches();
    assert_eq!(batches.len(), 1);
    batches[0].status
}

#[track_caller]
fn assert_struck(result: &Received) {
    assert_eq!(result.code(), "400 cancelled_before_submit", "{}", result.body);
    assert!(result.error().contains("nobody is called"), "{}", result.error());
}

/// Waits until a cancel or a get was taken, so that it asks while the submit is still in hand.
async fn until_taken(world: &World, kind: CommandKind) {
    let queue = world.topology.queue(kind);
    until("the command is in hand", async || world.queue(&queue).await.0 == 0).await;
}

#[tokio::test]
async fn a_submit_that_is_done_is_found_and_cancelled_by_its_id() {
    let mut world = World::start().await;
    submit(&world, "m").await;
    let submitted = world.next_result().await;
    assert_eq!(submitted.code(), "200", "{}", submitted.body);
    let batch = submitted.json["data"]["id"].clone();
    let got = world.ask(GET, &of("m")).await;
    assert_eq!((got.code().as_str(), &got.json["data"]["id"]), ("200", &batch), "{}", got.body);
    assert_eq!(got.json["data"]["recipients"].as_array().unwrap().len(), 2);
    let cancelled = world.ask(CANCEL, &of("m")).await;
    assert_eq!((cancelled.code().as_str(), &cancelled.json["data"]["id"]), ("200", &batch));
    assert_eq!(cancelled.json["data"]["status"], "cancelled");
    assert_eq!(status(&world), BatchStatus::Cancelled);
    let again = world.ask(CANCEL, &of("m")).await;
    assert_eq!(again.json["data"]["status"], "cancelled", "a second cancel has what it wanted");
    world.finish().await;
}

#[tokio::test]
async fn a_correlation_id_stands_in_for_a_message_id_that_is_not_there() {
    let mut world = World::start().await;
    let properties = BasicProperties::default().with_correlation_id("c".into());
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
    let submitted = world.next_result().await;
    assert_eq!(submitted.code(), "200", "{}", submitted.body);
    let got = world.ask(GET, &of("c")).await;
    assert_eq!(got.code(), "200", "{}", got.body);
    assert_eq!(got.json["data"]["id"], submitted.json["data"]["id"]);
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_that_comes_first_keeps_its_submit_from_being_sent_for_good() {
    let mut world = World::start().await;
    let cancelled = world.ask(CANCEL, &of("m")).await;
    assert_eq!(cancelled.code(), "404 not_found");
    for part in ["\"m\"", "answered cancelled_before_submit", "within 24 hours"] {
        assert!(cancelled.error().contains(part), "{part}: {}", cancelled.error());
    }
    submit(&world, "m").await;
    let first = world.next_result().await;
    assert_struck(&first);
    assert_eq!(first.header("attempts").as_deref(), Some("0"));
    submit(&world, "m").await;
    first.assert_repeats(&world.next_result().await);
    let cancelled = world.ask(CANCEL, &of("m")).await;
    assert_eq!(cancelled.code(), "404 not_found");
    assert!(cancelled.error().contains("cancelled_before_submit"), "{}", cancelled.error());
    assert_eq!(world.asked(), 0, "nothing was ever sent");
    submit(&world, "n").await;
    assert_eq!(world.next_result().await.code(), "200", "another submit is not struck");
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_of_an_unknown_id_may_be_repeated_and_outlasts_a_restart() {
    let mut world = World::start().await;
    for _ in 0..2 {
        assert_eq!(world.ask(CANCEL, &of("m")).await.code(), "404 not_found");
    }
    world.stop_worker().await;
    world.start_worker(|_| {}).await;
    submit(&world, "m").await;
    assert_struck(&world.next_result().await);
    assert_eq!(world.asked(), 0);
    world.finish().await;
}

#[tokio::test]
async fn a_get_of_an_unknown_id_is_not_found_and_does_not_keep_the_submit_from_being_sent() {
    let mut world = World::start().await;
    let got = world.ask(GET, &of("m")).await;
    assert_eq!(got.code(), "404 not_found");
    assert!(got.error().contains("\"m\""), "{}", got.error());
    assert!(!got.error().contains("cancelled"), "{}", got.error());
    submit(&world, "m").await;
    assert_eq!(world.next_result().await.code(), "200");
    assert_eq!(world.ask(GET, &of("m")).await.code(), "200");
    world.finish().await;
}

#[tokio::test]
async fn submits_and_their_cancels_that_wait_in_the_queues_end_with_nobody_called() {
    let mut world = World::without_worker().await;
    let slow = Fault::on(Route::Submit, Effect::Latency(Duration::from_millis(300)));
    world.sandbox.order(slow.until_cleared());
    let ids: Vec<_> = (0..25).map(|n| format!("m-{n}")).collect();
    for id in &ids {
        submit(&world, id).await;
    }
    let (first, last) = ids.split_at(12);
    for id in last {
        publish(&world, CANCEL, id).await;
    }
    // Fewer at a time than there are, so that some are cancelled on their way, and some before it.
    world.start_worker(|settings| settings.broker.prefetch = 8).await;
    until("some are on their way", async || world.requests(Route::Submit) > 0).await;
    for id in first {
        publish(&world, CANCEL, id).await;
    }
    let results = results(&mut world, 2 * ids.len()).await;
    for id in &ids {
        let (submitted, cancelled) = (&results[id], &results[&format!("cancel-{id}")]);
        if submitted.code() == "200" {
            assert_eq!(cancelled.code(), "200", "{}", cancelled.body);
            assert_eq!(cancelled.json["data"]["id"], submitted.json["data"]["id"]);
        } else {
            assert_struck(submitted);
            assert_eq!(cancelled.code(), "404 not_found", "{}", cancelled.body);
        }
    }
    let batches = world.sandbox.batches();
    assert!(batches.iter().all(|batch| batch.status == BatchStatus::Cancelled));
    let done = ids.iter().filter(|id| results[*id].code() == "200").count();
    assert_eq!(batches.len(), done, "no batch that nobody was told of");
    assert!((1..ids.len()).contains(&done), "{done} of {} were on their way", ids.len());
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_waits_for_the_submit_in_hand_and_cancels_its_batch() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_secs(1))));
    submit(&world, "m").await;
    until("the submit is at the vendor", async || world.requests(Route::Submit) == 1).await;
    publish(&world, CANCEL, "m").await;
    until_taken(&world, CANCEL).await;
    assert_eq!(world.sandbox.batches().len(), 0, "the vendor is still busy");
    let results = results(&mut world, 2).await;
    assert_eq!((results["m"].code(), results["cancel-m"].code()), ("200".into(), "200".into()));
    assert_eq!(results["cancel-m"].json["data"]["id"], results["m"].json["data"]["id"]);
    assert_eq!(status(&world), BatchStatus::Cancelled);
    world.finish().await;
}

#[tokio::test]
async fn a_get_waits_for_the_submit_in_hand_and_answers_its_batch() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_secs(1))));
    submit(&world, "m").await;
    until("the submit is at the vendor", async || world.requests(Route::Submit) == 1).await;
    publish(&world, GET, "m").await;
    until_taken(&world, GET).await;
    assert_eq!(world.sandbox.batches().len(), 0, "the vendor is still busy");
    let results = results(&mut world, 2).await;
    assert_eq!((results["m"].code(), results["get-m"].code()), ("200".into(), "200".into()));
    assert_eq!(results["get-m"].json["data"]["id"], results["m"].json["data"]["id"]);
    assert_eq!(status(&world), BatchStatus::Pending, "a get cancels nothing");
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_keeps_a_submit_that_waits_to_be_tried_again_from_being_sent() {
    // A lease of two seconds: the submit is renewed, and the cancel seen, long before its wait is over.
    let brief = |settings: &mut Settings| settings.elevenlabs_timeout = Duration::from_secs(1);
    let mut world = World::with(brief).await;
    let limited = Effect::Status(
        Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after("50"),
    );
    world.sandbox.order(Fault::on(Route::Submit, limited).until_cleared());
    submit(&world, "m").await;
    until("it was turned away", async || {
        let requests = world.sandbox.requests();
        requests.iter().any(|request| request.status == Some(429))
    })
    .await;
    publish(&world, CANCEL, "m").await;
    until_taken(&world, CANCEL).await;
    world.sandbox.clear_faults();
    let results = results(&mut world, 2).await;
    assert_struck(&results["m"]);
    let cancelled = &results["cancel-m"];
    assert_eq!(cancelled.code(), "404 not_found");
    assert!(cancelled.error().contains("cancelled_before_submit"), "{}", cancelled.error());
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 0));
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_while_a_lost_submit_is_looked_for_cancels_what_is_found_and_lets_nothing_be_sent()
{
    for (lost, batches) in [(Effect::ResetAfter, 1), (Effect::ResetBefore, 0)] {
        let mut world = World::start().await;
        world.sandbox.order(Fault::on(Route::Submit, lost));
        let away = Effect::Status(Reply::new(503).retry_after("1"));
        world.sandbox.order(Fault::on(Route::List, away));
        submit(&world, "m").await;
        until("it is looked for", async || world.requests(Route::List) == 1).await;
        publish(&world, CANCEL, "m").await;
        let results = results(&mut world, 2).await;
        if batches == 1 {
            assert_eq!(results["m"].code(), "200", "{}", results["m"].body);
            assert_eq!(results["cancel-m"].code(), "200", "{}", results["cancel-m"].body);
            assert_eq!(status(&world), BatchStatus::Cancelled);
        } else {
            assert_struck(&results["m"]);
            assert_eq!(results["cancel-m"].code(), "404 not_found");
        }
        assert_eq!(world.sandbox.batches().len(), batches);
        assert_eq!(world.requests(Route::Submit), 1);
        world.finish().await;
    }
}

#[tokio::test]
async fn a_submit_that_failed_has_no_batch_and_the_answer_names_how_it_failed() {
    let mut world = World::start().await;
    let refused = Effect::vendor_error(422, "invalid", "No.");
    world.sandbox.order(Fault::on(Route::Submit, refused));
    submit(&world, "m").await;
    assert_eq!(world.next_result().await.code(), "400 rejected_by_elevenlabs");
    for kind in [CANCEL, GET] {
        let answered = world.ask(kind, &of("m")).await;
        assert_eq!(answered.code(), "404 not_found", "{kind}");
        for part in ["\"m\"", "rejected_by_elevenlabs", "no batch"] {
            assert!(answered.error().contains(part), "{part}: {}", answered.error());
        }
    }
    assert_eq!(world.asked(), 1, "nobody else was asked");
    world.finish().await;
}

#[tokio::test]
async fn a_submit_of_unknown_outcome_is_not_called_absent() {
    let mut world = World::with(|settings| settings.retry_horizon = Duration::from_secs(1)).await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter));
    let away = Effect::Status(Reply::new(503));
    world.sandbox.order(Fault::on(Route::List, away).until_cleared());
    submit(&world, "m").await;
    assert_eq!(world.next_result().await.code(), "500 outcome_unknown");
    // Nothing is taken while ElevenLabs cannot be read.
    world.sandbox.clear_faults();
    for kind in [CANCEL, GET] {
        let answered = world.ask(kind, &of("m")).await;
        assert_eq!(answered.code(), "500 outcome_unknown", "{kind}");
        assert!(answered.error().contains("use batch_id"), "{}", answered.error());
    }
    world.finish().await;
}

#[tokio::test]
async fn what_names_no_submit_and_no_batch_is_refused_with_what_to_write() {
    let mut world = World::start().await;
    let long = "m".repeat(256);
    for kind in [CANCEL, GET] {
        for (body, said) in [
            (
                json!({"batch_id": "btcal_1", "command_id": "m"}),
                "must have only one of the fields batch_id, command_id",
            ),
            (json!({}), "must have one of the fields batch_id, command_id"),
            (json!({"command_id": 7}), "command_id: must be a string, not a number"),
            (json!({"command_id": null}), "command_id: must be a string, not null"),
            (json!({"batch_id": ["b"]}), "batch_id: must be a string, not an array"),
            (json!({"command_id": ""}), "command_id: must not be empty"),
            (json!({"batch_id": ""}), "batch_id: must be a batch id as a submit's result gave it"),
            (json!({"command_id": long}), "command_id: must have at most 255 characters"),
            (json!({"command_id": "a\0b"}), "command_id: must be the message_id of the submit"),
            (json!({"id": "m"}), "is not a known field; known are batch_id, command_id"),
        ] {
            let refused = world.ask(kind, &body).await;
            assert_eq!(refused.code(), "400 invalid_command", "{kind} {body}");
            assert!(refused.error().contains(said), "{kind} {body}: {}", refused.error());
        }
    }
    assert_eq!(world.asked(), 0);
    world.finish().await;
}

#[tokio::test]
async fn what_one_worker_of_a_pool_has_done_another_one_finds_and_cancels() {
    let database = Database::create().await;
    let url = database.url();
    let place = LedgerPlace::Postgres { url: url.clone().into(), shown: String::new() };
    let mut world = World::without_worker().await;
    world.start_worker(|settings| settings.ledger.place = place).await;
    submit(&world, "m").await;
    let submitted = world.next_result().await;
    assert_eq!(submitted.code(), "200", "{}", submitted.body);
    let batch = submitted.json["data"]["id"].clone();
    // Struck by the first worker, to be seen by the second one.
    assert_eq!(world.ask(CANCEL, &of("n")).await.code(), "404 not_found");
    let second = Process::consuming(&world, &url, &[]).await;
    // The broker takes turns among those that wait: each worker has some of these.
    for n in 0..6 {
        let got = world.ask(GET, &of("m")).await;
        assert_eq!((got.code().as_str(), &got.json["data"]["id"]), ("200", &batch), "{n}");
    }
    second.until_logged("answered command=\"get\"").await;
    world.stop_worker().await;
    let cancelled = world.ask(CANCEL, &of("m")).await;
    assert_eq!((cancelled.code().as_str(), &cancelled.json["data"]["id"]), ("200", &batch));
    assert_eq!(status(&world), BatchStatus::Cancelled);
    submit(&world, "n").await;
    assert_struck(&world.next_result().await);
    second.stop().await;
    world.finish().await;
    database.drop().await;
}
