//! What a producer asks for is what happens, and the answer is the vendor's.

use std::time::Duration;

use call_manager::domain::command::{COMMAND_ID_VARIABLE, CommandKind, marker};
use elevenlabs_sandbox::{BatchStatus, Body, Effect, Fault, Reply, Route};
use serde_json::json;
use uuid::Uuid;

use crate::support::node::Node;
use crate::support::{World, submit_body, with_id};

/// As the README gives it.
const README_SUBMIT: &str = include_str!("../../script/demo-submit.json");

#[tokio::test]
async fn the_readmes_own_submit_goes_through_and_is_readable_and_stoppable() {
    let mut world = World::start().await;
    let result = world.ask_bytes(CommandKind::Submit, README_SUBMIT.as_bytes()).await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(result.routing_key, "batch-calling.submit.succeeded");
    assert_eq!(result.json["data"]["scheduled_time_unix"], 1_696_435_200);
    let id = result.json["data"]["id"].as_str().unwrap().to_owned();
    let batches = world.sandbox.batches();
    assert_eq!(batches.len(), 1);
    let called: Vec<_> =
        batches[0].recipients.iter().map(|r| r.phone_number.clone().unwrap()).collect();
    assert!(called.contains(&"+0987654321".to_owned()), "{called:?}");

    let got = world.ask(CommandKind::Get, &json!({"batch_id": id})).await;
    assert_eq!(got.routing_key, "batch-calling.get.succeeded");
    assert_eq!(got.json["data"]["recipients"].as_array().unwrap().len(), called.len());

    let cancelled = world.ask(CommandKind::Cancel, &json!({"batch_id": id})).await;
    assert_eq!(cancelled.routing_key, "batch-calling.cancel.succeeded");
    assert_eq!(cancelled.json["data"]["status"], "cancelled");
    assert_eq!(world.sandbox.batches()[0].status, BatchStatus::Cancelled);
    world.finish().await;
}

#[tokio::test]
async fn dynamic_variables_reach_the_vendor_with_the_commands_own_marker() {
    let mut world = World::start().await;
    let result = world.ask(CommandKind::Submit, &submit_body()).await;
    let recipients = &world.sandbox.batches()[0].recipients;
    assert_eq!(recipients[0].dynamic_variables["nombre"], "Ana");
    assert_eq!(recipients[0].dynamic_variables["monto"], 12.5);
    for recipient in recipients {
        let marker = marker(&result.command_id());
        assert_eq!(recipient.dynamic_variables[COMMAND_ID_VARIABLE], marker);
    }
    let requests = world.sandbox.requests();
    let sent = requests.iter().find(|request| request.route == Route::Submit).unwrap();
    assert!(sent.body.get("phone_provider").is_none(), "it is no part of the vendor's request");
    world.finish().await;
}

#[tokio::test]
async fn the_data_is_what_the_vendor_answered_to_the_byte() {
    let mut world = World::start().await;
    let batch_id = world.submitted().await;
    let odd = format!(
        "{{\"zzz\": 1.0, \"id\":\"{batch_id}\",\n\t\"new_field\": {{\"b\":1e2,\"a\":12345678901234567890}}, \"status\":\"brand_new\"}}"
    );
    world.sandbox.order(Fault::on(
        Route::Get,
        Effect::Status(Reply {
            status: 200,
            body: Some(Body::Text(odd.clone())),
            retry_after: None,
            processed: false,
        }),
    ));
    let got = world.ask(CommandKind::Get, &json!({"batch_id": batch_id})).await;
    assert_eq!(got.body, format!("{{\"success\":true,\"data\":{odd}}}"));
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_of_a_batch_that_is_already_cancelled_succeeds() {
    let mut world = World::start().await;
    let id = world.submitted().await;
    for _ in 0..2 {
        let result = world.ask(CommandKind::Cancel, &json!({"batch_id": id})).await;
        assert_eq!(result.code(), "200", "{}", result.body);
        assert_eq!(result.json["data"]["status"], "cancelled");
    }
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_that_cannot_see_at_once_that_the_batch_is_cancelled_tries_again() {
    let mut world = World::start().await;
    let id = world.submitted().await;
    world.ask(CommandKind::Cancel, &json!({"batch_id": id})).await;
    world.sandbox.order(Fault::on(Route::Get, Effect::Status(Reply::new(503))));
    let result = world.ask(CommandKind::Cancel, &json!({"batch_id": id})).await;
    assert_eq!(result.code(), "200", "{}", result.body);
    world.finish().await;
}

#[tokio::test]
async fn a_cancel_of_a_batch_that_is_over_says_so() {
    let mut world = World::start().await;
    let id = world.submitted().await;
    world.sandbox.advance(Duration::from_secs(3600));
    let result = world.ask(CommandKind::Cancel, &json!({"batch_id": id})).await;
    assert_eq!(result.code(), "400 rejected_by_elevenlabs");
    // Also where the answer says nothing about the batch.
    let unpaid = Effect::vendor_error(402, "payment_required", "No credits.");
    for nothing in [Effect::Status(Reply::new(409)), unpaid] {
        world.sandbox.order(Fault::on(Route::Cancel, nothing).until_cleared());
        let asked = world.requests(Route::Cancel);
        let result = world.ask(CommandKind::Cancel, &json!({"batch_id": id})).await;
        assert_eq!(result.code(), "400 rejected_by_elevenlabs", "{}", result.body);
        assert!(result.error().contains("(the batch is completed)"), "{}", result.error());
        assert_eq!(world.requests(Route::Cancel), asked + 1, "nothing is tried again");
        world.sandbox.clear_faults();
    }
    world.finish().await;
}

#[tokio::test]
async fn unknown_ids_are_not_found() {
    let mut world = World::start().await;
    for kind in [CommandKind::Get, CommandKind::Cancel] {
        let result = world.ask(kind, &json!({"batch_id": "btcal_nobody"})).await;
        assert_eq!(result.code(), "404 not_found");
    }
    let mut submit = submit_body();
    submit["agent_id"] = json!("agent_missing_1");
    assert_eq!(world.ask(CommandKind::Submit, &submit).await.code(), "404 not_found");
    assert_eq!(world.sandbox.batches().len(), 0);
    world.finish().await;
}

#[tokio::test]
async fn another_phone_provider_than_expected_is_a_warning_on_a_success() {
    let mut world = World::start().await;
    let mut submit = submit_body();
    submit["phone_provider"] = json!("twilio");
    assert_eq!(world.ask(CommandKind::Submit, &submit).await.header("warning"), None);
    submit["phone_provider"] = json!("sip_trunk");
    let result = world.ask(CommandKind::Submit, &submit).await;
    assert_eq!(result.code(), "200");
    let warning = result.header("warning").unwrap();
    assert!(warning.starts_with("phone_provider is sip_trunk in the command"), "{warning}");
    assert!(warning.contains("belongs to twilio"), "{warning}");
    world.finish().await;
}

#[tokio::test]
async fn a_message_straight_to_the_queue_is_as_good_as_one_to_the_exchange() {
    let mut world = World::start().await;
    for kind in CommandKind::ALL {
        let id = Uuid::now_v7().to_string();
        let body = match kind {
            CommandKind::Submit => submit_body(),
            _ => json!({"batch_id": "btcal_nobody"}),
        };
        let queue = world.topology.queue(kind);
        world.publish_to("", &queue, body.to_string().as_bytes(), with_id(&id)).await;
        let result = world.next_result().await;
        assert_eq!(result.command_id(), id);
        let expected = if kind == CommandKind::Submit { "200" } else { "404 not_found" };
        assert_eq!(result.code(), expected, "{}", result.body);
    }
    world.finish().await;
}

#[tokio::test]
async fn ten_thousand_recipients_go_through() {
    let mut world = World::start().await;
    let mut submit = submit_body();
    let recipients = (0..10_000).map(|n| {
        json!({"phone_number": format!("+1{n:09}"), "dynamic_variables": {"nombre": format!("Persona {n}")}})
    });
    submit["recipients"] = recipients.collect();
    let result = world.ask(CommandKind::Submit, &submit).await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(world.sandbox.batches()[0].recipients.len(), 10_000);
    world.finish().await;
}

#[tokio::test]
async fn large_answers_go_through_many_at_a_time() {
    let mut world = World::start().await;
    let mut submit = submit_body();
    submit["recipients"] = (0..500).map(|n| json!({"phone_number": format!("+1{n:09}")})).collect();
    let result = world.ask(CommandKind::Submit, &submit).await;
    let reference = json!({"batch_id": result.json["data"]["id"]}).to_string();
    for n in 0..40 {
        let id = format!("m-{n}");
        world.publish(CommandKind::Get, reference.as_bytes(), with_id(&id)).await;
    }
    for _ in 0..40 {
        let result = world.next_result().await;
        assert!(result.body.len() > 100_000, "more than a shared channel takes");
        assert_eq!(result.json["data"]["recipients"].as_array().unwrap().len(), 500);
    }
    world.finish().await;
}

#[tokio::test]
async fn an_answer_that_is_too_large_for_the_broker_is_a_clear_failure_and_harms_nobody() {
    let node = Node::with("max_message_size = 1000000").await;
    let mut world = World::at(node.amqp_url()).await;
    world.start_worker(|_| {}).await;
    let id = world.submitted().await;
    let answer = format!("{{\"id\":\"{id}\",\"padding\":\"{}\"}}", "x".repeat(1_100_000));
    let answered = Effect::Status(Reply::new(200).text(&answer));
    world.sandbox.order(Fault::on(Route::Get, answered).until_cleared());
    let result = world.ask(CommandKind::Get, &json!({"batch_id": id})).await;
    assert_eq!(result.code(), "500 upstream_unavailable");
    assert!(result.error().contains("has to raise max_message_size"), "{}", result.error());
    assert_eq!(result.header("attempts").as_deref(), Some("1"), "the vendor was asked once");
    world.finish().await;
}

#[tokio::test]
async fn the_same_submit_published_often_is_one_batch_and_one_result() {
    let mut world = World::start().await;
    let body = submit_body().to_string();
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_millis(300))));
    for _ in 0..20 {
        world.publish(CommandKind::Submit, body.as_bytes(), with_id("same")).await;
    }
    let first = world.next_result().await;
    for _ in 1..20 {
        let next = world.next_result().await;
        assert_eq!(
            (next.body.as_str(), next.message_id()),
            (first.body.as_str(), first.message_id())
        );
    }
    assert_eq!(world.sandbox.batches().len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn an_id_used_again_with_another_body_is_refused_and_answered_as_itself() {
    let mut world = World::start().await;
    let first = {
        world
            .publish(CommandKind::Submit, submit_body().to_string().as_bytes(), with_id("same"))
            .await;
        world.next_result().await
    };
    let mut other = submit_body();
    other["call_name"] = json!("Otra campaña");
    world.publish(CommandKind::Submit, other.to_string().as_bytes(), with_id("same")).await;
    let refused = world.next_result().await;
    assert_eq!(refused.code(), "400 command_id_reused");
    assert_ne!(refused.message_id(), first.message_id());
    assert_eq!(world.sandbox.batches().len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn cancels_do_not_wait_behind_submits() {
    let mut world = World::with(|settings| {
        settings.broker.prefetch = 2;
        // The submits hang; there is no need to wait for them at the end.
        settings.shutdown_grace = Duration::from_millis(100);
    })
    .await;
    let id = world.submitted().await;
    world
        .sandbox
        .order(Fault::on(Route::Submit, Effect::Hang { processed: false }).until_cleared());
    for n in 0..10 {
        let id = format!("slow-{n}");
        world
            .publish(CommandKind::Submit, submit_body().to_string().as_bytes(), with_id(&id))
            .await;
    }
    let result = world.ask(CommandKind::Cancel, &json!({"batch_id": id})).await;
    assert_eq!(result.code(), "200");
    world.stop_worker().await;
    world.clean_up().await;
}
