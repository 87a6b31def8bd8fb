//! While ElevenLabs cannot be used, commands wait in their queue; none fails, and cancels go first.

use std::cell::Cell;
use std::collections::HashMap;
use std::net::TcpListener;
use std::time::{Duration, Instant, SystemTime};

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Reply, Route};
use lapin::types::AMQPValue;
use serde_json::json;

use crate::start::Process;
use crate::support::proxy::Proxy;
use crate::support::{Received, World, submit_body, until, with_header, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

fn status(status: u16) -> Effect {
    Effect::vendor_error(status, "a_code", "The vendor's words.")
}

async fn publish_submits(world: &World, count: usize) {
    let body = submit_body().to_string();
    for n in 0..count {
        world.publish(SUBMIT, body.as_bytes(), with_id(&format!("m-{n}"))).await;
    }
}

/// The results of so many different commands, by command id.
async fn results(world: &mut World, count: usize) -> HashMap<String, Received> {
    let mut results = HashMap::new();
    while results.len() < count {
        let result = world.next_result().await;
        results.insert(result.command_id(), result);
    }
    results
}

async fn ready_in_queue(world: &World, kind: CommandKind) -> u32 {
    world.queue(&world.topology.queue(kind)).await.0
}

/// Until the worker leaves what comes in the queue, and has nothing in hand: the broker counts a
/// consumer for as long as something that it took is unsettled.
async fn until_resting(world: &World) {
    let queue = world.topology.queue(SUBMIT);
    until("submits are not taken", async || world.queue(&queue).await.1 == 0).await;
}

#[tokio::test]
async fn an_outage_fails_nothing_and_what_waited_is_done_within_seconds_of_its_end() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Any, status(503)).until_cleared());
    publish_submits(&world, 200).await;
    until_resting(&world).await;
    assert!(ready_in_queue(&world, SUBMIT).await >= 100, "the backlog waits in its queue");
    let sent = world.requests(Route::Submit);
    assert!(sent <= 64, "{sent} requests to submit: what is in hand, and nothing more");
    let probes = world.probes();
    until("it is probed", async || world.probes() >= probes + 3).await;
    assert_eq!(world.requests(Route::Submit), sent, "never with a submit");
    world.sandbox.clear_faults();
    let back = Instant::now();
    let results = results(&mut world, 200).await;
    assert!(results.values().all(|result| result.code() == "200"));
    assert!(back.elapsed() < Duration::from_secs(20), "{:?}", back.elapsed());
    assert_eq!(world.sandbox.batches().len(), 200);
    world.finish().await;
}

#[tokio::test]
async fn a_vendor_that_nobody_can_connect_to_is_waited_for() {
    let mut world = World::without_worker().await;
    let nobody = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let url = format!("http://{nobody}");
    let elsewhere = [("ELEVENLABS_BASE_URL", url.as_str())];
    let worker = crate::process::Process::consuming(&world, &world.ledger_url(), &elsewhere).await;
    publish_submits(&world, 3).await;
    until("it says so", async || {
        worker.ready().await.1.contains("elevenlabs: no connection to ElevenLabs could be made")
    })
    .await;
    let sandbox = world.sandbox.base_url().strip_prefix("http://").unwrap().parse().unwrap();
    let _vendor = Proxy::at(nobody, sandbox).await;
    let results = results(&mut world, 3).await;
    assert!(results.values().all(|result| result.code() == "200"));
    assert_eq!(world.requests(Route::Submit), 3);
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn a_key_that_was_changed_fails_no_campaign_however_long_it_takes() {
    let mut world = World::with(|settings| settings.retry_horizon = Duration::from_secs(8)).await;
    world.sandbox.order(Fault::on(Route::Any, status(401)).until_cleared());
    // As many as are in hand at a time: each of them has waited.
    publish_submits(&world, 60).await;
    until_resting(&world).await;
    // Past the horizon and the time in hand: into a delay queue and out of it again.
    let retry = world.topology.delay(call_manager::broker::Delay::Short);
    until("what was in hand is deferred", async || world.queue(&retry).await.0 > 0).await;
    let most = Cell::new(0);
    until("some of it comes back", async || {
        let there = world.queue(&retry).await.0;
        most.set(most.get().max(there));
        there < most.get()
    })
    .await;
    let sent = world.requests(Route::Submit);
    world.sandbox.clear_faults();
    // What they waited for the key is not held against them.
    world.sandbox.order(Fault::on(Route::Submit, status(429)).times(10));
    let results = results(&mut world, 60).await;
    let wrong: Vec<_> = results.values().filter(|result| result.code() != "200").collect();
    assert!(wrong.is_empty(), "{}", wrong[0].body);
    assert_eq!(world.sandbox.batches().len(), 60);
    assert_eq!(world.requests(Route::Submit), sent + 10 + 60, "once each when the key is good");
    world.finish().await;
}

#[tokio::test]
async fn a_command_that_alone_is_refused_to_the_key_fails_alone() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Submit, status(403)));
    let refused = world.ask(SUBMIT, &submit_body()).await;
    assert_eq!(refused.code(), "500 unauthorized");
    assert!(refused.error().contains("which it accepts otherwise"), "{}", refused.error());
    assert!(!world.submitted().await.is_empty(), "the next one goes through at once");
    world.finish().await;
}

#[tokio::test]
async fn a_time_that_elevenlabs_asks_for_is_given_to_it_by_all_commands_but_cancels() {
    let mut world = World::start().await;
    let id = world.submitted().await;
    let asked = Duration::from_secs(4);
    let limited = Effect::Status(
        Reply::vendor_error(429, "rate_limit_exceeded", "Slow down.").retry_after("4"),
    );
    world.sandbox.order(Fault::on(Route::Submit, limited));
    publish_submits(&world, 1).await;
    until("it was turned away", async || world.requests(Route::Submit) == 2).await;
    let since = Instant::now();
    let body = json!({"batch_id": id}).to_string();
    world.publish(CommandKind::Cancel, body.as_bytes(), with_id("cancel")).await;
    assert_eq!(world.next_result().await.command_id(), "cancel", "people are left alone at once");
    world.publish(CommandKind::Get, body.as_bytes(), with_id("get")).await;
    assert!(since.elapsed() < asked / 2, "{:?}", since.elapsed());
    let before = world.sandbox.requests();
    let results = results(&mut world, 2).await;
    assert!(results.values().all(|result| result.code() == "200"));
    // The first thing that is asked of it again, of any kind.
    let turned_away = before.iter().rfind(|request| request.route == Route::Submit).unwrap().at;
    let next = world.sandbox.requests()[before.len()].at;
    assert!(next - turned_away >= asked * 9 / 10, "{:?}", next - turned_away);
    world.finish().await;
}

#[tokio::test]
async fn when_elevenlabs_is_back_cancels_are_tried_first() {
    let mut world = World::start().await;
    let id = world.submitted().await;
    world.sandbox.order(Fault::on(Route::Any, status(503)).until_cleared());
    publish_submits(&world, 100).await;
    until_resting(&world).await;
    let body = json!({"batch_id": id}).to_string();
    for n in 0..30 {
        let id = with_id(&format!("cancel-{n}"));
        world.publish(CommandKind::Cancel, body.as_bytes(), id).await;
    }
    let before = world.sandbox.requests().len();
    world.sandbox.clear_faults();
    assert!(results(&mut world, 130).await.values().all(|result| result.code() == "200"));
    let requests = world.sandbox.requests();
    let of = |route: Route| {
        let mut after = requests.iter().enumerate().skip(before);
        after.find(|(_, request)| request.route == route && request.status == Some(200))
    };
    let first_submit = of(Route::Submit).expect("submits went through").0;
    let cancels = requests[..first_submit].iter().filter(|request| request.route == Route::Cancel);
    assert_eq!(cancels.count(), 30, "all cancels that waited went before the first submit");
    world.finish().await;
}

#[tokio::test]
async fn readiness_names_what_cannot_be_used_and_liveness_stays_green() {
    let mut world = World::without_worker().await;
    let process = Process::start(&world, &[]).await;
    until("it is ready", async || process.get("/health/ready").await.0 == 200).await;
    let (_, body) = process.get("/health/ready").await;
    let parts = ["worker", "broker", "publisher", "ledger", "elevenlabs"];
    assert!(parts.iter().all(|part| body["parts"][part] == "ok"), "{body}");

    world.sandbox.order(Fault::on(Route::Any, status(401)).until_cleared());
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    until("it says so", async || process.get("/health/ready").await.0 == 503).await;
    let (_, body) = process.get("/health/ready").await;
    let said = body["missing"][0].as_str().unwrap();
    assert!(said.starts_with("elevenlabs: ElevenLabs refused the request (HTTP 401)"), "{body}");
    assert_eq!((&body["parts"]["broker"], &body["parts"]["ledger"]), (&"ok".into(), &"ok".into()));
    assert_eq!(process.get("/health").await.0, 200);

    world.sandbox.clear_faults();
    assert_eq!(world.next_result().await.code(), "200");
    until("it is ready again", async || process.get("/health/ready").await.0 == 200).await;
    process.signal("TERM");
    assert_eq!(process.ended().await.0, Some(0));
    world.finish().await;
}

#[tokio::test]
async fn a_lost_submit_past_its_time_waits_for_the_key_without_asking_all_the_time() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::ResetAfter));
    world.sandbox.order(Fault::on(Route::List, status(401)).until_cleared());
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let properties = with_header("m", "not_after", AMQPValue::Timestamp(now + 3));
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties).await;
    let since = Instant::now();
    until("its time is over", async || since.elapsed() >= Duration::from_secs(6)).await;
    let looked = world.requests(Route::List) + world.probes();
    assert!(looked < 30, "{looked} looks in 6 s");
    world.sandbox.clear_faults();
    assert_eq!(world.next_result().await.code(), "200", "its batch exists");
    world.finish().await;
}

#[tokio::test]
async fn a_stop_sends_nothing_to_a_vendor_that_cannot_be_used() {
    let mut world = World::start().await;
    world.sandbox.order(Fault::on(Route::Any, status(401)).until_cleared());
    publish_submits(&world, 1).await;
    until("the key is found out", async || world.probes() >= 3).await;
    world.stop_worker().await;
    assert_eq!(world.requests(Route::Submit), 1);
    world.sandbox.clear_faults();
    world.start_worker(|_| {}).await;
    assert_eq!(world.next_result().await.code(), "200");
    world.finish().await;
}

#[tokio::test]
async fn cancels_that_fail_do_not_keep_everything_else_waiting() {
    let mut world = World::start().await;
    let id = world.submitted().await;
    world.sandbox.order(Fault::on(Route::Cancel, status(503)).until_cleared());
    let body = json!({"batch_id": id}).to_string();
    for n in 0..6 {
        let id = with_id(&format!("cancel-{n}"));
        world.publish(CommandKind::Cancel, body.as_bytes(), id).await;
    }
    until("the breaker has opened", async || world.probes() > 1).await;
    let since = Instant::now();
    assert!(!world.submitted().await.is_empty());
    assert!(since.elapsed() < Duration::from_secs(15), "{:?}", since.elapsed());
    world.sandbox.clear_faults();
    assert_eq!(results(&mut world, 6).await.len(), 6);
    world.finish().await;
}
