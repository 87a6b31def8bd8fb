//! A worker that is killed at any point makes no second batch and loses no result.

use std::collections::HashMap;
use std::time::{Duration, Instant};

use call_manager::domain::command::{CommandKind, marker};
use elevenlabs_sandbox::{Effect, Fault, Request, Route};
use lapin::BasicProperties;
use serde_json::json;

use crate::process::Process;
use crate::support::postgres::Database;
use crate::support::{Received, World, submit_body, until};

const SUBMIT: CommandKind = CommandKind::Submit;

/// What ElevenLabs may take to list a batch, as [`Process::start`] sets it.
const WINDOW: Duration = Duration::from_millis(300);

/// Where the ledger is that a worker leaves to the next one.
struct Ledger {
    url: String,
    database: Option<Database>,
}

impl Ledger {
    fn file(world: &World) -> Self {
        Self { url: world.ledger_url(), database: None }
    }

    async fn postgres() -> Self {
        let database = Database::create().await;
        Self { url: database.url(), database: Some(database) }
    }

    async fn end(self) {
        if let Some(database) = self.database {
            database.drop().await;
        }
    }
}

fn properties(id: &str) -> BasicProperties {
    BasicProperties::default()
        .with_message_id(id.into())
        .with_correlation_id(format!("for {id}").into())
}

async fn submit(world: &World, id: &str) {
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), properties(id)).await;
}

/// How many batches carry the marker of a command, with the id of one of them.
fn batches_of(world: &World, id: &str) -> (usize, String) {
    let marker = json!(marker(id));
    let batches = world.sandbox.batches().into_iter().filter(|batch| {
        let mut recipients = batch.recipients.iter();
        recipients.any(|one| one.dynamic_variables.get("call_manager_command_id") == Some(&marker))
    });
    let ids: Vec<_> = batches.map(|batch| batch.id).collect();
    (ids.len(), ids.first().cloned().unwrap_or_default())
}

/// All results of one submit are the same success, which names the one batch there is.
pub fn assert_one_batch(world: &World, id: &str, results: &[Received]) {
    let (batches, batch) = batches_of(world, id);
    assert_eq!(batches, 1, "batches of {id}");
    let first = results.first().expect("a result at least");
    assert_eq!((first.code().as_str(), first.command_id().as_str()), ("200", id), "{}", first.body);
    assert_eq!(first.json["data"]["id"], json!(batch));
    assert_ne!(first.header("attempts").as_deref(), Some("0"), "a batch takes a request");
    let correlation_id = first.properties.correlation_id().as_ref().unwrap();
    assert_eq!(correlation_id.as_str(), format!("for {id}"));
    for other in &results[1..] {
        first.assert_repeats(other);
    }
}

/// Runs a worker until it dies: by itself at `point`, or (3 and 4) killed while its request is at
/// the vendor.
async fn dies_at(world: &World, ledger: &Ledger, point: u8) {
    let requests = world.requests(Route::Submit);
    let processed = point == 4;
    match point {
        3 | 4 => {
            world.sandbox.order(Fault::on(Route::Submit, Effect::Hang { processed }));
            let worker = Process::start(world, &ledger.url, &[("ELEVENLABS_TIMEOUT", "1500ms")]);
            until("the request is at the vendor", async || {
                let all = world.sandbox.requests();
                let mut submits = all.iter().filter(|request| request.route == Route::Submit);
                submits.nth(requests).is_some_and(|request| request.processed == processed)
            })
            .await;
            worker.kill().await;
        }
        _ => {
            let point = point.to_string();
            Process::start(world, &ledger.url, &[("CRASH_AT", &point)]).killed().await;
        }
    }
}

/// What came of a submit.
struct Came {
    /// How often it was sent.
    sent: usize,
    results: usize,
    /// When the list was read, since the last worker died.
    looked: Vec<Duration>,
    /// When it was sent, since then.
    sent_after: Option<Duration>,
    /// As the result says.
    attempts: String,
}

/// One submit, a worker that dies at the point, and at once one that does not.
async fn survives(mut world: World, ledger: Ledger, points: &[u8]) -> Came {
    submit(&world, "m").await;
    for point in points {
        dies_at(&world, &ledger, *point).await;
    }
    let died = Instant::now();
    let worker = Process::start(&world, &ledger.url, &[]);
    worker.until_logged("answered").await;
    worker.stop().await;
    let results = world.remaining_results().await;
    assert_one_batch(&world, "m", &results);
    let requests = world.sandbox.requests();
    let since = |request: &Request| request.at.checked_duration_since(died);
    let of = |route| requests.iter().filter(move |request| request.route == route);
    let came = Came {
        sent: of(Route::Submit).count(),
        results: results.len(),
        looked: of(Route::List).filter_map(since).collect(),
        sent_after: of(Route::Submit).find_map(since),
        attempts: results[0].header("attempts").unwrap_or_default(),
    };
    world.finish().await;
    ledger.end().await;
    came
}

/// How often a submit is sent and answered whose worker is killed at a point.
pub fn expected(point: u8, (sent, results): (usize, usize)) {
    // Only a request that the vendor did not process is sent again.
    assert_eq!(sent, if point == 3 { 2 } else { 1 }, "requests");
    match point {
        // What was handed to the socket may have arrived.
        7 => assert!((1..=2).contains(&results), "{results} results"),
        8 => assert_eq!(results, 2),
        _ => assert_eq!(results, 1),
    }
}

/// What came of a submit whose worker was killed at a point.
fn expected_after(point: u8, came: &Came) {
    expected(point, (came.sent, came.results));
    let (first, looks) = came.looked.split_first().expect("a worker asks once when it starts");
    match point {
        // Nobody knows what the one before has sent, so the list is read when that would show in it.
        1..=3 => {
            let sent = came.sent_after.expect("it is sent");
            let is_late = |look: &&Duration| (WINDOW..sent).contains(*look);
            assert!(looks.iter().any(|look| is_late(&look)), "{looks:?}, sent {sent:?}");
        }
        4 | 5 => assert!(!looks.is_empty(), "its batch is searched for"),
        // The ledger knows.
        _ => assert!(looks.is_empty(), "{looks:?}, after {first:?}"),
    }
    // The row has the request that may have left; a worker without it would begin to count anew.
    let attempts = match point {
        2 | 3 => "2",
        _ => "1",
    };
    assert_eq!(came.attempts, attempts, "attempts");
}

macro_rules! killed {
    ($($name:ident $point:literal)*) => {
        mod with_its_ledger_in_a_file {
            use super::*;
            $(
                #[tokio::test]
                async fn $name() {
                    let world = World::without_worker().await;
                    let ledger = Ledger::file(&world);
                    expected_after($point, &survives(world, ledger, &[$point]).await);
                }
            )*
        }

        mod with_its_ledger_in_postgres {
            use super::*;
            $(
                #[tokio::test]
                async fn $name() {
                    let ledger = Ledger::postgres().await;
                    let world = World::without_worker().await;
                    expected_after($point, &survives(world, ledger, &[$point]).await);
                }
            )*
        }
    };
}

killed! {
    killed_at_1_before_the_claim 1
    killed_at_2_after_the_claim 2
    killed_at_3_when_the_request_was_sent 3
    killed_at_4_when_elevenlabs_had_done_it 4
    killed_at_5_when_it_was_answered 5
    killed_at_6_when_it_was_recorded 6
    killed_at_7_when_its_result_was_published 7
    killed_at_8_when_its_result_was_confirmed 8
}

#[tokio::test]
async fn three_deaths_in_a_row_make_one_batch() {
    let world = World::without_worker().await;
    let ledger = Ledger::file(&world);
    // The one after point 5 finds the batch, and dies with it recorded.
    let came = survives(world, ledger, &[2, 5, 6]).await;
    assert_eq!((came.sent, came.results), (1, 1));
}

#[tokio::test]
async fn three_deaths_in_a_row_of_workers_of_a_pool_make_one_batch() {
    let ledger = Ledger::postgres().await;
    let world = World::without_worker().await;
    // The one after point 3 sends again, and the one after point 4 finds what that has created.
    let came = survives(world, ledger, &[3, 4, 8]).await;
    assert_eq!((came.sent, came.results), (2, 2));
}

/// Kills a worker with submits in its queue, at the vendor, between attempts, and done.
async fn killed_in_the_middle_of_fifty(mut world: World, ledger: Ledger) {
    let vendor = &world.sandbox;
    let limited = Effect::vendor_error(429, "system_busy", "Busy");
    for (seed, (effect, probability)) in (0..).zip([
        (limited, 0.1),
        (Effect::ResetAfter, 0.1),
        (Effect::ResetBefore, 0.1),
        (Effect::Hang { processed: true }, 0.05),
        (Effect::Hang { processed: false }, 0.05),
        (Effect::Latency(Duration::from_millis(50)), 0.4),
        (Effect::Latency(Duration::from_millis(400)), 0.4),
    ]) {
        let fault = Fault::on(Route::Submit, effect).until_cleared();
        vendor.order(fault.with_probability(probability, seed));
    }
    let ids: Vec<_> = (0..50).map(|n| format!("m-{n}")).collect();
    for id in &ids {
        submit(&world, id).await;
    }
    let worker = Process::start(&world, &ledger.url, &[("PREFETCH", "12")]);
    until("half of them were sent", async || world.requests(Route::Submit) >= 25).await;
    worker.kill().await;
    world.sandbox.clear_faults();
    // At once: what it was asked, the vendor is still doing.
    let worker = Process::start(&world, &ledger.url, &[]);
    let mut results = HashMap::<String, Vec<Received>>::new();
    while results.len() < ids.len() {
        let result = world.next_result().await;
        results.entry(result.command_id()).or_default().push(result);
    }
    worker.stop().await;
    for result in world.remaining_results().await {
        results.entry(result.command_id()).or_default().push(result);
    }
    for id in &ids {
        assert_one_batch(&world, id, &results[id]);
    }
    assert_eq!(world.sandbox.batches().len(), ids.len());
    world.finish().await;
    ledger.end().await;
}

#[tokio::test]
async fn a_worker_killed_in_the_middle_of_fifty_submits_leaves_one_batch_each() {
    let world = World::without_worker().await;
    let ledger = Ledger::file(&world);
    killed_in_the_middle_of_fifty(world, ledger).await;
}

#[tokio::test]
async fn a_worker_of_a_pool_killed_in_the_middle_of_fifty_submits_leaves_one_batch_each() {
    let ledger = Ledger::postgres().await;
    let world = World::without_worker().await;
    killed_in_the_middle_of_fifty(world, ledger).await;
}
