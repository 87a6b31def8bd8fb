//! The row of one submit: what is known of it, and what that says at a given time.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

use super::op::Body;

/// Milliseconds since 1970, by the store's clock.
pub type Millis = i64;

/// Stands for the age of an attempt whose time is not known: older than any batch.
pub(super) const LONG_AGO: Duration = Duration::from_secs(10 * 365 * 24 * 60 * 60);

/// How many API keys a row remembers. A submit that met more ends as one whose key is not known.
const MAX_KEYS: usize = 8;

/// What is known of one submit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Row {
    /// Tells two bodies apart; `None` while there is only a strike, and where it was given up unread.
    pub fingerprint: Option<Uuid>,
    /// Hash of the body's raw bytes: what a message that is given up unread is compared with.
    pub body: Option<Uuid>,
    /// A cancel came. While there is nothing else in the row, the strike ends at this time. Later it
    /// lasts until the submit is finished; a batch that was created all the same has to be cancelled.
    pub struck_until: Option<Millis>,
    /// When the row was changed last.
    pub touched_at: Millis,
    /// What the submit is finished with when its message does not come back, as JSON.
    pub origin: Option<Arc<str>>,
    /// Who has it, or how it ended.
    pub state: State,
}

/// Where a submit stands.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub enum State {
    /// Nobody has begun it: there is only a strike.
    Waiting,
    /// Somebody had it, and nothing of it was done: it may be claimed without a search.
    Released {
        /// How often ElevenLabs was called.
        attempts: u32,
    },
    /// A request may have left, or leaves any moment.
    InHand(Hold),
    /// It is finished.
    Settled(Settled),
}

/// A worker's hold on a submit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Hold {
    /// The claim.
    pub token: Uuid,
    /// Who made it.
    pub worker: Uuid,
    /// When others may take it over.
    pub lease_until: Millis,
    /// From when on a request of any holder may have left.
    pub sent_from: Millis,
    /// When the last request of any holder is over, whatever became of its holder.
    pub busy_until: Millis,
    /// How often ElevenLabs was called, by all holders.
    pub attempts: u32,
    /// The hashes of the API keys that attempts were made with: absence counts for these alone.
    pub keys: Vec<Uuid>,
}

/// The end of a submit.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Settled {
    /// Retention counts from here: when it ended, or a later time at which the calls begin.
    pub at: Millis,
    /// [`crate::domain::result::Ending`] as JSON.
    pub ending: Arc<str>,
    /// The broker has confirmed its result.
    pub published: bool,
    /// The batch, where there is one.
    pub batch: Option<Batch>,
}

/// A batch, and the API key that sees it.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Batch {
    /// ElevenLabs' id.
    pub id: Arc<str>,
    /// Hash of the key.
    pub key: Uuid,
}

/// What has been done for a submit.
#[derive(Clone, Debug, PartialEq)]
pub struct History {
    /// Since a request may have left for the first time.
    pub age: Duration,
    /// Since every request must be over; zero while one may still be under way.
    pub quiet: Duration,
    /// Until every request must be over.
    pub busy: Duration,
    /// The API keys of the attempts.
    pub keys: Vec<Uuid>,
}

impl History {
    pub(super) fn of(hold: &Hold, now: Millis) -> Self {
        // A clock that was put back says nothing about how long ago that was.
        let age = if hold.sent_from > now { LONG_AGO } else { between(hold.sent_from, now) };
        Self {
            age,
            quiet: between(hold.busy_until, now),
            busy: between(now, hold.busy_until),
            keys: hold.keys.clone(),
        }
    }
}

impl Hold {
    /// Goes on where another holder left no word. Where the clock was put back, no request is under way
    /// past `longest`.
    pub(super) fn take_over(&mut self, held: &Self, now: Millis, longest: Millis) {
        self.sent_from = held.sent_from;
        let was_put_back = held.sent_from > now;
        self.busy_until = if was_put_back { held.busy_until.min(longest) } else { held.busy_until };
        self.keys.clone_from(&held.keys);
    }

    pub(super) fn note_key(&mut self, key: Uuid) {
        if self.keys.contains(&key) {
            return;
        }
        // One that nobody has: with so many keys, no search proves anything any more.
        self.keys.push(if self.keys.len() < MAX_KEYS { key } else { Uuid::nil() });
        self.keys.dedup();
    }
}

impl Row {
    pub(super) fn new(now: Millis, state: State) -> Self {
        let (fingerprint, body, struck_until, origin) = (None, None, None, None);
        Self { fingerprint, body, struck_until, touched_at: now, origin, state }
    }

    /// Whether a cancel holds at `now`: for ever once the submit has been claimed.
    pub(super) fn is_struck(&self, now: Millis) -> bool {
        self.struck_until.is_some_and(|until| self.fingerprint.is_some() || until > now)
    }

    /// Somebody has begun it, and its result is not with the broker.
    pub fn is_unfinished(&self) -> bool {
        match &self.state {
            State::Waiting => false,
            // Those of the former version have nothing that they could be finished with.
            State::Released { .. } | State::InHand(_) => self.origin.is_some(),
            State::Settled(settled) => !settled.published,
        }
    }

    /// Its batch exists, and a cancel came while it was created.
    pub fn is_to_cancel(&self) -> bool {
        matches!(self.state, State::Settled(_)) && self.struck_until.is_some()
    }

    pub(super) fn take(&mut self, body: &Body) {
        self.fingerprint = Some(body.fingerprint);
        self.body = Some(body.hash);
        self.origin = Some(Arc::clone(&body.origin));
    }
}

pub(super) fn after(now: Millis, span: Duration) -> Millis {
    now.saturating_add(millis(span))
}

/// The time that was `span` ago.
pub(super) fn before(now: Millis, span: Duration) -> Millis {
    now.saturating_sub(millis(span))
}

fn millis(span: Duration) -> Millis {
    Millis::try_from(span.as_millis()).unwrap_or(Millis::MAX)
}

pub(super) fn between(earlier: Millis, later: Millis) -> Duration {
    Duration::from_millis(u64::try_from(later.saturating_sub(earlier)).unwrap_or_default())
}
