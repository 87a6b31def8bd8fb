//! ElevenLabs is away for 20 seconds with a thousand commands queued.

use std::time::{Duration, Instant};

use elevenlabs_sandbox::{Effect, Fault, Route};

use crate::load::{Load, until_memory_is_back};
use crate::process::Process;
use crate::support::{World, until};

const AWAY: Duration = Duration::from_secs(20);

#[tokio::test]
async fn a_vendor_that_is_away_for_20_s_fails_none_of_a_thousand_commands() {
    let mut world = World::without_worker().await;
    let mut load = Load::of(&world, "vendor 503 for 20 s").await;
    let worker = Process::consuming(&world, &world.ledger_url(), &[]).await;
    // The same load: what a worker allocates once for it is there by then.
    load.publish(&world, 1_000).await;
    load.until_all_answered().await;
    let before = worker.resident_bytes();

    let down = Effect::vendor_error(503, "down", "Down.");
    world.sandbox.order(Fault::on(Route::Any, down).until_cleared());
    let since = Instant::now();
    load.publish(&world, 1_000).await;
    until("it has lasted", async || since.elapsed() >= AWAY).await;
    world.sandbox.clear_faults();
    let back = Instant::now();
    load.until_all_answered().await;
    let drained = back.elapsed();
    eprintln!("1,000 commands drained {:.1} s after the vendor's return", drained.as_secs_f64());
    // Seconds, on a machine that is not busy with anything else.
    assert!(drained < Duration::from_secs(40), "{drained:?}");
    until_memory_is_back(&worker, before).await;
    worker.stop().await;
    load.verify(&mut world).await;
    world.finish().await;
}
