//! A command that ends its workers is given up with a result, and takes no other along.

use std::collections::HashMap;
use std::time::Duration;

use call_manager::domain::command::{CommandKind, marker};
use elevenlabs_sandbox::{Effect, Fault, Route};
use futures_util::StreamExt as _;
use futures_util::future::join_all;
use lapin::options::{BasicGetOptions, QueuePurgeOptions};
use lapin::types::{AMQPValue, FieldTable};
use tokio::time::timeout;
use tokio_util::sync::CancellationToken;

use crate::process::Process;
use crate::support::postgres::Database;
use crate::support::wait::until_within;
use crate::support::{Received, World, listen, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

/// After so many times it is not executed any more.
const TIMES: usize = 20;

/// It goes to a delay queue each time.
const LONG: Duration = Duration::from_secs(120);

#[tokio::test]
async fn poison_is_dead_lettered_with_a_reason_and_takes_no_other_command_along() {
    const OTHERS: usize = 40;
    let mut world = World::without_worker().await;
    let body = submit_body().to_string();
    // Each attempt takes a while, so that whatever is in hand is there when the worker dies.
    let slow = Effect::Latency(Duration::from_millis(300));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    let mut headers = FieldTable::default();
    headers.insert("campaign".into(), AMQPValue::LongString("autumn".into()));
    let properties = with_id("poison").with_headers(headers).with_correlation_id("for it".into());
    for n in 0..OTHERS / 2 {
        world.publish(SUBMIT, body.as_bytes(), with_id(&format!("m-{n}"))).await;
    }
    world.publish(SUBMIT, body.as_bytes(), properties).await;
    for n in OTHERS / 2..OTHERS {
        world.publish(SUBMIT, body.as_bytes(), with_id(&format!("m-{n}"))).await;
    }

    let ledger = world.drained_ledger().await;
    for _ in 0..TIMES {
        Process::start(&world, &ledger, &[("CRASH_ON", "poison")]).killed().await;
    }
    let survivor = Process::consuming(&world, &ledger, &[("CRASH_ON", "poison")]).await;
    let mut results = HashMap::new();
    while results.len() < OTHERS + 1 {
        let result = world.next_result().await;
        results.insert(result.command_id(), result);
    }
    world.until_nothing_waits().await;
    let poison = results.remove("poison").unwrap();
    assert_eq!(poison.code(), "500 poison_message");
    assert!(poison.error().contains("Nothing was sent to ElevenLabs"), "{}", poison.error());
    let wrong = results.values().find(|result| result.code() != "200");
    assert!(wrong.is_none(), "{}", wrong.unwrap().body);
    assert_eq!(world.sandbox.batches().len(), OTHERS, "one each");

    let queue = world.topology.dead_letter();
    let options = BasicGetOptions { no_ack: true };
    let dead = world.channel.basic_get(queue.into(), options).await.unwrap().unwrap();
    assert_eq!(dead.data, body.as_bytes());
    assert_eq!(dead.properties.message_id().as_ref().unwrap().as_str(), "poison");
    assert_eq!(dead.properties.correlation_id().as_ref().unwrap().as_str(), "for it");
    let headers = dead.properties.headers().as_ref().unwrap().inner();
    let text =
        |name: &str| headers.get(name).and_then(AMQPValue::as_long_string).unwrap().to_string();
    assert_eq!(text("campaign"), "autumn");
    let reason = text("x-call-manager-reason");
    assert!(reason.starts_with("poison_message: it came back"), "{reason}");
    let ours = headers.keys().filter(|name| name.as_str().starts_with("x-call-manager"));
    assert_eq!(ours.count(), 1, "published again, it begins anew: {headers:?}");
    survivor.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn a_command_that_panics_again_and_again_is_given_up_and_ends_no_connection() {
    let mut world = World::without_worker().await;
    let ledger = world.drained_ledger().await;
    let worker = Process::consuming(&world, &ledger, &[("PANIC_ON", "poison")]).await;
    let body = submit_body().to_string();
    for id in ["before", "poison", "behind"] {
        world.publish(SUBMIT, body.as_bytes(), with_id(id)).await;
    }
    for _ in 0..2 {
        assert_eq!(world.next_result().await.code(), "200", "the others are not dragged along");
    }
    let given_up = async || worker.log().contains("goes to the dead-letter queue");
    until_within(LONG, "it is given up", given_up).await;
    assert_eq!(world.next_result().await.code(), "500 poison_message");
    let log = worker.log();
    assert_eq!(log.matches("the command's task panicked").count(), TIMES);
    assert!(!log.contains("connecting again"), "{log}");
    worker.stop().await;
    world
        .channel
        .queue_purge(world.topology.dead_letter().into(), QueuePurgeOptions::default())
        .await
        .unwrap();
    world.finish().await;
}

#[tokio::test]
async fn a_submit_that_was_begun_is_not_called_undone_because_it_is_poison() {
    let mut world = World::without_worker().await;
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    let ledger = world.ledger_url();
    // Its request has left when the worker dies.
    world.sandbox.order(Fault::on(Route::Submit, Effect::Hang { processed: true }));
    let first = Process::consuming(&world, &ledger, &[]).await;
    until("it is at ElevenLabs", async || world.requests(Route::Submit) == 1).await;
    first.kill().await;
    for _ in 1..TIMES {
        Process::start(&world, &ledger, &[("CRASH_ON", "m")]).killed().await;
    }
    let survivor = Process::consuming(&world, &ledger, &[("CRASH_ON", "m")]).await;
    let result = world.next_result().await;
    assert_eq!(result.code(), "500 outcome_unknown");
    let marked = format!("call_manager_command_id = \"{}\"", marker("m"));
    assert!(result.error().contains(&marked), "{}", result.error());
    survivor.stop().await;
    // For good.
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
    let other = Process::consuming(&world, &ledger, &[]).await;
    result.assert_repeats(&world.next_result().await);
    assert_eq!(world.requests(Route::Submit), 1, "it is not sent again");
    other.stop().await;
    let dead = world.topology.dead_letter();
    assert_eq!(world.queue(&dead).await.0, 1);
    world.clean_up().await;
}

/// One of a pool, started again whenever the poison has killed it; returns how often that was.
async fn restarted(world: &World, ledger: &str, done: &CancellationToken) -> usize {
    let mut deaths = 0;
    loop {
        let mut worker = Process::start(world, ledger, &[("CRASH_ON", "poison")]);
        tokio::select! {
            () = worker.ended() => deaths += 1,
            () = done.cancelled() => {
                worker.stop().await;
                return deaths;
            }
        }
    }
}

#[tokio::test]
async fn poison_in_a_pool_of_three_is_given_up_and_takes_no_other_command_along() {
    const OTHERS: usize = 40;
    let world = World::without_worker().await;
    let database = Database::create().await;
    // One that has seen the queues empty: what comes back may have been begun in another, else.
    Process::consuming(&world, &database.url(), &[]).await.stop().await;
    database.run("UPDATE call_manager_ledger SET drained_at = 0").await;
    let body = submit_body().to_string();
    let slow = Effect::Latency(Duration::from_millis(300));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    for n in 0..OTHERS {
        world.publish(SUBMIT, body.as_bytes(), with_id(&format!("m-{n}"))).await;
        if n == OTHERS / 2 {
            world.publish(SUBMIT, body.as_bytes(), with_id("poison")).await;
        }
    }
    let (ledger, done) = (database.url(), CancellationToken::new());
    let mut results = listen(&world.channel, &world.topology.results_exchange()).await;
    let pool = join_all((0..3).map(|_| restarted(&world, &ledger, &done)));
    let answered = async {
        let mut codes = HashMap::new();
        while codes.len() < OTHERS + 1 {
            let result = timeout(LONG, results.next()).await.expect("a result comes in time");
            let result = Received::checked(&result.unwrap().unwrap());
            codes.insert(result.command_id(), result.code());
        }
        done.cancel();
        codes
    };
    let (deaths, mut codes) = tokio::join!(pool, answered);
    assert_eq!(codes.remove("poison").as_deref(), Some("500 poison_message"));
    assert!(codes.values().all(|code| code == "200"), "{codes:?}");
    let deaths: usize = deaths.into_iter().sum();
    assert!(deaths <= TIMES, "{deaths} deaths");
    assert_eq!(world.sandbox.batches().len(), OTHERS, "one each");
    let purge = QueuePurgeOptions::default();
    let dead = world.channel.queue_purge(world.topology.dead_letter().into(), purge).await.unwrap();
    assert_eq!(dead, 1);
    world.finish().await;
    database.drop().await;
}
