//! A row as the columns that both durable stores keep.

use std::sync::Arc;

use uuid::Uuid;

use super::row::{Batch, Hold, Millis, Row, Settled, State};

/// One value per column, in the order of [`NAMES`] after `command_id`.
#[derive(Debug, Default)]
pub struct Columns {
    pub fingerprint: Option<Uuid>,
    pub body: Option<Uuid>,
    pub token: Option<Uuid>,
    pub worker: Option<Uuid>,
    pub lease_until: Option<Millis>,
    pub sent_from: Option<Millis>,
    pub busy_until: Option<Millis>,
    pub attempts: Option<i64>,
    /// 16 bytes each.
    pub keys: Option<Vec<u8>>,
    pub struck_until: Option<Millis>,
    pub touched_at: Millis,
    pub origin: Option<Arc<str>>,
    pub settled_at: Option<Millis>,
    pub ending: Option<Arc<str>>,
    pub published: bool,
    pub batch_id: Option<Arc<str>>,
    pub batch_key: Option<Uuid>,
}

/// The columns' names, for statements.
pub const NAMES: &str = "fingerprint, body, token, worker, lease_until, sent_from, busy_until, \
     attempts, keys, struck_until, touched_at, origin, settled_at, ending, published, batch_id, \
     batch_key";

impl From<Row> for Columns {
    fn from(row: Row) -> Self {
        let columns = Self {
            fingerprint: row.fingerprint,
            body: row.body,
            struck_until: row.struck_until,
            touched_at: row.touched_at,
            origin: row.origin,
            published: true,
            ..Self::default()
        };
        match row.state {
            State::Waiting => columns,
            State::Released { attempts } => Self { attempts: Some(attempts.into()), ..columns },
            State::InHand(hold) => Self {
                token: Some(hold.token),
                worker: Some(hold.worker),
                lease_until: Some(hold.lease_until),
                sent_from: Some(hold.sent_from),
                busy_until: Some(hold.busy_until),
                attempts: Some(hold.attempts.into()),
                keys: Some(hold.keys.iter().flat_map(Uuid::as_bytes).copied().collect()),
                ..columns
            },
            State::Settled(settled) => Self {
                settled_at: Some(settled.at),
                ending: Some(settled.ending),
                published: settled.published,
                batch_key: settled.batch.as_ref().map(|batch| batch.key),
                batch_id: settled.batch.map(|batch| batch.id),
                ..columns
            },
        }
    }
}

impl Columns {
    /// `None` for a row that says nothing.
    pub fn into_row(self) -> Option<Row> {
        let attempts = u32::try_from(self.attempts.unwrap_or_default()).unwrap_or(u32::MAX);
        let state = match (self.settled_at, self.token) {
            (Some(at), _) => State::Settled(Settled {
                at,
                ending: self.ending.unwrap_or_default(),
                published: self.published,
                // The former version did not keep the key: one that nobody has.
                batch: self
                    .batch_id
                    .map(|id| Batch { id, key: self.batch_key.unwrap_or_default() }),
            }),
            (None, Some(token)) => {
                let lease_until = self.lease_until.unwrap_or_default();
                // The former version did not note it: no search proves an absence, then.
                let unknown = || Uuid::nil().as_bytes().to_vec();
                let keys = self.keys.unwrap_or_else(unknown);
                State::InHand(Hold {
                    token,
                    worker: self.worker.unwrap_or_default(),
                    lease_until,
                    sent_from: self.sent_from.unwrap_or_default(),
                    // A lease covers its request.
                    busy_until: self.busy_until.unwrap_or(lease_until),
                    attempts,
                    keys: keys
                        .chunks_exact(16)
                        .filter_map(|key| Uuid::from_slice(key).ok())
                        .collect(),
                })
            }
            (None, None) if self.fingerprint.is_some() => State::Released { attempts },
            (None, None) if self.struck_until.is_none() => return None,
            (None, None) => State::Waiting,
        };
        Some(Row {
            fingerprint: self.fingerprint,
            body: self.body,
            struck_until: self.struck_until,
            touched_at: self.touched_at,
            origin: self.origin,
            state,
        })
    }
}
