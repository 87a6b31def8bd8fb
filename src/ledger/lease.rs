//! The right to execute a submit for a while, and whoever else has it.

use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use tokio::sync::watch;
use uuid::Uuid;

use crate::domain::result::{Ending, Outcome};

use super::op::{End, Op, Purpose, Reply, Yours};
use super::row::{Batch, History, Millis};
use super::store::StoreError;
use super::{Ended, Inner, Unavailable, read, unexpected};

/// A claim that nothing has been sent under is as good as a renewal for so long.
const STILL_FRESH: Duration = Duration::from_secs(1);

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

/// A submit that a task of this process has in hand, until it is dropped.
pub struct Holding {
    ledger: Arc<Inner>,
    command_id: Arc<str>,
    _open: watch::Sender<()>,
}

impl Holding {
    pub(super) fn new(ledger: Arc<Inner>, command_id: Arc<str>, open: watch::Sender<()>) -> Self {
        Self { ledger, command_id, _open: open }
    }
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
    token: Uuid,
    /// Began before the store's own lease did, so it ends before that.
    since: Since,
    /// A fresh claim that no request has been sent under yet.
    unused: bool,
    struck: bool,
    attempts: u32,
    origin: Option<Arc<str>>,
}

impl Lease {
    pub(super) fn new(
        holding: Holding,
        command_id: Arc<str>,
        token: Uuid,
        since: Since,
        yours: Yours,
    ) -> Self {
        let Yours { history, struck, attempts, origin } = yours;
        let unused = history.is_none();
        Self { holding, command_id, token, since, unused, struck, attempts, origin }
    }

    /// Has to say [`Go::Ahead`] immediately before each request that could create a batch;
    /// `attempts` counts it in.
    pub async fn before_request(&mut self, attempts: u32) -> Result<Go, Unavailable> {
        // A claim that was written a moment ago covers the first request; one that has waited does not:
        // a cancel may have come.
        let is_fresh = std::mem::take(&mut self.unused) && self.since.elapsed() < STILL_FRESH;
        if !is_fresh || !self.covers_a_request() {
            let purpose = Purpose::Request(self.holding.ledger.send);
            if self.renew_for(attempts, purpose).await?.is_none() {
                return Ok(Go::Gone);
            }
            if !self.covers_a_request() {
                return Err(StoreError::TooSlow(self.holding.ledger.send.takes).into());
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

    /// How often ElevenLabs had been called when it was claimed.
    pub fn attempts(&self) -> u32 {
        self.attempts
    }

    /// What the row keeps to finish the submit with.
    pub fn origin(&self) -> Option<&Arc<str>> {
        self.origin.as_ref()
    }

    /// Keeps it for another while, and tells what is known of the attempts. `None` where another
    /// worker has taken it over.
    pub async fn renew(&mut self, attempts: u32) -> Result<Option<Attempted>, Unavailable> {
        self.renew_for(attempts, Purpose::Keep).await
    }

    /// Does the same when the holder has seen its own request end: nothing is under way any more.
    pub async fn renew_after_request(
        &mut self,
        attempts: u32,
    ) -> Result<Option<Attempted>, Unavailable> {
        self.renew_for(attempts, Purpose::Ended).await
    }

    async fn renew_for(
        &mut self,
        attempts: u32,
        purpose: Purpose,
    ) -> Result<Option<Attempted>, Unavailable> {
        let lease = self.length();
        let asked = Since::now();
        let op = Op::Renew { token: self.token, lease, attempts, purpose };
        // Whatever comes of it.
        self.unused = false;
        match self.holding.ledger.ask(&self.command_id, op).await? {
            Reply::Yours(Yours { history: Some(history), struck, .. }) => {
                self.struck = struck;
                self.since = asked;
                Ok(Some(Attempted::new(history, asked)))
            }
            Reply::Gone => Ok(None),
            _ => Err(unexpected()),
        }
    }

    /// Records how the submit ended, before anybody is told. Returns how it ended for good: what
    /// another worker recorded first counts. `None` where another worker has it in hand. Retention
    /// counts from `begins_at`, in Unix seconds, where that is later than now.
    pub async fn settle(
        &self,
        ending: &Ending,
        begins_at: Option<i64>,
    ) -> Result<Option<Ended>, Unavailable> {
        let key = self.holding.ledger.send.key;
        let batch = match &ending.outcome {
            Outcome::Succeeded { batch_id, .. } => {
                Some(Batch { id: batch_id.as_str().into(), key })
            }
            Outcome::Failed { .. } => None,
        };
        let end = End {
            ending: serde_json::to_string(ending).map_err(StoreError::Ending)?.into(),
            batch,
            begins_at: begins_at.map(|seconds: i64| -> Millis { seconds.saturating_mul(1_000) }),
        };
        let op = Op::Settle { token: self.token, end };
        match self.holding.ledger.ask(&self.command_id, op).await? {
            Reply::Settled(finished) => Ok(Some(read(finished)?)),
            Reply::Gone => Ok(None),
            _ => Err(unexpected()),
        }
    }

    /// Lets go, so that the next worker need not wait for the lease to run out. Where a request
    /// `may_have_left`, it has to search for the batch first.
    pub async fn release(self, may_have_left: bool, attempts: u32) -> Result<(), Unavailable> {
        let op = Op::Release { token: self.token, may_have_left, attempts };
        self.holding.ledger.ask(&self.command_id, op).await?;
        Ok(())
    }

    fn covers_a_request(&self) -> bool {
        self.since.elapsed() + self.holding.ledger.send.takes <= self.length()
    }
}

/// A moment, by both clocks of this machine: one stands still while the machine is suspended, the
/// other can be put back.
#[derive(Clone, Copy, Debug)]
pub struct Since(Instant, SystemTime);

impl Since {
    pub(super) fn now() -> Self {
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

/// What is known of the attempts of a submit.
#[derive(Clone, Debug)]
pub struct Attempted {
    /// Of the first one.
    pub age: Age,
    /// Since every request must be over; zero while one may still be under way.
    pub quiet: Duration,
    /// Until every request must be over; zero once they are.
    pub busy: Duration,
    /// Hashes of the API keys they were made with.
    pub keys: Vec<Uuid>,
}

impl Attempted {
    pub(super) fn new(history: History, since: Since) -> Self {
        let History { age, quiet, busy, keys } = history;
        Self { age: Age { then: age, since }, quiet, busy, keys }
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
