//! Why there is no ledger, and why it cannot be used right now.

use std::error::Error as _;
use std::io;
use std::path::PathBuf;
use std::sync::Arc;

use tokio_postgres::error::SqlState;

use super::store::StoreError;

/// Why there is no ledger.
#[derive(Debug, thiserror::Error)]
#[expect(missing_docs, reason = "each text says it")]
pub enum OpenError {
    #[error(
        "the ledger {} is in use by another worker; give each worker that has queues of its own a \
         file of its own, and workers that share queues one PostgreSQL (LEDGER_URL=postgres://…)",
        path.display()
    )]
    InUse { path: PathBuf },
    #[error(
        "the ledger {} cannot be opened; set LEDGER_URL=sqlite:PATH to a file in a directory that \
         exists and that the worker may write to",
        path.display()
    )]
    File { path: PathBuf, source: rusqlite::Error },
    #[error(
        "LEDGER_URL is no PostgreSQL URL, or has a parameter that is not known; example: \
         postgres://user:password@host:5432/database?sslmode=require, with special characters of the \
         password percent-encoded"
    )]
    Url,
    #[error(
        "the ledger {} is damaged, or no ledger; restore it, or empty the queues before you start \
         with a new one, which does not know what was sent",
        path.display()
    )]
    Damaged { path: PathBuf, source: rusqlite::Error },
    #[error(
        "the ledger in PostgreSQL cannot be opened; check LEDGER_URL, the server, and that its user \
         may create tables"
    )]
    Server { source: tokio_postgres::Error },
    #[error("the ledger in PostgreSQL cannot be reached; check LEDGER_URL and the server")]
    Pool { source: deadpool_postgres::PoolError },
    #[error("the connection pool to PostgreSQL cannot be set up")]
    Build { source: deadpool_postgres::BuildError },
    #[error("the ledger's thread cannot be started; check the limits on this process")]
    Thread { source: io::Error },
    #[error("TLS to PostgreSQL cannot be set up; check the CA certificates of this system")]
    Tls { source: rustls::Error },
    #[error(
        "{place} is about the submits to {known}, and ELEVENLABS_BASE_URL is another; set \
         ELEVENLABS_BASE_URL={known} again, or LEDGER_URL to a ledger of its own, with queues of its \
         own (AMQP_PREFIX): this one does not know what the other ElevenLabs has done"
    )]
    OtherElevenlabs { place: String, known: String },
    #[error(
        "{place} was made by a newer version of call-manager; use that version (a new ledger only when \
         the queues are empty: it does not know what was sent)"
    )]
    Newer { place: String },
}

impl OpenError {
    /// The server does not answer, or not yet: that may end by itself.
    pub fn is_away(&self) -> bool {
        match self {
            Self::Pool { .. } => true,
            Self::Server { source } => match source.code() {
                None => {
                    let by_network = source
                        .source()
                        .and_then(|cause| cause.downcast_ref::<io::Error>())
                        .is_some();
                    by_network || source.is_closed()
                }
                // One that refuses a password or a statement needs a person.
                Some(code) => [
                    SqlState::CANNOT_CONNECT_NOW,
                    SqlState::ADMIN_SHUTDOWN,
                    SqlState::CRASH_SHUTDOWN,
                    SqlState::TOO_MANY_CONNECTIONS,
                    SqlState::READ_ONLY_SQL_TRANSACTION,
                ]
                .contains(code),
            },
            _ => false,
        }
    }
}

/// The ledger cannot be read or written right now. Nothing is known of what was asked for; all of
/// it may be repeated.
#[derive(Clone, Debug, thiserror::Error)]
#[error("the ledger cannot be used")]
pub struct Unavailable(#[source] Arc<StoreError>);

impl From<StoreError> for Unavailable {
    fn from(error: StoreError) -> Self {
        Self(Arc::new(error))
    }
}
