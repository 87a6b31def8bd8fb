//! The row of one submit and its transitions: pure, the same for every store.

use std::sync::Arc;
use std::time::Duration;

use uuid::Uuid;

/// Milliseconds since 1970, by the store's clock.
pub type Millis = i64;

/// What stands for an age that cannot be told.
const LONG_AGO: Duration = Duration::from_secs(24 * 60 * 60);

/// What is known of one submit.
#[derive(Clone, Debug, PartialEq)]
pub struct Row {
    /// Tells two bodies apart; `None` while there is only a strike, and where it was given up unread.
    pub fingerprint: Option<Uuid>,
    /// Until when it must not be begun.
    pub struck_until: Option<Millis>,
    /// Who has it, or how it ended.
    pub state: State,
}

/// Where a submit stands.
#[derive(Clone, Debug, PartialEq)]
pub enum State {
    /// Nobody has begun it: there is only a strike.
    Waiting,
    /// A request may have left, or leaves any moment.
    InHand(Hold),
    /// It is done.
    Settled {
        /// Since when.
        at: Millis,
        /// [`crate::domain::result::Ending`] as JSON.
        ending: Arc<str>,
    },
}

impl State {
    /// What a store keeps in columns of its own: the hold, or when and how it ended.
    pub fn into_parts(self) -> (Option<Hold>, Option<(Millis, Arc<str>)>) {
        match self {
            Self::Waiting => (None, None),
            Self::InHand(hold) => (Some(hold), None),
            Self::Settled { at, ending } => (None, Some((at, ending))),
        }
    }
}

/// A worker's hold on a submit.
#[derive(Clone, Debug, PartialEq)]
pub struct Hold {
    /// The claim.
    pub token: Uuid,
    /// Who made it.
    pub worker: Uuid,
    /// When others may take it over.
    pub lease_until: Millis,
    /// From when on a request of any holder may have left.
    pub sent_from: Millis,
    /// How often the vendor was called, by all holders.
    pub attempts: u32,
}

/// Something to do with one row.
#[derive(Clone, Debug)]
pub enum Op {
    /// Take it in hand.
    Claim {
        /// Of the body.
        fingerprint: Uuid,
        /// Of this claim alone.
        token: Uuid,
        /// Who claims. One worker has no two live claims of one submit.
        worker: Uuid,
        /// How long nobody else may take it.
        lease: Duration,
    },
    /// Keep it in hand.
    Renew {
        /// The claim.
        token: Uuid,
        /// From now on.
        lease: Duration,
        /// How often the vendor was called, this time included.
        attempts: u32,
    },
    /// Record how it ended.
    Settle {
        /// The claim.
        token: Uuid,
        /// Of the body.
        fingerprint: Uuid,
        /// As JSON.
        ending: Arc<str>,
        /// The batch surely exists.
        succeeded: bool,
    },
    /// Let go of it.
    Release {
        /// The claim.
        token: Uuid,
        /// A request may have left: whoever comes next has to look for its batch first.
        may_have_left: bool,
    },
    /// Record how it ended, unless somebody has it in hand.
    Condemn {
        /// Who asks. What it had in hand itself it has not any more.
        worker: Uuid,
        /// As JSON; `None` only asks what was done for it.
        ending: Option<Arc<str>>,
    },
    /// See where it stands.
    Find {
        /// Unless it is settled, let nobody begin it so long.
        strike: Option<Duration>,
    },
}

/// What came of an [`Op`].
#[derive(Clone, Debug, PartialEq)]
pub enum Reply {
    /// Claim: the caller has it. Renew: still. Condemn: it could.
    Yours {
        /// What there was before: nothing for a fresh claim.
        history: Option<History>,
        /// A cancel came first.
        struck: bool,
    },
    /// Claim, condemn: a live lease of another worker. Find: somebody's.
    InHand {
        /// How long the lease still lasts.
        remaining: Duration,
    },
    /// It ended so: recorded now (settle, condemn), or before.
    Settled(Arc<str>),
    /// Claim: the id belongs to another body.
    Conflict,
    /// Renew, settle: another worker has taken it over.
    Gone,
    /// Release: done. Find: nobody has begun it.
    Nobody,
}

/// What has been done for a submit.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct History {
    /// Since a request may have left for the first time.
    pub age: Duration,
    /// How often the vendor was called, at most.
    pub attempts: u32,
}

impl History {
    fn of(hold: &Hold, now: Millis) -> Self {
        // A clock that was put back says nothing about how long ago that was.
        let age = if hold.sent_from > now { LONG_AGO } else { between(hold.sent_from, now) };
        Self { age, attempts: hold.attempts }
    }
}

impl Op {
    /// Applies itself to the row of its submit, at the time `now`.
    pub fn apply(&self, row: &mut Option<Row>, now: Millis) -> Reply {
        match self {
            Self::Claim { fingerprint, token, worker, lease } => {
                let hold = Hold {
                    token: *token,
                    worker: *worker,
                    lease_until: after(now, *lease),
                    sent_from: now,
                    // The claim covers the first request.
                    attempts: 1,
                };
                claim(row, now, *fingerprint, hold)
            }
            Self::Renew { token, lease, attempts } => match row {
                Some(Row { state: State::InHand(hold), struck_until, .. })
                    if hold.token == *token =>
                {
                    hold.lease_until = after(now, *lease);
                    hold.attempts = hold.attempts.max(*attempts);
                    let history = Some(History::of(hold, now));
                    Reply::Yours { history, struck: is_later(*struck_until, now) }
                }
                _ => Reply::Gone,
            },
            Self::Settle { token, fingerprint, ending, succeeded } => {
                match row.as_ref().map(|row| &row.state) {
                    Some(State::Settled { ending, .. }) => {
                        return Reply::Settled(Arc::clone(ending));
                    }
                    // That its own request created no batch says nothing about the other holder's.
                    Some(State::InHand(hold)) if hold.token != *token && !succeeded => {
                        return Reply::Gone;
                    }
                    _ => {}
                }
                *row = Some(Row {
                    fingerprint: Some(*fingerprint),
                    struck_until: None,
                    state: State::Settled { at: now, ending: Arc::clone(ending) },
                });
                Reply::Settled(Arc::clone(ending))
            }
            Self::Release { token, may_have_left } => {
                if let Some(Row { state: State::InHand(hold), struck_until, .. }) = row
                    && hold.token == *token
                {
                    if *may_have_left {
                        hold.lease_until = now;
                    } else {
                        let strike = struck_until.filter(|until| *until > now);
                        *row = strike.map(|until| Row {
                            fingerprint: None,
                            struck_until: Some(until),
                            state: State::Waiting,
                        });
                    }
                }
                Reply::Nobody
            }
            Self::Condemn { worker, ending } => condemn(row, now, *worker, ending.as_ref()),
            Self::Find { strike } => find(row, now, *strike),
        }
    }
}

fn claim(row: &mut Option<Row>, now: Millis, fingerprint: Uuid, mut new: Hold) -> Reply {
    let struck_until = row.as_ref().and_then(|row| row.struck_until);
    let mut history = None;
    if let Some(row) = row {
        if row.fingerprint.is_some_and(|known| known != fingerprint) {
            return Reply::Conflict;
        }
        match &row.state {
            State::Waiting => {}
            State::Settled { ending, .. } => return Reply::Settled(Arc::clone(ending)),
            State::InHand(held) if held.worker != new.worker && held.lease_until > now => {
                return Reply::InHand { remaining: between(now, held.lease_until) };
            }
            State::InHand(held) => {
                new.sent_from = held.sent_from;
                new.attempts = held.attempts;
                history = Some(History::of(held, now));
            }
        }
    }
    *row = Some(Row { fingerprint: Some(fingerprint), struck_until, state: State::InHand(new) });
    Reply::Yours { history, struck: is_later(struck_until, now) }
}

fn condemn(row: &mut Option<Row>, now: Millis, asks: Uuid, ending: Option<&Arc<str>>) -> Reply {
    let mut history = None;
    match row.as_ref().map(|row| &row.state) {
        Some(State::Settled { ending, .. }) => return Reply::Settled(Arc::clone(ending)),
        Some(State::InHand(hold)) if hold.worker != asks && hold.lease_until > now => {
            return Reply::InHand { remaining: between(now, hold.lease_until) };
        }
        Some(State::InHand(hold)) => history = Some(History::of(hold, now)),
        None | Some(State::Waiting) => {}
    }
    let Some(ending) = ending else { return Reply::Yours { history, struck: false } };
    let fingerprint = row.as_ref().and_then(|row| row.fingerprint);
    let state = State::Settled { at: now, ending: Arc::clone(ending) };
    *row = Some(Row { fingerprint, struck_until: None, state });
    Reply::Settled(Arc::clone(ending))
}

fn find(row: &mut Option<Row>, now: Millis, strike: Option<Duration>) -> Reply {
    let reply = match row.as_ref().map(|row| &row.state) {
        None | Some(State::Waiting) => Reply::Nobody,
        Some(State::InHand(hold)) => Reply::InHand { remaining: between(now, hold.lease_until) },
        Some(State::Settled { ending, .. }) => return Reply::Settled(Arc::clone(ending)),
    };
    if let Some(strike) = strike {
        let row =
            row.get_or_insert(Row { fingerprint: None, struck_until: None, state: State::Waiting });
        row.struck_until = row.struck_until.max(Some(after(now, strike)));
    }
    reply
}

fn is_later(time: Option<Millis>, now: Millis) -> bool {
    time.is_some_and(|time| time > now)
}

fn after(now: Millis, span: Duration) -> Millis {
    now.saturating_add(millis(span))
}

/// The time that was `span` ago.
pub(super) fn before(now: Millis, span: Duration) -> Millis {
    now.saturating_sub(millis(span))
}

fn millis(span: Duration) -> Millis {
    Millis::try_from(span.as_millis()).unwrap_or(Millis::MAX)
}

fn between(earlier: Millis, later: Millis) -> Duration {
    Duration::from_millis(u64::try_from(later.saturating_sub(earlier)).unwrap_or_default())
}

#[cfg(test)]
#[path = "row_tests.rs"]
mod tests;
