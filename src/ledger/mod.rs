//! What is known about each submit, durably: who has it in hand, how it ended, whether it is
//! struck out. One row per submit, keyed by command id.
//!
//! `row.rs` is the whole of the rules, pure; `group.rs` writes whatever is waiting in one
//! transaction; `sqlite.rs`, `postgres.rs` and `memory.rs` keep the rows. This file is what the
//! handler sees: claims, leases, and the tasks of this process that wait for each other.

mod error;
mod group;
mod memory;
mod postgres;
mod row;
mod sqlite;
mod store;

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use secrecy::SecretString;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::timeout;
use tokio_util::task::TaskTracker;
use uuid::Uuid;

use crate::domain::result::{Ending, Outcome};

use group::Request;
use row::{Millis, Op, Reply};
use store::{Store, StoreError};

pub use error::{OpenError, Unavailable};
pub use row::History;

/// Requests that wait for the store; who comes when they are so many waits to be one of them.
const WAITING: usize = 1024;

/// How long a cancel of a submit that nobody has begun keeps it from being begun: the two are in
/// different queues, and either may come first.
pub const STRIKE: Duration = Duration::from_secs(24 * 60 * 60);

/// A claim that nothing has been sent under is as good as a renewal for so long.
const STILL_FRESH: Duration = Duration::from_secs(1);

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
    /// How long what is settled is remembered.
    pub retention: Duration,
    /// The longest a request to the vendor can take. A lease is twice as long.
    pub longest_request: Duration,
}

/// The answer to "may I execute this submit?".
pub enum Claim {
    /// Nobody has begun it.
    Fresh(Lease),
    /// Somebody has, and left no word: a request may have left.
    Abandoned(Lease, History),
    /// Another worker, or another task of this one, has it in hand.
    Held(Held),
    /// It is done.
    Settled(Ending),
    /// The id belongs to a submit with another body.
    Conflict,
}

/// The answer to "may I send this request now?".
#[derive(Debug, PartialEq)]
pub enum Go {
    /// Yes, and nobody else will while it lasts.
    Ahead,
    /// No: a cancel came first.
    Struck,
    /// No: another worker has taken it over.
    Gone,
}

/// How far a submit is.
#[derive(Debug)]
pub enum Found {
    /// Nobody has begun it, or it is unknown.
    Nobody,
    /// Somebody has it in hand.
    InHand,
    /// It is done.
    Settled(Ending),
}

/// One row per submit. Cheap to clone; all clones are the same ledger.
#[derive(Clone)]
pub struct Ledger(Arc<Inner>);

struct Inner {
    requests: mpsc::Sender<Request>,
    worker: Uuid,
    longest_request: Duration,
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
                // Blocks, before there is anything else to do.
                Ok(Self::serve(sqlite::Sqlite::open(path)?, &settings))
            }
            Location::Postgres(ref url) => {
                let store = postgres::Postgres::open(url).await?;
                Ok(Self::serve(store, &settings))
            }
            Location::Memory => Ok(Self::serve(memory::Memory::default(), &settings)),
        }
    }

    fn serve(store: impl Store, settings: &Settings) -> Self {
        let (requests, waiting) = mpsc::channel(WAITING);
        let worker = store.worker();
        let serving = TaskTracker::new();
        let (troubled, trouble) = watch::channel(None);
        let work = group::serve(store, waiting, settings.retention, troubled);
        // A thread of its own: writing to a file blocks.
        serving.spawn_blocking(move || Handle::current().block_on(work));
        serving.close();
        Self(Arc::new(Inner {
            requests,
            worker,
            longest_request: settings.longest_request,
            in_hand: Mutex::default(),
            trouble,
            serving,
        }))
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

    /// Claims a submit, durably, before anything of it is sent.
    pub async fn claim(&self, command_id: &str, fingerprint: Uuid) -> Result<Claim, Unavailable> {
        let command_id: Arc<str> = command_id.into();
        let holding = match self.enter(&command_id) {
            Ok(holding) => holding,
            Err(held) => return Ok(Claim::Held(held)),
        };
        let token = Uuid::now_v7();
        let asked = Since::now();
        let op = Op::Claim { fingerprint, token, worker: self.0.worker, lease: self.0.lease() };
        Ok(match self.0.ask(&command_id, op).await? {
            Reply::Yours { history, struck } => {
                let lease = Lease {
                    holding,
                    command_id,
                    fingerprint,
                    token,
                    since: asked,
                    unused: history.is_none(),
                    struck,
                };
                match history {
                    None => Claim::Fresh(lease),
                    Some(history) => Claim::Abandoned(lease, history),
                }
            }
            Reply::InHand { remaining } => Claim::Held(Held::Elsewhere { remaining }),
            Reply::Settled(ending) => Claim::Settled(read(&ending)?),
            Reply::Conflict => Claim::Conflict,
            Reply::Gone | Reply::Nobody => return Err(unexpected()),
        })
    }

    /// Looks how far a submit is. With `strike`, one that is not settled is not begun (again) for
    /// [`STRIKE`].
    pub async fn find(&self, command_id: &str, strike: bool) -> Result<Found, Unavailable> {
        let op = Op::Find { strike: strike.then_some(STRIKE) };
        Ok(match self.0.ask(&command_id.into(), op).await? {
            Reply::Nobody => Found::Nobody,
            Reply::InHand { .. } => Found::InHand,
            Reply::Settled(ending) => Found::Settled(read(&ending)?),
            _ => return Err(unexpected()),
        })
    }

    /// Gives up a submit whose executions all ended with their worker: records an ending for it, which
    /// may depend on what was done, so that nobody executes it any more.
    pub async fn condemn(
        &self,
        command_id: &str,
        ending_of: impl Fn(Option<History>) -> Ending,
    ) -> Result<Found, Unavailable> {
        let command_id: Arc<str> = command_id.into();
        let Ok(_holding) = self.enter(&command_id) else { return Ok(Found::InHand) };
        let mut ending = None;
        loop {
            let op = Op::Condemn { worker: self.0.worker, ending: ending.take() };
            return Ok(match self.0.ask(&command_id, op).await? {
                Reply::InHand { .. } => Found::InHand,
                Reply::Settled(ending) => Found::Settled(read(&ending)?),
                Reply::Yours { history, .. } => {
                    let json = serde_json::to_string(&ending_of(history));
                    ending = Some(json.map_err(StoreError::Ending)?.into());
                    continue;
                }
                _ => return Err(unexpected()),
            });
        }
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
        Ok(Holding { ledger: Arc::clone(&self.0), command_id: Arc::clone(command_id), _open: open })
    }
}

impl Inner {
    fn lease(&self) -> Duration {
        self.longest_request * 2
    }

    async fn ask(&self, command_id: &Arc<str>, op: Op) -> Result<Reply, Unavailable> {
        let (reply, answered) = oneshot::channel();
        let request = Request { command_id: Arc::clone(command_id), op, reply };
        self.requests.send(request).await.map_err(|_| StoreError::Ended)?;
        answered.await.map_err(|_| StoreError::Ended)?
    }

    fn in_hand(&self) -> MutexGuard<'_, HashMap<Arc<str>, watch::Receiver<()>>> {
        // An entry is written in one step, so a panic elsewhere leaves none half-written.
        self.in_hand.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A submit that a task of this process has in hand, until it is dropped.
struct Holding {
    ledger: Arc<Inner>,
    command_id: Arc<str>,
    _open: watch::Sender<()>,
}

impl Drop for Holding {
    fn drop(&mut self) {
        self.ledger.in_hand().remove(&self.command_id);
    }
}

/// The right to execute a submit, for a while. Dropped without a word, it leaves the submit
/// abandoned: to this worker at once, to others when the lease runs out.
pub struct Lease {
    holding: Holding,
    command_id: Arc<str>,
    fingerprint: Uuid,
    token: Uuid,
    /// Began before the store's own lease did, so it ends before that.
    since: Since,
    /// A fresh claim that no request has been sent under yet.
    unused: bool,
    struck: bool,
}

impl Lease {
    /// Has to say [`Go::Ahead`] immediately before each request that could create a batch;
    /// `attempts` counts it in.
    pub async fn before_request(&mut self, attempts: u32) -> Result<Go, Unavailable> {
        // A claim that was written a moment ago covers the first request; one that has waited does not:
        // a cancel may have come.
        let is_fresh = std::mem::take(&mut self.unused) && self.since.elapsed() < STILL_FRESH;
        if !is_fresh || !self.covers_a_request() {
            if self.renew(attempts).await?.is_none() {
                return Ok(Go::Gone);
            }
            if !self.covers_a_request() {
                let longest_request = self.holding.ledger.longest_request;
                return Err(StoreError::TooSlow(longest_request).into());
            }
        }
        Ok(if self.struck { Go::Struck } else { Go::Ahead })
    }

    /// How long it is good after a renewal.
    pub fn length(&self) -> Duration {
        self.holding.ledger.lease()
    }

    /// Whether a cancel had come when it was claimed or renewed last.
    pub fn is_struck(&self) -> bool {
        self.struck
    }

    /// Keeps it for another while, and tells since when a request may have left. `None` where
    /// another worker has taken it over.
    pub async fn renew(&mut self, attempts: u32) -> Result<Option<Age>, Unavailable> {
        let lease = self.holding.ledger.lease();
        let asked = Since::now();
        let op = Op::Renew { token: self.token, lease, attempts };
        match self.holding.ledger.ask(&self.command_id, op).await? {
            Reply::Yours { history, struck } => {
                self.struck = struck;
                self.since = asked;
                self.unused = false;
                let then = history.map(|history| history.age).unwrap_or_default();
                Ok(Some(Age { then, since: asked }))
            }
            Reply::Gone => {
                // Whatever the local clock says of it.
                self.unused = false;
                Ok(None)
            }
            _ => Err(unexpected()),
        }
    }

    /// Records how the submit ended, before anybody is told. Returns how it ended for good: what
    /// another worker recorded first counts. `None` where another worker has it in hand.
    pub async fn settle(&self, ending: &Ending) -> Result<Option<Ending>, Unavailable> {
        let op = Op::Settle {
            token: self.token,
            fingerprint: self.fingerprint,
            ending: serde_json::to_string(ending).map_err(StoreError::Ending)?.into(),
            succeeded: matches!(ending.outcome, Outcome::Succeeded { .. }),
        };
        match self.holding.ledger.ask(&self.command_id, op).await? {
            Reply::Settled(ending) => Ok(Some(read(&ending)?)),
            Reply::Gone => Ok(None),
            _ => Err(unexpected()),
        }
    }

    /// Lets go, so that the next worker need not wait for the lease to run out. Where a request
    /// `may_have_left`, it has to look for the batch first.
    pub async fn release(self, may_have_left: bool) -> Result<(), Unavailable> {
        let op = Op::Release { token: self.token, may_have_left };
        self.holding.ledger.ask(&self.command_id, op).await?;
        Ok(())
    }

    fn covers_a_request(&self) -> bool {
        let ledger = &self.holding.ledger;
        self.since.elapsed() + ledger.longest_request <= ledger.lease()
    }
}

/// A moment, by both clocks of this machine: one stands still while the machine is suspended, the
/// other can be put back.
#[derive(Clone, Copy, Debug)]
struct Since(Instant, SystemTime);

impl Since {
    fn now() -> Self {
        Self(Instant::now(), SystemTime::now())
    }

    fn elapsed(&self) -> Duration {
        self.0.elapsed().max(self.1.elapsed().unwrap_or_default())
    }
}

/// How long ago a request may have left for the first time; it goes on growing.
#[derive(Clone, Copy, Debug)]
pub struct Age {
    then: Duration,
    since: Since,
}

impl Age {
    /// By now.
    pub fn now(&self) -> Duration {
        self.then + self.since.elapsed()
    }
}

/// Whoever has the submit in hand.
pub enum Held {
    /// A task of this process.
    Here {
        /// Closed when it lets go.
        freed: watch::Receiver<()>,
    },
    /// Another worker.
    Elsewhere {
        /// How long its lease still lasts.
        remaining: Duration,
    },
}

impl Held {
    /// Returns when it is worth claiming again: the task has let go, or `look_again` is over.
    pub async fn freed(self, look_again: Duration) {
        match self {
            // Nothing is ever sent: the only event is that the holder is gone.
            Self::Here { mut freed } => while freed.changed().await.is_ok() {},
            Self::Elsewhere { remaining } => {
                tokio::time::sleep(remaining.min(look_again)).await;
            }
        }
    }
}

fn read(ending: &str) -> Result<Ending, Unavailable> {
    Ok(serde_json::from_str(ending).map_err(StoreError::Ending)?)
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
