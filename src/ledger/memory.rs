//! Rows that live as long as the process: for trials, and as the yardstick of the durable stores.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::group::Group;
use super::row::{Row, State, before};
use super::store::{Store, StoreError};
use super::wall_clock;

/// A map in this process.
pub struct Memory {
    worker: Uuid,
    rows: HashMap<Arc<str>, Row>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { worker: Uuid::now_v7(), rows: HashMap::new() }
    }
}

impl Store for Memory {
    fn worker(&self) -> Uuid {
        self.worker
    }

    async fn commit(&mut self, group: &mut Group) -> Result<(), StoreError> {
        let ids = group.ids().into_iter();
        let read = ids.filter_map(|id| self.rows.get(&id).cloned().map(|row| (id, row))).collect();
        for (id, row) in group.apply(read, wall_clock()) {
            match row {
                Some(row) => self.rows.insert(id, row),
                None => self.rows.remove(&id),
            };
        }
        Ok(())
    }

    async fn forget(&mut self, retention: Duration) -> Result<u64, StoreError> {
        let (rows, now) = (self.rows.len(), wall_clock());
        self.rows.retain(|_, row| match row.state {
            State::Waiting => row.struck_until.is_some_and(|until| until > now),
            State::InHand(_) => true,
            State::Settled { at, .. } => at > before(now, retention),
        });
        Ok((rows - self.rows.len()) as u64)
    }
}
