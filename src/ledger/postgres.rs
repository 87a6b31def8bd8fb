//! Rows in a PostgreSQL database that a pool of workers shares.

use std::collections::{HashMap, HashSet};
use std::str::FromStr as _;
use std::sync::Arc;
use std::time::Duration;

use deadpool_postgres::{
    Hook, HookError, Manager, ManagerConfig, Object, Pool, RecyclingMethod, Runtime, Transaction,
};
use rustls_platform_verifier::ConfigVerifierExt as _;
use secrecy::{ExposeSecret as _, SecretString};
use tokio::time::timeout;
use tokio_postgres::config::SslMode;
use tokio_postgres::types::ToSql;
use tokio_postgres::{Client, NoTls};
use tokio_postgres_rustls::MakeRustlsConnect;
use uuid::Uuid;

use super::OpenError;
use super::columns::{Columns, NAMES};
use super::group::Group;
use super::row::{Millis, Row, before};
use super::store::{Answer, FORGET_AT_ONCE, Question, Store, StoreError, UNFINISHED_AT_ONCE};

/// In order; the table `call_manager_migrations` says which of them a database has had.
const MIGRATIONS: [&str; 2] = [
    include_str!("../../migrations/postgres/0001_submits.sql"),
    include_str!("../../migrations/postgres/0002_finishing.sql"),
];

/// The key of the lock under which one worker migrates and the others wait: any number that nobody
/// else uses.
const MIGRATION_LOCK: i64 = 0x63_616c_6c5f_6d67;

/// One writes, one more is there when the first has to be replaced.
const CONNECTIONS: usize = 2;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long a connection, and then the work on one group, may take. Longer, and every command would
/// hang with it.
const LIMIT: Duration = Duration::from_secs(10);

/// For the server: a worker that froze in a transaction must not hold up the others for long. And a
/// table that has grown since the statements were planned must not be read as a whole each time.
const SESSION: &str = "SET idle_in_transaction_session_timeout = '5s'; \
     SET lock_timeout = '5s'; SET statement_timeout = '8s'; \
     SET default_transaction_isolation = 'read committed'; \
     SET enable_seqscan = off; \
     SELECT set_config('synchronous_commit', 'on', false) \
     WHERE current_setting('synchronous_commit') = 'off'";

/// A pool of connections.
pub struct Postgres {
    worker: Uuid,
    was_drained: bool,
    pool: Pool,
}

impl Postgres {
    /// Connects, and creates or updates the tables, for the ElevenLabs at `base_url` alone.
    pub async fn open(url: &SecretString, base_url: &str) -> Result<Self, OpenError> {
        let pool = pool(url)?;
        let mut client = pool.get().await.map_err(|source| match source {
            deadpool_postgres::PoolError::Backend(source) => OpenError::Server { source },
            other => OpenError::Pool { source: other },
        })?;
        migrate(&mut client).await?;
        let was_drained = belong(&client, base_url).await?;
        drop(client);
        Ok(Self { worker: Uuid::now_v7(), was_drained, pool })
    }
}

fn pool(url: &SecretString) -> Result<Pool, OpenError> {
    let mut config = tokio_postgres::Config::from_str(url.expose_secret())
        // The parser's own words may quote a part of the password.
        .map_err(|_| OpenError::Url)?;
    if config.get_application_name().is_none() {
        config.application_name("call-manager");
    }
    config.connect_timeout(CONNECT_LIMIT);
    // A server that vanished without a word is noticed within the same time.
    config.tcp_user_timeout(LIMIT).keepalives_idle(LIMIT);
    let settings = ManagerConfig { recycling_method: RecyclingMethod::Fast };
    let manager = if config.get_ssl_mode() == SslMode::Require {
        let tls = rustls::ClientConfig::with_platform_verifier()
            .map_err(|source| OpenError::Tls { source })?;
        Manager::from_config(config, MakeRustlsConnect::new(tls), settings)
    } else {
        Manager::from_config(config, NoTls, settings)
    };
    let session = Hook::async_fn(|client, _| {
        Box::pin(async move { client.batch_execute(SESSION).await.map_err(HookError::Backend) })
    });
    Pool::builder(manager)
        .max_size(CONNECTIONS)
        .runtime(Runtime::Tokio1)
        .wait_timeout(Some(CONNECT_LIMIT))
        .create_timeout(Some(CONNECT_LIMIT))
        .recycle_timeout(Some(CONNECT_LIMIT))
        .post_create(session)
        .build()
        .map_err(|source| OpenError::Build { source })
}

/// Safe where several workers start at once: one migrates, the others find it done.
async fn migrate(client: &mut Client) -> Result<(), OpenError> {
    let failed = |source| OpenError::Server { source };
    let transaction = client.transaction().await.map_err(failed)?;
    // However long a migration takes, the others wait for it.
    let patient = "SET LOCAL lock_timeout = 0; SET LOCAL statement_timeout = 0";
    transaction.batch_execute(patient).await.map_err(failed)?;
    transaction
        .execute("SELECT pg_advisory_xact_lock($1)", &[&MIGRATION_LOCK])
        .await
        .map_err(failed)?;
    transaction
        .batch_execute(
            "CREATE TABLE IF NOT EXISTS call_manager_migrations (number int PRIMARY KEY)",
        )
        .await
        .map_err(failed)?;
    let done = transaction
        .query_one("SELECT count(*) FROM call_manager_migrations", &[])
        .await
        .map_err(failed)?;
    let done = usize::try_from(done.get::<_, i64>(0)).unwrap_or(usize::MAX);
    if done > MIGRATIONS.len() {
        return Err(OpenError::Newer { place: "the PostgreSQL database".to_owned() });
    }
    for (number, migration) in (1_i32..).zip(MIGRATIONS).skip(done) {
        transaction.batch_execute(migration).await.map_err(failed)?;
        transaction
            .execute("INSERT INTO call_manager_migrations (number) VALUES ($1)", &[&number])
            .await
            .map_err(failed)?;
    }
    transaction.commit().await.map_err(failed)
}

/// A ledger that belongs to no ElevenLabs yet becomes this one's; returns whether its queues were
/// ever seen empty.
async fn belong(client: &Client, base_url: &str) -> Result<bool, OpenError> {
    let failed = |source| OpenError::Server { source };
    let take = "UPDATE call_manager_ledger SET base_url = $1 WHERE base_url IS NULL";
    client.execute(take, &[&base_url]).await.map_err(failed)?;
    let select = "SELECT base_url, drained_at IS NOT NULL FROM call_manager_ledger";
    let ledger = client.query_one(select, &[]).await.map_err(failed)?;
    let known: String = ledger.try_get(0).map_err(failed)?;
    if known != base_url {
        let place = "the ledger in PostgreSQL".to_owned();
        return Err(OpenError::OtherElevenlabs { place, known });
    }
    ledger.try_get(1).map_err(failed)
}

impl Store for Postgres {
    fn worker(&self) -> Uuid {
        self.worker
    }

    fn was_drained(&self) -> bool {
        self.was_drained
    }

    async fn commit(&mut self, group: &mut Group) -> Result<(), StoreError> {
        let mut client = in_time(self.client()).await?;
        in_time(transact(&mut client, group)).await.inspect_err(|_| discard(client))
    }

    async fn ask(&mut self, question: &Question) -> Result<Answer, StoreError> {
        let client = in_time(self.client()).await?;
        let answered = in_time(answer(&client, question)).await;
        self.was_drained |= matches!((question, &answered), (Question::Drained, Ok(_)));
        answered.inspect_err(|_| discard(client))
    }

    async fn forget(&mut self, retention: Duration) -> Result<u64, StoreError> {
        let client = in_time(self.client()).await?;
        in_time(remove(&client, retention)).await.inspect_err(|_| discard(client))
    }
}

impl Postgres {
    async fn client(&self) -> Result<Object, StoreError> {
        Ok(self.pool.get().await?)
    }
}

async fn in_time<T>(work: impl Future<Output = Result<T, StoreError>>) -> Result<T, StoreError> {
    timeout(LIMIT, work).await.unwrap_or(Err(StoreError::TooSlow(LIMIT)))
}

/// Closes a connection that may be dead, or in the middle of a transaction.
fn discard(client: Object) {
    drop(Object::take(client));
}

async fn transact(client: &mut Object, group: &mut Group) -> Result<(), StoreError> {
    let transaction = client.transaction().await?;
    let ids: Vec<Arc<str>> = group.ids().into_iter().collect();
    let (rows, now) = lock(&transaction, &ids).await?;
    let mut empty: HashSet<_> = ids.into_iter().filter(|id| !rows.contains_key(id)).collect();
    let mut columns = Arrays::default();
    for (id, row) in group.apply(rows, now) {
        if let Some(row) = row {
            empty.remove(&id);
            columns.push(id, row.into());
        } else {
            empty.insert(id);
        }
    }
    write(&transaction, &columns).await?;
    delete(&transaction, &empty).await?;
    transaction.commit().await?;
    Ok(())
}

async fn remove(client: &Object, retention: Duration) -> Result<u64, StoreError> {
    let now: Millis = client.query_one(NOW, &[]).await?.try_get(0)?;
    // Rows that another worker is just removing are left to it.
    let settled = client
        .execute(
            "DELETE FROM call_manager_submits WHERE command_id IN (SELECT command_id FROM call_manager_submits \
             WHERE settled_at IS NOT NULL AND settled_at <= $1 AND published \
             AND struck_until IS NULL ORDER BY settled_at LIMIT $2 \
             FOR UPDATE SKIP LOCKED)",
            &[&before(now, retention), &FORGET_AT_ONCE],
        )
        .await?;
    let struck = client
        .execute(
            "DELETE FROM call_manager_submits WHERE command_id IN (SELECT command_id FROM call_manager_submits \
             WHERE fingerprint IS NULL AND settled_at IS NULL AND struck_until <= $1 LIMIT $2 \
             FOR UPDATE SKIP LOCKED)",
            &[&now, &FORGET_AT_ONCE],
        )
        .await?;
    Ok(settled + struck)
}

const NOW: &str = "SELECT (extract(epoch FROM clock_timestamp()) * 1000)::bigint";

/// Locks the group's rows against every other worker until the transaction ends, and reads them.
/// One statement creates or locks each row, in the order of the ids: what is not there cannot be
/// locked, and workers with the same ids wait for each other in one direction only. The condition
/// that never holds keeps a locked row as it is.
async fn lock(
    transaction: &Transaction<'_>,
    ids: &[Arc<str>],
) -> Result<(HashMap<Arc<str>, Row>, Millis), StoreError> {
    let create_or_lock = transaction
        .prepare_cached(
            "INSERT INTO call_manager_submits AS old (command_id) \
             SELECT id FROM unnest($1::text[]) WITH ORDINALITY AS new (id, place) ORDER BY place \
             ON CONFLICT (command_id) DO UPDATE SET attempts = old.attempts WHERE false",
        )
        .await?;
    let clock = transaction.prepare_cached(NOW).await?;
    let select = format!(
        "SELECT command_id, {NAMES} FROM call_manager_submits WHERE command_id = ANY ($1::text[])"
    );
    let select = transaction.prepare_cached(&select).await?;
    let ids: Vec<&str> = ids.iter().map(|id| &**id).collect();
    let ids: [&(dyn ToSql + Sync); 1] = [&ids];
    // Sent together, in this order: one round trip.
    let (_, now, found) = futures_util::try_join!(
        transaction.execute(&create_or_lock, &ids),
        transaction.query_one(&clock, &[]),
        transaction.query(&select, &ids),
    )?;
    let rows = found.iter().filter_map(|row| read(row).transpose()).collect::<Result<_, _>>()?;
    Ok((rows, now.try_get(0)?))
}

/// `None` for a row that is empty.
fn read(row: &tokio_postgres::Row) -> Result<Option<(Arc<str>, Row)>, tokio_postgres::Error> {
    let id = row.try_get::<_, &str>(0)?;
    let text = |column| Ok(row.try_get::<_, Option<&str>>(column)?.map(Arc::from));
    let columns = Columns {
        fingerprint: row.try_get(1)?,
        body: row.try_get(2)?,
        token: row.try_get(3)?,
        worker: row.try_get(4)?,
        lease_until: row.try_get(5)?,
        sent_from: row.try_get(6)?,
        busy_until: row.try_get(7)?,
        attempts: row.try_get(8)?,
        keys: row.try_get(9)?,
        struck_until: row.try_get(10)?,
        touched_at: row.try_get(11)?,
        origin: text(12)?,
        settled_at: row.try_get(13)?,
        ending: text(14)?,
        published: row.try_get(15)?,
        batch_id: text(16)?,
        batch_key: row.try_get(17)?,
    };
    Ok(columns.into_row().map(|row| (id.into(), row)))
}

/// Many rows, as the arrays that `unnest` turns back into rows.
#[derive(Default)]
struct Arrays {
    command_id: Vec<Arc<str>>,
    fingerprint: Vec<Option<Uuid>>,
    body: Vec<Option<Uuid>>,
    token: Vec<Option<Uuid>>,
    worker: Vec<Option<Uuid>>,
    lease_until: Vec<Option<Millis>>,
    sent_from: Vec<Option<Millis>>,
    busy_until: Vec<Option<Millis>>,
    attempts: Vec<Option<i64>>,
    keys: Vec<Option<Vec<u8>>>,
    struck_until: Vec<Option<Millis>>,
    touched_at: Vec<Millis>,
    origin: Vec<Option<Arc<str>>>,
    settled_at: Vec<Option<Millis>>,
    ending: Vec<Option<Arc<str>>>,
    published: Vec<bool>,
    batch_id: Vec<Option<Arc<str>>>,
    batch_key: Vec<Option<Uuid>>,
}

impl Arrays {
    fn push(&mut self, id: Arc<str>, row: Columns) {
        self.command_id.push(id);
        self.fingerprint.push(row.fingerprint);
        self.body.push(row.body);
        self.token.push(row.token);
        self.worker.push(row.worker);
        self.lease_until.push(row.lease_until);
        self.sent_from.push(row.sent_from);
        self.busy_until.push(row.busy_until);
        self.attempts.push(row.attempts);
        self.keys.push(row.keys);
        self.struck_until.push(row.struck_until);
        self.touched_at.push(row.touched_at);
        self.origin.push(row.origin);
        self.settled_at.push(row.settled_at);
        self.ending.push(row.ending);
        self.published.push(row.published);
        self.batch_id.push(row.batch_id);
        self.batch_key.push(row.batch_key);
    }
}

async fn delete(transaction: &Transaction<'_>, ids: &HashSet<Arc<str>>) -> Result<(), StoreError> {
    if ids.is_empty() {
        return Ok(());
    }
    let ids: Vec<&str> = ids.iter().map(|id| &**id).collect();
    let delete = transaction
        .prepare_cached("DELETE FROM call_manager_submits WHERE command_id = ANY ($1::text[])")
        .await?;
    transaction.execute(&delete, &[&ids]).await?;
    Ok(())
}

async fn write(transaction: &Transaction<'_>, rows: &Arrays) -> Result<(), StoreError> {
    if rows.command_id.is_empty() {
        return Ok(());
    }
    let set: Vec<String> = NAMES.split(", ").map(|name| format!("{name} = new.{name}")).collect();
    let update = format!(
        "UPDATE call_manager_submits AS old SET {} FROM unnest($1::text[], $2::uuid[], $3::uuid[], \
         $4::uuid[], $5::uuid[], $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[], \
         $10::bytea[], $11::bigint[], $12::bigint[], $13::text[], $14::bigint[], $15::text[], \
         $16::boolean[], $17::text[], $18::uuid[]) AS new (command_id, {NAMES}) \
         WHERE old.command_id = new.command_id",
        set.join(", ")
    );
    let update = transaction.prepare_cached(&update).await?;
    let ids: Vec<&str> = rows.command_id.iter().map(|id| &**id).collect();
    let texts = |column: &[Option<Arc<str>>]| -> Vec<Option<String>> {
        column.iter().map(|text| text.as_deref().map(str::to_owned)).collect()
    };
    let (origins, endings) = (texts(&rows.origin), texts(&rows.ending));
    let batches = texts(&rows.batch_id);
    let values: [&(dyn ToSql + Sync); 18] = [
        &ids,
        &rows.fingerprint,
        &rows.body,
        &rows.token,
        &rows.worker,
        &rows.lease_until,
        &rows.sent_from,
        &rows.busy_until,
        &rows.attempts,
        &rows.keys,
        &rows.struck_until,
        &rows.touched_at,
        &origins,
        &rows.settled_at,
        &endings,
        &rows.published,
        &batches,
        &rows.batch_key,
    ];
    transaction.execute(&update, &values).await?;
    Ok(())
}

async fn answer(client: &Object, question: &Question) -> Result<Answer, StoreError> {
    Ok(match question {
        Question::Unfinished { untouched, cancel } => {
            let now: Millis = client.query_one(NOW, &[]).await?.try_get(0)?;
            let select = "SELECT command_id FROM (SELECT command_id FROM call_manager_submits \
                 WHERE ((settled_at IS NULL AND origin IS NOT NULL) OR NOT published) \
                 AND touched_at <= $1 ORDER BY touched_at LIMIT $3) AS untouched \
                 UNION SELECT command_id FROM (SELECT command_id FROM call_manager_submits \
                 WHERE settled_at IS NOT NULL AND struck_until IS NOT NULL AND touched_at <= $2 \
                 ORDER BY touched_at LIMIT $3) AS to_cancel";
            let select = client.prepare_cached(select).await?;
            let limits: [&(dyn ToSql + Sync); 3] =
                [&before(now, *untouched), &before(now, *cancel), &UNFINISHED_AT_ONCE];
            let rows = client.query(&select, &limits).await?;
            let ids = rows.iter().map(|row| Ok(row.try_get::<_, &str>(0)?.into()));
            Answer::Unfinished(ids.collect::<Result<_, tokio_postgres::Error>>()?)
        }
        Question::Owners(batches) => {
            let select = "SELECT batch_id, command_id FROM call_manager_submits \
                 WHERE batch_id = ANY ($1::text[])";
            let select = client.prepare_cached(select).await?;
            let rows = client.query(&select, &[batches]).await?;
            let owners = rows.iter().map(|row| Ok((row.try_get(0)?, row.try_get(1)?)));
            Answer::Owners(owners.collect::<Result<_, tokio_postgres::Error>>()?)
        }
        Question::BatchOf(key) => {
            let select = "SELECT batch_id FROM call_manager_submits WHERE batch_key = $1 \
                 ORDER BY settled_at DESC LIMIT 1";
            let row = client.query_opt(select, &[key]).await?;
            Answer::BatchOf(row.map(|row| row.try_get(0)).transpose()?)
        }
        Question::Drained => {
            let note = format!(
                "UPDATE call_manager_ledger SET drained_at = ({NOW}) WHERE drained_at IS NULL"
            );
            client.execute(&note, &[]).await?;
            Answer::Noted
        }
    })
}
