//! Answers that are not ElevenLabs' own: of a gateway in front, of another address, or with the API key
//! in them.

use std::time::Duration;

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{BatchStatus, Effect, Fault, Reply, Route};
use serde_json::{Value, json};

use crate::process::Process;
use crate::support::{World, submit_body, until, with_id};

const KEY: &str = "sandbox-key";

fn foreign(status: u16, body: &str) -> Effect {
    Effect::Status(Reply::new(status).text(body))
}

async fn thirty_commands_outlast(effect: Effect, processed: bool) {
    let mut world = World::start().await;
    let batch = world.submitted().await;
    let effect = match effect {
        Effect::Status(reply) if processed => Effect::Status(reply.processed()),
        other => other,
    };
    world.sandbox.order(Fault::on(Route::Any, effect).until_cleared());
    for n in 0..10 {
        for kind in CommandKind::ALL {
            let about = json!({"batch_id": batch});
            let body = if kind == CommandKind::Submit { submit_body() } else { about };
            let id = with_id(&format!("{kind}-{n}"));
            world.publish(kind, body.to_string().as_bytes(), id).await;
        }
    }
    until("ElevenLabs is found to be unavailable", async || world.probes() > 3).await;
    world.sandbox.clear_faults();
    for _ in 0..30 {
        let result = world.next_result().await;
        assert_eq!(result.code(), "200", "{}", result.body);
    }
    assert_eq!(world.sandbox.batches().len(), 11, "one each");
    world.finish().await;
}

#[tokio::test]
async fn a_gateway_that_knows_no_path_fails_no_command() {
    thirty_commands_outlast(foreign(404, "<html>404 Not Found</html>"), false).await;
}

#[tokio::test]
async fn a_gateway_that_refuses_what_was_done_makes_no_second_batch() {
    thirty_commands_outlast(foreign(400, "bad request"), true).await;
}

#[tokio::test]
async fn a_limit_of_a_gateway_is_no_word_of_elevenlabs() {
    let mut world = World::start().await;
    let limited = Reply::new(429).text("<html>slow down</html>").retry_after("1").processed();
    world.sandbox.order(Fault::on(Route::Submit, Effect::Status(limited)));
    let result = world.ask(CommandKind::Submit, &submit_body()).await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
    world.finish().await;
}

#[tokio::test]
async fn an_address_that_is_no_elevenlabs_is_told_before_commands_are_taken() {
    let plain = json!({"detail": "Not Found"});
    for effect in [
        foreign(404, "<html>nothing here</html>"),
        foreign(200, "<html>welcome</html>"),
        Effect::Status(Reply::new(404).json(plain)),
    ] {
        let mut world = World::without_worker().await;
        world.sandbox.order(Fault::on(Route::Any, effect).until_cleared());
        let body = submit_body().to_string();
        world.publish(CommandKind::Submit, body.as_bytes(), with_id("m")).await;
        let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
        let (code, said) = worker.ready().await;
        assert!(code == 503 && said.contains("elevenlabs: "), "{said}");
        assert_eq!(world.queue(&world.topology.queue(CommandKind::Submit)).await, (1, 0));
        assert_eq!(world.requests(Route::Submit), 0);
        world.sandbox.clear_faults();
        assert_eq!(world.next_result().await.code(), "200");
        worker.stop().await;
        world.finish().await;
    }
}

#[tokio::test]
async fn a_batch_id_that_names_another_route_is_refused() {
    let mut world = World::start().await;
    for id in ["workspace", "submit"] {
        for kind in [CommandKind::Cancel, CommandKind::Get] {
            let result = world.ask(kind, &json!({"batch_id": id})).await;
            assert_eq!(result.code(), "400 invalid_command");
            assert!(result.error().contains("another route"), "{}", result.error());
        }
    }
    assert_eq!(world.asked(), 0);
    world.finish().await;
}

#[tokio::test]
async fn the_api_key_is_in_no_result() {
    let mut world = World::start().await;
    let batch = world.submitted().await;
    let quoted = format!("The key {KEY} may not do that");
    let get = json!({"batch_id": batch});
    let said = Effect::vendor_error(400, "refused", &quoted);
    world.sandbox.order(Fault::on(Route::Get, said));
    let result = world.ask(CommandKind::Get, &get).await;
    assert!(result.error().contains("The key [key] may not do that"), "{}", result.error());
    let answer = json!({"id": batch, "debug": {"xi-api-key": KEY}});
    world.sandbox.order(Fault::on(Route::Get, Effect::Status(Reply::new(200).json(answer))));
    let result = world.ask(CommandKind::Get, &get).await;
    assert_eq!(result.json["data"]["debug"]["xi-api-key"], Value::from("[key]"));
    // What is found in the list becomes a result, too.
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter));
    world.sandbox.distort(|route, page| {
        let batches = page["batch_calls"].as_array_mut().filter(|_| route == Route::List);
        batches.into_iter().flatten().for_each(|batch| batch["debug"] = json!(KEY));
    });
    let result = world.ask(CommandKind::Submit, &submit_body()).await;
    assert_eq!((result.code().as_str(), &result.json["data"]["debug"]), ("200", &json!("[key]")));
    world.finish().await;
}

/// A replica that is behind, or a route that a gateway does not know yet.
#[tokio::test]
async fn a_batch_that_a_get_shows_is_not_called_unknown_by_its_cancel() {
    let mut world = World::start().await;
    let batch = world.submitted().await;
    let missing = Effect::vendor_error(404, "not_found", "No such batch.");
    world.sandbox.order(Fault::on(Route::Cancel, missing));
    let result = world.ask(CommandKind::Cancel, &json!({"batch_id": batch})).await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(world.requests(Route::Cancel), 2);
    assert_eq!(world.sandbox.batches()[0].status, BatchStatus::Cancelled);
    world.finish().await;
}

#[tokio::test]
async fn the_api_key_is_not_shown_by_readiness() {
    let world = World::without_worker().await;
    let quoted = format!("Invalid API key: {KEY}");
    let refused = Effect::vendor_error(401, "invalid_api_key", &quoted);
    world.sandbox.order(Fault::on(Route::Any, refused).until_cleared());
    let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
    let (code, said) = worker.ready().await;
    assert!(code == 503 && said.contains("Invalid API key: [key]"), "{said}");
    assert!(!worker.log().contains(KEY), "{}", worker.log());
    world.sandbox.clear_faults();
    let ready = async || worker.ready().await.0 == 200;
    tokio::time::timeout(Duration::from_secs(20), until("it is ready", ready)).await.unwrap();
    worker.stop().await;
    world.finish().await;
}
