//! Group commit: whatever is waiting is written in one transaction, and answered once it is durable.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout_at};
use tracing::{debug, warn};
use uuid::Uuid;

use crate::telemetry::chain;

use super::Unavailable;
use super::row::{Millis, Op, Reply, Row};
use super::store::{FORGET_AT_ONCE, Store, StoreError};

/// The largest group. Larger ones gain nothing, and a failed one fails all of it.
const MAX_GROUP: usize = 256;

/// How often a part of what is old is removed: few rows, often, so that nobody waits for it.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// The same while there is more.
const FORGET_MORE: Duration = Duration::from_secs(1);

/// How often a store that failed is tried again while nobody asks anything of it.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// The same of one that works, so that it is known before a command needs it.
const TRY_IDLE: Duration = Duration::from_secs(10);

/// One operation and who waits for it.
pub struct Request {
    /// Which row.
    pub command_id: Arc<str>,
    /// What to do.
    pub op: Op,
    /// Gets the reply when it is durable.
    pub reply: oneshot::Sender<Result<Reply, Unavailable>>,
}

/// The operations of one transaction.
pub struct Group {
    requests: Vec<Request>,
    replies: Vec<Reply>,
}

/// A row as the transaction has to leave it; `None`: there is none any more.
pub type Change = (Arc<str>, Option<Row>);

impl Group {
    fn new(requests: Vec<Request>) -> Self {
        Self { replies: Vec::with_capacity(requests.len()), requests }
    }

    /// Whose rows it needs: sorted, each once.
    pub fn ids(&self) -> BTreeSet<Arc<str>> {
        self.requests.iter().map(|request| Arc::clone(&request.command_id)).collect()
    }

    /// Does all of it to the rows that were read; returns what has changed, sorted.
    pub fn apply(&mut self, mut rows: HashMap<Arc<str>, Row>, now: Millis) -> Vec<Change> {
        let mut changed = BTreeMap::new();
        for Request { command_id, op, .. } in &self.requests {
            let before = rows.remove(command_id);
            let mut row = before.clone();
            self.replies.push(op.apply(&mut row, now));
            if row != before {
                changed.insert(Arc::clone(command_id), row.clone());
            }
            if let Some(row) = row {
                rows.insert(Arc::clone(command_id), row);
            }
        }
        changed.into_iter().collect()
    }

    /// Writes a row that means nothing and goes with the old ones: reading proves little of a disk
    /// that is full.
    fn trial(worker: Uuid) -> Self {
        let (reply, _nobody_waits) = oneshot::channel();
        let op = Op::Find { strike: Some(Duration::from_millis(1)) };
        let command_id = format!("call-manager.trial.{worker}").into();
        Self::new(vec![Request { command_id, op, reply }])
    }

    fn answer(self, committed: Result<(), StoreError>, trouble: &watch::Sender<Option<String>>) {
        let said = committed.as_ref().err().map(|error| chain(error));
        let is_news = *trouble.borrow() != said;
        trouble.send_if_modified(|before| {
            let changed = before.is_some() != said.is_some();
            *before = said;
            changed
        });
        match committed {
            Ok(()) => {
                for (request, reply) in self.requests.into_iter().zip(self.replies) {
                    // Who does not wait any more has left its claim to its lease.
                    request.reply.send(Ok(reply)).ok();
                }
            }
            Err(error) => {
                // It is tried every second.
                if is_news {
                    warn!(error = chain(&error), "the ledger cannot be written");
                }
                let error = Unavailable::from(error);
                for request in self.requests {
                    request.reply.send(Err(error.clone())).ok();
                }
            }
        }
    }
}

/// Serves requests until every sender is gone.
pub async fn serve(
    mut store: impl Store,
    mut requests: mpsc::Receiver<Request>,
    retention: Duration,
    trouble: watch::Sender<Option<String>>,
) {
    let mut forget_at = Instant::now();
    loop {
        if forget_at <= Instant::now() {
            let more = match store.forget(retention).await {
                Ok(rows) => {
                    debug!(rows, "old rows removed from the ledger");
                    rows >= FORGET_AT_ONCE.unsigned_abs()
                }
                Err(error) => {
                    warn!(error = chain(&error), "old rows cannot be removed from the ledger");
                    false
                }
            };
            forget_at = Instant::now() + if more { FORGET_MORE } else { FORGET_EVERY };
        }
        let mut waiting = Vec::new();
        let is_in_trouble = trouble.borrow().is_some();
        let try_at = Instant::now() + if is_in_trouble { TRY_AGAIN } else { TRY_IDLE };
        let until = try_at.min(forget_at);
        let mut group = match timeout_at(until, requests.recv_many(&mut waiting, MAX_GROUP)).await {
            Err(_) if until < try_at => continue,
            Err(_) => Group::trial(store.worker()),
            Ok(0) => return,
            Ok(_) => Group::new(waiting),
        };
        let committed = store.commit(&mut group).await;
        group.answer(committed, &trouble);
    }
}
