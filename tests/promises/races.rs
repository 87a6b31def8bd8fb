//! Workers that share a queue and a ledger never execute one submit twice.

use std::time::{Duration, Instant};

use call_manager::config::{LedgerPlace, Settings};
use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Route};
use lapin::BasicProperties;
use serde_json::json;
use tokio_postgres::Client;

use crate::process::{LONGEST_REQUEST, Process};
use crate::support::postgres::{Database, client};
use crate::support::proxy::Proxy;
use crate::support::{Received, World, submit_body, until, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;

async fn submit(world: &World, id: &str) {
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id(id)).await;
}

/// Fails unless all results are one success.
fn assert_all_the_same(world: &World, results: &[Received]) {
    let first = &results[0];
    assert_eq!(first.code(), "200", "{}", first.body);
    assert_eq!(first.json["data"]["id"], json!(world.sandbox.batches()[0].id));
    for other in &results[1..] {
        first.assert_repeats(other);
    }
}

#[tokio::test]
async fn one_command_published_many_times_to_a_pool_makes_one_batch_and_answers_each() {
    let database = Database::create().await;
    let mut world = World::without_worker().await;
    let mut pool = Vec::new();
    for _ in 0..4 {
        // Few commands each, so that every worker gets some.
        pool.push(Process::start(&world, &database.url(), &[("PREFETCH", "25")]));
    }
    for worker in &pool {
        worker.until_logged("consuming").await;
    }
    // Longer than the settling window: who does not wait for the first one would send again.
    let slow = Effect::Latency(Duration::from_millis(600));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    for (batches, copies) in (1..).zip([2, 10, 100]) {
        let (id, body) = (format!("m-{copies}"), submit_body().to_string());
        let published = (0..copies).map(|_| world.publish(SUBMIT, body.as_bytes(), with_id(&id)));
        futures_util::future::join_all(published).await;
        let mut results = Vec::new();
        for _ in 0..copies {
            results.push(world.next_result().await);
        }
        assert_eq!(results[0].code(), "200", "{}", results[0].body);
        assert!(results.iter().all(|result| result.command_id() == id), "{copies} copies");
        for other in &results[1..] {
            results[0].assert_repeats(other);
        }
        assert_eq!(world.sandbox.batches().len(), batches, "{copies} copies");
        assert_eq!(world.requests(Route::Submit), batches, "{copies} copies");
    }
    for worker in pool {
        assert!(worker.log().contains("answered"), "every worker had its share");
        worker.stop().await;
    }
    assert_eq!(world.remaining_results().await.len(), 0);
    world.finish().await;
    database.drop().await;
}

#[tokio::test]
async fn a_copy_that_is_redelivered_to_another_worker_waits_for_the_first_one() {
    let database = Database::create().await;
    let mut world = World::without_worker().await;
    let (proxy, url) = Proxy::to_broker().await;
    let patient = ("ELEVENLABS_TIMEOUT", "8s");
    let through = [("AMQP_URL", url.as_str()), patient];
    let first = Process::consuming(&world, &database.url(), &through).await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(Duration::from_millis(2_500))));
    submit(&world, "m").await;
    until("the submit is at the vendor", async || world.requests(Route::Submit) == 1).await;
    let second = Process::consuming(&world, &database.url(), &[patient]).await;
    proxy.refuse(true);
    proxy.cut();
    let queue = world.topology.queue(SUBMIT);
    until("only the second worker consumes", async || world.queue(&queue).await.1 == 1).await;
    assert_eq!(world.sandbox.batches().len(), 0, "the vendor is still busy");
    let results = [world.next_result().await];
    second.until_logged("answered").await;
    assert_all_the_same(&world, &results);
    assert_eq!((world.requests(Route::Submit), world.sandbox.batches().len()), (1, 1));
    assert_eq!(world.requests(Route::List), 0, "there was nothing to look for");
    // It has nothing in hand, and no broker to leave in order.
    first.kill().await;
    second.stop().await;
    assert_eq!(world.remaining_results().await.len(), 0);
    world.finish().await;
    database.drop().await;
}

/// A worker freezes with its submit at the vendor; another one takes over when the lease has run
/// out; then the first one goes on. How often the submit was sent.
async fn taken_over_from_a_frozen_worker(effect: Effect) -> usize {
    let database = Database::create().await;
    let mut world = World::without_worker().await;
    // It gets the first copy and no other.
    let first = Process::consuming(&world, &database.url(), &[("PREFETCH", "1")]).await;
    world.sandbox.order(Fault::on(Route::Submit, effect));
    let before_the_claim = Instant::now();
    submit(&world, "m").await;
    until("the submit is at the vendor", async || world.requests(Route::Submit) == 1).await;
    first.freeze().await;
    let second = Process::consuming(&world, &database.url(), &[]).await;
    submit(&world, "m").await;
    let taken_over = world.next_result().await;
    assert!(before_the_claim.elapsed() > LONGEST_REQUEST * 2, "not before the lease has run out");
    assert_eq!(world.sandbox.batches().len(), 1);
    let sent = world.requests(Route::Submit);
    first.thaw();
    let results = [taken_over, world.next_result().await];
    first.until_logged("answered").await;
    assert_all_the_same(&world, &results);
    assert_eq!(world.sandbox.batches().len(), 1);
    assert_eq!(world.requests(Route::Submit), sent, "the one that was frozen sends nothing");
    first.stop().await;
    second.stop().await;
    assert_eq!(world.remaining_results().await.len(), 0);
    world.finish().await;
    database.drop().await;
    sent
}

#[tokio::test]
async fn the_batch_of_a_frozen_worker_is_adopted_by_the_one_that_takes_over() {
    // It is frozen well before the vendor answers.
    let slow = Effect::Latency(Duration::from_millis(800));
    assert_eq!(taken_over_from_a_frozen_worker(slow).await, 1);
}

#[tokio::test]
async fn what_a_frozen_worker_did_not_get_done_is_sent_by_the_one_that_takes_over_alone() {
    let lost = Effect::Hang { processed: false };
    assert_eq!(taken_over_from_a_frozen_worker(lost).await, 2);
}

/// A session of the test's own with a lock on the row of one submit.
async fn lock_row(database: &Database, id: &str) -> Client {
    let client = client(&database.url()).await;
    client.batch_execute("BEGIN").await.unwrap();
    let lock = "SELECT 1 FROM call_manager_submits WHERE command_id = $1 FOR UPDATE";
    assert_eq!(client.query(lock, &[&id]).await.unwrap().len(), 1, "{id} is in the ledger");
    client
}

/// Waits until a worker with this application name waits for a lock of the test's.
async fn until_locked_out(observer: &Client, application: &str, by: &Client) {
    let holder: i32 = by.query_one("SELECT pg_backend_pid()", &[]).await.unwrap().get(0);
    let waits = "SELECT 1 FROM pg_stat_activity \
                 WHERE application_name = $1 AND $2 = ANY (pg_blocking_pids(pid))";
    until("the worker waits for the row", async || {
        !observer.query(waits, &[&application, &holder]).await.unwrap().is_empty()
    })
    .await;
}

#[tokio::test]
async fn a_get_of_one_worker_leaves_alone_what_another_one_has_just_claimed() {
    let database = Database::create().await;
    // Two workers with one ledger and one vendor; each has a queue of its own, so that the test
    // decides which of them gets what.
    let mut world = World::without_worker().await;
    let mut other = World::without_worker().await;
    let application = format!("reader-{}", uuid::Uuid::now_v7().simple());
    let place = |name: &str| LedgerPlace::Postgres {
        url: format!("{}&application_name={name}", database.url()).into(),
        shown: String::new(),
    };
    let reads = place(&application);
    let vendor = world.sandbox.base_url().parse().unwrap();
    let patient = |settings: &mut Settings| settings.elevenlabs_timeout = Duration::from_secs(3);
    world
        .start_worker(|settings| {
            patient(settings);
            settings.ledger.place = place("writer");
        })
        .await;
    other
        .start_worker(|settings| {
            patient(settings);
            settings.elevenlabs_base_url = vendor;
            settings.ledger.place = reads;
        })
        .await;
    for id in ["a", "z"] {
        submit(&world, id).await;
        assert_eq!(world.next_result().await.code(), "200");
    }
    let get = async |id: &str| {
        let body = json!({"command_id": id}).to_string();
        let properties = BasicProperties::default().with_message_id(format!("get-{id}").into());
        other.publish(CommandKind::Get, body.as_bytes(), properties).await;
    };
    // While the reader waits for one row, what it is asked gathers: "m" and "z" become one group.
    let (observer, first) = (client(&database.url()).await, lock_row(&database, "a").await);
    get("a").await;
    until_locked_out(&observer, &application, &first).await;
    let second = lock_row(&database, "z").await;
    get("m").await;
    get("z").await;
    let queue = other.topology.queue(CommandKind::Get);
    until("it has all three", async || other.queue(&queue).await.0 == 0).await;
    first.batch_execute("ROLLBACK").await.unwrap();
    // It has seen that there is no "m", and waits for "z".
    until_locked_out(&observer, &application, &second).await;
    world.sandbox.order(Fault::on(Route::Submit, Effect::Hang { processed: true }));
    submit(&world, "m").await;
    until("the submit is at the vendor", async || world.sandbox.batches().len() == 3).await;
    second.batch_execute("ROLLBACK").await.unwrap();
    for _ in 0..3 {
        other.next_raw_result().await;
    }
    assert_eq!(world.next_result().await.code(), "200");
    assert_eq!(world.sandbox.batches().len(), 3, "it is looked for, and not sent again");
    assert_eq!(world.requests(Route::Submit), 3);
    world.finish().await;
    other.finish().await;
    database.drop().await;
}
