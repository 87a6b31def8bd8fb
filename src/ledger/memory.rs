//! Rows that live as long as the process: for trials, and as the yardstick of the durable stores.

use std::collections::HashMap;
use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::group::Group;
use super::row::{Batch, Row, State, before};
use super::store::{Answer, Question, Store, StoreError};
use super::wall_clock;

/// A map in this process.
pub struct Memory {
    worker: Uuid,
    was_drained: bool,
    rows: HashMap<Arc<str>, Row>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { worker: Uuid::now_v7(), was_drained: false, rows: HashMap::new() }
    }
}

impl Store for Memory {
    fn worker(&self) -> Uuid {
        self.worker
    }

    fn was_drained(&self) -> bool {
        self.was_drained
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

    async fn ask(&mut self, question: &Question) -> Result<Answer, StoreError> {
        Ok(match question {
            Question::Unfinished { untouched, cancel } => {
                let now = wall_clock();
                let (untouched, cancel) = (before(now, *untouched), before(now, *cancel));
                let is_due = |row: &Row| {
                    row.is_unfinished() && row.touched_at <= untouched
                        || row.is_to_cancel() && row.touched_at <= cancel
                };
                let due = self.rows.iter().filter(|(_, row)| is_due(row));
                Answer::Unfinished(due.map(|(id, _)| Arc::clone(id)).collect())
            }
            Question::Owners(batches) => {
                let owned =
                    self.batches().filter(|(_, batch)| batches.contains(&(*batch.id).into()));
                Answer::Owners(
                    owned.map(|(id, batch)| ((*batch.id).into(), (**id).into())).collect(),
                )
            }
            Question::BatchOf(key) => {
                let mut of_key = self.batches().filter(|(_, batch)| batch.key == *key);
                Answer::BatchOf(of_key.next().map(|(_, batch)| (*batch.id).into()))
            }
            Question::Drained => {
                self.was_drained = true;
                Answer::Noted
            }
        })
    }

    async fn forget(&mut self, retention: Duration) -> Result<u64, StoreError> {
        let (rows, now) = (self.rows.len(), wall_clock());
        self.rows.retain(|_, row| match &row.state {
            State::Waiting => row.struck_until.is_some_and(|until| until > now),
            State::Released { .. } | State::InHand(_) => true,
            State::Settled(settled) => {
                settled.at > before(now, retention) || row.is_unfinished() || row.is_to_cancel()
            }
        });
        Ok((rows - self.rows.len()) as u64)
    }
}

impl Memory {
    fn batches(&self) -> impl Iterator<Item = (&Arc<str>, &Batch)> {
        self.rows.iter().filter_map(|(id, row)| match &row.state {
            State::Settled(settled) => settled.batch.as_ref().map(|batch| (id, batch)),
            _ => None,
        })
    }
}
