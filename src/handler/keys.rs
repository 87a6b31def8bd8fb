//! Which API keys' batches the present key sees. A search proves absence for those keys alone.

use std::collections::HashSet;
use std::sync::{Mutex, PoisonError};

use uuid::Uuid;

use crate::domain::command::BatchId;
use crate::elevenlabs::Class;
use crate::telemetry::chain;

use super::Handler;

/// The former keys whose batches the present key has read: within a workspace a changed key sees
/// everything.
#[derive(Default)]
pub struct SeenKeys(Mutex<HashSet<Uuid>>);

impl SeenKeys {
    fn has(&self, key: Uuid) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).contains(&key)
    }

    fn add(&self, key: Uuid) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).insert(key);
    }
}

/// Whether the present key sees what it has to.
pub enum Sees {
    All,
    NotAll,
    /// The ledger or ElevenLabs could not be asked.
    CannotTell(String),
}

impl Handler {
    /// Whether it is known that the present key sees the batches of this one.
    pub(super) fn has_seen(&self, key: Uuid) -> bool {
        key == self.vendor.key_id() || self.seen_keys.has(key)
    }

    /// Whether the present key sees the batches of all these keys.
    pub(super) async fn sees_all(&self, keys: &[Uuid]) -> Sees {
        for key in keys.iter().filter(|key| !self.has_seen(**key)) {
            match self.sees_batch_of(*key).await {
                Sees::All => self.seen_keys.add(*key),
                other => return other,
            }
        }
        Sees::All
    }

    /// The proof is a batch that the ledger knows from the other key.
    async fn sees_batch_of(&self, key: Uuid) -> Sees {
        let batch = match self.ledger.batch_of_key(key).await {
            Ok(batch) => batch,
            Err(error) => return Sees::CannotTell(chain(&error)),
        };
        let Some(batch) = batch.and_then(|id| BatchId::try_from(id).ok()) else {
            return Sees::NotAll;
        };
        match self.vendor.get(&batch).await {
            Ok(_) => Sees::All,
            Err(error) => match error.class() {
                Class::Refused | Class::Unauthorized => Sees::NotAll,
                Class::Account | Class::NeverSent | Class::RateLimited | Class::Unknown => {
                    Sees::CannotTell(error.to_string())
                }
            },
        }
    }
}
