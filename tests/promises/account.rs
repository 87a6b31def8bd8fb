//! While ElevenLabs refuses submits because of the account, they wait; gets and cancels go on.

use std::collections::HashSet;
use std::time::{Duration, SystemTime};

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{BatchStatus, Effect, Fault, Reply, Route};
use lapin::types::AMQPValue;
use serde_json::json;

use crate::process::Process;
use crate::support::wait::until_within;
use crate::support::{World, submit_body, until, with_header, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

/// The key is quoted, and must not be told.
const WORDS: &str = "Ask billing about sandbox-key";
const TOLD: &str = "Ask billing about [key]";

fn refusal(status: u16, code: &str) -> Effect {
    Effect::vendor_error(status, code, WORDS)
}

async fn publish(world: &World, id: &str) {
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(id)).await;
}

fn lines(worker: &Process, words: &str) -> usize {
    worker.log().lines().filter(|line| line.contains(words)).count()
}

async fn until_ready(worker: &Process) {
    until("it is ready", async || worker.ready().await.0 == 200).await;
}

async fn until_held(worker: &Process) {
    until("readiness says so", async || {
        let (code, said) = worker.ready().await;
        code == 503
            && said.contains("elevenlabs: ElevenLabs refused the request because of the account")
    })
    .await;
}

/// Ten submits outlast this refusal, and each is executed once.
async fn submits_wait_for_the_account(refused: Effect) {
    let mut world = World::without_worker().await;
    let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
    let batch = world.submitted().await;
    world.sandbox.order(Fault::on(Route::Submit, refused).until_cleared());
    publish(&world, "m-0").await;
    until_held(&worker).await;
    let (_, said) = worker.ready().await;
    assert!(said.contains(TOLD), "{said}");
    for n in 1..10 {
        publish(&world, &format!("m-{n}")).await;
    }
    let about = json!({"batch_id": batch});
    for kind in [CommandKind::Get, CommandKind::Cancel] {
        let answered = world.ask(kind, &about).await;
        assert_eq!(answered.code(), "200", "{}", answered.body);
    }
    assert_eq!(world.sandbox.batches()[0].status, BatchStatus::Cancelled);
    until("one tries again", async || world.requests(Route::Submit) > 2).await;
    let sent = world.requests(Route::Submit);
    assert!(sent < 6, "one at a time, not {sent}");
    world.sandbox.clear_faults();
    let mut executed = HashSet::new();
    while executed.len() < 10 {
        let result = world.result_within(Duration::from_secs(40)).await;
        assert_eq!(result.code(), "200", "{}", result.body);
        executed.insert(result.command_id());
    }
    assert_eq!(world.sandbox.batches().len(), 11, "once each");
    assert_eq!(world.requests(Route::Submit), sent + 10);
    until_ready(&worker).await;
    assert_eq!(lines(&worker, "takes no submits of this account"), 1, "{}", worker.log());
    assert_eq!(lines(&worker, "takes submits of this account again"), 1, "{}", worker.log());
    assert!(!worker.log().contains("sandbox-key"), "{}", worker.log());
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn submits_wait_for_a_payment() {
    submits_wait_for_the_account(refusal(402, "payment_required")).await;
}

#[tokio::test]
async fn submits_wait_for_credits() {
    submits_wait_for_the_account(refusal(402, "insufficient_credits")).await;
}

#[tokio::test]
async fn submits_wait_for_a_quota_that_an_older_route_names() {
    let detail = json!({"detail": {"status": "quota_exceeded", "message": WORDS}});
    submits_wait_for_the_account(Effect::Status(Reply::new(401).json(detail))).await;
}

#[tokio::test]
async fn submits_wait_for_an_agreement() {
    submits_wait_for_the_account(refusal(403, "batch_calling_agreement_required")).await;
}

#[tokio::test]
async fn of_two_names_the_current_one_counts() {
    let mut world = World::start().await;
    let named = |status: u16, code: &str, older: &str| {
        let detail = json!({"detail": {"code": code, "status": older, "message": WORDS}});
        Fault::on(Route::Submit, Effect::Status(Reply::new(status).json(detail)))
    };
    for (status, code) in [(400, "400 rejected_by_elevenlabs"), (403, "500 unauthorized")] {
        world.sandbox.order(named(status, "invalid_agent", "quota_exceeded"));
        assert_eq!(world.ask(SUBMIT, &submit_body()).await.code(), code);
    }
    world.sandbox.order(named(400, "quota_exceeded", "invalid_agent"));
    let result = world.ask(SUBMIT, &submit_body()).await;
    assert_eq!(result.code(), "200", "{}", result.body);
    assert_eq!(result.header("attempts").as_deref(), Some("2"));
    assert_eq!(world.sandbox.batches().len(), 1);
    world.finish().await;
}

#[tokio::test]
async fn a_list_that_answers_does_not_end_the_hold() {
    let mut world = World::without_worker().await;
    let patient = [("ELEVENLABS_TIMEOUT", "5s")];
    let worker = Process::consuming(&world, &world.ledger_url(), &patient).await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter));
    world.sandbox.order(Fault::on(Route::Submit, refusal(402, "payment_required")).until_cleared());
    world.sandbox.order(Fault::on(Route::List, Effect::Latency(Duration::from_secs(2))));
    publish(&world, "lost").await;
    until("it is searched for", async || world.requests(Route::List) > 0).await;
    publish(&world, "m").await;
    until_held(&worker).await;
    let found = world.next_result().await;
    assert_eq!((found.command_id().as_str(), found.code().as_str()), ("lost", "200"));
    publish(&world, "n").await;
    until_held(&worker).await;
    until("one tries again", async || world.requests(Route::Submit) > 2).await;
    until_held(&worker).await;
    world.sandbox.clear_faults();
    for _ in 0..2 {
        assert_eq!(world.result_within(Duration::from_secs(40)).await.code(), "200");
    }
    assert_eq!(world.sandbox.batches().len(), 3);
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn a_submit_that_waits_for_the_account_can_be_cancelled_in_advance() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Submit, refusal(402, "payment_required")).until_cleared());
    publish(&world, "m").await;
    until("it is refused", async || world.requests(Route::Submit) > 0).await;
    let cancel = json!({"command_id": "m"}).to_string();
    world.publish(CommandKind::Cancel, cancel.as_bytes(), with_id("cancel")).await;
    for _ in 0..2 {
        let result = world.next_result().await;
        let expected = match result.command_id().as_str() {
            "m" => "400 cancelled_before_submit",
            _ => "404 not_found",
        };
        assert_eq!(result.code(), expected, "{}", result.body);
    }
    assert!(world.sandbox.batches().is_empty());
    world.finish().await;
}

/// A batch that was cancelled while its submit was under way, and whose cancel failed.
#[tokio::test]
async fn what_is_still_to_be_cancelled_waits_for_no_credits() {
    let mut world = World::without_worker().await;
    let patient = [("ELEVENLABS_TIMEOUT", "5s")];
    let worker = Process::consuming(&world, &world.ledger_url(), &patient).await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_secs(2))));
    world.sandbox.order(Fault::on(Route::Submit, refusal(402, "payment_required")).until_cleared());
    // Until the cancel's own time is over.
    world.sandbox.order(Fault::on(Route::Cancel, Effect::Status(Reply::new(503))).times(7));
    publish(&world, "m").await;
    until("it is at ElevenLabs", async || world.requests(Route::Submit) == 1).await;
    let over = SystemTime::now() + Duration::from_secs(4);
    let over = over.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let over = AMQPValue::LongLongInt(over.try_into().unwrap());
    let cancel = json!({"command_id": "m"}).to_string();
    let properties = with_header("cancel", "not_after", over);
    world.publish(CommandKind::Cancel, cancel.as_bytes(), properties).await;
    for _ in 0..2 {
        let result = world.next_result().await;
        let is_submit = result.command_id() == "m";
        assert_eq!(result.code(), if is_submit { "200" } else { "500 outcome_unknown" });
    }
    publish(&world, "n").await;
    until_held(&worker).await;
    let status = || world.sandbox.batches()[0].status;
    assert_ne!(status(), BatchStatus::Cancelled, "nothing has cancelled it yet");
    let limit = Duration::from_secs(60);
    until_within(limit, "it is cancelled", async || status() == BatchStatus::Cancelled).await;
    until_held(&worker).await;
    worker.stop().await;
    // The other submit still waits.
    world.clean_up().await;
}

#[tokio::test]
async fn a_get_or_a_cancel_that_is_refused_for_the_account_is_tried_again_and_holds_nothing() {
    let mut world = World::start().await;
    let batch = world.submitted().await;
    for (kind, route) in [(CommandKind::Get, Route::Get), (CommandKind::Cancel, Route::Cancel)] {
        world.sandbox.order(Fault::on(route, refusal(401, "quota_exceeded")));
        let result = world.ask(kind, &json!({"batch_id": batch})).await;
        assert_eq!(result.code(), "200", "{}", result.body);
        assert_eq!(result.header("attempts").as_deref(), Some("2"));
        world.submitted().await;
    }
    assert_eq!(world.requests(Route::Submit), 3);
    world.finish().await;
}

/// What is refused in another form may have been done.
#[tokio::test]
async fn a_402_of_a_gateway_holds_nothing() {
    let mut world = World::start().await;
    let foreign = Reply::new(402).text("<html>pay the proxy</html>").processed();
    world.sandbox.order(Fault::on(Route::Submit, Effect::Status(foreign)));
    world.submitted().await;
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
    world.finish().await;
}
