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
use super::op::{Op, Reply};
use super::row::{Millis, Row};
use super::store::{Answer, FORGET_AT_ONCE, Question, Store, StoreError};

/// The largest group. Larger ones gain nothing, and a failed one fails all of it.
const MAX_GROUP: usize = 256;

/// How often a part of what is old is removed: few rows, often, so that nobody waits for it.
const FORGET_EVERY: Duration = Duration::from_secs(60);

/// The same while there is more.
const FORGET_MORE: Duration = Duration::from_secs(1);

/// How long an operation that nobody waits for may wait for others: a transaction of its own would hold
/// those up.
const LINGER: Duration = Duration::from_millis(250);

/// How often a store that failed is tried again while nobody asks anything of it.
const TRY_AGAIN: Duration = Duration::from_secs(1);

/// The same of one that works, so that it is known before a command needs it.
const TRY_IDLE: Duration = Duration::from_secs(8);

/// A store that takes longer for one transaction cannot be used: its disk or its server stalls.
const STALLED: Duration = Duration::from_secs(5);

/// Something to do, and who waits for it.
pub enum Job {
    /// With one row.
    Change(Request),
    /// With many.
    Ask(Question, oneshot::Sender<Result<Answer, Unavailable>>),
}

/// One operation and who waits for it.
pub struct Request {
    /// Which row.
    pub command_id: Arc<str>,
    /// What to do.
    pub op: Op,
    /// Gets the reply when it is durable; `None` where nobody waits.
    pub reply: Option<oneshot::Sender<Result<Reply, Unavailable>>>,
}

impl Request {
    /// Whoever asked has given up: what comes late would only be in the way of what is asked next.
    fn is_given_up(&self) -> bool {
        self.reply.as_ref().is_some_and(oneshot::Sender::is_closed)
    }

    fn answer(self, reply: Result<Reply, Unavailable>) {
        if let Some(waiting) = self.reply {
            // Who does not wait any more has left its claim to its lease.
            waiting.send(reply).ok();
        }
    }
}

/// Why the ledger cannot be written, for whoever follows it.
pub type Trouble = watch::Sender<Option<String>>;

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
        let op = Op::Find { strike: Some(Duration::from_millis(1)) };
        let command_id = format!("call-manager.trial.{worker}").into();
        Self::new(vec![Request { command_id, op, reply: None }])
    }

    fn answer(self, committed: Result<(), StoreError>, trouble: &Trouble) {
        let is_news = tell(trouble, committed.as_ref().err().map(|error| chain(error)));
        match committed {
            Ok(()) => {
                for (request, reply) in self.requests.into_iter().zip(self.replies) {
                    request.answer(Ok(reply));
                }
            }
            Err(error) => {
                // It is tried every second.
                if is_news {
                    warn!(error = chain(&error), "the ledger cannot be written");
                }
                let error = Unavailable::from(error);
                for request in self.requests {
                    request.answer(Err(error.clone()));
                }
            }
        }
    }
}

/// Returns whether it is news.
fn tell(trouble: &Trouble, said: Option<String>) -> bool {
    let is_news = *trouble.borrow() != said;
    trouble.send_if_modified(|before| {
        let changed = before.is_some() != said.is_some();
        *before = said;
        changed
    });
    is_news
}

/// Says so when the store stalls: it then answers nothing itself. Returns with the store.
pub async fn watch_over(mut working: watch::Receiver<Option<Instant>>, trouble: Arc<Trouble>) {
    loop {
        let since = *working.borrow_and_update();
        let Some(since) = since else {
            if working.changed().await.is_err() {
                return;
            }
            continue;
        };
        match timeout_at(since + STALLED, working.changed()).await {
            Ok(Ok(())) => {}
            Ok(Err(_)) => return,
            Err(_) => {
                let reason = StoreError::TooSlow(STALLED).to_string();
                if tell(&trouble, Some(reason)) {
                    warn!("the ledger stalls: its disk or its server does not answer");
                }
                if working.changed().await.is_err() {
                    return;
                }
            }
        }
    }
}

/// The store with what is known of it.
pub struct Serving<S> {
    /// Where the rows are.
    pub store: S,
    /// How long what is finished is remembered.
    pub retention: Duration,
    /// Why it cannot be written.
    pub trouble: Arc<Trouble>,
    /// Since when it has been at work.
    pub working: watch::Sender<Option<Instant>>,
    /// When it was written last, or tried.
    pub tried: Instant,
    /// Old rows are removed only once the queues were seen empty: a message may still come back.
    pub may_forget: bool,
    /// Written with the next that somebody waits for.
    pub unhurried: Unhurried,
}

/// Operations that nobody waits for, and when they have to be written at the latest.
#[derive(Default)]
pub struct Unhurried {
    requests: Vec<Request>,
    write_at: Option<Instant>,
}

impl Unhurried {
    fn push(&mut self, request: Request) {
        self.requests.push(request);
        self.write_at.get_or_insert_with(|| Instant::now() + LINGER);
    }

    fn take(&mut self) -> Vec<Request> {
        self.write_at = None;
        std::mem::take(&mut self.requests)
    }

    fn is_due(&self) -> bool {
        self.requests.len() >= MAX_GROUP || self.write_at.is_some_and(|at| at <= Instant::now())
    }
}

impl<S: Store> Serving<S> {
    /// Serves until every sender is gone.
    pub async fn serve(mut self, mut jobs: mpsc::Receiver<Job>) {
        let mut forget_at = Instant::now();
        loop {
            if self.may_forget && forget_at <= Instant::now() {
                forget_at = Instant::now() + self.forget().await;
            }
            let mut waiting = Vec::new();
            let is_in_trouble = self.trouble.borrow().is_some();
            let try_at = self.tried + if is_in_trouble { TRY_AGAIN } else { TRY_IDLE };
            let until = if self.may_forget { try_at.min(forget_at) } else { try_at };
            let until = self.unhurried.write_at.map_or(until, |at| until.min(at));
            // What is due by its number was written, so there is room for one at least.
            let room = MAX_GROUP - self.unhurried.requests.len();
            match timeout_at(until, jobs.recv_many(&mut waiting, room)).await {
                Err(_) if self.unhurried.is_due() => self.write(Vec::new()).await,
                Err(_) if until < try_at => {}
                Err(_) => self.commit(Group::trial(self.store.worker())).await,
                Ok(0) => {
                    self.write(Vec::new()).await;
                    return;
                }
                Ok(_) => self.work(waiting).await,
            }
        }
    }

    async fn work(&mut self, jobs: Vec<Job>) {
        let (mut requests, mut questions) = (Vec::new(), Vec::new());
        for job in jobs {
            match job {
                Job::Change(request) if request.is_given_up() => {}
                Job::Change(request) if request.reply.is_none() => self.unhurried.push(request),
                Job::Change(request) => requests.push(request),
                Job::Ask(question, reply) => questions.push((question, reply)),
            }
        }
        if !requests.is_empty() || !questions.is_empty() || self.unhurried.is_due() {
            self.write(requests).await;
        }
        for (question, reply) in questions {
            self.may_forget |= matches!(question, Question::Drained);
            self.working.send_replace(Some(Instant::now()));
            let answer = self.store.ask(&question).await;
            self.working.send_replace(None);
            if let Err(error) = &answer {
                tell(&self.trouble, Some(chain(error)));
            }
            reply.send(answer.map_err(Unavailable::from)).ok();
        }
    }

    async fn write(&mut self, requests: Vec<Request>) {
        // They were asked first.
        let mut all = self.unhurried.take();
        all.extend(requests);
        if !all.is_empty() {
            self.commit(Group::new(all)).await;
        }
    }

    async fn commit(&mut self, mut group: Group) {
        self.working.send_replace(Some(Instant::now()));
        let committed = self.store.commit(&mut group).await;
        self.working.send_replace(None);
        self.tried = Instant::now();
        group.answer(committed, &self.trouble);
    }

    /// Returns how long to wait until the next time.
    async fn forget(&mut self) -> Duration {
        self.working.send_replace(Some(Instant::now()));
        let forgotten = self.store.forget(self.retention).await;
        self.working.send_replace(None);
        match forgotten {
            Ok(rows) => {
                debug!(rows, "old rows removed from the ledger");
                if rows >= FORGET_AT_ONCE.unsigned_abs() { FORGET_MORE } else { FORGET_EVERY }
            }
            Err(error) => {
                warn!(error = chain(&error), "old rows cannot be removed from the ledger");
                FORGET_EVERY
            }
        }
    }
}
