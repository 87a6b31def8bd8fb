//! What is known about each submit, durably: who has it in hand, how it ended, whether a cancel came,
//! and what it is finished with when its message does not come back. One row per submit, keyed by
//! command id.
//!
//! `op.rs` is the whole of the rules, pure, on the rows of `row.rs`; `group.rs` writes whatever is
//! waiting in one transaction; `sqlite.rs`, `postgres.rs` and `memory.rs` keep the rows. This file and
//! `lease.rs` are what the handler sees.

mod columns;
mod error;
mod group;
mod lease;
mod memory;
pub(crate) mod op;
mod postgres;
pub(crate) mod row;
mod sqlite;
mod store;

use std::collections::HashMap;
use std::io;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, SystemTime};

use secrecy::SecretString;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, timeout};
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::domain::result::Ending;

use group::{Job, Request, Serving};
use lease::{Holding, Since};
use op::{Dispatch, Finished, Op, Reply, Sentence, Yours};
use row::Millis;
use store::{Answer, Question, Store, StoreError};

pub use error::{OpenError, Unavailable};
pub use lease::{Age, Attempted, Go, Held, Lease};
pub use op::Body;

/// Capacity of the queue to the store. Senders wait when it is full.
const WAITING: usize = 1024;

/// The limit on every operation: a disk or a server that stalls must not keep commands in hand.
const LIMIT: Duration = Duration::from_secs(10);

/// A row that changes this often while its submit is given up is in somebody's hand.
const CONDEMN_TURNS: usize = 4;

/// How long a cancel of a submit that nobody has claimed keeps it from being begun: the two are in
/// different queues, and either may come first.
pub const STRIKE: Duration = Duration::from_secs(24 * 60 * 60);

/// Where the rows are.
#[derive(Clone, Debug)]
pub enum Location {
    /// A file, for one worker.
    Sqlite(PathBuf),
    /// A server, for a pool of workers. The URL has a password in it.
    Postgres(SecretString),
    /// This process: everything is forgotten when it ends.
    Memory,
}

/// How to keep them.
#[derive(Clone, Debug)]
pub struct Settings {
    /// Where.
    pub location: Location,
    /// The ElevenLabs that the submits go to: a ledger knows of one.
    pub base_url: String,
    /// Hash of the API key that requests are made with.
    pub key: Uuid,
    /// How long what is finished is remembered.
    pub retention: Duration,
    /// The longest a request to ElevenLabs can take. A lease is twice as long.
    pub longest_request: Duration,
}

/// The answer to "may I execute this submit?".
pub enum Claim {
    /// Nothing of it was done.
    Fresh(Lease),
    /// A request may have left whose outcome nobody has recorded.
    Abandoned(Lease, Attempted),
    /// Another worker, or another task of this one, has it in hand.
    Held(Held),
    /// It is finished.
    Settled(Ended),
    /// The id belongs to a submit with another body.
    Conflict,
}

/// How far a submit is.
#[derive(Debug)]
pub enum Found {
    /// Nobody has begun it, or it is unknown.
    Nobody,
    /// Somebody has it in hand.
    InHand,
    /// It is finished.
    Settled(Ended),
    /// Of [`Ledger::condemn`]: the id belongs to a message with another body.
    Conflict,
}

/// How a submit ended.
#[derive(Debug)]
pub struct Ended {
    /// What its result says.
    pub ending: Ending,
    /// The broker has its result.
    pub published: bool,
    /// Its batch, and the API key that saw it, where a cancel came while it was created.
    pub cancel: Option<(String, Uuid)>,
    /// What the claim kept, until the result is published.
    pub origin: Option<Arc<str>>,
}

/// One row per submit. Cheap to clone; all clones are the same ledger.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

struct Inner {
    jobs: mpsc::Sender<Job>,
    worker: Uuid,
    send: Dispatch,
    was_drained: watch::Sender<bool>,
    /// The submits that a task of this process has in hand. Closed when it lets go.
    in_hand: Mutex<HashMap<Arc<str>, watch::Receiver<()>>>,
    trouble: watch::Receiver<Option<String>>,
    serving: TaskTracker,
}

impl Ledger {
    /// Opens it, creating what is not there yet.
    pub async fn open(settings: Settings) -> Result<Self, OpenError> {
        match settings.location {
            Location::Sqlite(ref path) => {
                let store = Self::open_file(path.clone(), settings.base_url.clone()).await?;
                Self::serve(store, &settings)
            }
            Location::Postgres(ref url) => {
                let store = postgres::Postgres::open(url, &settings.base_url).await?;
                Self::serve(store, &settings)
            }
            Location::Memory => Self::serve(memory::Memory::default(), &settings),
        }
    }

    /// On a thread of its own: a disk that stalls must not take a stop and the health endpoint along.
    async fn open_file(path: PathBuf, base_url: String) -> Result<sqlite::Sqlite, OpenError> {
        let (tell, told) = oneshot::channel();
        let named = thread::Builder::new().name("ledger-open".to_owned());
        named
            .spawn(move || drop(tell.send(sqlite::Sqlite::open(&path, &base_url))))
            .map_err(|source| OpenError::Thread { source })?;
        told.await.unwrap_or_else(|_| {
            let source = io::Error::other("its thread ended");
            Err(OpenError::Thread { source })
        })
    }

    fn serve(store: impl Store, settings: &Settings) -> Result<Self, OpenError> {
        let (jobs, waiting) = mpsc::channel(WAITING);
        let worker = store.worker();
        let was_drained = watch::Sender::new(store.was_drained());
        let serving = TaskTracker::new();
        let trouble = Arc::new(watch::Sender::new(None));
        let followed = trouble.subscribe();
        let working = watch::Sender::new(None);
        let watching = group::watch_over(working.subscribe(), Arc::clone(&trouble));
        let (retention, tried, may_forget) = (settings.retention, Instant::now(), false);
        let unhurried = group::Unhurried::default();
        let work = Serving { store, retention, trouble, working, tried, may_forget, unhurried }
            .serve(waiting);
        // A thread of its own, which the end of the process does not wait for: writing to a file blocks,
        // and a disk that stalls blocks for ever.
        let (runtime, token) = (Handle::current(), serving.token());
        let named = thread::Builder::new().name("ledger".to_owned());
        named
            .spawn(move || {
                let _token = token;
                runtime.block_on(work);
            })
            .map_err(|source| OpenError::Thread { source })?;
        serving.spawn(watching);
        serving.close();
        Ok(Self(Arc::new(Inner {
            jobs,
            worker,
            send: Dispatch { takes: settings.longest_request, key: settings.key },
            was_drained,
            in_hand: Mutex::default(),
            trouble: followed,
            serving,
        })))
    }

    /// Follows why the ledger cannot be written; `None` while it can. Tried again by itself.
    pub fn trouble(&self) -> watch::Receiver<Option<String>> {
        self.0.trouble.clone()
    }

    /// Returns when the ledger serves no more: everything is closed, or it failed.
    pub async fn ended(&self) {
        self.0.serving.wait().await;
    }

    /// Waits until everything is written that was asked for, once every other clone is dropped.
    pub async fn close(self, limit: Duration) {
        let serving = self.0.serving.clone();
        drop(self);
        timeout(limit, serving.wait()).await.ok();
    }

    /// Claims a submit, durably, before anything of it is sent. With `doubt`, a submit that the ledger
    /// does not know counts as begun: its message says so.
    pub async fn claim(
        &self,
        command_id: &str,
        body: Body,
        doubt: bool,
    ) -> Result<Claim, Unavailable> {
        self.claim_for(command_id, Some(body), doubt).await?.ok_or_else(unexpected)
    }

    /// Claims a submit whose message does not come back, to finish it; `None` where there is nothing
    /// to finish.
    pub async fn take_over(&self, command_id: &str) -> Result<Option<Claim>, Unavailable> {
        self.claim_for(command_id, None, false).await
    }

    async fn claim_for(
        &self,
        command_id: &str,
        body: Option<Body>,
        doubt: bool,
    ) -> Result<Option<Claim>, Unavailable> {
        let command_id: Arc<str> = command_id.into();
        let holding = match self.enter(&command_id) {
            Ok(holding) => holding,
            Err(held) => return Ok(Some(Claim::Held(held))),
        };
        let Inner { worker, send, .. } = *self.0;
        let (token, asked, lease) = (Uuid::now_v7(), Since::now(), self.0.lease());
        let op = Op::Claim { body, token, worker, lease, send, doubt };
        Ok(Some(match self.0.ask(&command_id, op).await? {
            Reply::Yours(yours) => {
                let attempted = yours.history.clone().map(|past| Attempted::new(past, asked));
                let lease = Lease::new(holding, command_id, token, asked, yours);
                match attempted {
                    None => Claim::Fresh(lease),
                    Some(attempted) => Claim::Abandoned(lease, attempted),
                }
            }
            Reply::InHand { remaining } => Claim::Held(Held::Elsewhere { remaining }),
            Reply::Settled(finished) => Claim::Settled(read(finished)?),
            Reply::Conflict => Claim::Conflict,
            Reply::Nobody => return Ok(None),
            Reply::Gone => return Err(unexpected()),
        }))
    }

    /// Looks how far a submit is. With `strike`, one that is not finished is not begun (again): for
    /// [`STRIKE`] where nobody has claimed it, and for ever else. Where no answer comes, the strike may
    /// hold all the same.
    pub async fn find(&self, command_id: &str, strike: bool) -> Result<Found, Unavailable> {
        let op = Op::Find { strike: strike.then_some(STRIKE) };
        Ok(match self.0.ask(&command_id.into(), op).await? {
            Reply::Nobody => Found::Nobody,
            Reply::InHand { .. } => Found::InHand,
            Reply::Settled(finished) => Found::Settled(read(finished)?),
            _ => return Err(unexpected()),
        })
    }

    /// Gives up a submit whose executions all ended with their worker: records an ending for it, which
    /// depends on how often ElevenLabs was called and on whether a request may have left.
    pub async fn condemn(
        &self,
        command_id: &str,
        body: Uuid,
        doubt: bool,
        ending_of: impl Fn(u32, bool) -> Ending,
    ) -> Result<Found, Unavailable> {
        let command_id: Arc<str> = command_id.into();
        let Ok(_holding) = self.enter(&command_id) else { return Ok(Found::InHand) };
        let mut sentence = None;
        for _ in 0..CONDEMN_TURNS {
            let op = Op::Condemn { worker: self.0.worker, body, doubt, sentence: sentence.take() };
            return Ok(match self.0.ask(&command_id, op).await? {
                Reply::InHand { .. } => Found::InHand,
                Reply::Settled(finished) => Found::Settled(read(finished)?),
                Reply::Conflict => Found::Conflict,
                Reply::Yours(Yours { history, attempts, .. }) => {
                    let begun = history.is_some();
                    let json = serde_json::to_string(&ending_of(attempts, begun));
                    let ending = json.map_err(StoreError::Ending)?.into();
                    sentence = Some(Sentence { begun, ending });
                    continue;
                }
                _ => return Err(unexpected()),
            });
        }
        Ok(Found::InHand)
    }

    /// The broker has the result of a submit. Nobody waits for it: lost, the result is published twice.
    pub async fn published(&self, command_id: &str) {
        let request = Request { command_id: command_id.into(), op: Op::Published, reply: None };
        // Closed, the worker is ending.
        timeout(LIMIT, self.0.jobs.send(Job::Change(request))).await.ok();
    }

    /// The batch that a cancel came for needs no cancel any more.
    pub async fn cancelled(&self, command_id: &str) -> Result<(), Unavailable> {
        self.0.ask(&command_id.into(), Op::Cancelled).await.map(drop)
    }

    /// Submits that nobody has touched for so long although they are unfinished, and, sooner, those
    /// whose batch has to be cancelled: some of them.
    pub async fn unfinished(
        &self,
        untouched: Duration,
        cancel: Duration,
    ) -> Result<Vec<Arc<str>>, Unavailable> {
        match self.0.question(Question::Unfinished { untouched, cancel }).await? {
            Answer::Unfinished(ids) => Ok(ids),
            _ => Err(unexpected()),
        }
    }

    /// Which commands these batches are of: batch id to command id. Those that the ledger does not
    /// know are missing.
    pub async fn owners(
        &self,
        batches: Vec<String>,
    ) -> Result<HashMap<String, String>, Unavailable> {
        match self.0.question(Question::Owners(batches)).await? {
            Answer::Owners(owners) => Ok(owners),
            _ => Err(unexpected()),
        }
    }

    /// A batch that was created with this API key, the newest that the ledger knows.
    pub async fn batch_of_key(&self, key: Uuid) -> Result<Option<String>, Unavailable> {
        match self.0.question(Question::BatchOf(key)).await? {
            Answer::BatchOf(batch) => Ok(batch),
            _ => Err(unexpected()),
        }
    }

    /// Notes that no submit waits in any queue. From now on, each one that comes back was claimed in
    /// this ledger, if at all, and old rows may be removed.
    pub async fn note_drained(&self) -> Result<(), Unavailable> {
        self.0.question(Question::Drained).await?;
        self.0.was_drained.send_replace(true);
        Ok(())
    }

    /// Whether the queues were ever seen empty with this ledger in use.
    pub fn was_drained(&self) -> bool {
        *self.0.was_drained.borrow()
    }

    /// One task of this process at a time: the others wait for it without asking the store. Which
    /// of two bodies is the right one, only the store can tell.
    fn enter(&self, command_id: &Arc<str>) -> Result<Holding, Held> {
        let mut in_hand = self.0.in_hand();
        if let Some(freed) = in_hand.get(command_id) {
            return Err(Held::Here { freed: freed.clone() });
        }
        let (open, freed) = watch::channel(());
        in_hand.insert(Arc::clone(command_id), freed);
        drop(in_hand);
        Ok(Holding::new(Arc::clone(&self.0), Arc::clone(command_id), open))
    }
}

impl Inner {
    fn lease(&self) -> Duration {
        self.send.takes * 2
    }

    async fn ask(&self, command_id: &Arc<str>, op: Op) -> Result<Reply, Unavailable> {
        let (reply, answered) = oneshot::channel();
        let request = Request { command_id: Arc::clone(command_id), op, reply: Some(reply) };
        self.done(Job::Change(request), answered).await
    }

    async fn question(&self, question: Question) -> Result<Answer, Unavailable> {
        let (reply, answered) = oneshot::channel();
        self.done(Job::Ask(question, reply), answered).await
    }

    async fn done<T>(
        &self,
        job: Job,
        answered: oneshot::Receiver<Result<T, Unavailable>>,
    ) -> Result<T, Unavailable> {
        let done = async {
            self.jobs.send(job).await.map_err(|_| StoreError::Ended)?;
            answered.await.map_err(|_| StoreError::Ended)?
        };
        match timeout(LIMIT, done).await {
            Ok(done) => done,
            Err(_) => Err(StoreError::TooSlow(LIMIT).into()),
        }
    }

    fn in_hand(&self) -> MutexGuard<'_, HashMap<Arc<str>, watch::Receiver<()>>> {
        // An entry is written in one step, so a panic elsewhere leaves none half-written.
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn read(finished: Finished) -> Result<Ended, Unavailable> {
    Ok(Ended {
        ending: serde_json::from_str(&finished.ending).map_err(StoreError::Ending)?,
        published: finished.published,
        cancel: finished.cancel.map(|batch| ((*batch.id).to_owned(), batch.key)),
        origin: finished.origin,
    })
}

/// A reply that no transition gives to such an operation.
fn unexpected() -> Unavailable {
    StoreError::Unexpected.into()
}

/// The time that rows of this machine are stamped with.
fn wall_clock() -> Millis {
    let since = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap_or_default();
    Millis::try_from(since.as_millis()).unwrap_or(Millis::MAX)
}
