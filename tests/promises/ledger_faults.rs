//! A ledger that cannot be written for a while: nothing is sent meanwhile, and everything is done by
//! itself afterwards.

use std::path::PathBuf;
use std::time::{Duration, Instant};

use elevenlabs_sandbox::{Effect, Fault, Route};
use tokio::process::Command;

use crate::load::{Load, until_memory_is_back};
use crate::process::Process;
use crate::support::postgres::Server;
use crate::support::wait::until_within;
use crate::support::{World, until};

/// How long it has to stay quiet.
const QUIET: Duration = Duration::from_secs(2);

/// The write-ahead log is some 4 MB before SQLite begins it again, and a submit takes some 16 kB.
const MOST_ROUNDS: usize = 40;

/// Room for all that the tests publish: what comes while the ledger fails has to be claimed too. And
/// time for each request, also on a busy machine: none is to be given up.
const SETTINGS: [(&str, &str); 2] = [("PREFETCH", "250"), ("ELEVENLABS_TIMEOUT", "5s")];

/// A worker process that has worked, and what it took for that.
struct Trial {
    world: World,
    worker: Process,
    load: Load,
    resident: u64,
    name: &'static str,
}

impl Trial {
    async fn start(name: &'static str, ledger: &str) -> Self {
        let world = World::without_worker().await;
        let worker = Process::consuming(&world, ledger, &SETTINGS).await;
        Self::warm_up(name, world, worker).await
    }

    async fn warm_up(name: &'static str, world: World, worker: Process) -> Self {
        // When the ledger fails, some are at the vendor and have to be recorded.
        for (latency, probability) in [(400, 0.3), (50, 1.0)] {
            let slow = Effect::Latency(Duration::from_millis(latency));
            let fault = Fault::on(Route::Submit, slow).until_cleared();
            world.sandbox.order(fault.with_probability(probability, 1));
        }
        let mut load = Load::of(&world, name).await;
        load.publish(&world, 200).await;
        load.until_all_answered().await;
        let resident = worker.resident_bytes();
        Self { world, worker, load, resident, name }
    }

    /// Returns in the middle of work.
    async fn under_load(&mut self) {
        self.load.publish(&self.world, 150).await;
        self.load.until_answered(self.load.answered() + 20).await;
    }

    /// While the ledger cannot be written: the log says why, and nothing is sent.
    async fn stands_still(&mut self, cause: &str) {
        // What was published before may be done by now, and SQLite goes on within the file it has.
        for _ in 0..MOST_ROUNDS {
            self.load.publish(&self.world, 30).await;
            tokio::select! {
                () = self.worker.until_logged(cause) => break,
                () = self.load.until_all_answered() => {}
            }
        }
        assert!(self.worker.log().contains(cause), "{}: the fault does not show", self.name);
        let (status, body) = self.worker.ready().await;
        assert!(status == 503 && body.contains("\"ledger: "), "{status}: {body}");
        // What was claimed before may still be on its way.
        let (mut sent, mut since) = (self.world.asked(), Instant::now());
        let began = Instant::now();
        while since.elapsed() < QUIET {
            assert!(began.elapsed() < QUIET * 2, "{}: it goes on sending", self.name);
            assert_eq!(self.worker.health().await, Some(200), "{}", self.name);
            let now = self.world.asked();
            if now != sent {
                (sent, since) = (now, Instant::now());
            }
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
        // Who had sent before has not been answered: each batch there is has its one submit.
        assert_eq!(self.world.requests(Route::Submit), self.world.sandbox.batches().len());
    }

    /// After the fault: everything is done, by itself, and nothing has piled up.
    async fn recovers(mut self) {
        let over = Instant::now();
        self.load.until_all_answered().await;
        let took = over.elapsed();
        self.load.publish(&self.world, 50).await;
        self.load.until_all_answered().await;
        assert_eq!(self.worker.health().await, Some(200), "{}", self.name);
        eprintln!("{}: done {took:.1?} after the fault", self.name);
        assert!(took < Duration::from_secs(20), "{}: {took:?}", self.name);
        until_memory_is_back(&self.worker, self.resident).await;
        self.worker.stop().await;
        self.load.verify(&mut self.world).await;
        self.world.finish().await;
    }
}

async fn restarted(name: &'static str, killed: bool) {
    let mut server = Server::start().await;
    let mut trial = Trial::start(name, server.url()).await;
    trial.under_load().await;
    server.stop(killed).await;
    trial.stands_still("onnection refused").await;
    server.start_again().await;
    trial.recovers().await;
    server.end().await;
}

#[tokio::test]
async fn a_postgres_that_is_restarted_is_waited_for() {
    restarted("PostgreSQL restarted", false).await;
}

#[tokio::test]
async fn a_postgres_that_is_killed_and_started_again_is_waited_for() {
    restarted("PostgreSQL killed", true).await;
}

#[tokio::test]
async fn a_postgres_that_lets_nobody_write_is_waited_for() {
    let server = Server::start().await;
    let mut trial = Trial::start("PostgreSQL read-only", server.url()).await;
    trial.under_load().await;
    server.read_only(true).await;
    trial.stands_still("read-only transaction").await;
    server.read_only(false).await;
    trial.recovers().await;
    server.end().await;
}

#[tokio::test]
async fn a_postgres_without_a_free_connection_is_waited_for() {
    let server = Server::start().await;
    let mut trial = Trial::start("PostgreSQL full", server.url()).await;
    trial.under_load().await;
    let taken = server.take_all_connections().await;
    trial.stands_still("too many connections").await;
    drop(taken);
    trial.recovers().await;
    server.end().await;
}

/// What can keep a worker from writing more into its files.
enum Disk {
    /// It has a small one for itself, and something else fills it.
    Full { filler: PathBuf },
    /// Its files may not grow beyond a size, as with a quota.
    Limited { pid: u32 },
}

impl Disk {
    async fn fails(&self) {
        match self {
            Self::Full { filler } => {
                let full = tokio::fs::write(filler, vec![0; 16 << 20]).await.unwrap_err();
                assert_eq!(full.kind(), std::io::ErrorKind::StorageFull);
            }
            Self::Limited { pid } => limit_files(*pid, "8192").await,
        }
    }

    async fn is_back(&self) {
        match self {
            Self::Full { filler } => tokio::fs::remove_file(filler).await.unwrap(),
            Self::Limited { pid } => limit_files(*pid, "unlimited").await,
        }
    }

    /// What `SQLite` calls it.
    fn cause(&self) -> &'static str {
        match self {
            Self::Full { .. } => "database or disk is full",
            Self::Limited { .. } => "disk I/O error",
        }
    }
}

/// Sets the soft limit on the size of a process's files, in bytes.
async fn limit_files(pid: u32, size: &str) {
    let (pid, limit) = (pid.to_string(), format!("--fsize={size}:"));
    let set = Command::new("prlimit").args(["--pid", &pid, &limit]).status().await.unwrap();
    assert!(set.success());
}

const MOUNT: [&str; 3] = ["unshare", "--map-root-user", "--mount"];

/// A worker with a disk in a mount namespace of its own.
fn on_a_small_disk(world: &World) -> (Process, Disk) {
    let folder = world.ledger_file().parent().unwrap().to_owned();
    let mount = r#"mount -t tmpfs -o size=16m tmpfs "$0" && exec "$1""#;
    let by = [&MOUNT[..], &["sh", "-c", mount, folder.to_str().unwrap()]].concat();
    let worker = Process::through(&by, world, &world.ledger_url(), &SETTINGS);
    // Where the test sees that disk.
    let root = PathBuf::from(format!("/proc/{}/root", worker.pid()));
    let filler = root.join(folder.strip_prefix("/").unwrap()).join("filler");
    (worker, Disk::Full { filler })
}

/// A worker that gets an error where its files would grow too large, not the signal.
fn with_limited_files(world: &World) -> (Process, Disk) {
    let by = ["sh", "-c", r#"trap '' XFSZ; exec "$0""#];
    let worker = Process::through(&by, world, &world.ledger_url(), &SETTINGS);
    let pid = worker.pid();
    (worker, Disk::Limited { pid })
}

async fn waits_for_disk(name: &'static str, start: impl FnOnce(&World) -> (Process, Disk)) {
    let world = World::without_worker().await;
    let (worker, disk) = start(&world);
    worker.until_logged("consuming").await;
    let mut trial = Trial::warm_up(name, world, worker).await;
    trial.under_load().await;
    disk.fails().await;
    trial.stands_still(disk.cause()).await;
    disk.is_back().await;
    trial.recovers().await;
}

#[tokio::test]
async fn a_full_disk_is_waited_for() {
    let mount = [&MOUNT[1..], &["mount", "-t", "tmpfs", "tmpfs", "/mnt"]].concat();
    let allowed = Command::new(MOUNT[0]).args(mount).status().await.unwrap().success();
    assert!(allowed, "no disk can be filled where nothing can be mounted: allow `unshare --mount`");
    waits_for_disk("SQLite, disk full", on_a_small_disk).await;
}

#[tokio::test]
async fn a_ledger_file_that_may_not_grow_is_waited_for() {
    waits_for_disk("SQLite, limited files", with_limited_files).await;
}

#[tokio::test]
async fn a_worker_with_nothing_to_do_notices_that_its_ledger_is_away() {
    let mut server = Server::start().await;
    let world = World::without_worker().await;
    let worker = Process::consuming(&world, server.url(), &SETTINGS).await;
    until("it is ready", async || worker.ready().await.0 == 200).await;
    server.stop(false).await;
    let told = async || worker.ready().await.1.contains("\"ledger: ");
    until_within(Duration::from_secs(20), "it says so", told).await;
    server.start_again().await;
    until("it is ready again", async || worker.ready().await.0 == 200).await;
    worker.stop().await;
    world.finish().await;
    server.end().await;
}

#[tokio::test]
async fn a_postgres_that_is_away_at_the_start_is_waited_for() {
    let mut server = Server::start().await;
    server.stop(false).await;
    let mut world = World::without_worker().await;
    let worker = Process::start(&world, server.url(), &SETTINGS);
    worker.until_logged("no ledger; trying again").await;
    let (status, body) = worker.ready().await;
    assert_eq!(status, 503);
    assert!(body.contains("\"ledger: the ledger in PostgreSQL cannot be opened"), "{body}");
    assert_eq!(worker.health().await, Some(200));
    server.start_again().await;
    worker.until_logged("consuming").await;
    assert!(!world.submitted().await.is_empty());
    worker.stop().await;
    world.finish().await;
    server.end().await;
}
