//! What a place for rows has to do, and how it can fail.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::group::Group;

/// A place where rows are kept.
pub trait Store: Send + 'static {
    /// Who this worker is. A store that only one worker can use gives the same id after a restart:
    /// what its former self had in hand is its own at once.
    fn worker(&self) -> Uuid;

    /// Whether [`Question::Drained`] was ever asked of this ledger.
    fn was_drained(&self) -> bool;

    /// Reads the rows of a group, lets it change them, and writes what has changed: in one
    /// transaction, which no other worker's for the same rows can overlap, durable when it returns.
    /// After an error nothing is known; every operation may be repeated.
    fn commit(&mut self, group: &mut Group) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Answers a question about many rows.
    fn ask(
        &mut self,
        question: &Question,
    ) -> impl Future<Output = Result<Answer, StoreError>> + Send;

    /// Removes some of what was finished and published longer ago than `retention`, and strikes that
    /// are over; never a submit that is unfinished. Returns how many rows.
    fn forget(
        &mut self,
        retention: Duration,
    ) -> impl Future<Output = Result<u64, StoreError>> + Send;
}

/// How many rows one call of [`Store::forget`] removes at most, per kind.
pub const FORGET_AT_ONCE: i64 = 2_000;

/// How many rows one [`Question::Unfinished`] names at most.
pub const UNFINISHED_AT_ONCE: i64 = 64;

/// Something that concerns more than the row of one submit.
#[derive(Clone, Debug)]
pub enum Question {
    /// Submits that have been unfinished and untouched for so long, and those whose batch has to be
    /// cancelled and which have been untouched for `cancel`.
    Unfinished {
        /// Unfinished: in nobody's hands, or without a published result.
        untouched: Duration,
        /// A cancel came while they were executed.
        cancel: Duration,
    },
    /// Whose batches these are.
    Owners(Vec<String>),
    /// The newest batch that was created with this API key.
    BatchOf(Uuid),
    /// From now on, every message that comes back was claimed in this ledger, if at all: its queues
    /// were seen empty.
    Drained,
}

/// The answer to a [`Question`].
#[derive(Clone, Debug)]
pub enum Answer {
    /// The command ids.
    Unfinished(Vec<Arc<str>>),
    /// Batch id to command id; those that no row names are missing.
    Owners(HashMap<String, String>),
    /// A batch id.
    BatchOf(Option<String>),
    /// It is noted.
    Noted,
}

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
    /// The disk or the connection hangs, or a lease cannot be renewed in the time that it has to cover.
    #[error("not done within {0:?}")]
    TooSlow(Duration),
}
