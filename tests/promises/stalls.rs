//! SQLite's disk stalls: nothing fails, and nothing is answered, for as long as that lasts.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use call_manager::domain::command::CommandKind;
use tempfile::TempDir;

use crate::process::Process;
use crate::support::{World, submit_body, until, with_id};

/// A library that makes the calls stall which reach the disk.
fn library(folder: &TempDir) -> PathBuf {
    let library = folder.path().join("stall.so");
    let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/promises/support/stall.c");
    let mut compiler = Command::new("cc");
    compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).arg("-ldl");
    assert!(compiler.status().expect("a C compiler: SQLite is built by it").success());
    library
}

#[tokio::test]
async fn a_disk_that_stalls_from_the_start_on_hides_neither_health_nor_a_stop() {
    let folder = tempfile::tempdir().unwrap();
    let (library, flag) = (library(&folder), folder.path().join("stalls"));
    let (library, stalls) = (library.to_str().unwrap(), flag.to_str().unwrap());
    let stalling = [("LD_PRELOAD", library), ("STALL_WHILE", stalls)];
    let world = World::without_worker().await;
    std::fs::write(&flag, "").unwrap();
    let worker = Process::start(&world, &world.ledger_url(), &stalling);
    worker.until_logged("/health/ready").await;
    until("readiness says so", async || worker.ready().await.1.contains("being opened")).await;
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn a_disk_that_stalls_is_told_and_waited_for_and_a_stop_works() {
    let folder = tempfile::tempdir().unwrap();
    let (library, flag) = (library(&folder), folder.path().join("stalls"));
    let (library, stalls) = (library.to_str().unwrap(), flag.to_str().unwrap());
    let stalling = [("LD_PRELOAD", library), ("STALL_WHILE", stalls)];
    let mut world = World::without_worker().await;
    let worker = Process::consuming(&world, &world.ledger_url(), &stalling).await;
    let body = submit_body().to_string();
    world.publish(CommandKind::Submit, body.as_bytes(), with_id("first")).await;
    assert_eq!(world.next_result().await.code(), "200");

    std::fs::write(&flag, "").unwrap();
    let since = Instant::now();
    for n in 0..10 {
        world.publish(CommandKind::Submit, body.as_bytes(), with_id(&format!("m-{n}"))).await;
    }
    until("readiness says so", async || worker.ready().await.1.contains("\"ledger: ")).await;
    assert!(since.elapsed().as_secs() <= 15, "{:?}", since.elapsed());
    let queue = world.topology.queue(CommandKind::Submit);
    until("no more are taken", async || world.queue(&queue).await.1 == 0).await;
    assert_eq!(world.sandbox.batches().len(), 1, "nothing is sent without the ledger");

    // A stop works meanwhile, and another worker goes on when the disk does.
    let stopping = Instant::now();
    worker.stop().await;
    assert!(stopping.elapsed().as_secs() < 25, "{:?}", stopping.elapsed());
    std::fs::remove_file(&flag).unwrap();
    let worker = Process::consuming(&world, &world.ledger_url(), &stalling).await;
    for _ in 0..10 {
        assert_eq!(world.next_result().await.code(), "200");
    }
    assert_eq!(world.sandbox.batches().len(), 11, "one each");
    worker.stop().await;
    world.finish().await;
}
