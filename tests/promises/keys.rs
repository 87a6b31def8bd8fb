//! Absence holds only for the API key that looked, and a ledger for one ElevenLabs.

use std::time::Duration;

use call_manager::config::{LedgerPlace, Settings};
use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{BatchStatus, Effect, Fault, Options, Route};
use serde_json::json;

use crate::process::Process;
use crate::support::postgres::Database;
use crate::support::{World, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

async fn world() -> World {
    World::before(Options {
        speed: 0.0,
        rotated_keys: vec!["rotated-key".to_owned()],
        other_keys: vec!["other-key".to_owned()],
        ..Options::default()
    })
    .await
}

fn with_key(key: &'static str) -> impl FnOnce(&mut Settings) {
    move |settings| settings.elevenlabs_api_key = key.into()
}

/// The worker's own file, or this database.
fn with_ledger(database: Option<&Database>) -> impl FnOnce(&mut Settings) {
    let url = database.map(Database::url);
    move |settings| {
        if let Some(url) = url {
            settings.ledger.place = LedgerPlace::Postgres { url: url.into(), shown: String::new() };
        }
    }
}

fn with_ledger_and_key(
    database: Option<&Database>,
    key: &'static str,
) -> impl FnOnce(&mut Settings) {
    let ledger = with_ledger(database);
    move |settings| {
        ledger(settings);
        with_key(key)(settings);
    }
}

async fn finish(world: World, database: Option<Database>) {
    world.finish().await;
    if let Some(database) = database {
        database.drop().await;
    }
}

/// The answer to a submit is lost, and the worker is stopped before it could read the list.
async fn leave_in_doubt(world: &mut World, effect: Effect) {
    world.sandbox.order(Fault::on(Route::Submit, effect));
    let away = Effect::vendor_error(503, "down", "Down.");
    world.sandbox.order(Fault::on(Route::List, away).until_cleared());
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    until("it is searched for", async || world.requests(Route::List) > 0).await;
    world.stop_worker().await;
    world.sandbox.clear_faults();
}

#[tokio::test]
async fn a_search_with_a_key_that_may_not_see_the_batch_proves_no_absence() {
    for effect in [Effect::ResetAfter, Effect::ResetBefore] {
        for database in [None, Some(Database::create().await)] {
            let ledger = database.as_ref();
            let mut world = world().await;
            world.start_worker(with_ledger(ledger)).await;
            let batches = usize::from(effect == Effect::ResetAfter);
            leave_in_doubt(&mut world, effect.clone()).await;
            world.start_worker(with_ledger_and_key(ledger, "other-key")).await;
            let result = world.next_result().await;
            assert_eq!(result.code(), "500 outcome_unknown", "{}", result.body);
            assert!(result.error().contains("the API key was changed"), "{}", result.error());
            assert_eq!(world.requests(Route::Submit), 1);
            assert_eq!(world.sandbox.batches().len(), batches);
            finish(world, database).await;
        }
    }
}

#[tokio::test]
async fn a_key_that_reads_a_batch_of_the_former_key_sees_what_that_one_saw() {
    for database in [None, Some(Database::create().await)] {
        let ledger = database.as_ref();
        let mut world = world().await;
        world.start_worker(with_ledger(ledger)).await;
        world.submitted().await;
        leave_in_doubt(&mut world, Effect::ResetBefore).await;
        world.start_worker(with_ledger_and_key(ledger, "rotated-key")).await;
        let result = world.next_result().await;
        assert_eq!(result.code(), "200", "{}", result.body);
        assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (3, 2));
        finish(world, database).await;
    }
}

#[tokio::test]
async fn a_batch_that_the_ledger_knows_is_never_called_unknown() {
    let mut world = world().await;
    world.start_worker(|_| {}).await;
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    let submitted = world.next_result().await;
    let id = submitted.json["data"]["id"].as_str().unwrap();
    world.stop_worker().await;
    world.start_worker(with_key("other-key")).await;
    for kind in [CommandKind::Get, CommandKind::Cancel] {
        for target in [json!({"batch_id": id}), json!({"command_id": "m"})] {
            let result = world.ask(kind, &target).await;
            assert_eq!(result.code(), "500 outcome_unknown", "{kind} {target}: {}", result.body);
            assert!(result.error().contains(id), "{}", result.error());
        }
        let unknown = world.ask(kind, &json!({"batch_id": "btcal_nobodys"})).await;
        assert_eq!(unknown.code(), "404 not_found");
    }
    world.finish().await;
}

/// A cancel came while the batch was created. The key of another workspace gets a 404 for it, which is
/// no reason to let it call people.
#[tokio::test]
async fn a_batch_that_is_to_be_cancelled_is_not_given_up_for_a_key_that_does_not_see_it() {
    let mut world = world().await;
    world.start_worker(|_| {}).await;
    let slow = Effect::Latency(Duration::from_secs(1));
    world.sandbox.order(Fault::on(Route::Submit, slow));
    let away = Effect::vendor_error(503, "down", "Down.");
    world.sandbox.order(Fault::on(Route::Cancel, away).until_cleared());
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    until("it is sent", async || world.requests(Route::Submit) == 1).await;
    let cancel = json!({"command_id": "m"}).to_string();
    world.publish(CommandKind::Cancel, cancel.as_bytes(), with_id("cancel")).await;
    assert_eq!(world.next_result().await.code(), "200");
    until("it is to be cancelled", async || world.requests(Route::Cancel) > 0).await;
    world.stop_worker().await;
    world.sandbox.clear_faults();
    world.start_worker(with_key("other-key")).await;
    let unseen = world.next_result().await;
    assert_eq!(unseen.code(), "500 outcome_unknown", "{}", unseen.body);
    let asked = world.requests(Route::Cancel);
    until("it is tried again", async || world.requests(Route::Cancel) > asked).await;
    world.stop_worker().await;
    assert_ne!(world.sandbox.batches()[0].status, BatchStatus::Cancelled);
    world.start_worker(|_| {}).await;
    let is_cancelled = || world.sandbox.batches()[0].status == BatchStatus::Cancelled;
    until("it is cancelled", async || is_cancelled()).await;
    world.finish().await;
}

#[tokio::test]
async fn a_ledger_of_another_elevenlabs_is_refused_with_the_way_out() {
    let mut world = world().await;
    world.start_worker(|_| {}).await;
    world.submitted().await;
    world.stop_worker().await;
    let other = [("ELEVENLABS_BASE_URL", "http://127.0.0.1:9")];
    let worker = Process::start(&world, &world.ledger_url(), &other);
    worker.until_logged("is about the submits to").await;
    let log = worker.log();
    assert!(log.contains(&world.sandbox.base_url()) && log.contains("LEDGER_URL"), "{log}");
    assert_eq!(log.lines().filter(|line| line.starts_with("call-manager: ")).count(), 1, "{log}");
    world.start_worker(|settings| settings.settling_window = Duration::from_millis(300)).await;
    world.submitted().await;
    world.finish().await;
}
