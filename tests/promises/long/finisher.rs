//! A worker is killed while it finishes a submit whose message is gone; the next one goes on.

use std::panic::AssertUnwindSafe;

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::Route;
use futures_util::FutureExt as _;
use futures_util::future::join_all;

use crate::crash::{assert_one_batch, expected};
use crate::ledger::Place;
use crate::process::Process;
use crate::support::World;
use crate::support::wait::until_within;

use super::purged::{FINISHED_WITHIN, SETTINGS, killed_and_purged};

/// The crash points that the finisher passes: claimed, found, recorded, published, confirmed.
const POINTS: [u8; 5] = [2, 5, 6, 7, 8];

/// One submit without its message, a worker that is killed at the point, and one that is not.
async fn survives(store: &str, point: u8) {
    let place = Place::of(store).await;
    let mut world = World::without_worker().await;
    let ledger = place.url(&world);
    killed_and_purged(&world, &ledger, true).await;
    let at = point.to_string();
    let killed = [SETTINGS[0], ("CRASH_AT", at.as_str())];
    Process::start(&world, &ledger, &killed).killed_within(FINISHED_WITHIN).await;
    let queue = world.topology.queue(CommandKind::Submit);
    assert_eq!(world.queue(&queue).await.0, 0, "its message is gone");
    let worker = Process::consuming(&world, &ledger, &SETTINGS).await;
    let finished = async || worker.log().contains("answered without its message");
    until_within(FINISHED_WITHIN, &format!("finished after {point}"), finished).await;
    worker.stop().await;
    let results = world.remaining_results().await;
    assert_one_batch(&world, "m", &results);
    expected(point, (world.requests(Route::Submit), results.len()));
    world.finish().await;
    place.clean_up().await;
}

/// All points at the same time: each waits twice for longer than the longest delay.
async fn survives_all(store: &str) {
    let all = POINTS.map(async |point| {
        let end = AssertUnwindSafe(survives(store, point)).catch_unwind().await;
        end.err().map(|_| point)
    });
    let failed: Vec<_> = join_all(all).await.into_iter().flatten().collect();
    assert!(failed.is_empty(), "killed at {failed:?}, with {store}");
}

#[tokio::test]
async fn a_finisher_killed_at_any_point_is_followed_by_another_with_sqlite() {
    survives_all("sqlite").await;
}

#[tokio::test]
async fn a_finisher_killed_at_any_point_is_followed_by_another_with_postgres() {
    survives_all("postgres").await;
}
