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
use super::group::Group;
use super::row::{Hold, Millis, Row, State, before};
use super::store::{FORGET_AT_ONCE, Store, StoreError};

/// In order; the table `call_manager_migrations` says which of them a database has had.
const MIGRATIONS: [&str; 1] = [include_str!("../../migrations/postgres/0001_submits.sql")];

/// The key of the lock under which one worker migrates and the others wait: any number that nobody
/// else uses.
const MIGRATION_LOCK: i64 = 0x63_616c_6c5f_6d67;

/// One writes, one more is there when the first has to be replaced.
const CONNECTIONS: usize = 2;

const CONNECT_LIMIT: Duration = Duration::from_secs(5);

/// How long a connection, and then the work on one group, may take. Longer, and every command would
/// hang with it.
const LIMIT: Duration = Duration::from_secs(10);

/// For the server: a worker that froze in a transaction must not hold up the others for long.
const SESSION: &str = "SET idle_in_transaction_session_timeout = '5s'; \
     SET lock_timeout = '5s'; SET statement_timeout = '8s'; \
     SET default_transaction_isolation = 'read committed'; \
     SELECT set_config('synchronous_commit', 'on', false) \
     WHERE current_setting('synchronous_commit') = 'off'";

/// A pool of connections.
pub struct Postgres {
    worker: Uuid,
    pool: Pool,
}

impl Postgres {
    /// Connects, and creates or updates the tables.
    pub async fn open(url: &SecretString) -> Result<Self, OpenError> {
        let pool = pool(url)?;
        let mut client = pool.get().await.map_err(|source| match source {
            deadpool_postgres::PoolError::Backend(source) => OpenError::Server { source },
            other => OpenError::Pool { source: other },
        })?;
        migrate(&mut client).await?;
        drop(client);
        Ok(Self { worker: Uuid::now_v7(), pool })
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

impl Store for Postgres {
    fn worker(&self) -> Uuid {
        self.worker
    }

    async fn commit(&mut self, group: &mut Group) -> Result<(), StoreError> {
        let mut client = in_time(self.client()).await?;
        in_time(transact(&mut client, group)).await.inspect_err(|_| discard(client))
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
    let mut columns = Columns::default();
    for (id, row) in group.apply(rows, now) {
        if let Some(row) = row {
            empty.remove(&id);
            columns.push(id, row);
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
             WHERE settled_at IS NOT NULL AND settled_at <= $1 ORDER BY settled_at LIMIT $2 \
             FOR UPDATE SKIP LOCKED)",
            &[&before(now, retention), &FORGET_AT_ONCE],
        )
        .await?;
    let struck = client
        .execute(
            "DELETE FROM call_manager_submits WHERE command_id IN (SELECT command_id FROM call_manager_submits \
             WHERE fingerprint IS NULL AND struck_until <= $1 LIMIT $2 \
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
    let select = transaction
        .prepare_cached(
            "SELECT command_id, fingerprint, token, worker, lease_until, sent_from, attempts, \
             struck_until, settled_at, ending FROM call_manager_submits \
             WHERE command_id = ANY ($1::text[])",
        )
        .await?;
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
    let token: Option<Uuid> = row.try_get(2)?;
    let struck_until: Option<Millis> = row.try_get(7)?;
    let settled_at: Option<Millis> = row.try_get(8)?;
    let state = match (settled_at, token) {
        (Some(at), _) => State::Settled { at, ending: row.try_get::<_, &str>(9)?.into() },
        (None, Some(token)) => State::InHand(Hold {
            token,
            worker: row.try_get(3)?,
            lease_until: row.try_get(4)?,
            sent_from: row.try_get(5)?,
            attempts: u32::try_from(row.try_get::<_, i64>(6)?).unwrap_or(u32::MAX),
        }),
        (None, None) if struck_until.is_none() => return Ok(None),
        (None, None) => State::Waiting,
    };
    Ok(Some((id.into(), Row { fingerprint: row.try_get(1)?, struck_until, state })))
}

/// The columns of many rows, as the arrays that `unnest` turns back into rows.
#[derive(Default)]
struct Columns {
    command_id: Vec<Arc<str>>,
    fingerprint: Vec<Option<Uuid>>,
    token: Vec<Option<Uuid>>,
    worker: Vec<Option<Uuid>>,
    lease_until: Vec<Option<Millis>>,
    sent_from: Vec<Option<Millis>>,
    attempts: Vec<Option<i64>>,
    struck_until: Vec<Option<Millis>>,
    settled_at: Vec<Option<Millis>>,
    ending: Vec<Option<Arc<str>>>,
}

impl Columns {
    fn push(&mut self, id: Arc<str>, row: Row) {
        let (hold, settled) = row.state.into_parts();
        let hold = hold.as_ref();
        self.command_id.push(id);
        self.fingerprint.push(row.fingerprint);
        self.token.push(hold.map(|hold| hold.token));
        self.worker.push(hold.map(|hold| hold.worker));
        self.lease_until.push(hold.map(|hold| hold.lease_until));
        self.sent_from.push(hold.map(|hold| hold.sent_from));
        self.attempts.push(hold.map(|hold| hold.attempts.into()));
        self.struck_until.push(row.struck_until);
        self.settled_at.push(settled.as_ref().map(|(at, _)| *at));
        self.ending.push(settled.map(|(_, ending)| ending));
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

async fn write(transaction: &Transaction<'_>, columns: &Columns) -> Result<(), StoreError> {
    if columns.command_id.is_empty() {
        return Ok(());
    }
    let update = transaction
        .prepare_cached(
            "UPDATE call_manager_submits AS old SET fingerprint = new.fingerprint, token = new.token, \
             worker = new.worker, lease_until = new.lease_until, sent_from = new.sent_from, \
             attempts = new.attempts, struck_until = new.struck_until, \
             settled_at = new.settled_at, ending = new.ending \
             FROM unnest($1::text[], $2::uuid[], $3::uuid[], $4::uuid[], $5::bigint[], \
             $6::bigint[], $7::bigint[], $8::bigint[], $9::bigint[], $10::text[]) \
             AS new (command_id, fingerprint, token, worker, lease_until, sent_from, attempts, \
             struck_until, settled_at, ending) \
             WHERE old.command_id = new.command_id",
        )
        .await?;
    let ids: Vec<&str> = columns.command_id.iter().map(|id| &**id).collect();
    let endings: Vec<Option<&str>> = columns.ending.iter().map(Option::as_deref).collect();
    transaction
        .execute(
            &update,
            &[
                &ids,
                &columns.fingerprint,
                &columns.token,
                &columns.worker,
                &columns.lease_until,
                &columns.sent_from,
                &columns.attempts,
                &columns.struck_until,
                &columns.settled_at,
                &endings,
            ],
        )
        .await?;
    Ok(())
}
