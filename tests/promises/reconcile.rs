//! A submit whose answer was lost: its batch is looked for until it is found or surely not there.

use std::time::{Duration, Instant};

use call_manager::config::Settings;
use call_manager::domain::command::{CommandKind, marker};
use elevenlabs_sandbox::{Effect, Fault, Options, Reply, Route};
use futures_util::future::join_all;
use serde_json::{Value, json};

use crate::process::Process;
use crate::support::{LIMIT, Received, World, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

/// On the route, until it is cleared.
fn away(world: &World, route: Route, status: u16) {
    let effect = Effect::vendor_error(status, "a_code", "The vendor's words.");
    world.sandbox.order(Fault::on(route, effect).until_cleared());
}

/// The answer to the next submit is lost, after the vendor has done it or before.
fn lose_next(world: &World, done: bool) {
    let effect = if done { Effect::ResetAfter } else { Effect::ResetBefore };
    world.sandbox.order(Fault::on(Route::Submit, effect));
}

async fn submit(world: &World, id: &str) {
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(id)).await;
}

/// Submits, and the answer is lost while nobody can look for the batch, until the faults are cleared.
async fn submit_and_lose(world: &World, id: &str) {
    lose_next(world, true);
    away(world, Route::List, 503);
    submit(world, id).await;
}

/// The submit was sent once, and the result names the one batch that carries its marker.
#[track_caller]
fn assert_adopted(world: &World, result: &Received) {
    assert_eq!(result.code(), "200", "{}", result.body);
    let marker = json!(marker(&result.command_id()));
    let batches = world.sandbox.batches();
    let mut found = batches.iter().filter(|batch| {
        batch.recipients[0].dynamic_variables.get("call_manager_command_id") == Some(&marker)
    });
    let batch = found.next().expect("the batch of the submit");
    assert!(found.next().is_none(), "one batch");
    assert_eq!(result.json["data"]["id"], json!(batch.id));
    assert_eq!(result.header("attempts").as_deref(), Some("1"));
}

/// The submit was sent a second time, and the result names its batch.
#[track_caller]
fn assert_adopted_again(world: &World, result: &Received) {
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (2, 1));
    assert_eq!(result.json["data"]["id"], json!(world.sandbox.batches()[0].id));
}

fn short(settings: &mut Settings) {
    settings.retry_horizon = Duration::from_secs(1);
}

#[tokio::test]
async fn a_list_that_stays_away_past_the_horizon_leaves_the_outcome_unknown() {
    join_all([503, 404].map(async |status| {
        let mut world = World::with(short).await;
        lose_next(&world, true);
        away(&world, Route::List, status);
        submit(&world, "m-1").await;
        let result = world.next_result().await;
        assert_eq!(result.code(), "500 outcome_unknown", "HTTP {status}");
        for part in [
            "Nothing was sent again",
            &format!("call_manager_command_id = \"{}\"", marker("m-1")),
            "\"Recordatorio de cita\"",
            &format!("HTTP {status}"),
        ] {
            assert!(result.error().contains(part), "{part}: {}", result.error());
        }
        assert!(world.requests(Route::List) > 1, "it was tried again");
        // For good: who asks once more gets the same answer, with the list in order or not.
        world.sandbox.clear_faults();
        submit(&world, "m-1").await;
        result.assert_repeats(&world.next_result().await);
        assert_eq!(world.requests(Route::Submit), 1);
        world.finish().await;
    }))
    .await;
}

#[tokio::test]
async fn a_list_that_comes_back_is_read_and_the_batch_adopted() {
    join_all([503, 401, 429].map(async |status| {
        let mut world = World::start().await;
        lose_next(&world, true);
        away(&world, Route::List, status);
        submit(&world, "m").await;
        let asked = |world: &World| world.requests(Route::List) + world.probes();
        until("it was asked for twice, after the start", async || asked(&world) >= 3).await;
        world.sandbox.clear_faults();
        let result = world.next_result().await;
        assert_adopted(&world, &result);
        assert_eq!(world.requests(Route::Submit), 1, "HTTP {status}");
        world.finish().await;
    }))
    .await;
}

#[tokio::test]
async fn a_list_that_cannot_be_read_is_no_empty_list() {
    let effects = [
        Effect::Status(Reply::new(200).json(json!({"batch_calls": "none"}))),
        Effect::Status(Reply::new(200).json(json!({}))),
        Effect::Status(Reply::new(200).json(json!({"batch_calls": [{"id": "btcal_1"}]}))),
        Effect::Status(Reply::new(200).json(json!({"batch_calls": [], "has_more": "no"}))),
        Effect::Status(Reply::new(200).text("<html>maintenance</html>")),
        Effect::Truncated,
        Effect::Garbage,
    ];
    join_all(effects.map(async |effect| {
        let shown = format!("{effect:?}");
        let mut world = World::with(short).await;
        lose_next(&world, true);
        world.sandbox.order(Fault::on(Route::List, effect).until_cleared());
        submit(&world, "m").await;
        assert_eq!(world.next_result().await.code(), "500 outcome_unknown", "{shown}");
        assert_eq!(world.requests(Route::Submit), 1, "{shown}");
        world.finish().await;
    }))
    .await;
}

#[tokio::test]
async fn a_batch_that_shows_late_in_the_list_is_waited_for() {
    let lag = Duration::from_millis(900);
    let options = Options { speed: 0.0, list_lag: lag, ..Options::default() };
    let mut world = World::before(options).await;
    world.start_worker(|settings| settings.settling_window = lag * 2).await;
    lose_next(&world, true);
    submit(&world, "m").await;
    let result = world.next_result().await;
    assert_adopted(&world, &result);
    assert!(world.requests(Route::List) > 1, "it was not there at first");
    world.finish().await;
}

#[tokio::test]
async fn the_window_counts_from_the_end_of_the_request_and_one_look_after_it_is_enough() {
    let window = Duration::from_secs(2);
    let mut world = World::with(|settings| settings.settling_window = window).await;
    lose_next(&world, false);
    // However often the list is away meanwhile.
    away(&world, Route::List, 503);
    submit(&world, "m").await;
    until("the answer is lost", async || world.requests(Route::Submit) == 1).await;
    let lost = Instant::now();
    until("the window is over", async || lost.elapsed() > window).await;
    let looked = world.requests(Route::List);
    assert_eq!(world.requests(Route::Submit), 1);
    world.sandbox.clear_faults();
    let result = world.next_result().await;
    assert_adopted_again(&world, &result);
    assert_eq!(world.requests(Route::List), looked + 1, "one look that saw everything");
    world.finish().await;
}

#[tokio::test]
async fn a_batch_that_shows_within_the_window_is_found_however_slow_the_list_is() {
    let lag = Duration::from_secs(1);
    let options = Options { speed: 0.0, list_lag: lag, ..Options::default() };
    let mut world = World::before(options).await;
    world.start_worker(|settings| settings.settling_window = lag * 3 / 2).await;
    lose_next(&world, true);
    let slow = Effect::Latency(Duration::from_millis(700));
    world.sandbox.order(Fault::on(Route::List, slow).until_cleared());
    submit(&world, "m").await;
    let result = world.next_result().await;
    assert_adopted(&world, &result);
    world.finish().await;
}

#[tokio::test]
async fn the_equal_batch_of_another_command_is_not_adopted() {
    let mut world = World::start().await;
    submit(&world, "first").await;
    let first = world.next_result().await;
    assert_adopted(&world, &first);

    lose_next(&world, true);
    submit(&world, "second").await;
    let second = world.next_result().await;
    assert_adopted(&world, &second);
    assert_ne!(first.json["data"]["id"], second.json["data"]["id"]);
    assert_eq!(world.requests(Route::Submit), 2);

    lose_next(&world, false);
    submit(&world, "third").await;
    let third = world.next_result().await;
    assert_eq!(third.code(), "200", "{}", third.body);
    let ids: Vec<_> = world.sandbox.batches().into_iter().map(|batch| json!(batch.id)).collect();
    assert_eq!(ids.len(), 3, "neither of the two is the third one's");
    assert_eq!(third.json["data"]["id"], ids[2]);
    assert_eq!(world.requests(Route::Submit), 4);
    world.finish().await;
}

#[tokio::test]
async fn submits_with_equal_bodies_that_are_all_lost_at_once_find_each_its_own() {
    let mut world = World::start().await;
    let lost = Fault::on(Route::Submit, Effect::ResetAfter);
    world.sandbox.order(lost.times(10));
    for n in 0..10 {
        submit(&world, &format!("m-{n}")).await;
    }
    let mut answered = std::collections::HashSet::new();
    for _ in 0..10 {
        let result = world.next_result().await;
        assert_adopted(&world, &result);
        assert!(answered.insert(result.command_id()), "answered once");
    }
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (10, 10));
    world.finish().await;
}

/// Somebody else's program creates batches for the same agent.
async fn others_submit(world: &World, name: &str, count: usize) {
    let client = reqwest::Client::builder().no_proxy().timeout(LIMIT).build().unwrap();
    let url = format!("{}/v1/convai/batch-calling/submit", world.sandbox.base_url());
    let mut body = submit_body();
    body["call_name"] = name.into();
    // The same field that this worker marks its batches with, in forms it never has.
    for (recipient, marker) in
        body["recipients"].as_array_mut().unwrap().iter_mut().zip([json!(7), Value::Null])
    {
        let variables = json!({"call_manager_command_id": marker});
        *recipient = json!({
            "phone_number": "+14155550199",
            "conversation_initiation_client_data": {"dynamic_variables": variables},
        });
    }
    for _ in 0..count {
        let request = client.post(&url).header("xi-api-key", "sandbox-key").json(&body);
        let response = request.send().await.unwrap();
        assert_eq!(response.status(), 200, "{}", response.text().await.unwrap());
    }
}

#[tokio::test]
async fn a_lost_batch_is_found_behind_hundreds_of_newer_ones() {
    let mut world = World::start().await;
    submit_and_lose(&world, "m").await;
    until("it is looked for", async || world.requests(Route::List) > 0).await;
    others_submit(&world, "Another campaign", 320).await;
    // Of the same name, so that only their recipients tell them apart.
    others_submit(&world, "Recordatorio de cita", 30).await;
    let looks = world.requests(Route::List);
    world.sandbox.clear_faults();
    let result = world.next_result().await;
    assert_adopted(&world, &result);
    assert_eq!(world.sandbox.batches().len(), 351);
    assert!(world.requests(Route::List) - looks >= 4, "100 to a page");
    assert_eq!(world.requests(Route::Get), 31, "only what could be it is looked at closely");
    world.finish().await;
}

#[tokio::test]
async fn a_page_that_fails_in_the_middle_of_the_list_is_not_its_end() {
    let mut world = World::start().await;
    submit_and_lose(&world, "m").await;
    until("it is looked for", async || world.requests(Route::List) > 0).await;
    // The lost one lies on the second page from now on, and that page alone fails.
    others_submit(&world, "Another campaign", 120).await;
    world.sandbox.clear_faults();
    for _ in 0..2 {
        let passes = Effect::Latency(Duration::from_millis(1));
        world.sandbox.order(Fault::on(Route::List, passes));
        world.sandbox.order(Fault::on(Route::List, Effect::CloseBefore));
    }
    let result = world.next_result().await;
    assert_adopted(&world, &result);
    assert_eq!(world.requests(Route::Submit), 1 + 120);
    world.finish().await;
}

#[tokio::test]
async fn a_candidate_that_cannot_be_read_is_not_ruled_out() {
    join_all([503, 404, 401].map(async |status| {
        let mut world = World::start().await;
        lose_next(&world, true);
        away(&world, Route::Get, status);
        submit(&world, "m").await;
        until("it was tried again", async || world.requests(Route::Get) >= 2).await;
        assert_eq!(world.requests(Route::Submit), 1);
        world.sandbox.clear_faults();
        let result = world.next_result().await;
        assert_adopted(&world, &result);
        assert_eq!(world.requests(Route::Submit), 1, "HTTP {status}");
        world.finish().await;
    }))
    .await;
}

#[tokio::test]
async fn a_candidate_that_stays_unreadable_leaves_the_outcome_unknown() {
    let mut world = World::with(short).await;
    lose_next(&world, true);
    away(&world, Route::Get, 503);
    submit(&world, "m").await;
    assert_eq!(world.next_result().await.code(), "500 outcome_unknown");
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
    world.finish().await;
}

#[tokio::test]
async fn a_worker_that_is_killed_while_it_looks_leaves_the_batch_to_the_next_one() {
    let mut world = World::without_worker().await;
    let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
    submit_and_lose(&world, "m").await;
    until("it looks", async || world.requests(Route::List) > 0).await;
    worker.kill().await;
    world.sandbox.clear_faults();
    world.start_worker(|_| {}).await;
    let result = world.next_result().await;
    assert_adopted(&world, &result);
    assert_eq!(world.requests(Route::Submit), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_worker_that_is_stopped_while_it_looks_leaves_the_batch_to_the_next_one() {
    let mut world = World::start().await;
    submit_and_lose(&world, "m").await;
    until("it looks", async || world.requests(Route::List) > 0).await;
    world.stop_worker().await;
    world.sandbox.clear_faults();
    world.start_worker(|_| {}).await;
    let result = world.next_result().await;
    assert_adopted(&world, &result);
    assert_eq!(world.requests(Route::Submit), 1);
    world.finish().await;
}

#[tokio::test]
async fn an_adopted_batch_of_another_provider_carries_the_warning_too() {
    let mut world = World::start().await;
    let mut body = submit_body();
    body["phone_provider"] = "sip_trunk".into();
    let told = world.ask(SUBMIT, &body).await;
    lose_next(&world, true);
    let adopted = world.ask(SUBMIT, &body).await;
    assert_adopted(&world, &adopted);
    assert!(adopted.header("warning").unwrap().contains("sip_trunk"), "{:?}", adopted.properties);
    assert_eq!(adopted.header("warning"), told.header("warning"), "as one that was answered");
    world.finish().await;
}

#[tokio::test]
async fn an_empty_page_that_says_there_is_more_is_not_the_end_of_the_list() {
    let mut world = World::with(short).await;
    lose_next(&world, true);
    let page = json!({"batch_calls": [], "next_doc": "further-on", "has_more": true});
    let empty = Effect::Status(Reply::new(200).json(page));
    world.sandbox.order(Fault::on(Route::List, empty).until_cleared());
    submit(&world, "m-1").await;
    assert_eq!(world.next_result().await.code(), "500 outcome_unknown");
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
    world.finish().await;
}

#[tokio::test]
async fn a_batch_whose_recipients_show_no_marker_yet_is_looked_at_again() {
    let mut world = World::start().await;
    submit_and_lose(&world, "m-1").await;
    until("the batch is there", async || world.sandbox.batches().len() == 1).await;
    let id = &world.sandbox.batches()[0].id;
    world.sandbox.clear_faults();
    let bare = json!({"id": id, "recipients": [{"id": "r-1"}, {"id": "r-2"}]});
    world.sandbox.order(Fault::on(Route::Get, Effect::Status(Reply::new(200).json(bare))));
    let result = world.next_result().await;
    assert_adopted(&world, &result);
    assert!(world.requests(Route::Get) >= 2, "it was read once more");
    world.finish().await;
}
