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

use super::columns::{Columns, NAMES};
use super::group::Group;
use super::row::before;
use super::store::{Answer, FORGET_AT_ONCE, Question, Store, StoreError, UNFINISHED_AT_ONCE};
use super::{OpenError, wall_clock};

/// In order; a file's `user_version` says how many it has had.
const MIGRATIONS: [&str; 2] = [
    include_str!("../../migrations/sqlite/0001_submits.sql"),
    include_str!("../../migrations/sqlite/0002_finishing.sql"),
];

/// How long to wait for a former worker that is just ending.
const BUSY: Duration = Duration::from_secs(5);

/// A connection that holds its file alone.
pub struct Sqlite {
    worker: Uuid,
    was_drained: bool,
    connection: Connection,
}

impl Sqlite {
    /// Opens or creates the file, for the ElevenLabs at `base_url` alone. Blocks.
    pub fn open(path: &Path, base_url: &str) -> Result<Self, OpenError> {
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
        let owner = owner(&mut connection, base_url).map_err(failed)?;
        if owner.base_url != base_url {
            let place = format!("the ledger {}", path.display());
            return Err(OpenError::OtherElevenlabs { place, known: owner.base_url });
        }
        Ok(Self { worker: owner.worker, was_drained: owner.was_drained, connection })
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
struct Owner {
    worker: Uuid,
    base_url: String,
    was_drained: bool,
}

/// A file that belongs to nobody yet becomes this worker's, for this ElevenLabs.
fn owner(connection: &mut Connection, base_url: &str) -> rusqlite::Result<Owner> {
    let transaction = exclusive(connection)?;
    transaction.execute(
        "INSERT INTO owner (worker) SELECT ?1 WHERE NOT EXISTS (SELECT 1 FROM owner)",
        [Uuid::now_v7()],
    )?;
    transaction.execute("UPDATE owner SET base_url = ?1 WHERE base_url IS NULL", [base_url])?;
    let owner = transaction.query_row(
        "SELECT worker, base_url, drained_at IS NOT NULL FROM owner",
        (),
        |row| Ok(Owner { worker: row.get(0)?, base_url: row.get(1)?, was_drained: row.get(2)? }),
    )?;
    transaction.commit()?;
    Ok(owner)
}

fn exclusive(connection: &mut Connection) -> rusqlite::Result<Transaction<'_>> {
    connection.transaction_with_behavior(TransactionBehavior::Exclusive)
}

impl Store for Sqlite {
    fn worker(&self) -> Uuid {
        self.worker
    }

    fn was_drained(&self) -> bool {
        self.was_drained
    }

    // Blocks: it runs on a thread of its own.
    async fn commit(&mut self, group: &mut Group) -> Result<(), StoreError> {
        let transaction = self.connection.transaction()?;
        let mut rows = HashMap::new();
        {
            let select = format!("SELECT {NAMES} FROM submits WHERE command_id = ?1");
            let mut select = transaction.prepare_cached(&select)?;
            for id in group.ids() {
                let columns = select.query_row([&*id], read).optional()?;
                if let Some(row) = columns.and_then(Columns::into_row) {
                    rows.insert(id, row);
                }
            }
            let mut delete =
                transaction.prepare_cached("DELETE FROM submits WHERE command_id = ?1")?;
            for (id, row) in group.apply(rows, wall_clock()) {
                match row {
                    Some(row) => write(&transaction, &id, &row.into())?,
                    None => drop(delete.execute([&*id])?),
                }
            }
        }
        transaction.commit()?;
        Ok(())
    }

    async fn ask(&mut self, question: &Question) -> Result<Answer, StoreError> {
        Ok(match question {
            Question::Unfinished { untouched, cancel } => {
                Answer::Unfinished(self.unfinished(*untouched, *cancel)?)
            }
            Question::Owners(batches) => {
                let mut select = self
                    .connection
                    .prepare_cached("SELECT command_id FROM submits WHERE batch_id = ?1")?;
                let mut owners = HashMap::new();
                for batch in batches {
                    if let Some(id) = select.query_row([batch], |row| row.get(0)).optional()? {
                        owners.insert(batch.clone(), id);
                    }
                }
                Answer::Owners(owners)
            }
            Question::BatchOf(key) => {
                let newest = "SELECT batch_id FROM submits WHERE batch_key = ?1 \
                     ORDER BY settled_at DESC LIMIT 1";
                let found = self.connection.query_row(newest, [key], |row| row.get(0));
                Answer::BatchOf(found.optional()?)
            }
            Question::Drained => {
                let note = "UPDATE owner SET drained_at = ?1 WHERE drained_at IS NULL";
                self.connection.execute(note, [wall_clock()])?;
                self.was_drained = true;
                Answer::Noted
            }
        })
    }

    async fn forget(&mut self, retention: Duration) -> Result<u64, StoreError> {
        let now = wall_clock();
        let transaction = self.connection.transaction()?;
        let settled = transaction.execute(
            "DELETE FROM submits WHERE command_id IN (SELECT command_id FROM submits \
             WHERE settled_at IS NOT NULL AND settled_at <= ?1 AND published = 1 \
             AND struck_until IS NULL ORDER BY settled_at LIMIT ?2)",
            params![before(now, retention), FORGET_AT_ONCE],
        )?;
        let struck = transaction.execute(
            "DELETE FROM submits WHERE command_id IN (SELECT command_id FROM submits \
             WHERE fingerprint IS NULL AND settled_at IS NULL AND struck_until <= ?1 LIMIT ?2)",
            params![now, FORGET_AT_ONCE],
        )?;
        transaction.commit()?;
        Ok((settled + struck) as u64)
    }
}

impl Sqlite {
    fn unfinished(
        &self,
        untouched: Duration,
        cancel: Duration,
    ) -> Result<Vec<Arc<str>>, rusqlite::Error> {
        let now = wall_clock();
        let mut select = self.connection.prepare_cached(
            "SELECT command_id FROM (SELECT command_id, touched_at FROM submits \
             WHERE ((settled_at IS NULL AND origin IS NOT NULL) OR published = 0) \
             AND touched_at <= ?1 ORDER BY touched_at LIMIT ?3) \
             UNION SELECT command_id FROM (SELECT command_id, touched_at FROM submits \
             WHERE settled_at IS NOT NULL AND struck_until IS NOT NULL \
             AND touched_at <= ?2 ORDER BY touched_at LIMIT ?3)",
        )?;
        let limits = params![before(now, untouched), before(now, cancel), UNFINISHED_AT_ONCE];
        select.query_map(limits, |row| row.get(0))?.collect()
    }
}

fn write(
    transaction: &Transaction<'_>,
    command_id: &str,
    row: &Columns,
) -> Result<(), rusqlite::Error> {
    let insert = format!(
        "INSERT OR REPLACE INTO submits (command_id, {NAMES}) \
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8, ?9, ?10, ?11, ?12, ?13, ?14, ?15, ?16, ?17, ?18)"
    );
    transaction.prepare_cached(&insert)?.execute(params![
        command_id,
        row.fingerprint,
        row.body,
        row.token,
        row.worker,
        row.lease_until,
        row.sent_from,
        row.busy_until,
        row.attempts,
        row.keys,
        row.struck_until,
        row.touched_at,
        row.origin,
        row.settled_at,
        row.ending,
        row.published,
        row.batch_id,
        row.batch_key,
    ])?;
    Ok(())
}

fn read(row: &rusqlite::Row<'_>) -> rusqlite::Result<Columns> {
    Ok(Columns {
        fingerprint: row.get(0)?,
        body: row.get(1)?,
        token: row.get(2)?,
        worker: row.get(3)?,
        lease_until: row.get(4)?,
        sent_from: row.get(5)?,
        busy_until: row.get(6)?,
        attempts: row.get(7)?,
        keys: row.get(8)?,
        struck_until: row.get(9)?,
        touched_at: row.get(10)?,
        origin: row.get(11)?,
        settled_at: row.get(12)?,
        ending: row.get(13)?,
        published: row.get(14)?,
        batch_id: row.get(15)?,
        batch_key: row.get(16)?,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_committed_is_on_disk() {
        let folder = tempfile::tempdir().unwrap();
        let sqlite = Sqlite::open(&folder.path().join("ledger.db"), "http://elevenlabs").unwrap();
        let set = |name| sqlite.connection.pragma_query_value(None, name, |row| row.get(0));
        // 2 is FULL.
        assert_eq!((set("synchronous"), set("fullfsync")), (Ok(2), Ok(1)));
        let journal = sqlite.connection.pragma_query_value(None, "journal_mode", |row| row.get(0));
        assert_eq!(journal, Ok("wal".to_owned()));
    }
}
