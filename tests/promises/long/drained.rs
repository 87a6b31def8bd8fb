//! A ledger learns that the queues are empty, however few commands its worker takes at a time.

use std::time::Duration;

use crate::ledger::Place;
use crate::process::Process;
use crate::support::wait::until_within;
use crate::support::{World, postgres};

#[tokio::test]
async fn a_worker_that_takes_one_command_at_a_time_sees_that_none_waits() {
    let place = Place::of("postgres").await;
    let world = World::without_worker().await;
    let ledger = place.url(&world);
    let worker = Process::consuming(&world, &ledger, &[("PREFETCH", "1")]).await;
    let client = postgres::client(&ledger).await;
    // It believes it after a minute.
    until_within(Duration::from_secs(100), "it is noted in the ledger", async || {
        let noted = "SELECT drained_at IS NOT NULL FROM call_manager_ledger";
        client.query_one(noted, &[]).await.unwrap().get(0)
    })
    .await;
    worker.stop().await;
    drop(client);
    world.finish().await;
    place.clean_up().await;
}
