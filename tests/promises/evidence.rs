//! What ElevenLabs gives back may be redacted, retyped, trimmed, normalised or somebody else's: a batch
//! is ruled out by evidence against it, and what stays undecided is never sent again.

use call_manager::domain::command::{CommandKind, marker};
use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use serde_json::{Value, json};

use crate::support::{Received, World, submit_body, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;
const MARKER: &str = "call_manager_command_id";

/// Changes each recipient of a batch.
fn each_recipient(batch: &mut Value, change: impl Fn(&mut Value)) {
    for recipient in batch["recipients"].as_array_mut().into_iter().flatten() {
        change(recipient);
    }
}

fn client_data(recipient: &mut Value) -> &mut Value {
    &mut recipient["conversation_initiation_client_data"]
}

fn set_marker(batch: &mut Value, change: impl Fn(&str) -> Value) {
    each_recipient(batch, |recipient| {
        let marker = &mut client_data(recipient)["dynamic_variables"][MARKER];
        *marker = change(marker.as_str().unwrap());
    });
}

/// Changes each batch of a list.
fn each_listed(page: &mut Value, change: impl Fn(&mut Value)) {
    for batch in page["batch_calls"].as_array_mut().into_iter().flatten() {
        change(batch);
    }
}

fn redact(batch: &mut Value) {
    each_recipient(batch, |recipient| *client_data(recipient) = Value::Null);
}

/// The answer to a submit is lost after ElevenLabs has done it, and what comes back is changed so.
async fn after_a_lost_answer(id: &str, change: fn(Route, &mut Value)) -> (World, Received) {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter));
    world.sandbox.distort(change);
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(id)).await;
    let result = world.next_result().await;
    assert_eq!(world.sandbox.batches().len(), 1, "{}", result.body);
    assert_eq!(world.requests(Route::Submit), 1, "{}", result.body);
    (world, result)
}

async fn stays_unknown(id: &str, change: fn(Route, &mut Value)) {
    let (world, result) = after_a_lost_answer(id, change).await;
    assert_eq!(result.code(), "500 outcome_unknown", "{}", result.body);
    let batch = world.sandbox.batches()[0].id.clone();
    assert!(result.error().contains(&batch), "it names the batch: {}", result.error());
    assert!(result.error().contains(&marker(id)), "{}", result.error());
    world.finish().await;
}

async fn is_found(id: &str, change: fn(Route, &mut Value)) {
    let (world, result) = after_a_lost_answer(id, change).await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(result.json["data"]["id"], json!(world.sandbox.batches()[0].id));
    world.finish().await;
}

#[tokio::test]
async fn a_batch_without_its_marker_leaves_the_outcome_unknown() {
    stays_unknown("m", |_, batch| redact(batch)).await;
}

#[tokio::test]
async fn a_batch_whose_marker_is_a_number_or_masked_leaves_the_outcome_unknown() {
    stays_unknown("12345", |_, batch| set_marker(batch, |_| json!(12345))).await;
    stays_unknown("m", |_, batch| set_marker(batch, |_| json!("***"))).await;
}

#[tokio::test]
async fn a_batch_without_recipients_or_with_masked_numbers_leaves_the_outcome_unknown() {
    stays_unknown("m", |route, batch| {
        if route == Route::Get {
            batch["recipients"] = json!([]);
        }
    })
    .await;
    stays_unknown("m", |_, batch| {
        redact(batch);
        each_recipient(batch, |recipient| recipient["phone_number"] = json!("+1415***0100"));
    })
    .await;
}

#[tokio::test]
async fn a_marker_that_was_trimmed_or_changed_its_case_is_recognised() {
    is_found(" m ", |_, batch| set_marker(batch, |marker| json!(format!(" {marker}\n")))).await;
    is_found("m", |_, batch| set_marker(batch, |marker| json!(marker.to_uppercase()))).await;
}

#[tokio::test]
async fn a_name_that_was_normalised_hides_no_batch() {
    is_found("m", |_, page| {
        each_listed(page, |batch| batch["name"] = json!("recordatorio-de-cita"));
    })
    .await;
    stays_unknown("m", |_, answer| {
        each_listed(answer, |batch| batch["name"] = json!("RECORDATORIO"));
        redact(answer);
    })
    .await;
}

#[tokio::test]
async fn a_marker_that_can_be_read_counts_for_more_than_a_name_a_time_or_an_agent() {
    is_found("m", |_, page| each_listed(page, |batch| batch["name"] = json!("Another"))).await;
    is_found("m", |_, page| each_listed(page, |batch| batch["agent_id"] = json!("agent_x"))).await;
    is_found("m", |_, page| each_listed(page, |batch| batch["created_at_unix"] = json!(0))).await;
    is_found("m", |_, page| {
        each_listed(page, |batch| {
            let created = batch["created_at_unix"].as_i64().unwrap();
            batch["created_at_unix"] = json!(created - 6 * 60 * 60);
        });
    })
    .await;
}

#[tokio::test]
async fn what_is_masked_or_retyped_rules_nothing_out() {
    stays_unknown("m", |_, answer| {
        redact(answer);
        each_listed(answer, |batch| batch["name"] = json!("Record•••••• de ••••"));
    })
    .await;
    stays_unknown("m", |_, answer| {
        redact(answer);
        each_recipient(answer, |recipient| recipient["phone_number"] = json!(14_155_550_199.5));
        each_listed(answer, |batch| batch["created_at_unix"] = json!("20261122"));
    })
    .await;
}

/// Something in between answers in a form that could be a batch's.
#[tokio::test]
async fn an_answer_that_is_not_about_what_was_sent_is_searched_for() {
    for answer in [
        json!({"id": "req-1", "status": "accepted"}),
        json!({"id": "btcal_2", "name": "Another campaign", "agent_id": "agent_1"}),
        json!({"id": "btcal_2", "name": "Recordatorio de cita", "agent_id": "agent_2"}),
    ] {
        let mut world = World::start().await;
        let accepted = Reply::new(202).json(answer).processed();
        world.sandbox.order(Fault::on(Route::Submit, Effect::Status(accepted)));
        world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
        let result = world.next_result().await;
        assert_eq!(result.code(), "200", "{}", result.body);
        assert_eq!(result.json["data"]["id"], json!(world.sandbox.batches()[0].id));
        assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
        world.finish().await;
    }
}

#[tokio::test]
async fn a_list_without_names_and_times_hides_no_batch() {
    is_found("m", |_, page| {
        each_listed(page, |batch| {
            batch["name"] = Value::Null;
            batch["created_at_unix"] = json!("a moment ago");
            batch["agent_id"] = Value::Null;
        });
    })
    .await;
}

#[tokio::test]
async fn numbers_that_are_written_in_another_way_are_no_evidence() {
    stays_unknown("m", |_, batch| {
        redact(batch);
        each_recipient(batch, |recipient| {
            let number = recipient["phone_number"].as_str().unwrap().trim_start_matches('+');
            recipient["phone_number"] = json!(number.parse::<u64>().unwrap());
        });
    })
    .await;
}

/// The next submit does not arrive, so that nothing but evidence speaks against the batches there are.
async fn is_sent_again(world: &mut World, id: &str) {
    let (sent, batches) = (world.requests(Route::Submit), world.sandbox.batches().len());
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetBefore));
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(id)).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(world.requests(Route::Submit), sent + 2);
    assert_eq!(world.sandbox.batches().len(), batches + 1);
}

#[tokio::test]
async fn what_the_ledger_knows_to_be_anothers_is_ruled_out() {
    let mut world = World::start().await;
    world.submitted().await;
    // A worker that has seen none of it itself.
    world.stop_worker().await;
    world.start_worker(|_| {}).await;
    world.sandbox.distort(|_, batch| redact(batch));
    is_sent_again(&mut world, "m").await;
    world.finish().await;
}

#[tokio::test]
async fn what_calls_other_people_or_another_commands_is_ruled_out() {
    let mut world = World::start().await;
    let mut others = submit_body();
    for recipient in others["recipients"].as_array_mut().unwrap() {
        recipient["phone_number"] = json!("+525590001234");
    }
    others["recipients"].as_array_mut().unwrap().truncate(1);
    let client = reqwest::Client::builder().no_proxy().build().unwrap();
    let url = format!("{}/v1/convai/batch-calling/submit", world.sandbox.base_url());
    let mut stranger = others.clone();
    stranger["recipients"][0].as_object_mut().unwrap().remove("dynamic_variables");
    stranger.as_object_mut().unwrap().remove("phone_provider");
    let request = client.post(url).header("xi-api-key", "sandbox-key").json(&stranger);
    assert_eq!(request.send().await.unwrap().status(), 200);
    is_sent_again(&mut world, "m").await;
    world.finish().await;
}

#[tokio::test]
async fn a_call_that_was_made_proves_that_its_batch_exists() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter));
    world
        .sandbox
        .order(Fault::on(Route::List, Effect::vendor_error(503, "down", "Down.")).times(3));
    // The list does not show it, and its recipients nothing.
    world.sandbox.distort(|route, answer| match route {
        Route::List => answer["batch_calls"] = json!([]),
        _ => redact(answer),
    });
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    crate::support::until("its batch is there", async || world.sandbox.batches().len() == 1).await;
    world.sandbox.advance(std::time::Duration::from_secs(60));
    let result = world.next_result().await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(result.json["data"]["id"], json!(world.sandbox.batches()[0].id));
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
    world.finish().await;
}
