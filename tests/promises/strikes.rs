//! A cancel by command id whose strike is written and whose answer is lost: nothing is denied.

use std::time::{Duration, SystemTime};

use call_manager::domain::command::CommandKind;
use elevenlabs_sandbox::{BatchStatus, Effect, Fault, Route};
use lapin::BasicProperties;
use lapin::types::AMQPValue;
use serde_json::json;
use uuid::Uuid;

use crate::process::Process;
use crate::stalls::Disk;
use crate::support::postgres::{Database, client};
use crate::support::proxy::{Hole, Proxy, Towards};
use crate::support::{Received, World, submit_body, until, with_header, with_id};

const SUBMIT: CommandKind = CommandKind::Submit;
const CANCEL: CommandKind = CommandKind::Cancel;

/// No request is given up while the ledger fails.
const TIMEOUT: (&str, &str) = ("ELEVENLABS_TIMEOUT", "10s");

/// Long enough for the strike to be asked for, and over when the ledger is back.
const CANCEL_EXPIRES: Duration = Duration::from_secs(5);

/// How long a submit is at ElevenLabs: the strike is written before it is done.
const IN_FLIGHT: Duration = Duration::from_secs(6);

/// The rows with the strike, of the trigger's and of a query's.
const STRUCK: &str = "NEW.command_id = 'm' AND NEW.struck_until IS NOT NULL";
const LET_GO: &str = "SELECT pg_advisory_unlock(hashtext(current_schema()))";

/// A PostgreSQL behind a proxy, which loses the answer to one COMMIT.
pub struct Remote {
    database: Database,
    proxy: Proxy,
    /// Of the worker's sessions.
    name: String,
    pub url: String,
}

impl Remote {
    pub async fn start() -> Self {
        let database = Database::create().await;
        let config: tokio_postgres::Config = database.url().parse().unwrap();
        let direct = format!("127.0.0.1:{}", config.get_ports()[0]);
        let proxy = Proxy::to(direct.parse().unwrap()).await;
        let name = format!("remote-{}", Uuid::now_v7());
        let url = database.url().replace(&direct, &proxy.address.to_string());
        let url = format!("{url}&application_name={name}");
        Self { database, proxy, name, url }
    }

    /// The server keeps the COMMIT of such rows waiting until the test lets it go.
    pub async fn hold(&self, rows: &str) {
        let hold = format!(
            "CREATE FUNCTION hold() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN \
             PERFORM pg_advisory_xact_lock(hashtext(current_schema())); RETURN NULL; END $$; \
             CREATE CONSTRAINT TRIGGER hold AFTER INSERT OR UPDATE ON call_manager_submits \
             DEFERRABLE INITIALLY DEFERRED FOR EACH ROW \
             WHEN ({rows}) EXECUTE FUNCTION hold(); \
             SELECT pg_advisory_lock(hashtext(current_schema()))"
        );
        self.database.run(&hold).await;
    }

    /// Returns when such a row is written and the worker has no answer to that.
    pub async fn until_lost(&self, rows: &str) {
        self.database.until_waiting(&self.name).await;
        self.proxy.blackhole(Towards::Client, Hole::Swallows);
        self.database.run(LET_GO).await;
        let own = client(&self.database.url()).await;
        let written = format!("SELECT count(*) FROM call_manager_submits AS new WHERE {rows}");
        let is_written = async || {
            let row = own.query_one(&written, &[]).await.unwrap();
            row.get::<_, i64>(0) == 1
        };
        until("it is written", is_written).await;
    }

    pub fn heal(&self) {
        self.proxy.heal();
    }

    pub async fn clean_up(self) {
        self.database.drop().await;
    }
}

/// What keeps the answer from the worker.
enum Lost {
    /// The disk stalls in the COMMIT for longer than the worker waits.
    Sqlite(Disk),
    /// The connection loses what the server answers.
    Postgres(Box<Remote>),
}

impl Lost {
    fn sqlite() -> Self {
        Self::Sqlite(Disk::new())
    }

    async fn postgres() -> Self {
        Self::Postgres(Box::new(Remote::start().await))
    }

    async fn worker(&self, world: &World) -> Process {
        match self {
            Self::Sqlite(disk) => {
                let more = [&disk.environment()[..], &[TIMEOUT]].concat();
                Process::consuming(world, &world.drained_ledger().await, &more).await
            }
            Self::Postgres(remote) => Process::consuming(world, &remote.url, &[TIMEOUT]).await,
        }
    }

    /// From now on, the worker gets no answer to the strike.
    async fn begin(&self) {
        match self {
            Self::Sqlite(disk) => disk.stall(),
            Self::Postgres(remote) => remote.hold(STRUCK).await,
        }
    }

    /// Returns when the strike is asked for and its answer is lost.
    async fn until_lost(&self, worker: &Process) {
        match self {
            Self::Sqlite(_) => worker.until_logged("deferred command=\"cancel\"").await,
            Self::Postgres(remote) => remote.until_lost(STRUCK).await,
        }
    }

    /// The ledger works again.
    fn end(&self) {
        match self {
            Self::Sqlite(disk) => disk.go_on(),
            Self::Postgres(remote) => remote.heal(),
        }
    }

    async fn clean_up(self) {
        if let Self::Postgres(remote) = self {
            remote.clean_up().await;
        }
    }
}

async fn submit(world: &World) {
    world.publish(SUBMIT, submit_body().to_string().as_bytes(), with_id("m")).await;
}

/// Returns when the submit is at ElevenLabs, for a while.
async fn submit_in_flight(world: &World) {
    world.sandbox.order(Fault::on(Route::Submit, Effect::Latency(IN_FLIGHT)));
    submit(world).await;
    until("it is at ElevenLabs", async || world.requests(Route::Submit) == 1).await;
}

fn expiring() -> (BasicProperties, SystemTime) {
    let over = SystemTime::now() + CANCEL_EXPIRES;
    let seconds = over.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    let seconds = AMQPValue::LongLongInt(i64::try_from(seconds).unwrap());
    (with_header("cancel", "not_after", seconds), over)
}

/// Cancels while the answer of the ledger is lost. With `expires`, the time of the cancel is over
/// before the ledger works again.
async fn cancelled(world: &World, worker: &Process, lost: &Lost, expires: bool) {
    // Nothing else is written within the next seconds: see `TRY_IDLE` in the ledger.
    let other = json!({"command_id": "other"}).to_string();
    world.publish(CANCEL, other.as_bytes(), with_id("first")).await;
    worker.until_logged("answered command=\"cancel\"").await;
    lost.begin().await;
    let (properties, over) = expiring();
    let properties = if expires { properties } else { with_id("cancel") };
    let cancel = json!({"command_id": "m"}).to_string();
    world.publish(CANCEL, cancel.as_bytes(), properties).await;
    lost.until_lost(worker).await;
    until("its time is over", async || !expires || over < SystemTime::now()).await;
    lost.end();
}

/// The result of a command, whichever other ones come.
async fn result_of(world: &mut World, id: &str) -> Received {
    loop {
        let result = world.next_result().await;
        if result.command_id() == id {
            return result;
        }
    }
}

async fn nobody_has_begun(lost: Lost, expires: bool) {
    let mut world = World::without_worker().await;
    let worker = lost.worker(&world).await;
    cancelled(&world, &worker, &lost, expires).await;
    let result = result_of(&mut world, "cancel").await;
    if expires {
        assert_eq!(result.code(), "500 outcome_unknown", "{}", result.body);
    } else {
        assert_eq!(result.code(), "404 not_found", "{}", result.body);
        assert!(result.error().contains("answered cancelled_before_submit"), "{}", result.error());
    }
    submit(&world).await;
    let submitted = result_of(&mut world, "m").await;
    assert_eq!(submitted.code(), "400 cancelled_before_submit", "{}", submitted.body);
    assert_eq!(world.requests(Route::Submit), 0);
    worker.stop().await;
    world.finish().await;
    lost.clean_up().await;
}

async fn is_in_flight(lost: Lost, expires: bool) {
    let mut world = World::without_worker().await;
    let worker = lost.worker(&world).await;
    submit_in_flight(&world).await;
    cancelled(&world, &worker, &lost, expires).await;
    let expected = if expires { "500 outcome_unknown" } else { "200" };
    let mut left = vec![("m", "200"), ("cancel", expected)];
    while !left.is_empty() {
        let result = world.next_result().await;
        let id = result.command_id();
        left.retain(|(command, code)| {
            assert!(*command != id || result.code() == *code, "{id}: {}", result.body);
            *command != id
        });
    }
    let batches = async || world.sandbox.batches();
    until("nobody is called", async || batches().await[0].status == BatchStatus::Cancelled).await;
    assert_eq!((batches().await.len(), world.requests(Route::Submit)), (1, 1));
    worker.stop().await;
    world.finish().await;
    lost.clean_up().await;
}

#[tokio::test]
async fn a_strike_whose_commit_stalls_in_sqlite_holds_for_a_submit_that_nobody_has_begun() {
    nobody_has_begun(Lost::sqlite(), false).await;
}

#[tokio::test]
async fn a_cancel_that_expires_while_sqlite_stalls_is_not_denied() {
    nobody_has_begun(Lost::sqlite(), true).await;
}

#[tokio::test]
async fn a_strike_whose_commit_stalls_in_sqlite_cancels_the_batch_of_a_submit_in_flight() {
    is_in_flight(Lost::sqlite(), false).await;
}

#[tokio::test]
async fn a_cancel_that_expires_while_sqlite_stalls_is_not_denied_of_a_submit_in_flight() {
    is_in_flight(Lost::sqlite(), true).await;
}

#[tokio::test]
async fn a_strike_whose_answer_postgres_loses_holds_for_a_submit_that_nobody_has_begun() {
    nobody_has_begun(Lost::postgres().await, false).await;
}

#[tokio::test]
async fn a_cancel_that_expires_while_postgres_is_silent_is_not_denied() {
    nobody_has_begun(Lost::postgres().await, true).await;
}

#[tokio::test]
async fn a_strike_whose_answer_postgres_loses_cancels_the_batch_of_a_submit_in_flight() {
    is_in_flight(Lost::postgres().await, false).await;
}

#[tokio::test]
async fn a_cancel_that_expires_while_postgres_is_silent_is_not_denied_of_a_submit_in_flight() {
    is_in_flight(Lost::postgres().await, true).await;
}
