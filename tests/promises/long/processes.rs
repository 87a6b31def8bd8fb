//! Workers that are frozen for minutes, killed or stopped under load, again and again.

use std::time::{Duration, Instant};

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{Effect, Fault, Route};

use crate::load::{Load, until_memory_is_back};
use crate::process::Process;
use crate::support::World;
use crate::support::postgres::Database;
use crate::support::wait::until_within;

const FROZEN: Duration = Duration::from_secs(120);

/// How soon a worker that goes on consumes again.
const SOON: Duration = Duration::from_secs(10);

/// Few in hand, so that a load takes a while; and time for each request, also on a busy machine.
const FEW: [(&str, &str); 2] = [("PREFETCH", "16"), ("ELEVENLABS_TIMEOUT", "5s")];

async fn slow_world() -> World {
    let world = World::without_worker().await;
    let slow = Effect::Latency(Duration::from_millis(100));
    world.sandbox.order(Fault::on(Route::Submit, slow).until_cleared());
    world
}

/// A worker that has worked, and what it has in memory since, in bytes.
async fn warm(world: &World, load: &mut Load, ledger: &str) -> (Process, u64) {
    let worker = Process::consuming(world, ledger, &FEW).await;
    load.publish(world, 200).await;
    load.until_all_answered().await;
    let resident = worker.resident_bytes();
    (worker, resident)
}

/// Workers that consume submits.
async fn consumers(world: &World) -> u32 {
    world.queue(&world.topology.queue(CommandKind::Submit)).await.1
}

/// Until the worker has been frozen for the whole time.
async fn stays_frozen(since: Instant) {
    let time = FROZEN + SOON;
    until_within(time, "the time is over", async || since.elapsed() >= FROZEN).await;
}

/// The worker goes on, and answers.
async fn goes_on(worker: &Process, world: &World, load: &mut Load, consumers_then: u32) {
    let answered = worker.log().matches("answered").count();
    let began = Instant::now();
    worker.thaw();
    // Its connections are gone, which it learns first.
    worker.until_logged("the lane is lost").await;
    until_within(SOON, "it consumes again", async || consumers(world).await == consumers_then)
        .await;
    eprintln!("it consumes again after {:.1?}", began.elapsed());
    load.publish(world, 50).await;
    load.until_all_answered().await;
    until_within(SOON, "it has its share", async || {
        worker.log().matches("answered").count() > answered
    })
    .await;
}

#[tokio::test]
async fn a_worker_of_a_pool_that_is_frozen_for_two_minutes_is_replaced_and_comes_back() {
    let database = Database::create().await;
    let mut world = slow_world().await;
    let mut load = Load::of(&world, "frozen for 120 s, PostgreSQL").await;
    let (frozen, resident) = warm(&world, &mut load, &database.url()).await;
    load.publish(&world, 200).await;
    load.until_answered(220).await;
    frozen.freeze().await;
    let since = Instant::now();
    let other = Process::consuming(&world, &database.url(), &FEW).await;
    load.until_all_answered().await;
    eprintln!("the other one is done after {:.1?}", since.elapsed());
    stays_frozen(since).await;
    assert_eq!(consumers(&world).await, 1, "the other one alone");
    goes_on(&frozen, &world, &mut load, 2).await;
    until_memory_is_back(&frozen, resident).await;
    frozen.stop().await;
    other.stop().await;
    load.verify(&mut world).await;
    world.finish().await;
    database.drop().await;
}

#[tokio::test]
async fn a_worker_alone_that_is_frozen_for_two_minutes_goes_on() {
    let mut world = slow_world().await;
    let mut load = Load::of(&world, "frozen for 120 s, SQLite").await;
    let (worker, resident) = warm(&world, &mut load, &world.ledger_url()).await;
    load.publish(&world, 200).await;
    load.until_answered(220).await;
    worker.freeze().await;
    stays_frozen(Instant::now()).await;
    assert_eq!(consumers(&world).await, 0, "the broker has missed it");
    goes_on(&worker, &world, &mut load, 1).await;
    until_memory_is_back(&worker, resident).await;
    worker.stop().await;
    load.verify(&mut world).await;
    world.finish().await;
}

/// Five workers, one after the other, each of which ends under load.
async fn one_after_the_other(name: &str, end: impl AsyncFn(Process)) {
    let mut world = slow_world().await;
    let ledger = world.ledger_url();
    let mut load = Load::of(&world, name).await;
    load.publish(&world, 200).await;
    for _ in 0..5 {
        let worker = Process::consuming(&world, &ledger, &FEW).await;
        load.until_answered(load.answered() + 20).await;
        end(worker).await;
    }
    let worker = Process::consuming(&world, &ledger, &FEW).await;
    load.until_all_answered().await;
    load.publish(&world, 200).await;
    load.until_all_answered().await;
    let resident = worker.resident_bytes();
    load.publish(&world, 200).await;
    load.until_all_answered().await;
    until_memory_is_back(&worker, resident).await;
    worker.stop().await;
    load.verify(&mut world).await;
    world.finish().await;
}

#[tokio::test]
async fn workers_killed_one_after_the_other_under_load_lose_nothing() {
    one_after_the_other("five workers killed", Process::kill).await;
}

#[tokio::test]
async fn workers_stopped_one_after_the_other_under_load_lose_nothing() {
    one_after_the_other("five workers stopped", Process::stop).await;
}
