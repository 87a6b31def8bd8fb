//! Rows in one SQLite file that one worker has for itself.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use rusqlite::{
    Connection, ErrorCode, OpenFlags, OptionalExtension as _, Transaction, TransactionBehavior,
    params,
};
use uuid::Uuid;

use super::group::Group;
use super::row::{Hold, Millis, Row, State, before};
use super::store::{FORGET_AT_ONCE, Store, StoreError};
use super::{OpenError, wall_clock};

/// In order; a file's `user_version` says how many it has had.
const MIGRATIONS: [&str; 1] = [include_str!("../../migrations/sqlite/0001_submits.sql")];

/// How long to wait for a former worker that is just ending.
const BUSY: Duration = Duration::from_secs(5);

/// A connection that holds its file alone.
pub struct Sqlite {
    worker: Uuid,
    connection: Connection,
}

impl Sqlite {
    /// Opens or creates the file. Blocks.
    pub fn open(path: &Path) -> Result<Self, OpenError> {
        let failed = |source: rusqlite::Error| match source.sqlite_error_code() {
            Some(ErrorCode::DatabaseBusy | ErrorCode::DatabaseLocked) => {
                OpenError::InUse { path: PathBuf::from(path) }
            }
            Some(ErrorCode::NotADatabase | ErrorCode::DatabaseCorrupt) => {
                OpenError::Damaged { path: PathBuf::from(path), source }
            }
            _ => OpenError::File { path: PathBuf::from(path), source },
        };
        // Without SQLITE_OPEN_URI: the name of a file is nothing but that.
        let flags = OpenFlags::SQLITE_OPEN_READ_WRITE
            | OpenFlags::SQLITE_OPEN_CREATE
            | OpenFlags::SQLITE_OPEN_NO_MUTEX;
        let mut connection = Connection::open_with_flags(path, flags).map_err(failed)?;
        let had = prepare(&mut connection).map_err(failed)?;
        if usize::try_from(had).is_ok_and(|had| had > MIGRATIONS.len()) {
            return Err(OpenError::Newer { place: path.display().to_string() });
        }
        let worker = owner(&mut connection).map_err(failed)?;
        Ok(Self { worker, connection })
    }
}

/// Returns how many migrations the file had had before; of a newer version, more than are known.
fn prepare(connection: &mut Connection) -> rusqlite::Result<i64> {
    connection.busy_timeout(BUSY)?;
    // Before anything is read: two workers with one file would each think the other's work its own.
    connection.pragma_update(None, "locking_mode", "EXCLUSIVE")?;
    connection.pragma_update(None, "journal_mode", "WAL")?;
    // Each commit reaches the disk before it returns; in WAL mode NORMAL would not.
    connection.pragma_update(None, "synchronous", "FULL")?;
    // SQLite's own version of fsync on macOS; without effect elsewhere.
    connection.pragma_update(None, "fullfsync", true)?;
    let transaction = exclusive(connection)?;
    let done: i64 = transaction.query_row("PRAGMA user_version", (), |row| row.get(0))?;
    for (number, migration) in (1..).zip(MIGRATIONS) {
        if number > done {
            transaction.execute_batch(migration)?;
            transaction.pragma_update(None, "user_version", number)?;
        }
    }
    transaction.commit()?;
    Ok(done)
}

/// Who the file belongs to, for ever.
fn owner(connection: &mut Connection) -> rusqlite::Result<Uuid> {
    let transaction = exclusive(connection)?;
    let known =
        transaction.query_row("SELECT worker FROM owner", (), |row| row.get(0)).optional()?;
    let worker = if let Some(worker) = known {
        worker
    } else {
        let worker = Uuid::now_v7();
        transaction.execute("INSERT INTO owner (worker) VALUES (?1)", [worker])?;
        worker
    };
    transaction.commit()?;
    Ok(worker)
}

fn exclusive(connection: &mut Connection) -> rusqlite::Result<Transaction<'_>> {
    connection.transaction_with_behavior(TransactionBehavior::Exclusive)
}

impl Store for Sqlite {
    fn worker(&self) -> Uuid {
        self.worker
    }

    // Blocks: it runs on a thread of its own.
    async fn commit(&mut self, group: &mut Group) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        let mut rows = HashMap::new();
        {
            let mut select = transaction.prepare_cached(
                "SELECT fingerprint, token, worker, lease_until, sent_from, attempts, struck_until, \
                 settled_at, ending FROM submits WHERE command_id = ?1",
            )?;
            for id in group.ids() {
                if let Some(row) = select.query_row([&*id], read).optional()? {
                    rows.insert(id, row);
                }
            }
            let mut write = transaction.prepare_cached(
                "INSERT OR REPLACE INTO submits (command_id, fingerprint, token, worker, \
                 lease_until, sent_from, attempts, struck_until, settled_at, ending) \
                 VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10)",
            )?;
            let mut delete =
                transaction.prepare_cached("DELETE FROM submits WHERE command_id = ?1")?;
            for (id, row) in group.apply(rows, wall_clock()) {
                let Some(row) = row else {
                    delete.execute([&*id])?;
                    continue;
                };
                let (hold, settled) = row.state.into_parts();
                let hold = hold.as_ref();
                write.execute(params![
                    &*id,
                    row.fingerprint,
                    hold.map(|hold| hold.token),
                    hold.map(|hold| hold.worker),
                    hold.map(|hold| hold.lease_until),
                    hold.map(|hold| hold.sent_from),
                    hold.map(|hold| hold.attempts),
                    row.struck_until,
                    settled.as_ref().map(|(at, _)| at),
                    settled.as_ref().map(|(_, ending)| &**ending),
                ])?;
            }
        }
        transaction.commit()?;
        Ok(())
    }

    async fn forget(&mut self, retention: Duration) -> Result<u64, StoreError> {
        let now = wall_clock();
        let transaction = self.connection.transaction()?;
        let settled = transaction.execute(
            "DELETE FROM submits WHERE command_id IN (SELECT command_id FROM submits \
             WHERE settled_at IS NOT NULL AND settled_at <= ?1 ORDER BY settled_at LIMIT ?2)",
            params![before(now, retention), FORGET_AT_ONCE],
        )?;
        let struck = transaction.execute(
            "DELETE FROM submits WHERE command_id IN (SELECT command_id FROM submits \
             WHERE fingerprint IS NULL AND struck_until <= ?1 LIMIT ?2)",
            params![now, FORGET_AT_ONCE],
        )?;
        transaction.commit()?;
        Ok((settled + struck) as u64)
    }
}

fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Row> {
    let token: Option<Uuid> = row.get(1)?;
    let settled_at: Option<Millis> = row.get(7)?;
    let state = match (settled_at, token) {
        (Some(at), _) => State::Settled { at, ending: row.get::<_, Arc<str>>(8)? },
        (None, Some(token)) => State::InHand(Hold {
            token,
            worker: row.get(2)?,
            lease_until: row.get(3)?,
            sent_from: row.get(4)?,
            attempts: row.get(5)?,
        }),
        (None, None) => State::Waiting,
    };
    Ok(Row { fingerprint: row.get(0)?, struck_until: row.get(6)?, state })
}
