//! SQLite's disk stalls: nothing fails, and nothing is answered, for as long as that lasts.

use std::path::PathBuf;
use std::process::Command;
use std::time::Instant;

use call_manager::domain::command::CommandKind;
use tempfile::TempDir;

use crate::process::Process;
use crate::support::{World, submit_body, until, with_id};

/// A disk that a test can make stall, for the workers that are started with it.
pub struct Disk {
    /// Gone with it.
    _folder: TempDir,
    library: PathBuf,
    /// The disk stalls while this file is there.
    flag: PathBuf,
}

impl Disk {
    pub fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let (library, flag) = (folder.path().join("stall.so"), folder.path().join("stalls"));
        let source = concat!(env!("CARGO_MANIFEST_DIR"), "/tests/promises/support/stall.c");
        let mut compiler = Command::new("cc");
        compiler.args(["-shared", "-fPIC", "-o"]).arg(&library).arg(source).arg("-ldl");
        assert!(compiler.status().expect("a C compiler: SQLite is built by it").success());
        Self { _folder: folder, library, flag }
    }

    pub fn environment(&self) -> [(&str, &str); 2] {
        let (library, flag) = (self.library.to_str().unwrap(), self.flag.to_str().unwrap());
        [("LD_PRELOAD", library), ("STALL_WHILE", flag)]
    }

    pub fn stall(&self) {
        std::fs::write(&self.flag, "").unwrap();
    }

    pub fn go_on(&self) {
        std::fs::remove_file(&self.flag).unwrap();
    }
}

#[tokio::test]
async fn a_disk_that_stalls_from_the_start_on_hides_neither_health_nor_a_stop() {
    let disk = Disk::new();
    let world = World::without_worker().await;
    disk.stall();
    let worker = Process::start(&world, &world.ledger_url(), &disk.environment());
    worker.until_logged("/health/ready").await;
    until("readiness says so", async || worker.ready().await.1.contains("being opened")).await;
    worker.stop().await;
    world.finish().await;
}

#[tokio::test]
async fn a_disk_that_stalls_is_told_and_waited_for_and_a_stop_works() {
    let disk = Disk::new();
    let mut world = World::without_worker().await;
    let worker = Process::consuming(&world, &world.ledger_url(), &disk.environment()).await;
    let body = submit_body().to_string();
    world.publish(CommandKind::Submit, body.as_bytes(), with_id("first")).await;
    assert_eq!(world.next_result().await.code(), "200");

    disk.stall();
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
    disk.go_on();
    let worker = Process::consuming(&world, &world.ledger_url(), &disk.environment()).await;
    for _ in 0..10 {
        assert_eq!(world.next_result().await.code(), "200");
    }
    assert_eq!(world.sandbox.batches().len(), 11, "one each");
    worker.stop().await;
    world.finish().await;
}
