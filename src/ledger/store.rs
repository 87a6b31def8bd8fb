//! What a place for rows has to do, and how it can fail.

use std::time::Duration;

use uuid::Uuid;

use super::group::Group;

/// A place where rows are kept.
pub trait Store: Send + 'static {
    /// Who this worker is. A store that only one worker can use gives the same id after a restart:
    /// what its former self had in hand is its own at once.
    fn worker(&self) -> Uuid;

    /// Reads the rows of a group, lets it change them, and writes what has changed: in one
    /// transaction, which no other worker's for the same rows can overlap, durable when it returns.
    /// After an error nothing is known; every operation may be repeated.
    fn commit(&mut self, group: &mut Group) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Removes some of what was settled longer ago than `retention`, and strikes that are over;
    /// never a submit that is in hand. Returns how many rows.
    fn forget(
        &mut self,
        retention: Duration,
    ) -> impl Future<Output = Result<u64, StoreError>> + Send;
}

/// How many rows one call of [`Store::forget`] removes at most, per kind.
pub const FORGET_AT_ONCE: i64 = 2_000;

/// Why a store could not do it.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The file.
    #[error("SQLite")]
    Sqlite(#[from] rusqlite::Error),
    /// The server.
    #[error("PostgreSQL")]
    Postgres(#[from] tokio_postgres::Error),
    /// No connection to the server.
    #[error("no connection to PostgreSQL")]
    Pool(#[from] deadpool_postgres::PoolError),
    /// Written by a newer version.
    #[error("the row says in a form that is not known how the submit ended")]
    Ending(#[source] serde_json::Error),
    /// A fault of this program.
    #[error("the operation does not fit the row")]
    Unexpected,
    /// The worker is ending.
    #[error("it is closed")]
    Ended,
    /// The connection hangs, or a lease cannot be renewed in the time that it has to cover.
    #[error("not done within {0:?}")]
    TooSlow(Duration),
}
